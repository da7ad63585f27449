"""The queries of one node: those it asks and those it hears."""

import pytest
from one_node import OneNode

from serfd.config import Seconds
from serfd.effects import Answer, Emit, Finish
from serfd.errors import CommandError
from serfd.serf import asking
from serfd.serf.events import Query
from serfd.serf.queries import EVERYBODY, QueryAnswer, QueryDone, QueryParams
from serfd.wire.serf_messages import (
    IS_ACK,
    WANTS_ACK,
    QueryMessage,
    QueryResponse,
    Relay,
    decode,
    encode,
)
from serfd.wire.swim_messages import User


def told(one: OneNode, kind: type) -> list[tuple[str, object]]:
    found = [(to, decode(m.payload)) for to, m in one.take(User)]
    return [(to, m) for to, m in found if isinstance(m, kind)]


def query(**fields: object) -> QueryMessage:
    """A query of n2."""
    message = QueryMessage(
        3, 77, bytes((10, 0, 0, 2)), 7946, "n2", (), 0, 0, 1_000_000_000, "load", b"pp"
    )
    return message._replace(**fields)  # type: ignore[arg-type]


def heard(one: OneNode) -> list[Query]:
    return [e.event for e in one.take_effects(Emit) if isinstance(e.event, Query)]


# Heard.


def test_a_query_is_heard_once_and_answered_to_the_asker() -> None:
    one = OneNode("n2", "n3")
    one.hear(User(encode(query())), User(encode(query())))
    (event,) = heard(one)
    assert (event.name, event.payload, event.source, event.deadline) == ("load", b"pp", "n2", 1.0)
    one.node.respond(0.5, event, b"42")
    one.collect()
    assert told(one, QueryResponse) == [("n2", QueryResponse(3, 77, "n1", 0, b"42"))]
    assert one.results() == [None]


def test_an_acknowledgement_is_sent_at_once_if_one_is_wanted() -> None:
    one = OneNode("n2")
    one.hear(User(encode(query(flags=WANTS_ACK))))
    assert told(one, QueryResponse) == [("n2", QueryResponse(3, 77, "n1", IS_ACK, b""))]


def refusal(one: OneNode) -> str:
    one.collect()
    *_, error = one.results()
    assert isinstance(error, CommandError)
    return str(error)


def test_an_answer_that_cannot_be_sent_says_why() -> None:
    one = OneNode("n2")
    one.hear(User(encode(query())))
    (event,) = heard(one)
    prefix = "failed to respond to key query: "
    one.node.respond(0.1, event, b"x" * 2000)
    assert refusal(one) == prefix + "response exceeds limit of 1024 bytes"
    one.node.respond(0.1, event, b"x")  # which did not use it up
    one.node.respond(0.1, event, b"x")
    assert refusal(one) == prefix + "response already sent"
    one.run_until(1.1)
    one.node.respond(1.1, event, b"x")
    assert refusal(one) == prefix + "response is past the deadline"


def test_who_is_not_meant_does_not_hear_it_but_passes_it_on() -> None:
    from serfd.serf.queries import encode_filters

    one = OneNode("n2", "n3", tags={"role": "web"})
    filters = encode_filters(QueryParams(tags={"role": "db"}))
    one.hear(User(encode(query(filters=filters, flags=WANTS_ACK))))
    assert heard(one) == []
    one.run_until(0.5)
    kinds = {type(decode(m.payload)) for _, m in one.take(User)}
    assert kinds == {QueryMessage}


@pytest.mark.parametrize(
    "odd",
    [{"filters": (b"",)}, {"timeout_ns": 0}, {"timeout_ns": -5}, {"addr": b"\1\2\3"},
     {"filters": (b"\x09",)}],
)  # fmt: skip
def test_odd_queries_harm_nobody(odd: dict[str, object]) -> None:
    one = OneNode("n2")
    one.hear(User(encode(query(flags=WANTS_ACK, relay_factor=255, **odd))))
    for event in heard(one):
        one.node.respond(0.0, event, b"x")
    one.run_until(2.0)
    assert one.statuses() == {"n1": "alive", "n2": "alive"} or "n2" in one.statuses()


def test_queries_to_answer_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "QUERIES_OPEN_MAX", 5)
    one = OneNode("n2")
    for i in range(20):
        one.hear(User(encode(query(id=i))))
    assert len(heard(one)) == 5


# Relays.


def test_an_answer_is_relayed_through_others_as_often_as_wanted() -> None:
    one = OneNode("n2", "n3", "n4", "n5")
    one.hear(User(encode(query(relay_factor=2))))
    (event,) = heard(one)
    one.sent.clear()
    one.node.respond(0.0, event, b"x")
    one.collect()
    relays = told(one, Relay)
    assert len({to for to, _ in relays}) == 2
    for _, relay in relays:
        assert isinstance(relay, Relay)
        assert (relay.name, decode(relay.inner)) == ("n2", QueryResponse(3, 77, "n1", 0, b"x"))


def test_an_answer_is_passed_on_to_a_member_and_nothing_else_to_nobody_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    one = OneNode("n2", "n3")
    answer = encode(QueryResponse(3, 77, "n3", 0, b"x"))
    n2 = bytes((10, 0, 0, 2))
    one.hear(User(encode(Relay(n2, 7946, "n2", answer))), source="n3")
    assert told(one, QueryResponse) == [("n2", QueryResponse(3, 77, "n3", 0, b"x"))]
    for bad in (
        Relay(bytes((10, 0, 0, 99)), 7946, "n2", answer),
        Relay(n2, 53, "n2", answer),
        Relay(n2, 7946, "stranger", answer),
        Relay(n2, 7946, "n2", encode(query())),
        Relay(b"", 7946, "n2", answer),
    ):
        one.hear(User(encode(bad)), source="n3")
    assert one.sent == []
    assert caplog.text.count("refused to relay") == 5


# Asked.


def ask(one: OneNode, params: QueryParams = EVERYBODY) -> QueryMessage:
    one.node.query(one.now, "load", b"pp", params)
    one.run_until(one.now + 0.001)
    messages = [m for _, m in told(one, QueryMessage)]
    message = messages[0]
    assert isinstance(message, QueryMessage)
    return message


def reply(one: OneNode, message: QueryMessage, sender: str, payload: bytes = b"y",
          flags: int = 0) -> None:  # fmt: skip
    answer = QueryResponse(message.ltime, message.id, sender, flags, payload)
    one.hear(User(encode(answer)), source="n2")


def test_a_query_ends_when_all_have_answered() -> None:
    one = OneNode("n2", "n3")
    message = ask(one)
    assert (message.source_node, message.addr) == ("n1", bytes((10, 0, 0, 1)))
    one.effects.clear()
    for sender in ("n2", "n3", "n1"):
        reply(one, message, sender)
    answers = [e.answer for e in one.effects if isinstance(e, Answer)]
    assert answers == [QueryAnswer(s, b"y", is_ack=False) for s in ("n2", "n3", "n1")]
    assert one.results() == [QueryDone(acks=0, responses=3, audience=3)]


@pytest.mark.parametrize(
    ("name", "params", "ends"),
    [
        ("_serf_ping", QueryParams(want_ack=True), True),
        ("_serf_ping", QueryParams(want_ack=True, wait_all=True), False),
        ("_serf_ping", EVERYBODY, False),
        ("load", QueryParams(want_ack=True), False),
    ],
)
def test_a_ping_ends_when_all_have_acknowledged_it(
    name: str, params: QueryParams, *, ends: bool
) -> None:
    one = OneNode("n2", "n3")
    one.node.query(0.0, name, b"", params)
    one.run_until(0.001)
    (message, *_) = [m for _, m in told(one, QueryMessage)]
    assert isinstance(message, QueryMessage)
    one.effects.clear()
    for sender in ("n1", "n2"):
        reply(one, message, sender, b"", IS_ACK)
    assert [e for e in one.effects if isinstance(e, Finish)] == []
    reply(one, message, "n3", b"", IS_ACK)
    assert one.results() == ([QueryDone(acks=3, responses=0, audience=3)] if ends else [])


@pytest.mark.parametrize(
    ("params", "seconds"),
    [
        (EVERYBODY, 3.2),
        (QueryParams(timeout=1.0), 1.0),
        (QueryParams(timeout=-1.0), 0.0),
        (QueryParams(timeout=1.0, wait_all=True), 1.0),
    ],
)
def test_a_query_that_not_all_answer_ends_in_time(params: QueryParams, seconds: float) -> None:
    one = OneNode("n2", "n3")
    one.node.query(0.0, "load", b"", params)
    one.run_until(max(0.0, seconds - 0.01), answering=["n2", "n3"])
    if seconds:
        assert one.results() == []
    one.run_until(seconds + 0.01, answering=["n2", "n3"])
    assert one.results() == [QueryDone(acks=0, responses=0, audience=3)]


def test_answers_nobody_asked_for_or_of_strangers_do_not_count() -> None:
    one = OneNode("n2")
    message = ask(one)
    one.effects.clear()
    reply(one, message, "stranger")
    reply(one, message._replace(id=message.id ^ 1), "n2")
    reply(one, message._replace(ltime=999), "n2")
    assert [e for e in one.effects if isinstance(e, Answer)] == []


def test_only_those_that_are_meant_are_waited_for() -> None:
    one = OneNode("n2", "n3", tags={"role": "web"})
    message = ask(one, QueryParams(nodes=["n3"]))
    one.effects.clear()
    reply(one, message, "n3")
    assert one.results() == [QueryDone(acks=0, responses=1, audience=1)]


def test_a_query_that_cannot_be_asked_says_why() -> None:
    one = OneNode("n2")
    one.node.query(0.0, "load", b"x" * 2000, EVERYBODY)
    assert refusal(one) == "query exceeds limit of 1024 bytes"


def test_a_query_that_fits_no_packet_is_refused_and_asks_nobody() -> None:
    one = OneNode("n2", query_size_limit=9216)
    one.node.query(0.0, "load", bytes(1395), EVERYBODY)
    one.collect()
    assert refusal(one) == "query exceeds limit of 1395 bytes: it fits no packet"
    assert heard(one) == []
    one.node.query(0.0, "load", bytes(1200), EVERYBODY)
    one.run_until(0.01)
    assert [len(m.payload) for _, m in told(one, QueryMessage)][:1] == [1200]
    one.node.query(0.0, "_serf_x", b"", EVERYBODY)
    assert refusal(one) == "Queries cannot contain the '_serf_' prefix"
    old = OneNode("n2", protocol=3)
    old.node.query(0.0, "load", b"", EVERYBODY)
    assert refusal(old) == "Feature not supported"


@pytest.mark.parametrize(("members", "seconds"), [(1, 3.2), (9, 3.2), (10, 6.4), (99, 6.4)])
def test_the_default_timeout_grows_with_the_cluster(members: int, seconds: float) -> None:
    one = OneNode(*[f"n{i}" for i in range(2, members + 1)])
    assert one.node._asking.default_timeout == pytest.approx(seconds)
    slow = OneNode(gossip={"gossip_interval": Seconds(0.5)})
    assert slow.node._asking.default_timeout == pytest.approx(8.0)
