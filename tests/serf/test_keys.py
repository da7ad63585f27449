"""Keyring changes of one node, and the count over all (serf.md 12.1)."""

import base64

import pytest

from serfd.errors import CommandError
from serfd.serf.keys import (
    INSTALL,
    KEYS_MAX,
    LIST,
    NO_KEYRING,
    NO_KEYS,
    REMOVE,
    USE,
    KeyChange,
    KeyResult,
    answer,
    decode_base64,
    fitting,
)
from serfd.serf.queries import QueryAnswer, QueryDone
from serfd.wire.sealing import Keyring
from serfd.wire.serf_messages import KeyRequest, KeyResponse, QueryResponse, decode, encode

A, B = bytes(16), bytes(range(32))


def text(key: bytes) -> str:
    return base64.b64encode(key).decode()


@pytest.mark.parametrize(
    ("query", "key", "error", "after"),
    [
        (INSTALL, B, "", [A, B]),
        (INSTALL, A, "", [A]),
        (INSTALL, b"short", "key size must be 16, 24 or 32 bytes", [A]),
        (USE, B, "Requested key is not in the keyring", [A]),
        (REMOVE, A, "Removing the primary key is not allowed", [A]),
        (REMOVE, B, "", [A]),
    ],
)
def test_one_change(query: str, key: bytes, error: str, after: list[bytes]) -> None:
    ring = Keyring([A])
    response = answer(query, encode(KeyRequest(key)), ring)
    assert (response.result, response.message) == (not error, error)
    assert list(ring.keys) == after


def test_peers_cannot_let_a_keyring_grow_without_end() -> None:
    keys = [bytes([i]) * 16 for i in range(KEYS_MAX)]
    ring = Keyring(keys)
    response = answer(INSTALL, encode(KeyRequest(B)), ring)
    error = "the keyring holds 64 keys, no more may be installed"
    assert (response.result, response.message) == (False, error)
    assert answer(INSTALL, encode(KeyRequest(keys[5])), ring).result
    assert list(ring.keys) == keys
    assert answer(REMOVE, encode(KeyRequest(keys[5])), ring).result
    assert answer(INSTALL, encode(KeyRequest(B)), ring).result


def test_a_list_names_all_keys_the_one_in_use_first() -> None:
    ring = Keyring([A, B])
    ring.use(B)
    response = answer(LIST, b"", ring)
    assert (response.keys, response.primary_key) == ([text(B), text(A)], text(B))


@pytest.mark.parametrize(("query", "error"), [(INSTALL, NO_KEYRING), (LIST, NO_KEYS)])
def test_without_encryption_there_is_nothing_to_change(query: str, error: str) -> None:
    response = answer(query, encode(KeyRequest(A)), Keyring())
    assert (response.result, response.message) == (False, error)


@pytest.mark.parametrize("payload", [b"", b"\x07", b"\x07\xc1", b"\x01\x80", b"\xff"])
def test_a_request_that_is_none_is_refused(payload: bytes) -> None:
    assert not answer(INSTALL, payload, Keyring([A])).result


@pytest.mark.parametrize(("count", "shown"), [(3, 3), (17, 17), (20, 17), (60, 17)])
def test_a_long_list_is_cut_to_what_fits(count: int, shown: int) -> None:
    keys = [text(bytes([i]) * 32) for i in range(count)]
    response = KeyResponse(result=True, message="", keys=keys, primary_key=keys[0])
    whole = fitting(response, QueryResponse(1, 2064206229, "n1", 0, b""), 1024)
    assert len(encode(whole)) <= 1024
    cut = decode(whole.payload)
    assert isinstance(cut, KeyResponse)
    assert cut.result
    assert abs(len(cut.keys) - shown) <= (1 if shown < count else 0)
    if shown < count:
        assert cut.message == (
            f"truncated key list response, showing first {len(cut.keys)} of {count} keys"
        )


def test_the_answers_of_all_are_counted() -> None:
    told: list[KeyResult] = []
    change = KeyChange(LIST, b"", 4, told.append)
    good = KeyResponse(result=True, message="", keys=[text(A)], primary_key=text(A))
    bad = KeyResponse(result=False, message="no", keys=[], primary_key="")
    for sender, payload in (
        ("n1", encode(good)), ("n2", encode(bad)), ("n3", b"junk"), ("n4", b"\x07\x81\xa3Key\xa0"),
    ):  # fmt: skip
        assert not change.has_enough
        change.answered(QueryAnswer(sender, payload, is_ack=False))
    assert change.has_enough
    change.over(QueryDone(0, 4, 4))
    (result,) = told
    assert (result.nodes, result.errors, result.responses) == (4, 3, 4)
    assert result.keys == {text(A): 1}
    assert result.messages["n2"] == "no"
    assert result.messages["n3"].startswith("Failed to decode key query response")
    assert result.messages["n4"].startswith("Invalid key query response type")
    assert result.error == "3/4 nodes reported failure"


def test_who_does_not_answer_is_told() -> None:
    told: list[KeyResult] = []
    change = KeyChange(LIST, b"", 2, told.append)
    change.over(QueryDone(0, 0, 2))
    assert told[0].error == "0/2 nodes reported success"


@pytest.mark.parametrize(
    ("given", "place"), [("!", 0), ("AA!A", 2), ("AAA", 0), ("A=AA", 1), ("abc def=", 3)]
)
def test_what_is_no_base64_is_refused_in_gos_words(given: str, place: int) -> None:
    with pytest.raises(CommandError, match=f"illegal base64 data at input byte {place}"):
        decode_base64(given)
    assert decode_base64(text(B)) == B
