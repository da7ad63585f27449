"""A node that remembers: what it writes, and how it comes back."""

import pytest
from one_node import OneNode, address

from serfd.effects import Connect, Emit, Remember
from serfd.serf.events import Query, UserEvent
from serfd.serf.lamport import LEAP_MAX
from serfd.serf.queries import EVERYBODY
from serfd.serf.snapshot import replay
from serfd.wire.serf_messages import (
    LeaveIntent,
    QueryMessage,
    UserEventMessage,
    decode,
    encode,
)
from serfd.wire.swim_messages import Dead, User, encode_push_pull


def written(one: OneNode) -> list[str]:
    lines: list[str] = []
    for effect in one.take_effects(Remember):
        lines = list(effect.lines) if effect.replace else [*lines, *effect.lines]
    return lines


def event(ltime: int) -> User:
    return User(encode(UserEventMessage(ltime, f"e{ltime}", b"", coalesce=False)))


def test_members_clocks_and_the_own_incarnation_are_written() -> None:
    one = OneNode("n2", "n3", remembered=[])
    one.hear(Dead(1, "n3", "n2"))
    one.hear(event(7))
    past = replay(written(one), rejoin_after_leave=False)
    assert past.nodes == {"n1": "10.0.0.1:7946", "n2": "10.0.0.2:7946"}
    assert (past.event_clock, past.incarnation) == (7, 1)


def test_a_clock_is_written_before_its_event_is_handed_on() -> None:
    one = OneNode("n2", remembered=[])
    one.effects.clear()
    one.hear(event(7))
    kinds = [type(e) for e in one.effects if isinstance(e, Emit | Remember)]
    assert kinds == [Remember, Emit]


def test_without_a_file_nothing_is_written() -> None:
    one = OneNode("n2")
    one.hear(event(7))
    assert written(one) == []


def test_nothing_is_written_twice() -> None:
    one = OneNode("n2", remembered=[])
    written(one)
    one.run_until(5.0, answering=["n2"])
    assert written(one) == []


PAST = [
    "alive: n1 10.0.0.1:7946",
    "alive: n2 10.0.0.2:7946",
    "alive: n3 10.0.0.3:7946",
    "not-alive: n3",
    "clock: 40",
    "event-clock: 30",
    "query-clock: 20",
    "#incarnation: 9",
]


def test_a_restarted_node_is_later_than_all_it_saw_before() -> None:
    one = OneNode(remembered=PAST)
    stats = one.node.stats()
    assert (stats["member_time"], stats["event_time"], stats["query_time"]) == ("41", "31", "21")
    assert one.node.memberlist.local.incarnation == 10


def test_nothing_that_was_heard_before_a_restart_is_heard_again() -> None:
    one = OneNode("n2", remembered=PAST)
    one.hear(event(30), event(31))
    query = QueryMessage(20, 1, b"\x0a\0\0\2", 7946, "n2", (), 0, 0, 10**9, "load", b"")
    one.hear(User(encode(query)), User(encode(query._replace(ltime=21))))
    heard = [e.event for e in one.take_effects(Emit)]
    assert [e.ltime for e in heard if isinstance(e, UserEvent)] == [31]
    assert [e.ltime for e in heard if isinstance(e, Query)] == [21]


def test_it_looks_for_those_who_were_alive_until_one_answers() -> None:
    past = [*PAST, "alive: n4 10.0.0.4:7946"]
    one = OneNode(remembered=past)
    one.run_until(0.0)
    ((stream, first),) = one.connects()
    assert first in ("n2", "n4")
    one.node.stream_closed(0.0, stream, "refused")
    ((stream, second),) = one.connects()
    assert {first, second} == {"n2", "n4"}
    peer = OneNode.alive(second)
    from serfd.wire.swim_messages import NodeState

    state = NodeState(peer.node, peer.addr, peer.port, peer.meta, 1, 0, peer.vsn)
    one.reply(stream, encode_push_pull([state], b"", join=True))
    one.run_until(0.5)
    assert one.statuses()[second] == "alive"
    assert [e for e in one.take_effects(Connect) if e.to == address(first)] == []


def test_it_says_if_none_of_them_answers(caplog: pytest.LogCaptureFixture) -> None:
    one = OneNode(remembered=PAST)
    one.run_until(0.0)
    ((stream, _),) = one.connects()
    one.node.stream_closed(0.0, stream, "refused")
    assert "Failed to re-join any previously known node" in caplog.text


@pytest.mark.parametrize("rejoin", [True, False])
def test_who_left_comes_back_by_itself_only_if_told_to(*, rejoin: bool) -> None:
    one = OneNode("n2", remembered=[], rejoin_after_leave=rejoin)
    lines = written(one)
    one.node.leave(0.0)
    one.collect()
    farewell = one.take_effects(Remember)
    assert any(effect.sync for effect in farewell)
    lines += [line for effect in farewell for line in effect.lines]
    assert "leave" in lines
    again = OneNode(remembered=lines, rejoin_after_leave=rejoin)
    again.run_until(0.0)
    assert [to for _, to in again.connects()] == (["n2"] if rejoin else [])


def test_a_broken_snapshot_is_told_and_does_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    one = OneNode(remembered=["alive: n2", "clock: x", "nonsense", "alive: n3 nowhere"])
    one.run_until(1.0)
    assert one.statuses() == {"n1": "alive"}
    assert "nonsense" in caplog.text


def test_of_a_clock_beyond_its_last_leap_as_much_is_written_as_a_start_believes() -> None:
    one = OneNode("n2", remembered=[])
    for ltime in (LEAP_MAX, LEAP_MAX + 9):
        one.hear(event(ltime))
    lines = written(one)
    assert replay(lines, rejoin_after_leave=False).warnings == []
    again = OneNode("n2", remembered=lines)
    again.effects.clear()
    again.hear(event(LEAP_MAX))
    assert again.take_effects(Emit) == []


@pytest.mark.parametrize("clock", [LEAP_MAX, 2**64 - 2, 2**64 - 1])
def test_with_a_clock_at_its_end_in_the_snapshot_others_take_what_this_node_tells(
    clock: int,
) -> None:
    lines = [f"{word}: {clock}" for word in ("clock", "event-clock", "query-clock")]
    one = OneNode("n2", remembered=lines)
    one.node.force_leave(0.0, "n3")
    one.node.user_event(0.0, "deploy", b"", coalesce=False)
    one.node.query(0.0, "load", b"", EVERYBODY)
    one.run_until(1.0)
    told = {type(decode(user.payload)) for _, user in one.take(User)}
    assert told >= {LeaveIntent, UserEventMessage, QueryMessage}
    decode(one.node.local_state())
