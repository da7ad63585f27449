"""A stream, fed in pieces. Streams of real agents are compared in test_golden.py."""

import gc
import tracemalloc
from collections.abc import Callable
from contextlib import AbstractContextManager
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serfd.errors import WireError
from serfd.wire import lzw
from serfd.wire import swim_messages as swim
from serfd.wire.envelope import Envelope, compressed
from serfd.wire.gomsgpack import pack
from serfd.wire.sealing import Keyring
from serfd.wire.stream import (
    READ_MAX,
    SEALED_MAX,
    STREAM_PACK_MAX,
    EnvelopeError,
    StreamItem,
    StreamReader,
    UserState,
    UserStream,
    seal_stream,
)
from serfd.wire.swim_messages import Ack, NodeState, Ping, PushPullHead, StreamError, encode

Peak = Callable[[int], AbstractContextManager[None]]

KEY = b"k" * 16
PLAIN = Envelope(compress=False)

ENVELOPES = {
    "plain": PLAIN,
    "compressing": Envelope(),
    "labelled": Envelope(label=b"blue", compress=False),
    "sealing": Envelope(keyring=Keyring([b"o" * 32, KEY]), compress=False),
    "everything": Envelope(label=b"blue", keyring=Keyring([KEY])),
}


def nonce() -> bytes:
    return b"n" * 12


def state(number: int) -> NodeState:
    addr = bytes((10, 0, number >> 8 & 255, number & 255))
    return NodeState(f"node-{number}", addr, 7946, b"\xff\x80", 1, 0, b"\1\5\2\2\5\5")


def push_pull(count: int, user_state: bytes = b"serf") -> tuple[bytes, list[StreamItem]]:
    """A body with so many states, and the items in it."""
    states = [state(number) for number in range(count)]
    head = PushPullHead(count, len(user_state), join=True)
    body = swim.encode_push_pull(states, user_state, join=True)
    return body, [head, *states, UserState(user_state)]


def read_all(
    data: bytes, envelope: Envelope = PLAIN, *, accepting: bool = True, step: int = 1 << 30
) -> list[StreamItem]:
    """All items in `data`, fed in pieces of `step` bytes."""
    reader = StreamReader(envelope, accepting=accepting)
    items: list[StreamItem] = []
    for start in range(0, len(data), step):
        reader.feed(data[start : start + step])
        drain(reader, items)
    return items


def drain(reader: StreamReader, items: list[StreamItem]) -> None:
    """Read what is there, as its owner would do in turns."""
    while reader.pending:
        items += reader.read()


BODIES: list[tuple[bytes, list[StreamItem]]] = [
    (encode(Ping(7, "a", b"1234", 7946, "b")), [Ping(7, "a", b"1234", 7946, "b")]),
    (encode(Ack(7)), [Ack(7)]),
    (encode(StreamError("no")), [StreamError("no")]),
    (swim.encode_user_stream(b"serf" * 10), [UserStream(b"serf" * 10)]),
    (swim.encode_user_stream(b""), [UserStream(b"")]),
    push_pull(0, b""),
    push_pull(3),
    push_pull(3, b""),
    push_pull(30, bytes(700)),
]


@pytest.mark.parametrize("calling", [True, False], ids=["request", "answer"])
@pytest.mark.parametrize("step", [1, 7, 1 << 30], ids=["bytewise", "in pieces", "at once"])
@pytest.mark.parametrize("envelope", ENVELOPES.values(), ids=ENVELOPES.keys())
@pytest.mark.parametrize(("body", "items"), BODIES, ids=range(len(BODIES)))
def test_what_is_sealed_is_read(
    body: bytes, items: list[StreamItem], envelope: Envelope, step: int, *, calling: bool
) -> None:
    data = seal_stream(body, envelope, calling=calling, nonce=nonce)
    assert read_all(data, envelope, accepting=calling, step=step) == items
    assert read_all(data + b"more", envelope, accepting=calling, step=step) == items


def test_the_layers_nest_from_label_to_body() -> None:
    envelope = ENVELOPES["everything"]
    body = encode(Ping(7, "a"))
    request = seal_stream(body, envelope, calling=True, nonce=nonce)
    assert request.startswith(b"\xf4\x04blue\x0a")
    header, sealed = request[6:11], request[11:]
    assert int.from_bytes(header[1:], "big") == len(sealed)
    opened = envelope.keyring.open(sealed, associated=header + b"blue")
    assert opened == compressed(body)
    assert seal_stream(body, envelope, calling=False, nonce=nonce) == header + sealed


def test_streams_are_compressed_even_when_that_is_longer_but_not_when_it_would_take_long() -> None:
    short = encode(Ping(7, "a"))
    assert seal_stream(short, Envelope(), calling=True, nonce=nonce) == compressed(short)
    longest = swim.encode_user_stream(bytes(STREAM_PACK_MAX - 18))
    assert len(longest) == STREAM_PACK_MAX
    assert seal_stream(longest, Envelope(), calling=True, nonce=nonce)[0] == swim.COMPRESS
    longer = swim.encode_user_stream(bytes(STREAM_PACK_MAX - 17))
    assert seal_stream(longer, Envelope(), calling=True, nonce=nonce) == longer


def test_an_unlabelled_answer_is_sealed_with_the_label() -> None:
    envelope = ENVELOPES["everything"]
    answer = seal_stream(encode(Ack(1)), envelope, calling=False, nonce=nonce)
    assert answer[0] == swim.ENCRYPT
    unlabelled = Envelope(keyring=envelope.keyring)
    with pytest.raises(EnvelopeError, match="no installed keys could decrypt the message"):
        read_all(answer, unlabelled, accepting=False)


def test_nothing_is_pending_before_bytes_come_or_after_the_last_item() -> None:
    reader = StreamReader(PLAIN, accepting=True)
    seen = [(reader.pending, reader.read())]
    for data in (encode(Ack(1)), b"more"):
        reader.feed(data)
        seen += [(reader.pending, reader.read()), (reader.pending, reader.read())]
    assert seen == [(False, []), (True, [Ack(1)]), (False, []), (True, []), (False, [])]


def test_one_read_does_a_bounded_slice_of_work() -> None:
    body, items = push_pull(3000, bytes(300_000))
    for data in (body, compressed(body)):
        reader = StreamReader(Envelope(), accepting=True)
        reader.feed(data)
        slices = []
        while reader.pending:
            slices.append(reader.read())
        assert [item for slice_ in slices for item in slice_] == items
        assert max(map(len, slices)) <= 520
        assert len(slices) >= (len(body) // READ_MAX) + 1


def test_the_user_state_is_given_only_when_it_is_whole() -> None:
    body, items = push_pull(2, b"x" * 100)
    assert read_all(body[:-1]) == items[:-1]
    assert read_all(body) == items


def test_a_stream_that_broke_off_frees_its_bytes_without_the_garbage_collector() -> None:
    gc.disable()
    tracemalloc.start()
    try:
        reader = StreamReader(PLAIN, accepting=True)
        reader.feed(b"\x08" + pack({"UserMsgLen": swim.USER_BYTES_MAX}) + bytes(1 << 20))
        while reader.pending:
            assert reader.read() == []
        held = tracemalloc.get_traced_memory()[0]
        del reader
        left = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
        gc.enable()
    assert held > 1 << 20
    assert left < 1 << 16


def sealed(plain: bytes) -> bytes:
    return seal_stream(plain, ENVELOPES["sealing"], calling=True, nonce=nonce)


TOO_LONG = (SEALED_MAX + 1).to_bytes(4, "big")
SEALED_PING = sealed(encode(Ping(1, "a")))


@pytest.mark.parametrize(
    ("envelope", "data", "fault"),
    [
        (PLAIN, b"\x0a", "remote state is encrypted and encryption is not configured"),
        (
            ENVELOPES["sealing"],
            b"\x06",
            "encryption is configured but remote state is not encrypted",
        ),
        (
            ENVELOPES["sealing"],
            b"\x0a" + TOO_LONG,
            "remote node state of 20971521 bytes is larger than limit (20971520)",
        ),
        (
            Envelope(keyring=Keyring([b"x" * 16])),
            SEALED_PING,
            "no installed keys could decrypt the message",
        ),
        (
            ENVELOPES["sealing"],
            b"\x0a\x00\x00\x00\x04abcd",
            "not a sealed message of version 0 or 1",
        ),
        (PLAIN, b"\x09\xc1", "compress: not msgpack, or not a map"),
        (PLAIN, b"\x09\x81\xa3Buf\x05", "compress: not msgpack, or not a map"),
        (PLAIN, b"\x09\x82\xa4Algo\x01\xa3Buf\xa1a", "compress: unknown algorithm 1"),
        (
            PLAIN,
            b"\x09\x82\xa4Algo\xa1x\xa3Buf\xa1a",
            "compress: Algo is 'x', expected an unsigned 8 bit number",
        ),
        (PLAIN, b"\x09\x80", "packed bytes stop without an end code"),
        (
            PLAIN,
            b"\x09\x81\xa3Buf\xa4\x00\x05\x0e\x08",
            "packed bytes have the impossible code 258",
        ),
        (
            PLAIN,
            b"\x09" + pack({"Buf": lzw.compress(b"\x06\x83")[:-1]}),
            "packed bytes stop without an end code",
        ),
        (
            ENVELOPES["sealing"],
            sealed(compressed(encode(Ack(1)))[:-3]),
            "packed bytes stop without an end code",
        ),
    ],
)
def test_a_request_that_cannot_be_opened_is_an_error_to_tell(
    envelope: Envelope, data: bytes, fault: str
) -> None:
    with pytest.raises(EnvelopeError) as caught:
        read_all(data, envelope)
    assert str(caught.value) == fault


@pytest.mark.parametrize(
    ("envelope", "data", "fault"),
    [
        (PLAIN, b"\x01", "message type 1 has no place on a stream"),
        (PLAIN, b"\x07", "message type 7 has no place on a stream"),
        (PLAIN, b"\xff", "message type 255 has no place on a stream"),
        (PLAIN, compressed(compressed(encode(Ack(1)))), "message type 9 has no place on a stream"),
        (PLAIN, b"\xf4\x04blue", "a stream with the label b'blue', expected b''"),
        (ENVELOPES["labelled"], b"\x00", "a stream with the label b'', expected b'blue'"),
        (ENVELOPES["labelled"], b"\xf4\x03red", "a stream with the label b'red', expected b'blue'"),
        (ENVELOPES["labelled"], b"\xf4\x00", "a stream with an empty label"),
        (PLAIN, b"\x00\xc1", "stream: not msgpack"),
        (PLAIN, b"\x00\x05", "ping: is 5, expected a map"),
        (
            PLAIN,
            b"\x02" + pack({"SeqNo": -1}),
            "ack: SeqNo is -1, expected an unsigned 32 bit number",
        ),
        (PLAIN, b"\x0d" + pack({"Error": 1}), "err: Error is 1, expected text"),
        (
            PLAIN,
            b"\x06" + pack({"Nodes": swim.NODES_MAX + 1}),
            "push/pull announces 1048577 nodes, at most 1048576 allowed",
        ),
        (
            PLAIN,
            b"\x06" + pack({"UserStateLen": swim.USER_BYTES_MAX + 1}),
            "push/pull: UserStateLen is 20971521, at most 20971520 bytes allowed",
        ),
        (
            PLAIN,
            b"\x08" + pack({"UserMsgLen": 2**32 - 1}),
            "user message: UserMsgLen is 4294967295, at most 20971520 bytes allowed",
        ),
        (
            PLAIN,
            b"\x06" + pack({"Nodes": 1}) + pack({"Port": -1}),
            "node state: Port is -1, expected an unsigned 16 bit number",
        ),
        (PLAIN, compressed(push_pull(3)[0][:-1]), "a message that ends too early"),
        (ENVELOPES["sealing"], sealed(push_pull(3)[0][:-1]), "a message that ends too early"),
        (ENVELOPES["sealing"], sealed(b"\x00"), "a message that ends too early"),
        (ENVELOPES["sealing"], sealed(b"\x09\x82\xa4Algo"), "a message that ends too early"),
    ],
    ids=lambda value: repr(value)[:24] if isinstance(value, bytes) else "",
)
def test_any_other_fault_is_a_wire_error(envelope: Envelope, data: bytes, fault: str) -> None:
    for step in (1, 1 << 30):
        with pytest.raises(WireError) as caught:
            read_all(data, envelope, step=step)
        assert str(caught.value) == fault


def test_an_answer_has_no_label() -> None:
    with pytest.raises(WireError, match="message type 244 has no place on a stream"):
        read_all(b"\xf4\x04blue", ENVELOPES["labelled"], accepting=False)


def test_after_a_fault_everything_is_ignored() -> None:
    reader = StreamReader(PLAIN, accepting=True)
    reader.feed(b"\xff")
    with pytest.raises(WireError):
        reader.read()
    assert not reader.pending
    reader.feed(encode(Ack(1)))
    assert reader.read() == []


def test_plain_streams_are_taken_where_incoming_is_not_verified() -> None:
    envelope = Envelope(keyring=Keyring([KEY]), verify_incoming=False)
    assert read_all(encode(Ack(1)), envelope) == [Ack(1)]
    request = seal_stream(encode(Ack(1)), envelope, calling=True, nonce=nonce)
    assert read_all(request, envelope) == [Ack(1)]


def test_a_stream_may_be_sealed_with_another_key_than_the_primary() -> None:
    other = b"o" * 32
    envelope = Envelope(label=b"blue", keyring=Keyring([KEY, other]))
    data = seal_stream(encode(Ack(1)), envelope, calling=True, nonce=nonce, key=other)
    assert read_all(data, Envelope(label=b"blue", keyring=Keyring([other]))) == [Ack(1)]


def test_streams_are_sent_plain_where_outgoing_is_not_verified() -> None:
    envelope = Envelope(keyring=Keyring([KEY]), verify_outgoing=False, compress=False)
    assert seal_stream(encode(Ack(1)), envelope, calling=True, nonce=nonce) == encode(Ack(1))


def test_fields_of_a_compress_message_may_come_in_any_order() -> None:
    packed = compressed(encode(Ack(1)))
    buf = packed[packed.index(b"\xa3Buf") :]
    data = b"\x09\x83\xa3New\x92\x01\x02" + buf + b"\xa4Algo\x00"
    assert read_all(data, step=1) == [Ack(1)]
    assert read_all(data) == [Ack(1)]


bodies = st.sampled_from([body for body, _ in BODIES])


@settings(max_examples=100, deadline=None)
@given(
    bodies,
    st.sampled_from(sorted(ENVELOPES)),
    st.integers(0, 400),
    st.binary(max_size=3),
    st.binary(max_size=60),
    st.integers(1, 50),
)
def test_arbitrary_and_broken_streams_raise_nothing_but_wire_errors(
    body: bytes, name: str, place: int, change: bytes, noise: bytes, step: int
) -> None:
    envelope = ENVELOPES[name]
    data = seal_stream(body, envelope, calling=True, nonce=nonce)
    hostile = body[:place] + change + body[place + 1 :]
    streams = [
        data[:place] + change + data[place + 1 :],
        *(
            seal_stream(one or b"\x00", envelope, calling=True, nonce=nonce)
            for one in (hostile, noise, b"\x06" + noise, b"\x09" + noise, b"\x08" + noise)
        ),
    ]
    for one in streams:
        try:
            read_all(one, envelope, step=step)
        except WireError:
            continue


def test_a_value_without_an_end_is_refused_while_it_is_unpacked(peak_below: Peak) -> None:
    endless = b"\x06" + pack({"Nodes": 1}) + b"\xdb\x01\x00\x00\x00" + bytes(4 << 20)
    data = compressed(endless)
    with peak_below(4 << 20), pytest.raises(WireError, match="over 65536 bytes and no end"):
        read_all(data)


def packed_states(count: int) -> bytes:
    """A push/pull of node states with 59,685 zeros each, packed by hand: quicker than `compress`.

    After each clear: some literals, a zero, and then always the code that is just being made, which
    is one zero longer each time.
    """
    begin = b"\x81\xa3New\xda" + (345 * 346 // 2).to_bytes(2, "big")
    head = b"\x06" + pack({"Nodes": count})
    one = [*begin, 0, *range(len(begin) + 258, len(begin) + 258 + 344)]
    lives = [[], [*head], *[one] * count, []]
    codes = []
    for life in lives:
        for place, code in enumerate([*life, 256]):
            codes.append(f"{code:0{9 if place < 255 else 10}b}")
    bits = "".join(reversed(codes))
    return int(bits, 2).to_bytes(len(bits) // 8 + 1, "little")


def test_a_stream_may_unpack_to_40_mib_and_no_more(peak_below: Peak) -> None:
    data = b"\x09" + pack({"Algo": 0, "Buf": packed_states(800)})
    reader = StreamReader(PLAIN, accepting=True)
    reader.feed(data)
    items: list[StreamItem] = []
    with peak_below(4 << 20), pytest.raises(EnvelopeError, match="more than 41943040 bytes"):
        drain(reader, items)
    assert 690 < len(items) < 703


def test_a_push_pull_that_announces_a_million_nodes_uses_what_it_sends(peak_below: Peak) -> None:
    reader = StreamReader(PLAIN, accepting=True)
    with peak_below(1 << 20):
        reader.feed(b"\x06" + pack({"Nodes": swim.NODES_MAX, "UserStateLen": swim.USER_BYTES_MAX}))
        assert reader.read() == [PushPullHead(swim.NODES_MAX, swim.USER_BYTES_MAX, join=False)]
        for number in range(1000):
            reader.feed(swim.encode_node_state(state(number)))
            assert reader.read() == [state(number)]
    assert not reader.pending


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a" + SEALED_MAX.to_bytes(4, "big") + bytes(100),
        b"\x08" + pack({"UserMsgLen": swim.USER_BYTES_MAX}) + bytes(100),
        b"\x06" + pack({"UserStateLen": swim.USER_BYTES_MAX}) + bytes(100),
        b"\x09\x82\xa4Algo\x00\xa3Buf\xdb\xff\xff\xff\xff" + lzw.compress(b"\x06\x83")[:-1],
        b"\x06\x81\xa1A\xdd\xff\xff\xff\xff" + bytes(100),
        b"\x06\xdf\xff\xff\xff\xff" + b"\xa0\x00" * 100,
        b"\x00\xdb\xff\xff\xff\xff" + bytes(100),
    ],
    ids=lambda data: data[:8].hex(),
)
def test_an_announced_length_is_not_believed(data: bytes, peak_below: Peak) -> None:
    envelope = ENVELOPES["sealing"] if data[0] == swim.ENCRYPT else PLAIN
    with peak_below(1 << 18):
        items = read_all(data, envelope)
    assert items in ([], [PushPullHead(0, swim.USER_BYTES_MAX, join=False)])


@pytest.mark.parametrize(
    "body",
    [b"\x91" * 100_000, b"\xdd\x00\x00\xff\xff" * 20_000, b"\x81\xa1A" * 30_000],
    ids=lambda body: body[:4].hex(),
)
@pytest.mark.parametrize("kind", [0, 2, 6, 8, 9, 13])
def test_nested_values_use_no_memory(kind: int, body: bytes, peak_below: Peak) -> None:
    with peak_below(2 << 20), pytest.raises(WireError):
        read_all(bytes((kind,)) + body)


def test_random_pieces_give_the_same_items() -> None:
    rng = Random(7)
    body, items = push_pull(200, rng.randbytes(5000))
    for envelope in ENVELOPES.values():
        data = seal_stream(body, envelope, calling=True, nonce=nonce)
        reader = StreamReader(envelope, accepting=True)
        found: list[StreamItem] = []
        while data:
            size = rng.randrange(1, 3000)
            reader.feed(data[:size])
            data = data[size:]
            if rng.random() < 0.5:
                found += reader.read()
        drain(reader, found)
        assert found == items
