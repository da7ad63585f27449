"""Who bears a name: the count of a vote."""

import pytest
from one_node import OneNode

from serfd.serf.names import NameVote, whois
from serfd.serf.queries import QueryAnswer, QueryDone
from serfd.wire.serf_messages import ConflictMember, ConflictResponse, encode

OURS, MAPPED, OTHER = (
    bytes((10, 0, 0, 1)),
    b"\0" * 10 + b"\xff\xff" + bytes((10, 0, 0, 1)),
    bytes((10, 0, 0, 9)),
)


def says(addr: bytes | None, port: int = 7946) -> bytes:
    if addr is None:
        return encode(ConflictResponse(None))
    member = ConflictMember("n1", addr, port, {}, 1, bytes((1, 5, 2, 2, 5, 5)))
    return encode(ConflictResponse(member))


@pytest.mark.parametrize(
    ("votes", "lost"),
    [
        ([], False),  # a stranger's word alone ends nobody
        ([OURS], False),
        ([MAPPED], False),  # the same address in its other form
        ([OTHER], True),
        ([OURS, OTHER], True),
        ([OURS, OURS, OTHER], False),
        ([OURS, None, None], True),
        ([OURS, OURS, None], False),
    ],
)
def test_the_majority_decides(votes: list[bytes | None], *, lost: bool) -> None:
    one = OneNode("n2")
    told: list[bool] = []
    vote = NameVote(one.node._common, lambda *, lost: told.append(lost))
    for number, addr in enumerate(votes):
        vote.answered(QueryAnswer(f"n{number}", says(addr), is_ack=False))
    vote.answered(QueryAnswer("junk", b"\x06\xc1", is_ack=False))
    vote.answered(QueryAnswer("odd", b"\x01\x80", is_ack=False))
    assert not vote.has_enough
    vote.over(QueryDone(0, len(votes), len(votes)))
    assert told == [lost]


def test_another_port_is_another_node() -> None:
    one = OneNode("n2")
    told: list[bool] = []
    vote = NameVote(one.node._common, lambda *, lost: told.append(lost))
    vote.answered(QueryAnswer("n2", says(OURS, port=1), is_ack=False))
    vote.over(QueryDone(0, 1, 1))
    assert told == [True]


def test_what_a_node_knows_of_a_name() -> None:
    one = OneNode("n2")
    known = whois(one.node._members.get("n2")).member
    assert known is not None
    assert (known.name, known.addr, known.port, known.status) == (
        "n2",
        bytes((10, 0, 0, 2)),
        7946,
        1,
    )
    assert whois(None) == ConflictResponse(None)
