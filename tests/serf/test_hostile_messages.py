"""What a stranger may put into Serf's own messages, and what the node makes of it."""

import pytest
from one_node import OneNode, address

from serfd.effects import Emit
from serfd.serf import names, node
from serfd.serf.events import Query
from serfd.serf.keys import INSTALL, REMOVE, USE
from serfd.serf.lamport import KEPT_SIZE_MAX, LEAP_MAX
from serfd.serf.queries import EVERYBODY, QueryDone, QueryParams, encode_filters
from serfd.serf.user_events import EVENT_SIZE_MAX
from serfd.wire.gomsgpack import pack
from serfd.wire.serf_messages import (
    WANTS_ACK,
    JoinIntent,
    KeyRequest,
    KeyResponse,
    LeaveIntent,
    PushPullState,
    QueryMessage,
    QueryResponse,
    SerfMessage,
    UserEventMessage,
    decode,
    encode,
    encode_tags,
)
from serfd.wire.stream import UserState
from serfd.wire.swim_messages import Dead, User, encode_push_pull

WRAPS = 2**64 - 1
"""The LTime that sets a real agent's clock to 0."""
CLOCKS = ("member_time", "event_time", "query_time")


def query(**fields: object) -> QueryMessage:
    """A query of n2."""
    message = QueryMessage(
        3, 77, bytes((10, 0, 0, 2)), 7946, "n2", (), 0, 0, 1_000_000_000, "load", b"pp"
    )
    return message._replace(**fields)  # type: ignore[arg-type]


def say(one: OneNode, message: SerfMessage) -> None:
    one.hear(User(encode(message)))


def told(one: OneNode, kind: type) -> list[SerfMessage]:
    """What of this kind went out since last asked."""
    found = [decode(m.payload) for _, m in one.take(User)]
    return [m for m in found if isinstance(m, kind)]


def heard(one: OneNode) -> list[Query]:
    return [e.event for e in one.take_effects(Emit) if isinstance(e.event, Query)]


# Lamport times.


@pytest.mark.parametrize(
    "message",
    [
        LeaveIntent(WRAPS, "n2"),
        JoinIntent(WRAPS, "n2"),
        UserEventMessage(WRAPS, "deploy", b"v1", coalesce=False),
        query(ltime=WRAPS, flags=WANTS_ACK),
        QueryResponse(WRAPS, 77, "n2", 0, b"x"),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_message_whose_time_would_wrap_a_clock_does_nothing(
    message: SerfMessage, caplog: pytest.LogCaptureFixture
) -> None:
    one = OneNode("n2", "n3")
    one.effects.clear()
    say(one, message)
    assert [one.node.stats()[clock] for clock in CLOCKS] == ["1"] * 3
    assert one.take_effects(Emit) == []
    assert one.statuses() == dict.fromkeys(("n1", "n2", "n3"), "alive")
    assert "10.0.0.2:7946: " in caplog.text
    one.run_until(0.5)
    assert told(one, object) == []  # nor is it passed on


@pytest.mark.parametrize(
    "state",
    [
        PushPullState(WRAPS, {}, [], 0, [], 0),
        PushPullState(0, {"n2": WRAPS}, [], 0, [], 0),
        PushPullState(0, {"n2": WRAPS}, ["n2"], 0, [], 0),
        PushPullState(0, {}, [], WRAPS, [], 0),
        PushPullState(0, {}, [], 0, [(WRAPS, [("deploy", b"v1")])], 0),
        PushPullState(0, {}, [], 0, [], WRAPS),
    ],
    ids=["clock", "status", "left", "event clock", "event", "query clock"],
)
def test_a_state_with_a_time_that_would_wrap_a_clock_does_nothing(
    state: PushPullState, caplog: pytest.LogCaptureFixture
) -> None:
    one = OneNode("n2")
    one.effects.clear()
    items = one.accept(encode_push_pull([], encode(state), join=True))
    assert any(isinstance(item, UserState) for item in items)  # the peer is answered all the same
    assert [one.node.stats()[clock] for clock in CLOCKS] == ["1"] * 3
    assert one.take_effects(Emit) == []
    assert "Failed to decode remote state of 10.0.0.2:7946: " in caplog.text


HIGHEST = 2**64 - 2
"""The highest LTime that a real agent's clock survives."""


@pytest.mark.parametrize("ltime", [LEAP_MAX, HIGHEST])
def test_a_forged_time_leaves_every_clock_room_for_ever(
    ltime: int, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = OneNode("n2", "n3"), OneNode("n2", "n3")
    for hearer in (one, other):
        say(hearer, JoinIntent(ltime, "n3"))
        say(hearer, UserEventMessage(ltime, "forged", b"", coalesce=False))
        say(hearer, query(ltime=ltime))
        hearer.run_until(1.0, answering=["n2", "n3"])
        hearer.sent.clear()
        hearer.effects.clear()
    assert ("out of reach" in caplog.text) is (ltime == HIGHEST)
    assert (one.node.stats()["dropped_input"] == "3") is (ltime == HIGHEST)
    for number in range(3):
        one.node.force_leave(one.now, "n3")
        one.node.user_event(one.now, f"e{number}", b"")
    one.node.query(one.now, "load", b"", QueryParams())
    one.run_until(2.0, answering=["n2", "n3"])
    # Others understand all it says, and it can still exchange states.
    other.hear(*dict.fromkeys(m for _, m in one.take(User)), source="n3")
    assert other.statuses()["n3"] == "leaving"
    other.run_until(5.0, answering=["n2", "n3"])  # it waits for the events before them
    events = [e.event.name for e in other.take_effects(Emit)]
    assert sorted(events) == ["e0", "e1", "e2", "load"]
    items = one.accept(encode_push_pull([], b"", join=False))
    [state] = [decode(item.payload) for item in items if isinstance(item, UserState)]
    assert isinstance(state, PushPullState)
    assert max(state.ltime, state.event_ltime, state.query_ltime) < LEAP_MAX + 100


def test_a_forged_state_leaves_the_clocks_room_and_hides_no_later_event() -> None:
    one = OneNode("n2")
    one.node.join(one.now, [address("n2")])
    [(stream, _)] = one.connects()
    events = [(HIGHEST, [("forged", b"")])]
    state = PushPullState(HIGHEST, {"n2": HIGHEST}, [], HIGHEST, events, HIGHEST)
    one.reply(stream, encode_push_pull([], encode(state), join=True))
    assert [int(one.node.stats()[clock]) < LEAP_MAX + 10_000 for clock in CLOCKS] == [True] * 3
    one.effects.clear()
    ltime = int(one.node.stats()["event_time"])
    say(one, UserEventMessage(ltime, "true", b"", coalesce=False))
    one.run_until(5.0, answering=["n2"])  # it waits for the events before it
    assert [e.event.name for e in one.take_effects(Emit)] == ["true"]


@pytest.mark.parametrize("ltime", [LEAP_MAX, HIGHEST])
def test_two_own_queries_never_share_a_time(ltime: int) -> None:
    one = OneNode("n2")
    say(one, query(ltime=ltime))
    one.effects.clear()
    for name in ("one", "two"):
        one.node.query(one.now, name, b"", EVERYBODY)
    one.run_until(30.0, answering=["n2"])
    assert [type(result) for result in one.results()] == [QueryDone, QueryDone]


@pytest.mark.parametrize("ltime", [LEAP_MAX, HIGHEST])
def test_after_a_forged_time_a_node_still_leaves(ltime: int) -> None:
    one = OneNode("n2", "n3")
    say(one, LeaveIntent(ltime, "ghost"))
    one.effects.clear()
    one.node.leave(one.now)
    one.run_until(3.0, answering=["n2", "n3"])
    assert one.results() == [None]
    decode(one.node.local_state())


def test_a_forged_time_of_a_member_that_left_does_not_spoil_this_nodes_state() -> None:
    one = OneNode("n2", "n3")
    one.hear(Dead(1, "n3", "n2"))
    state = PushPullState(5, {"n3": HIGHEST}, ["n3"], 5, [], 5)
    one.node.merge_remote_state(encode(state), address("n2"), join=False)
    own = decode(one.node.local_state())
    assert isinstance(own, PushPullState)
    assert max(own.status_ltimes.values()) <= LEAP_MAX


# Queries.


@pytest.mark.parametrize(
    "filters",
    [
        (b"",),
        (encode_filters(QueryParams(nodes=["n1"]))[0], b""),
        (b"\x00",),
        (b"\x01",),
        (b"\x01\xc0",),
        (b"\x02" + pack(["n1"]),),
        (b"\x01" + pack({"Tag": 7, "Expr": "x"}),),
        *(
            encode_filters(QueryParams(tags={"role": pattern}))
            for pattern in ("(", "[z-a]", "*", "(?=web)", r"(web)\1", "x{1001}", "web|" * 300,
                            "((a{100}){100}){100}", r"\pL" * 300)
        ),
    ],
    ids=repr,
)  # fmt: skip
def test_a_query_with_a_filter_that_makes_no_sense_is_for_nobody_and_passed_on(
    filters: tuple[bytes, ...],
) -> None:
    one = OneNode("n2", "n3", tags={"role": "web"})
    say(one, query(filters=filters, flags=WANTS_ACK))
    assert heard(one) == []
    one.run_until(0.5)
    kinds = {type(message) for message in told(one, object)}
    assert kinds == {QueryMessage}  # no ack, no answer


def test_a_query_of_serfs_own_that_nobody_knows_is_told_to_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    one = OneNode("n2")
    say(one, query(name="_serf_format-disk"))
    assert heard(one) == []
    assert "Unhandled internal query '_serf_format-disk'" in caplog.text


KEY = bytes(range(32))


def key_answer(name: str, payload: bytes) -> KeyResponse:
    """What a node answers to such a query about keys, by which its keyring has not changed."""
    one = OneNode("n2", keys=[KEY])
    say(one, query(name=name, payload=payload))
    assert one.node._keyring.keys == (KEY,)
    (response,) = told(one, QueryResponse)
    assert isinstance(response, QueryResponse)
    answer = decode(response.payload)
    assert isinstance(answer, KeyResponse)
    return answer


@pytest.mark.parametrize(
    "payload",
    [b"", b"\x07", b"\x07\xc1", b"\x08\x80", b"\xff" * 40, b"\x07" + pack({"Key": 5})],
    ids=repr,
)
@pytest.mark.parametrize("name", [INSTALL, USE, REMOVE])
def test_a_key_query_that_is_none_is_answered_that_it_failed(name: str, payload: bytes) -> None:
    assert not key_answer(name, payload).result


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (INSTALL, "key size must be 16, 24 or 32 bytes"),
        (USE, "Requested key is not in the keyring"),
        (REMOVE, ""),  # what is not there need not be removed
    ],
)
@pytest.mark.parametrize("size", [0, 1, 31, 33, 40_000])
def test_a_key_query_with_a_key_of_a_wrong_size_changes_nothing(
    name: str, message: str, size: int
) -> None:
    answer = key_answer(name, encode(KeyRequest(bytes(size))))
    assert (answer.result, answer.message) == (not message, message)


def test_queries_that_are_asked_in_the_same_moment_have_times_of_their_own() -> None:
    one = OneNode("n2")
    for name in ("first", "second"):
        one.node.query(0.0, name, b"", EVERYBODY)
    one.run_until(0.001)
    times = {m.name: m.ltime for m in told(one, QueryMessage) if isinstance(m, QueryMessage)}
    assert times == {"first": 1, "second": 2}
    one.effects.clear()
    one.run_until(10.0, answering=["n2"])
    assert one.results() == [QueryDone(acks=0, responses=0, audience=2)] * 2


@pytest.mark.parametrize("limit", [1024, 50])
def test_what_is_known_of_a_name_may_be_too_long_to_be_told(
    limit: int, caplog: pytest.LogCaptureFixture
) -> None:
    one = OneNode("n2", query_response_size_limit=limit)
    name = "x" * 700
    meta = encode_tags({"a": "b" * 480}, protocol=5)
    one.hear(OneNode.alive("n3", meta=meta)._replace(node=name))
    say(one, query(name=names.QUERY, payload=name.encode()))
    assert f"respond to conflict query: response exceeds limit of {limit} bytes" in caplog.text
    assert told(one, QueryResponse) == []


# Bytes.


def test_an_event_that_no_agent_may_send_does_nothing() -> None:
    one = OneNode("n2")
    say(one, UserEventMessage(5, "eé", bytes(EVENT_SIZE_MAX - 2), coalesce=False))
    state = PushPullState(1, {}, [], 1, [(5, [("é", bytes(EVENT_SIZE_MAX)), ("f", b"")])], 1)
    one.node.merge_remote_state(encode(state), address("n2"), join=False)
    assert [e.event.name for e in one.node.take_effects() if isinstance(e, Emit)] == ["f"]
    assert one.node.stats()["dropped_input"] == "2"
    one.effects.clear()
    say(one, UserEventMessage(6, "e", bytes(EVENT_SIZE_MAX - 1), coalesce=False))
    assert one.node.stats()["dropped_input"] == "2"
    assert len(one.take_effects(Emit)) == 1


def test_events_of_a_flood_leave_the_state_at_a_size_that_peers_take() -> None:
    one = OneNode("n2")
    for number in range(2_000):
        say(one, UserEventMessage(1 + number // 200, f"e{number}", bytes(9_000), coalesce=False))
        one.effects.clear()
    assert KEPT_SIZE_MAX - 3_000_000 < len(one.node.local_state()) < KEPT_SIZE_MAX + 100_000


# Queues.


def test_each_of_serfs_queues_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "QUEUE_MAX", 100)
    one = OneNode("n2")
    for number in range(1, 300):
        say(one, JoinIntent(number, f"stranger-{number}"))
        say(one, UserEventMessage(number, "e", b"%03d" % number, coalesce=False))
        say(one, query(ltime=number, id=number))
    stats = one.node.stats()
    queues = [stats[name] for name in ("intent_queue", "event_queue", "query_queue")]
    assert queues == ["100"] * 3


def test_who_forces_a_leave_into_a_full_queue_hears_that_it_was_not_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(node, "QUEUE_MAX", 100)
    one = OneNode("n2", "n3")
    for number in range(1, 120):
        say(one, JoinIntent(number, f"stranger-with-a-long-name-{number}"))
    one.effects.clear()
    one.node.force_leave(0.0, "n2")
    one.collect()
    assert [str(result) for result in one.results()] == ["timed out broadcasting node removal"]
