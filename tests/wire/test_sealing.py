"""The keyring: which key seals, which open, and what changes are refused."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serfd.errors import CommandError, WireError
from serfd.wire.sealing import SEALING_OVERHEAD, Keyring

A, B, C = b"a" * 16, b"b" * 24, b"c" * 32
NONCE = b"n" * 12


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("key", [A, B, C], ids=["128", "192", "256"])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 1400])
def test_what_is_sealed_is_opened_with_the_same_associated_data(
    key: bytes, version: int, size: int
) -> None:
    keyring = Keyring([key])
    sealed = keyring.seal(b"x" * size, associated=b"label", nonce=NONCE, version=version)
    assert sealed[0] == version
    assert sealed[1:13] == NONCE
    assert keyring.open(sealed, associated=b"label") == b"x" * size
    with pytest.raises(WireError, match="no installed keys could decrypt the message"):
        keyring.open(sealed, associated=b"")


def test_sealing_adds_29_bytes_and_version_0_also_pads_to_16() -> None:
    keyring = Keyring([A])
    assert len(keyring.seal(b"x" * 16, associated=b"", nonce=NONCE)) == 16 + SEALING_OVERHEAD
    padded = keyring.seal(b"x" * 16, associated=b"", nonce=NONCE, version=0)
    assert len(padded) == 32 + SEALING_OVERHEAD


def test_the_primary_seals_and_every_key_opens() -> None:
    sealed = Keyring([B]).seal(b"hello", associated=b"", nonce=NONCE)
    assert Keyring([A, B, C]).open(sealed, associated=b"") == b"hello"
    assert Keyring([B, A]).seal(b"hello", associated=b"", nonce=NONCE) == sealed
    with pytest.raises(WireError, match="no installed keys"):
        Keyring([A, C]).open(sealed, associated=b"")


def test_another_key_of_the_ring_may_seal() -> None:
    keyring = Keyring([A, B, C])
    sealed = keyring.seal(b"hello", associated=b"", nonce=NONCE, key=B)
    assert Keyring([B]).open(sealed, associated=b"") == b"hello"
    assert keyring.primary == A


@pytest.mark.parametrize(
    ("before", "change", "key", "after"),
    [
        ([], "add", A, (A,)),
        ([A], "add", B, (A, B)),
        ([A, B], "add", A, (A, B)),
        ([A, B], "add", B, (A, B)),
        ([A, B, C], "use", C, (C, A, B)),
        ([A, B], "use", A, (A, B)),
        ([A, B], "remove", B, (A,)),
        ([A], "remove", C, (A,)),
        ([A, B, A], "remove", C, (A, B)),
    ],
)
def test_changes_of_the_keyring(
    before: list[bytes], change: str, key: bytes, after: tuple[bytes, ...]
) -> None:
    keyring = Keyring(before)
    getattr(keyring, change)(key)
    assert keyring.keys == after
    assert keyring.primary == after[0]
    assert len(keyring) == len(after)


@pytest.mark.parametrize(
    ("change", "key", "fault"),
    [
        ("add", b"k" * 15, "key size must be 16, 24 or 32 bytes"),
        ("add", b"", "key size must be 16, 24 or 32 bytes"),
        ("use", C, "Requested key is not in the keyring"),
        ("remove", A, "Removing the primary key is not allowed"),
    ],
)
def test_refused_changes_say_why_and_change_nothing(change: str, key: bytes, fault: str) -> None:
    keyring = Keyring([A, B])
    with pytest.raises(CommandError) as caught:
        getattr(keyring, change)(key)
    assert str(caught.value) == fault
    assert keyring.keys == (A, B)


def test_an_empty_keyring_is_false_and_opens_nothing() -> None:
    keyring = Keyring()
    assert not keyring
    assert keyring.primary is None
    with pytest.raises(WireError, match="no installed keys"):
        keyring.open(Keyring([A]).seal(b"x", associated=b"", nonce=NONCE), associated=b"")


def test_keys_appear_in_no_text() -> None:
    keyring = Keyring([A, B])
    assert repr(keyring) == str(keyring) == "<Keyring of 2 keys>"


@pytest.mark.parametrize("sealed", [b"", b"\x01" + bytes(27), b"\x02" + bytes(40)])
def test_what_is_not_sealed_is_a_wire_error(sealed: bytes) -> None:
    with pytest.raises(WireError, match="not a sealed message of version 0 or 1"):
        Keyring([A]).open(sealed, associated=b"")


@pytest.mark.parametrize("plaintext", [b"x" * 15 + b"\x00", b"x" * 15 + b"\x11", b"\x05"])
def test_wrong_padding_is_a_wire_error(plaintext: bytes) -> None:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    sealed = b"\x00" + NONCE + AESGCM(A).encrypt(NONCE, plaintext, b"")
    with pytest.raises(WireError, match="wrong padding"):
        Keyring([A]).open(sealed, associated=b"")


def test_an_empty_plaintext_of_version_0_is_a_wire_error() -> None:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    sealed = b"\x00" + NONCE + AESGCM(A).encrypt(NONCE, b"", b"")
    with pytest.raises(WireError, match="wrong padding"):
        Keyring([A]).open(sealed, associated=b"")


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=100), st.integers(0, 70), st.binary(min_size=1, max_size=3))
def test_arbitrary_and_broken_bytes_raise_nothing_but_wire_errors(
    noise: bytes, place: int, change: bytes
) -> None:
    keyring = Keyring([A, B])
    sealed = keyring.seal(b"hello world, hello world", associated=b"", nonce=NONCE)
    for broken in (noise, sealed[:place] + change + sealed[place:]):
        with pytest.raises(WireError):
            keyring.open(broken, associated=b"")


def test_cryptography_is_imported_with_the_first_key_only() -> None:
    program = (
        "import sys\n"
        "from serfd.wire import packet, stream\n"
        "from serfd.wire.sealing import Keyring\n"
        "keyring = Keyring()\n"
        "assert 'cryptography' not in sys.modules\n"
        "keyring.add(bytes(16))\n"
        "assert 'cryptography' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
