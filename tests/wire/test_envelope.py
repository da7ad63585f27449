"""What packets and streams share: label, overhead, compression."""

import pytest

from serfd.errors import WireError
from serfd.wire import lzw
from serfd.wire.envelope import Envelope, compressed, decompressed
from serfd.wire.gomsgpack import pack
from serfd.wire.sealing import Keyring

KEY = b"k" * 16


@pytest.mark.parametrize(
    ("envelope", "overhead"),
    [
        (Envelope(), 0),
        (Envelope(label=b"blue"), 6),
        (Envelope(keyring=Keyring([KEY])), 29),
        (Envelope(label=b"blue", keyring=Keyring([KEY])), 35),
        (Envelope(keyring=Keyring([KEY]), verify_outgoing=False), 0),
    ],
)
def test_the_overhead_is_what_label_and_sealing_take(envelope: Envelope, overhead: int) -> None:
    assert envelope.overhead == overhead


def test_a_key_that_comes_later_turns_sealing_on() -> None:
    envelope = Envelope()
    before = envelope.seals
    envelope.keyring.add(KEY)
    assert (before, envelope.seals) == (False, True)
    assert envelope.overhead == 29


def test_each_envelope_has_a_keyring_of_its_own() -> None:
    assert Envelope().keyring is not Envelope().keyring


def test_the_label_header_says_the_length() -> None:
    assert Envelope().label_header == b""
    assert Envelope(label=b"blue").label_header == b"\xf4\x04blue"
    with pytest.raises(AssertionError):
        Envelope(label=b"x" * 256)


def test_a_compress_message_is_a_map_around_the_packed_bytes() -> None:
    message = compressed(b"aaaaaaaaaa")
    assert message == b"\x09" + pack({"Algo": 0, "Buf": lzw.compress(b"aaaaaaaaaa")})
    assert decompressed(message, limit=10) == b"aaaaaaaaaa"


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"Algo": 1, "Buf": lzw.compress(b"a")}, "compress: unknown algorithm 1"),
        ({"Algo": "lzw"}, "compress: Algo is 'lzw', expected an unsigned 8 bit number"),
        ({"Buf": 5}, "compress: Buf is 5, expected bytes"),
        ({}, "packed bytes stop without an end code"),
        ({"Buf": lzw.compress(b"a" * 11)}, "packed bytes unpack to more than 10 bytes"),
    ],
)
def test_a_broken_compress_message_is_a_wire_error(fields: dict[str, object], fault: str) -> None:
    with pytest.raises(WireError) as caught:
        decompressed(b"\x09" + pack(fields), limit=10)
    assert str(caught.value) == fault
