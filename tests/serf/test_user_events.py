"""User events: told at a pace others can take, handed on in order."""

from itertools import permutations
from typing import Any

import pytest
from one_node import OneNode

from serfd.effects import Connect, Emit
from serfd.errors import CommandError
from serfd.serf import user_events
from serfd.serf.events import UserEvent
from serfd.serf.user_events import EventOrder
from serfd.wire.serf_messages import UserEventMessage, decode, encode
from serfd.wire.swim_messages import User


def event(ltime: int, name: str = "e") -> UserEvent:
    return UserEvent(ltime, name, b"", coalesce=False)


@pytest.mark.parametrize("order", list(permutations([1, 2, 3, 4])))
def test_events_are_handed_on_in_their_order_whatever_they_come_in(order: tuple[int, ...]) -> None:
    events = EventOrder()
    events.start_after(0)
    assert [e.ltime for ltime in order for e in events.take(event(ltime))] == [1, 2, 3, 4]
    assert events.missing is None


def test_what_is_missing_is_not_waited_for_for_ever() -> None:
    events = EventOrder()
    events.start_after(0)
    assert events.take(event(1)) == [event(1)]
    assert events.take(event(4)) == events.take(event(3)) == []
    assert events.missing == 2
    assert events.give_up(events.newest) == [event(3), event(4)]
    assert events.take(event(2)) == [event(2)]  # late, but not lost
    assert events.take(event(5)) == [event(5)]


def test_the_first_event_that_a_node_ever_hears_is_not_held_back() -> None:
    assert EventOrder().take(event(57)) == [event(57)]


def test_events_of_one_time_pass_together() -> None:
    events = EventOrder()
    events.start_after(0)
    assert events.take(event(2, "b")) == events.take(event(2, "c")) == []
    assert events.take(event(1)) == [event(1), event(2, "b"), event(2, "c")]


def test_held_back_events_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_events, "HELD_MAX", 3)
    events = EventOrder()
    events.start_after(0)
    assert events.take(event(5)) == events.take(event(7)) == []
    assert [e.ltime for e in events.take(event(6))] == [5, 6, 7]


def heard(one: OneNode) -> list[UserEvent]:
    return [e.event for e in one.take_effects(Emit) if isinstance(e.event, UserEvent)]


def hear(one: OneNode, *ltimes: int) -> None:
    for ltime in ltimes:
        one.hear(User(encode(UserEventMessage(ltime, f"e{ltime}", b"", coalesce=False))))


def test_a_node_asks_for_what_is_missing_before_it_goes_on_without() -> None:
    one = OneNode("n2", "n3")
    hear(one, 1, 3)
    assert [e.ltime for e in heard(one)] == [1]
    one.connects()
    for now in (0.2, 0.7, 1.2):
        one.run_until(now, answering=("n2", "n3"))
        asked = len(one.take_effects(Connect))  # events travel in state exchanges too
        assert asked == 1
    one.run_until(1.6, answering=("n2", "n3"))
    assert heard(one) == []
    one.run_until(1.7, answering=("n2", "n3"))
    assert [e.ltime for e in heard(one)] == [3]


def test_each_gap_has_its_own_time() -> None:
    one = OneNode("n2", "n3")
    hear(one, 1, 3)
    one.run_until(0.1)
    hear(one, 5, 2)
    assert [e.ltime for e in heard(one)] == [1, 2, 3]
    one.connects()
    one.run_until(0.2)  # the first gap would be overdue now; it is closed
    assert one.connects() == []
    one.run_until(0.3)
    assert len(one.connects()) == 1
    hear(one, 4)
    assert [e.ltime for e in heard(one)] == [4, 5]
    one.run_until(5.0, answering=("n2", "n3"))
    assert one.connects() == []


def test_gaps_that_were_asked_for_together_are_given_up_together() -> None:
    one = OneNode("n2", "n3")
    hear(one, 1, 3, 5, 7)
    one.run_until(0.2)
    hear(one, 9)
    one.run_until(1.7)
    assert [e.ltime for e in heard(one)] == [1, 3, 5, 7]
    one.run_until(3.5)
    assert [e.ltime for e in heard(one)] == [9]


def test_an_event_is_told_to_all_and_heard_here() -> None:
    one = OneNode("n2")
    one.node.user_event(0.0, "deploy", b"v1", coalesce=False)
    one.run_until(0.01)
    assert heard(one) == [UserEvent(1, "deploy", b"v1", coalesce=False)]
    told = [decode(m.payload) for _, m in one.take(User)]
    assert told[0] == UserEventMessage(1, "deploy", b"v1", coalesce=False)
    assert one.node.stats()["event_time"] == "2"


def test_what_may_coalesce_is_heard_when_it_is_quiet() -> None:
    one = OneNode("n2")
    for payload in (b"v1", b"v2"):
        one.node.user_event(one.now, "deploy", payload, coalesce=True)
    one.run_until(0.9)
    assert heard(one) == []
    one.run_until(1.1)
    assert [e.payload for e in heard(one)] == [b"v2"]


@pytest.mark.parametrize(
    ("name", "payload", "error"),
    [
        ("n" * 10, 472, None),
        ("n" * 10, 473, "encoded user event exceeds configured limit of 512 bytes after encoding"),
        ("n" * 10, 503, "user event exceeds configured limit of 512 bytes before encoding"),
        ("", 0, None),
    ],
)
def test_events_have_a_size_limit(name: str, payload: int, error: str | None) -> None:
    one = OneNode("n2")
    one.node.user_event(0.0, name, b"x" * payload, coalesce=False)
    one.collect()
    (result,) = one.results()
    assert (str(result) if isinstance(result, CommandError) else None) == error
    assert one.node.stats()["event_time"] == ("1" if error else "2")


@pytest.mark.parametrize(
    ("settings", "fits"), [({}, 1395), ({"gossip": {"packet_size_max": 600}}, 595),
                           ({"keys": [bytes(16)]}, 1366)],
)  # fmt: skip
def test_an_event_that_fits_no_packet_is_refused_and_never_said_to_be_sent(
    settings: dict[str, Any], fits: int
) -> None:
    one = OneNode("n2", user_event_size_limit=9216, **settings)
    head = len(encode(UserEventMessage(1, "deploy", bytes(fits), coalesce=False))) - fits
    for size in (fits - head + 1, fits - head):
        one.node.user_event(0.0, "deploy", bytes(size), coalesce=False)
    one.collect()
    refused, sent = one.results()
    assert str(refused) == (
        f"encoded user event exceeds limit of {fits} bytes after encoding: it fits no packet"
    )
    assert sent is None
    one.run_until(0.01)
    told = [decode(m.payload) for _, m in one.take(User)]
    assert {len(m.payload) for m in told if isinstance(m, UserEventMessage)} == {fits - head}


def test_an_event_that_grew_while_it_waited_is_refused_too() -> None:
    one = OneNode("n2", user_event_size_limit=9216)
    head = len(encode(UserEventMessage(1, "deploy", bytes(1395), coalesce=False))) - 1395
    for _ in range(user_events.ON_THE_WAY_MAX):
        one.node.user_event(0.0, "before", b"", coalesce=False)
    one.node.user_event(0.0, "deploy", bytes(1395 - head), coalesce=False)
    one.hear(User(encode(UserEventMessage(70_000, "later", b"", coalesce=False))))
    one.run_until(3.0)
    results = one.results()
    assert [type(result) for result in results[-1:]] == [CommandError]
    assert one.node.stats()["event_queue"] == "0"


def test_a_burst_waits_for_room_and_is_told_in_full() -> None:
    one = OneNode("n2", "n3", "n4")
    for i in range(300):
        one.node.user_event(0.0, f"e{i}", b"", coalesce=False)
    one.collect()
    done_at_once = len(one.results())
    assert 0 < done_at_once <= user_events.ON_THE_WAY_MAX
    told: set[Any] = set()
    one.run_until(3.0)
    told = {decode(m.payload).name for _, m in one.take(User)}  # type: ignore[union-attr]
    assert len(told) == 300
    assert len(one.results()) == 300 - done_at_once


def test_a_burst_beyond_all_bounds_is_refused_and_never_said_to_be_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(user_events, "WAITING_MAX", 10)
    one = OneNode("n2")
    for i in range(100):
        one.node.user_event(0.0, f"e{i}", b"", coalesce=False)
    one.collect()
    refused = [r for r in one.results() if isinstance(r, CommandError)]
    assert len(refused) == 100 - 10 - user_events.ON_THE_WAY_MAX
    assert "event queue is full: 10 events wait" in str(refused[0])


def test_a_lone_node_keeps_nothing_for_those_who_come_later() -> None:
    one = OneNode()
    for i in range(200):
        one.node.user_event(0.0, f"e{i}", b"", coalesce=False)
    one.collect()
    assert one.results() == [None] * 200
    assert one.node.stats()["event_queue"] == "0"
