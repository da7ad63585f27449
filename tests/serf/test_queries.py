"""Who is meant by a query, who has answered."""

import pytest

from serfd.errors import CommandError, WireError
from serfd.serf.queries import (
    EVERYBODY,
    PATTERNS_SIZE_MAX,
    OpenQuery,
    QueryAnswer,
    QueryDone,
    QueryParams,
    check_name,
    encode_filters,
    is_meant,
)
from serfd.wire.serf_messages import IS_ACK, QueryResponse

TAGS = {"role": "web-1", "dc": "east"}


@pytest.mark.parametrize(
    ("params", "meant"),
    [
        (EVERYBODY, True),
        (QueryParams(nodes=["n1", "n2"]), True),
        (QueryParams(nodes=["n2"]), False),
        (QueryParams(nodes=["N1"]), False),
        (QueryParams(tags={"role": "web"}), True),  # found anywhere
        (QueryParams(tags={"role": "^web$"}), False),
        (QueryParams(tags={"role": "^web-[0-9]+$", "dc": "east|west"}), True),
        (QueryParams(tags={"role": "web", "dc": "north"}), False),
        (QueryParams(tags={"none": "^$"}), True),  # a missing tag is an empty text
        (QueryParams(tags={"none": "x"}), False),
        (QueryParams(nodes=["n1"], tags={"dc": "west"}), False),
        (QueryParams(tags={"role": r"\Aweb-\d\z"}), True),  # Go's dialect
    ],
)
def test_filters(params: QueryParams, *, meant: bool) -> None:
    assert is_meant(encode_filters(params), "n1", TAGS) is meant


@pytest.mark.parametrize(
    ("one", "why"),
    [
        (b"", "an empty filter"),
        (b"\x07\x80", "unknown filter type 7"),
        (b"\x00\xc1", "node filter"),
        (b"\x01\x93\x01\x02\x03", "tag filter"),
        (encode_filters(QueryParams(tags={"role": "(a"}))[0], "pattern '(a'"),
        (encode_filters(QueryParams(tags={"role": "x" * 2000}))[0], "patterns of more than 1024"),
    ],
)
def test_a_filter_that_cannot_be_read_matches_nobody(one: bytes, why: str) -> None:
    with pytest.raises(WireError, match=why.replace("(", r"\(")):
        is_meant((one,), "n1", TAGS)


def test_patterns_are_limited_in_bytes_altogether() -> None:
    matches = "|" + "é" * 31 + "x"  # 64 bytes
    filters = encode_filters(QueryParams(tags={"role": matches})) * (PATTERNS_SIZE_MAX // 64)
    assert is_meant(filters, "n1", TAGS)
    one_more = encode_filters(QueryParams(tags={"dc": "e"}))
    with pytest.raises(WireError, match="patterns of more than 1024 bytes"):
        is_meant(filters + one_more, "n1", TAGS)


def test_filters_are_limited_in_number() -> None:
    with pytest.raises(WireError, match="more than 64 filters"):
        is_meant(encode_filters(QueryParams(nodes=["n1"])) * 65, "n1", TAGS)


def response(sender: str, payload: bytes = b"x", *, ack: bool = False) -> QueryResponse:
    return QueryResponse(3, 7, sender, IS_ACK if ack else 0, payload)


def test_each_sender_counts_once_for_its_answer_and_once_for_its_ack() -> None:
    asked = OpenQuery(3, 7, EVERYBODY, {"n1", "n2"})
    assert asked.take(response("n1")) == QueryAnswer("n1", b"x", is_ack=False)
    assert asked.take(response("n1", b"again")) is None
    assert asked.take(response("n1", b"", ack=True)) == QueryAnswer("n1", b"", is_ack=True)
    assert asked.take(response("n1", b"", ack=True)) is None
    assert asked.done == QueryDone(acks=1, responses=1, audience=2)


@pytest.mark.parametrize("want_ack", [True, False])
def test_a_query_is_answered_when_all_that_are_meant_have(*, want_ack: bool) -> None:
    asked = OpenQuery(3, 7, QueryParams(want_ack=want_ack), {"n1", "n2"})
    asked.take(response("n1"))
    asked.take(response("n2"))
    assert asked.is_answered is not want_ack
    asked.take(response("n1", ack=True))
    asked.take(response("n2", ack=True))
    assert asked.is_answered


def test_who_is_gone_is_not_waited_for() -> None:
    asked = OpenQuery(3, 7, EVERYBODY, {"n1", "n2"})
    asked.take(response("n1"))
    asked.forget("n2")
    assert asked.is_answered


def test_serfs_way_is_to_wait_for_the_end() -> None:
    asked = OpenQuery(3, 7, QueryParams(wait_all=True), {"n1"})
    asked.take(response("n1"))
    assert not asked.is_answered


@pytest.mark.parametrize(
    ("name", "payload", "refused"),
    [
        ("load", b"", False),
        ("_serf_ping", b"", False),
        ("_serf_ping", b"x", True),
        ("_serf_conflict", b"", True),
        ("_serf_", b"", True),
    ],
)
def test_serfs_own_names_are_refused(name: str, payload: bytes, *, refused: bool) -> None:
    if refused:
        with pytest.raises(CommandError, match="cannot contain the '_serf_' prefix"):
            check_name(name, payload)
    else:
        check_name(name, payload)
