"""Named deadlines: set, moved, cancelled, popped in order."""

from serfd.timers import Timers


def test_timers_fire_in_the_order_of_their_deadlines_then_of_being_set() -> None:
    timers: Timers[str] = Timers()
    for name, deadline in (("late", 3.0), ("first", 1.0), ("second", 1.0)):
        timers.set(name, deadline)
    assert timers.next_deadline() == 1.0
    assert [timers.pop_due(3.0) for _ in range(4)] == ["first", "second", "late", None]


def test_a_timer_is_not_due_before_its_deadline() -> None:
    timers: Timers[str] = Timers()
    timers.set("x", 2.0)
    assert timers.pop_due(1.999) is None
    assert timers.pop_due(2.0) == "x"


def test_setting_a_timer_again_moves_it_both_ways() -> None:
    timers: Timers[str] = Timers()
    timers.set("x", 5.0)
    timers.set("x", 1.0)
    assert (timers.deadline("x"), len(timers)) == (1.0, 1)
    timers.set("x", 9.0)
    assert timers.pop_due(8.0) is None
    assert timers.pop_due(9.0) == "x"
    assert timers.pop_due(99.0) is None


def test_a_cancelled_timer_never_fires_and_cancelling_twice_is_no_error() -> None:
    timers: Timers[str] = Timers()
    timers.set("x", 1.0)
    timers.cancel("x")
    timers.cancel("x")
    assert "x" not in timers
    assert timers.next_deadline() is None
    assert timers.pop_due(9.0) is None


def test_a_timer_moved_for_ever_does_not_grow_the_heap() -> None:
    timers: Timers[str] = Timers()
    for step in range(10_000):
        timers.set("x", float(step))
    assert len(timers._heap) < 200
    assert timers.pop_due(1e9) == "x"
