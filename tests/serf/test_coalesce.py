"""Many changes in a moment become one event."""

import pytest
from one_node import VSN

from serfd.serf.coalesce import MemberCoalescer, Pace, UserCoalescer
from serfd.serf.events import Member, MemberEvent, MemberEventKind, Status, UserEvent

JOIN, FAILED, UPDATE, REAP = (
    MemberEventKind.JOIN,
    MemberEventKind.FAILED,
    MemberEventKind.UPDATE,
    MemberEventKind.REAP,
)


def member(name: str) -> Member:
    return Member(name, b"\x7f\0\0\1", 1, {}, Status.ALIVE, VSN)


def event(name: str, ltime: int, payload: bytes = b"") -> UserEvent:
    return UserEvent(ltime, name, payload, coalesce=True)


@pytest.mark.parametrize(
    ("times", "due"),
    [((0.0,), 1.0), ((0.0, 0.5), 1.5), ((0.0, 0.9, 1.8, 2.5), 3.0), ((0.0, 2.9), 3.0)],
)
def test_what_is_collected_waits_for_quiet_but_not_for_ever(
    times: tuple[float, ...], due: float
) -> None:
    pace = Pace(3.0, 1.0)
    assert pace.due is None
    for now in times:
        pace.collected(now)
    assert pace.due == due
    pace.reset()
    assert pace.due is None


def test_of_each_name_the_newest_event_is_handed_on() -> None:
    coalescer = UserCoalescer(3.0, 1.0)
    for one in (event("a", 1), event("b", 2), event("a", 4), event("a", 3)):
        assert coalescer.take(one, 0.0)
    assert coalescer.flush() == [event("a", 4), event("b", 2)]
    assert coalescer.flush() == []


def test_events_of_the_same_time_are_all_handed_on() -> None:
    coalescer = UserCoalescer(3.0, 1.0)
    coalescer.take(event("a", 4, b"x"), 0.0)
    coalescer.take(event("a", 4, b"y"), 0.0)
    assert coalescer.flush() == [event("a", 4, b"x"), event("a", 4, b"y")]


@pytest.mark.parametrize(("period", "may"), [(0.0, True), (3.0, False)])
def test_an_event_that_must_not_wait_is_not_taken(period: float, *, may: bool) -> None:
    assert not UserCoalescer(period, 1.0).take(UserEvent(1, "a", b"", coalesce=may), 0.0)


def test_of_each_member_the_last_change_is_told_grouped_by_kind() -> None:
    coalescer = MemberCoalescer(3.0, 1.0)
    for kind, name in ((JOIN, "a"), (FAILED, "b"), (FAILED, "a"), (JOIN, "c"), (JOIN, "b")):
        assert coalescer.take(kind, member(name), 0.0)
    assert coalescer.flush() == [
        MemberEvent(FAILED, (member("a"),)),
        MemberEvent(JOIN, (member("b"), member("c"))),
    ]


def test_a_member_that_is_back_where_it_was_is_not_told_of_again() -> None:
    coalescer = MemberCoalescer(3.0, 1.0)
    coalescer.take(JOIN, member("a"), 0.0)
    coalescer.flush()
    coalescer.take(FAILED, member("a"), 1.0)
    coalescer.take(JOIN, member("a"), 1.0)
    assert coalescer.flush() == []


def test_an_update_is_told_each_time_and_not_again() -> None:
    coalescer = MemberCoalescer(3.0, 1.0)
    for _ in range(2):
        coalescer.take(UPDATE, member("a"), 0.0)
        assert coalescer.flush() == [MemberEvent(UPDATE, (member("a"),))]
        assert coalescer.flush() == []


def test_who_was_reaped_may_be_reaped_again() -> None:
    coalescer = MemberCoalescer(3.0, 1.0)
    for _ in range(2):
        coalescer.take(REAP, member("a"), 0.0)
        assert coalescer.flush() == [MemberEvent(REAP, (member("a"),))]


def test_without_a_period_changes_are_told_at_once() -> None:
    assert not MemberCoalescer(0.0, 1.0).take(JOIN, member("a"), 0.0)
