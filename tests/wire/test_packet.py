"""A datagram's envelope. Packets of real agents are compared in test_golden.py."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serfd.errors import WireError
from serfd.wire import packet
from serfd.wire.envelope import Envelope, compressed
from serfd.wire.packet import MESSAGES_MAX, UNPACKED_MAX, PacketCodec
from serfd.wire.sealing import Keyring
from serfd.wire.swim_messages import Ack, Alive, Message, Nack, Ping, Suspect, User, encode

Peak = Callable[[int], AbstractContextManager[None]]

KEY = b"k" * 16
OTHER_KEY = b"o" * 32
PLAIN = Envelope(compress=False)


def nonce() -> bytes:
    return b"n" * 12


def alive(number: int) -> Alive:
    return Alive(1, f"node-{number}", b"\x0a\0\0\1", 7946, b"\xff\x80", b"\1\5\2\2\5\5")


def compound(*parts: bytes) -> bytes:
    lengths = b"".join(len(part).to_bytes(2, "big") for part in parts)
    return bytes((7, len(parts))) + lengths + b"".join(parts)


ENVELOPES = {
    "plain": PLAIN,
    "compressing": Envelope(),
    "labelled": Envelope(label=b"blue", compress=False),
    "sealing": Envelope(keyring=Keyring([KEY, OTHER_KEY]), compress=False),
    "everything": Envelope(label=b"blue", keyring=Keyring([KEY])),
}


@pytest.mark.parametrize("envelope", ENVELOPES.values(), ids=ENVELOPES.keys())
@pytest.mark.parametrize("crc", [True, False], ids=["crc", "no crc"])
@pytest.mark.parametrize("count", [1, 2, 127])
def test_what_is_sealed_is_opened(envelope: Envelope, count: int, *, crc: bool) -> None:
    messages: list[Message] = [alive(number) for number in range(count)]
    codec = PacketCodec(envelope)
    data = codec.seal([encode(message) for message in messages], crc=crc, nonce=nonce)
    assert codec.open(data) == (messages, [])


def test_a_lone_message_goes_bare() -> None:
    ping = encode(Ping(1, "a"))
    assert PacketCodec(Envelope()).seal([ping], crc=False, nonce=nonce) == ping
    assert PacketCodec(PLAIN).open(ping) == ([Ping(1, "a")], [])


def test_the_layers_nest_from_label_to_messages() -> None:
    parts = [encode(alive(number)) for number in range(10)]
    envelope = Envelope(label=b"blue", keyring=Keyring([KEY]))
    data = PacketCodec(envelope).seal(parts, crc=True, nonce=nonce)
    assert data.startswith(b"\xf4\x04blue")
    inner = envelope.keyring.open(data[6:], associated=b"blue")
    assert inner[0] == 12
    assert inner[1:5] == crc32(inner[5:]).to_bytes(4, "big")
    assert inner[5:] == compressed(compound(*parts))


def test_compression_is_used_only_where_it_is_shorter_and_wanted() -> None:
    messages = [encode(alive(number)) for number in range(10)]
    packing, plain = PacketCodec(Envelope()), PacketCodec(PLAIN)
    assert packing.seal(messages, crc=False, nonce=nonce) == compressed(compound(*messages))
    assert packing.seal(messages, crc=False, nonce=nonce, pack=False) == compound(*messages)
    assert plain.seal(messages, crc=False, nonce=nonce) == compound(*messages)
    noise = [bytes((8, *range(200)))]
    assert packing.seal(noise, crc=False, nonce=nonce) == noise[0]


def test_what_every_peer_must_be_spared_is_never_sent() -> None:
    codec = PacketCodec(PLAIN)
    for messages in ([], [b""], [b"\x08", b""], [b"\x08"] * 128):
        with pytest.raises(AssertionError):
            codec.seal(messages, crc=False, nonce=nonce)


def test_the_overhead_is_the_envelopes() -> None:
    assert PacketCodec(ENVELOPES["everything"]).overhead == 6 + 29


def test_a_keyring_that_gets_a_key_seals_from_then_on() -> None:
    keyring = Keyring()
    codec = PacketCodec(Envelope(keyring=keyring))
    ping = encode(Ping(1, "a"))
    assert codec.seal([ping], crc=False, nonce=nonce) == ping
    keyring.add(KEY)
    sealed = codec.seal([ping], crc=False, nonce=nonce)
    assert sealed == keyring.seal(ping, associated=b"", nonce=nonce())
    assert codec.open(sealed) == ([Ping(1, "a")], [])
    with pytest.raises(WireError):
        codec.open(ping)


def test_plain_and_sealed_are_both_taken_where_incoming_is_not_verified() -> None:
    codec = PacketCodec(Envelope(keyring=Keyring([KEY]), verify_incoming=False))
    ping = encode(Ping(1, "a"))
    assert codec.open(ping) == ([Ping(1, "a")], [])
    assert codec.open(codec.seal([ping], crc=False, nonce=nonce)) == ([Ping(1, "a")], [])


def test_outgoing_is_plain_where_it_is_not_verified() -> None:
    codec = PacketCodec(Envelope(keyring=Keyring([KEY]), verify_outgoing=False))
    ping = encode(Ping(1, "a"))
    assert codec.seal([ping], crc=False, nonce=nonce) == ping


SEALED = Keyring([OTHER_KEY]).seal(encode(Ping(1, "a")), associated=b"", nonce=nonce())
NACK = encode(Nack(1))


@pytest.mark.parametrize(
    ("envelope", "data", "fault"),
    [
        (PLAIN, b"", "an empty message"),
        (PLAIN, b"\x0d\x80", "message type 13 has no place in a packet"),
        (PLAIN, b"\x00\xc1", "ping: not msgpack"),
        (PLAIN, SEALED, "ping: not msgpack|indirect ping: "),
        (PLAIN, b"\x0c\x00\x00\x00\x00\x0b\x80", "wrong checksum 00000000, expected [0-9a-f]{8}"),
        (PLAIN, b"\x0c\x00\x00\x00\x00", "an empty message"),
        (PLAIN, b"\x0c\x00\x00\x00", "message type 12 has no place in a packet"),
        (PLAIN, b"\x07", "a compound cut short in its lengths"),
        (PLAIN, b"\x07\x02\x00\x01\x00", "a compound cut short in its lengths"),
        (PLAIN, b"\x07\x01\x00\x03\x0b\x80", "a compound cut short in part 1 of 1"),
        (PLAIN, compound(b"\x0c\x00\x00\x00\x00\x0b\x80"), "message type 12 has no place"),
        (PLAIN, compound(b""), "an empty message"),
        (PLAIN, b"\x09\x80", "packed bytes stop without an end code"),
        (PLAIN, compressed(b""), "an empty message"),
        (PLAIN, b"\xf4\x04blue" + NACK, "a packet with the label b'blue', expected b''"),
        (PLAIN, b"\xf4", "a packet without a whole label, expected b''"),
        (ENVELOPES["labelled"], NACK, "a packet without a whole label, expected b'blue'"),
        (ENVELOPES["labelled"], b"", "a packet without a whole label, expected b'blue'"),
        (ENVELOPES["labelled"], b"\xf4\x00" + NACK, "without a whole label"),
        (ENVELOPES["labelled"], b"\xf4\x04bl", "without a whole label"),
        (ENVELOPES["labelled"], b"\xf4\x03red" + NACK, "label b'red', expected b'blue'"),
        (ENVELOPES["everything"], b"\xf4\x04blue" + NACK, "not a sealed message of version 0 or 1"),
        (ENVELOPES["everything"], b"\xf4\x04blue" + SEALED, "no installed keys could decrypt"),
    ],
    ids=lambda value: repr(value)[:24] if isinstance(value, bytes) else "",
)
def test_a_packet_that_is_of_no_use_is_a_wire_error(
    envelope: Envelope, data: bytes, fault: str
) -> None:
    with pytest.raises(WireError, match=fault):
        PacketCodec(envelope).open(data)


def test_a_compound_without_parts_is_nothing() -> None:
    assert PacketCodec(PLAIN).open(b"\x07\x00") == ([], [])


def test_a_broken_part_loses_that_part_only() -> None:
    data = compound(NACK, b"\x00\xc1", b"", b"\x0c\x00", encode(Nack(2)))
    messages, faults = PacketCodec(PLAIN).open(data)
    assert messages == [Nack(1), Nack(2)]
    assert [str(fault) for fault in faults] == [
        "ping: not msgpack, or not a map",
        "an empty message",
        "message type 12 has no place in a packet",
    ]


def test_a_part_that_is_too_long_loses_the_later_ones_too() -> None:
    size = len(NACK).to_bytes(2, "big")
    data = b"\x07\x03" + size + b"\x00\xff" + size + NACK + NACK + NACK
    messages, faults = PacketCodec(PLAIN).open(data)
    assert messages == [Nack(1)]
    assert [str(fault) for fault in faults] == ["a compound cut short in part 2 of 3"]


def test_compounds_and_compressions_nest() -> None:
    inner = compound(encode(Ack(1)), compressed(compound(encode(Ack(2)), encode(Ack(3)))))
    data = compound(compressed(inner), encode(User(b"x")))
    assert PacketCodec(PLAIN).open(data) == ([Ack(1), Ack(2), Ack(3), User(b"x")], [])


def test_old_senders_may_put_255_parts_in_a_packet() -> None:
    messages, faults = PacketCodec(PLAIN).open(compound(*[NACK] * 255))
    assert len(messages) == 255
    assert faults == []


def test_the_same_bytes_are_compressed_once_for_several_peers() -> None:
    codec = PacketCodec(Envelope())
    parts = [encode(alive(number)) for number in range(1000, 1010)]
    first = codec.seal(parts, crc=False, nonce=nonce)
    hits = packet._shortest.cache_info().hits
    assert codec.seal(parts, crc=False, nonce=nonce) == first
    assert packet._shortest.cache_info().hits == hits + 1


messages = st.lists(
    st.integers(0, 2**32 - 1).map(lambda seq: Ping(seq, "node"))
    | st.builds(Suspect, st.integers(0, 9), st.text(max_size=9), st.text(max_size=9))
    | st.builds(User, st.binary(max_size=40)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(messages, st.sampled_from(sorted(ENVELOPES)), st.booleans())
def test_packets_of_any_messages_come_out_as_they_went_in(
    messages: list[Message], name: str, crc: bool
) -> None:
    codec = PacketCodec(ENVELOPES[name])
    data = codec.seal([encode(message) for message in messages], crc=crc, nonce=nonce)
    assert codec.open(data) == (messages, [])


@settings(max_examples=100, deadline=None)
@given(
    st.binary(max_size=100),
    messages,
    st.sampled_from(sorted(ENVELOPES)),
    st.integers(0, 200),
    st.binary(max_size=3),
)
def test_arbitrary_and_broken_packets_raise_nothing_but_wire_errors(
    noise: bytes, messages: list[Message], name: str, place: int, change: bytes
) -> None:
    envelope = ENVELOPES[name]
    codec = PacketCodec(envelope)
    parts = [encode(message) for message in messages]
    data = codec.seal(parts, crc=False, nonce=nonce)
    broken = data[:place] + change + data[place + 1 :]
    # Sealed by a peer that means harm: what is inside is arbitrary.
    inside = compound(*parts)
    hostile = inside[:place] + change + inside[place + 1 :]
    packets = [broken]
    for one in (noise, b"\x07" + noise, b"\x09" + noise, hostile, compressed(hostile)):
        if envelope.keyring and one:
            one = envelope.keyring.seal(one, associated=envelope.label, nonce=nonce())
        packets.append(envelope.label_header + one)
    for one in packets:
        try:
            codec.open(one)
        except WireError:
            continue


def nested(depth: int, inside: bytes) -> bytes:
    for _ in range(depth):
        inside = compound(inside)
    return inside


def test_envelopes_nested_too_deep_are_refused(peak_below: Peak) -> None:
    assert PacketCodec(PLAIN).open(nested(8, NACK)) == ([Nack(1)], [])
    with peak_below(1 << 20), pytest.raises(WireError, match="nested more than 8 deep"):
        PacketCodec(PLAIN).open(nested(1000, NACK))


def test_a_compression_bomb_is_refused(peak_below: Peak) -> None:
    bomb = compressed(bytes(4 << 20))
    assert len(bomb) < 6000
    with peak_below(3 << 20), pytest.raises(WireError, match="unpack to more than 262144 bytes"):
        PacketCodec(PLAIN).open(bomb)


def test_several_compressed_parts_share_one_limit(peak_below: Peak) -> None:
    part = compressed(encode(User(bytes(UNPACKED_MAX // 3))))
    with peak_below(3 << 20):
        messages, faults = PacketCodec(PLAIN).open(compound(*[part] * 10))
    assert len(messages) == 2
    assert len(faults) == 8


def test_a_packet_of_very_many_messages_is_cut_off(peak_below: Peak) -> None:
    inner = compound(*[NACK] * 255)
    data = compound(*[inner] * 20)
    with peak_below(1 << 20):
        messages, faults = PacketCodec(PLAIN).open(data)
    assert len(messages) == MESSAGES_MAX
    assert {str(fault) for fault in faults} == {"more than 1024 messages in a packet"}


def test_a_packet_of_very_many_faults_is_cut_off_too() -> None:
    data = compound(*[compound(*[b"\x0d"] * 255)] * 20, NACK)
    with pytest.raises(WireError, match="message type 13"):
        PacketCodec(PLAIN).open(data)


@pytest.mark.parametrize(
    "body",
    [b"\xdd\xff\xff\xff\xff", b"\x91" * 60_000, b"\x81\xa1A" * 20_000, b"\xdf\xff\xff\xff\xff"],
    ids=lambda body: body[:4].hex(),
)
@pytest.mark.parametrize("kind", [0, 2, 4, 9])
def test_msgpack_bombs_use_no_memory(kind: int, body: bytes, peak_below: Peak) -> None:
    with peak_below(1 << 20), pytest.raises(WireError):
        PacketCodec(PLAIN).open(bytes((kind,)) + body)
