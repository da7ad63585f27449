"""Virtual time: steps come in their order, and time stands still within one."""

from serfd.sim.agenda import Agenda


def test_steps_come_by_time_and_those_of_one_instant_in_the_order_pushed() -> None:
    agenda = Agenda()
    seen: list[str] = []
    for due, what in ((2.0, "c"), (1.0, "a"), (1.0, "b")):
        agenda.push(due, seen.append, what)
    agenda.run_to(5.0)
    assert seen == ["a", "b", "c"]
    assert agenda.now == 5.0


def test_a_step_sees_its_own_time_and_may_ask_for_more() -> None:
    agenda = Agenda()
    seen: list[float] = []

    def step() -> None:
        seen.append(agenda.now)
        if agenda.now < 3:
            agenda.after(1.0, step)

    agenda.push(1.0, step)
    agenda.run_to(10.0)
    assert seen == [1.0, 2.0, 3.0]


def test_what_is_due_later_waits() -> None:
    agenda = Agenda()
    seen: list[str] = []
    agenda.push(1.0, seen.append, "now")
    agenda.push(1.001, seen.append, "later")
    agenda.run_to(1.0)
    assert seen == ["now"]
    agenda.run_to(1.001)
    assert seen == ["now", "later"]
