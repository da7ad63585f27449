"""How many queries, how long, how far: what bounds them, and what an answer's relays are for."""

import pytest
from one_node import VSN, OneNode

from serfd.effects import Answer, Emit, Finish
from serfd.errors import CommandError
from serfd.serf import asking, queries
from serfd.serf.asking import QUERY_TIMEOUT_MAX
from serfd.serf.events import Query
from serfd.serf.keys import LIST
from serfd.serf.queries import EVERYBODY, QueryDone, QueryParams, encode_filters
from serfd.wire.serf_messages import (
    IS_ACK,
    WANTS_ACK,
    KeyResponse,
    QueryMessage,
    QueryResponse,
    Relay,
    SerfMessage,
    decode,
    encode,
)
from serfd.wire.swim_messages import Dead, User


def query(**fields: object) -> QueryMessage:
    """A query of n2."""
    message = QueryMessage(
        3, 77, bytes((10, 0, 0, 2)), 7946, "n2", (), 0, 0, 1_000_000_000, "load", b"pp"
    )
    return message._replace(**fields)  # type: ignore[arg-type]


def told(one: OneNode) -> list[tuple[str, SerfMessage]]:
    """What of Serf's went out since last asked: to whom, and what."""
    return [(to, decode(m.payload)) for to, m in one.take(User)]


def heard(one: OneNode, message: QueryMessage) -> Query:
    """The query that the node's owner is told of."""
    one.hear(User(encode(message)))
    (event,) = [e.event for e in one.take_effects(Emit) if isinstance(e.event, Query)]
    one.sent.clear()
    return event


def respond(one: OneNode, event: Query, payload: bytes) -> list[tuple[str, SerfMessage]]:
    """What goes out when the owner answers."""
    one.node.respond(one.now, event, payload)
    one.collect()
    return told(one)


# Asking.


def test_a_query_says_all_that_its_asker_wants() -> None:
    one = OneNode("n2", "n3")
    params = QueryParams(
        nodes=["n3"], tags={"role": "db"}, want_ack=True, relay_factor=7, timeout=1.5
    )
    one.node.query(0.0, "load", b"pp", params)
    one.run_until(0.001)
    message = told(one)[0][1]
    assert isinstance(message, QueryMessage)
    assert message == query(
        ltime=1, id=message.id, addr=bytes((10, 0, 0, 1)), source_node="n1",
        filters=encode_filters(params), flags=WANTS_ACK, relay_factor=7, timeout_ns=1_500_000_000,
    )  # fmt: skip


def test_queries_of_this_node_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "QUERIES_OPEN_MAX", 2)
    one = OneNode("n2")
    for _ in range(3):
        one.node.query(0.0, "load", b"", EVERYBODY)
    one.collect()
    (error,) = one.results()
    assert isinstance(error, CommandError)
    assert str(error) == "2 queries are open already; try later"
    one.run_until(5.0, answering=["n2"])
    assert one.results() == [QueryDone(acks=0, responses=0, audience=2)] * 2
    one.node.query(5.0, "load", b"", EVERYBODY)
    one.collect()
    assert one.results() == []


def test_answers_of_one_query_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "ANSWERS_MAX", 2)
    one = OneNode("n2", "n3", "n4")
    one.node.query(0.0, "load", b"", EVERYBODY)
    one.run_until(0.001)
    message = told(one)[0][1]
    assert isinstance(message, QueryMessage)
    for sender in ("n2", "n3", "n4"):
        one.hear(User(encode(QueryResponse(message.ltime, message.id, sender, 0, b""))))
    assert len(one.take_effects(Answer)) == 2


def test_a_key_change_does_not_wait_for_who_is_gone() -> None:
    one = OneNode("n2", "n3", keys=[bytes(16)])
    one.hear(Dead(1, "n3", "n2"))
    one.effects.clear()
    one.node.change_keys(0.0, LIST)
    one.run_until(0.001)
    messages = [m for _, m in told(one) if isinstance(m, QueryMessage)]
    answer = encode(KeyResponse(result=True, message="", keys=["x"], primary_key="x"))
    for sender in ("n1", "n2"):
        one.hear(User(encode(QueryResponse(messages[0].ltime, messages[0].id, sender, 0, answer))))
    (result,) = one.results()
    assert (result.nodes, result.responses, result.error) == (2, 2, "")


# Answering.


def test_a_query_cannot_be_answered_for_longer_than_a_day() -> None:
    one = OneNode("n2")
    event = heard(one, query(timeout_ns=2**63 - 1))
    assert event.deadline == QUERY_TIMEOUT_MAX


def test_nor_does_its_owner_wait_for_longer() -> None:
    one = OneNode("n2")
    one.node.query(0.0, "load", b"", QueryParams(timeout=2**63 / 1e9))
    one.run_until(0.5)
    ((_, message), *_) = told(one)
    assert isinstance(message, QueryMessage)
    assert message.timeout_ns == QUERY_TIMEOUT_MAX * 1e9
    one.node.wake(QUERY_TIMEOUT_MAX - 1)
    one.collect()
    assert one.results() == []
    one.node.wake(QUERY_TIMEOUT_MAX)
    one.collect()
    assert one.results() == [QueryDone(0, 0, 2)]


# Forgotten.


def test_a_query_that_nobody_waits_for_makes_room_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asking, "QUERIES_OPEN_MAX", 1)
    one = OneNode("n2", keys=[bytes(16)])
    first = one.node.query(0.0, "load", b"", QueryParams(timeout=3600.0))
    one.node.change_keys(0.0, LIST)
    one.collect()
    (refused,) = one.results()
    assert str(refused) == "1 queries are open already; try later"
    one.node.forget(0.0, first)
    one.node.change_keys(0.0, LIST)
    one.run_until(0.1)
    # This node too hears the list and answers it, for which there was no room either.
    (answer,) = [m for to, m in told(one) if to == "n1" and isinstance(m, QueryResponse)]
    assert isinstance(decode(answer.payload), KeyResponse)


def test_of_a_forgotten_query_nothing_is_heard() -> None:
    one = OneNode("n2")
    forgotten = one.node.query(0.0, "load", b"", QueryParams(timeout=5.0))
    other = one.node.query(0.0, "other", b"", QueryParams(timeout=5.0))
    one.run_until(0.5)
    (message,) = {m for _, m in told(one) if isinstance(m, QueryMessage) and m.name == "load"}
    one.node.forget(0.5, forgotten)
    one.node.forget(0.5, forgotten)
    one.hear(User(encode(QueryResponse(message.ltime, message.id, "n2", 0, b"late"))))
    one.run_until(6.0)
    found = [e for e in one.effects if isinstance(e, Answer | Finish)]
    assert found == [Finish(other, QueryDone(0, 0, 2))]


# Relays.


@pytest.mark.parametrize(
    ("members", "relay_factor", "relays"),
    [(2, 1, 1), (2, 2, 0), (3, 2, 2), (3, 3, 0), (3, 255, 0), (9, 3, 3), (9, 0, 0)],
)
def test_an_answer_is_relayed_only_where_there_are_more_members_than_relays(
    members: int, relay_factor: int, relays: int
) -> None:
    one = OneNode(*[f"n{number}" for number in range(2, members + 1)])
    answer = respond(one, heard(one, query(relay_factor=relay_factor)), b"x")
    assert [to for to, m in answer if isinstance(m, QueryResponse)] == ["n2"]
    through = [to for to, m in answer if isinstance(m, Relay)]
    assert len(through) == len(set(through)) == relays
    assert "n1" not in through


def test_an_acknowledgement_is_relayed_too() -> None:
    one = OneNode("n2", "n3")
    one.hear(User(encode(query(relay_factor=1, flags=WANTS_ACK))))
    (relay,) = [m for _, m in told(one) if isinstance(m, Relay)]
    assert decode(relay.inner) == QueryResponse(3, 77, "n1", IS_ACK, b"")


@pytest.mark.parametrize(("payload", "relayed"), [(900, True), (960, False)])
def test_an_answer_that_is_too_long_to_be_relayed_goes_straight_only(
    payload: int, relayed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    one = OneNode("n2", "n3")
    answer = respond(one, heard(one, query(relay_factor=1)), bytes(payload))
    assert [type(m) for _, m in answer] == [QueryResponse, *[Relay] * relayed]
    assert ("the answer to 'load' is too long to be relayed" in caplog.text) is not relayed


def test_members_that_are_too_old_are_not_asked_to_relay() -> None:
    one = OneNode("n2")
    one.hear(OneNode.alive("n3", vsn=bytes((1, 4, *VSN[2:]))), source="n3")
    answer = respond(one, heard(one, query(relay_factor=2)), b"x")
    assert [to for to, m in answer if isinstance(m, Relay)] == ["n2"]
