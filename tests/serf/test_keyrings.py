"""One node's keyring: answers wait for the file, changes for each other."""

import pytest
from one_node import OneNode

from serfd.effects import SaveKeyring
from serfd.errors import CommandError
from serfd.serf import keyrings
from serfd.serf.keys import INSTALL, LIST
from serfd.wire.envelope import Envelope
from serfd.wire.packet import PacketCodec
from serfd.wire.sealing import Keyring
from serfd.wire.serf_messages import KeyRequest, KeyResponse, QueryMessage, decode, encode
from serfd.wire.swim_messages import User


def asked(key: bytes, number: int = 1) -> User:
    return User(
        encode(
            QueryMessage(
                number, number, bytes((10, 0, 0, 2)), 7946, "n2", (), 0, 0, 10**9, INSTALL,
                encode(KeyRequest(key)),
            )
        )
    )  # fmt: skip


def answers(one: OneNode) -> list[KeyResponse]:
    found = [decode(m.payload) for _, m in one.take(User)]
    inner = [decode(m.payload) for m in found if hasattr(m, "sender")]
    return [m for m in inner if isinstance(m, KeyResponse)]


@pytest.mark.parametrize("error", [None, "cannot write the keyring file: No space left on device"])
def test_a_change_is_answered_when_the_file_is_written(error: str | None) -> None:
    one = OneNode("n2", keyring_file="keys.json", keys=[bytes(16)])
    one.hear(asked(bytes(range(32))))
    (save,) = one.take_effects(SaveKeyring)
    assert save.keys == (bytes(16), bytes(range(32)))
    assert "\\x" not in repr(save)
    assert answers(one) == []
    one.node.keyring_saved(0.1, error)
    one.collect()
    (response,) = answers(one)
    assert (response.result, response.message) == (error is None, error or "")


def test_without_a_file_a_change_is_answered_at_once() -> None:
    one = OneNode("n2", keys=[bytes(16)])
    one.hear(asked(bytes(range(32))))
    assert [r.result for r in answers(one)] == [True]
    assert one.take_effects(SaveKeyring) == []


def test_changes_that_wait_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyrings, "CHANGES_MAX", 2)
    one = OneNode("n2")
    for _ in range(4):
        one.node.change_keys(0.0, LIST)
    one.collect()
    errors = [r for r in one.results() if isinstance(r, CommandError)]
    assert len(errors) == 2
    assert "2 key changes wait already" in str(errors[0])
    one.run_until(10.0)
    assert [r.error for r in one.results()] == ["0/2 nodes reported success"] * 2


OLD, NEW = bytes(16), bytes(range(32))


@pytest.mark.parametrize("error", [None, "cannot write the keyring file: No space left on device"])
def test_the_key_by_which_it_was_let_in_becomes_the_primary_and_is_saved(
    error: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    one = OneNode("n2", keyring_file="keys.json", keys=[OLD, NEW])
    one.node.other_key_understood(NEW)
    one.collect()
    (save,) = one.take_effects(SaveKeyring)
    assert save.keys == (NEW, OLD)
    assert "key 2 of the keyring takes its place" in caplog.text
    # A change that somebody asks for meanwhile gets its own answer.
    one.codec = PacketCodec(Envelope(compress=False, keyring=Keyring([NEW, OLD])))
    one.hear(asked(bytes(range(24))))
    one.node.keyring_saved(0.1, error)
    one.collect()
    assert answers(one) == []
    assert (error is None) or (error in caplog.text)
    one.node.keyring_saved(0.1, None)
    one.collect()
    assert [r.result for r in answers(one)] == [True]


def test_a_key_that_was_removed_meanwhile_does_not_become_the_primary() -> None:
    one = OneNode("n2", keyring_file="keys.json", keys=[OLD])
    one.node.other_key_understood(NEW)
    one.collect()
    assert one.take_effects(SaveKeyring) == []


def test_without_a_file_the_new_primary_is_not_saved() -> None:
    one = OneNode("n2", keys=[OLD, NEW])
    one.node.other_key_understood(NEW)
    one.collect()
    assert one.take_effects(SaveKeyring) == []
