"""What a stranger may put into Serf's own messages, and what the node makes of it."""

import pytest
from one_node import OneNode

from serfd.effects import Emit
from serfd.serf import node
from serfd.serf.events import Query
from serfd.serf.keys import INSTALL, REMOVE, USE
from serfd.serf.queries import EVERYBODY, QueryDone, QueryParams, encode_filters
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
)
from serfd.wire.stream import UserState
from serfd.wire.swim_messages import User, encode_push_pull

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
            for pattern in ("(", "[z-a]", "*", "(?=web)", r"(web)\1", "x{1001}", "w" * 1025,
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
