"""A node whose name somebody else answers to asks the cluster who bears it."""

import pytest
from one_node import OneNode

from serfd.effects import Stop
from serfd.wire.serf_messages import (
    ConflictMember,
    ConflictResponse,
    QueryMessage,
    QueryResponse,
    decode,
    encode,
)
from serfd.wire.swim_messages import User

ELSEWHERE = bytes((10, 0, 0, 9))


def contested(**settings: object) -> tuple[OneNode, list[QueryMessage]]:
    """A node whose name was contested twice in a moment, and what it asked the cluster."""
    one = OneNode("n2", "n3", **settings)
    for _ in range(2):
        one.node.name_contested(OneNode.alive("n9")._replace(node="n1"))
    one.run_until(0.001)
    asked = {decode(m.payload) for _, m in one.take(User)}
    return one, [m for m in asked if isinstance(m, QueryMessage)]


def vote(one: OneNode, asked: QueryMessage, **addresses: bytes) -> list[Stop]:
    """Others say where they know n1 to be; whether the node ends when the vote does."""
    for voter, addr in addresses.items():
        known = ConflictMember("n1", addr, 7946, {}, 1, bytes((1, 5, 2, 2, 5, 5)))
        answer = encode(ConflictResponse(known))
        response = QueryResponse(asked.ltime, asked.id, voter, 0, answer)
        one.hear(User(encode(response)), source=voter)
    one.run_until(one.now + 3.0, answering=["n2", "n3"])
    assert one.take_effects(Stop) == []  # it waits for all votes
    one.run_until(one.now + 1.0, answering=["n2", "n3"])
    return one.take_effects(Stop)


def test_it_asks_once_and_ends_if_the_majority_knows_another() -> None:
    one, [asked] = contested()
    assert (asked.name, asked.payload, asked.filters) == ("_serf_conflict", b"n1", ())
    assert vote(one, asked, n2=ELSEWHERE, n3=ELSEWHERE) == [
        Stop("another node bears this node's name")
    ]


def test_it_goes_on_if_the_majority_knows_it_and_may_ask_again() -> None:
    one, [asked] = contested()
    own = bytes((10, 0, 0, 1))
    assert vote(one, asked, n2=own, n3=own) == []
    one.sent.clear()
    one.node.name_contested(OneNode.alive("n9")._replace(node="n1"))
    one.run_until(one.now + 0.001)
    assert any(isinstance(decode(m.payload), QueryMessage) for _, m in one.take(User))


def test_it_does_not_ask_if_it_is_told_not_to() -> None:
    _, asked = contested(disable_name_resolution=True)
    assert asked == []


@pytest.mark.parametrize(("name", "answered"), [(b"n1", False), (b"n2", True), (b"nobody", True)])
def test_it_says_where_it_knows_others_to_be_and_nothing_of_itself(
    name: bytes, *, answered: bool
) -> None:
    one = OneNode("n2")
    query = QueryMessage(
        3, 77, bytes((10, 0, 0, 2)), 7946, "n2", (), 0, 0, 10**9, "_serf_conflict", name
    )
    one.hear(User(encode(query)))
    answers = [decode(m.payload) for _, m in one.take(User)]
    assert [type(m) for m in answers] == [QueryResponse] * answered
