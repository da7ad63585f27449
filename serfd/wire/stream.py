"""A TCP stream's envelope and contents, fed piece by piece (gossip.md 3 and 4).

A stream carries one request and at most one answer, and only its content says where it ends. It is
read by three generators, one inside the other: `_opened` gives what label and sealing hid,
`_unpacked` what compression hid, and `_contents` the values in that. The first two give pieces of
bytes; an empty piece says that no more has arrived yet.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple, TypeAlias

from serfd.effects import NonceSource
from serfd.errors import WireError
from serfd.wire.envelope import Envelope, check_algorithm, compressed
from serfd.wire.gomsgpack import ValueCutter, find_raw, u8
from serfd.wire.lzw import Decompressor
from serfd.wire.sealing import SEALING_OVERHEAD
from serfd.wire.swim_messages import (
    ACK,
    COMPRESS,
    ENCRYPT,
    ERR,
    HAS_LABEL,
    PING,
    PUSH_PULL,
    USER,
    Ack,
    NodeState,
    Ping,
    PushPullHead,
    StreamError,
    decode_ack,
    decode_node_state,
    decode_ping,
    decode_push_pull_head,
    decode_stream_error,
    decode_user_length,
)

STREAM_PACK_MAX = 128 * 1024
"""Longer bodies are sent as they are: packing them in Python would hold up everything else."""

SEALED_MAX = 20 << 20
"""Bytes of a sealed message on a stream (gossip.md 3.4)."""

UNPACKED_MAX = 40 << 20
"""Bytes a compressed stream may unpack to (gossip.md 4.3)."""

READ_MAX = 64 * 1024
"""Bytes of content that one `read` works on, more or less."""

_STATE_WORK = 128
"""Reading one node state counts as so many bytes; so one `read` gives about 500 of them."""

_PACKED_STEP = 512
"""Packed bytes unpacked at a time: even a bomb makes no more than 700 kB of them."""


class EnvelopeError(WireError):
    """A request that could not be opened. Its text is for an err answer to the peer.

    Other faults on a stream close it without an answer (gossip.md 4.1).
    """


class UserStream(NamedTuple):
    """A message of the layer above that came on a stream."""

    payload: bytes


class UserState(NamedTuple):
    """The layer above's part of a push/pull. It comes last, even if empty: all is there then."""

    payload: bytes


StreamItem: TypeAlias = Ping | Ack | StreamError | UserStream | PushPullHead | NodeState | UserState
"""What a stream can carry. A push/pull is a head, its node states, and a user state."""

_Slice: TypeAlias = tuple[list[StreamItem], int]
"""Items found, and how much work it was, in bytes; 0 if there is nothing to do but wait."""


class StreamReader:
    """Reads what one side of a stream sends, in pieces of any size."""

    __slots__ = ("_arrived", "_slices", "pending", "taken")

    def __init__(self, envelope: Envelope, *, accepting: bool) -> None:
        """`accepting` is whether the peer opened the stream: then it starts with the label."""
        self.pending = False
        """Whether `read` can find more in what was fed."""
        self.taken = 0
        """Bytes read so far, as they are unpacked; what is held of them may be as much."""
        self._arrived = bytearray()
        # These generators must not know this reader: a cycle would keep the bytes of a broken
        # stream until the garbage collector comes.
        pieces = _unpacked(_opened(self._arrived, envelope, accepting=accepting))
        self._slices = _contents(pieces)

    def feed(self, data: bytes) -> None:
        """Add bytes that arrived; call `read` until it is no longer `pending`."""
        self._arrived += data
        self.pending = True

    def read(self) -> list[StreamItem]:
        """Work on about `READ_MAX` bytes and give the items in them, in order.

        Raises EnvelopeError if the peer should be told, WireError for any other fault. After that,
        and after the last item, everything that is fed is ignored.
        """
        self.pending = False
        items: list[StreamItem] = []
        room = READ_MAX
        for found, work in self._slices:
            items += found
            self.taken += work
            room -= work
            if not work or room <= 0:
                self.pending = work > 0
                return items
        self._arrived.clear()
        return items


def _opened(arrived: bytearray, envelope: Envelope, *, accepting: bool) -> Iterator[bytes]:
    """Undo label and sealing (gossip.md 3.4, 3.5)."""
    label = envelope.label
    yield from _until(arrived, 1)
    if accepting:
        found = b""
        if arrived[0] == HAS_LABEL:
            yield from _until(arrived, 2)
            yield from _until(arrived, 2 + arrived[1])
            found = bytes(arrived[2 : 2 + arrived[1]])
            if not found:
                raise WireError("a stream with an empty label")
            del arrived[: 2 + len(found)]
        if found != label:
            raise WireError(f"a stream with the label {found!r}, expected {label!r}")
        yield from _until(arrived, 1)

    keyring = envelope.keyring
    if arrived[0] != ENCRYPT:
        if keyring and envelope.verify_incoming:
            raise EnvelopeError("encryption is configured but remote state is not encrypted")
        while True:
            piece = bytes(arrived[:READ_MAX])
            del arrived[:READ_MAX]
            yield piece

    if not keyring:
        raise EnvelopeError("remote state is encrypted and encryption is not configured")
    yield from _until(arrived, 5)
    header = bytes(arrived[:5])
    size = int.from_bytes(header[1:], "big")
    if size > SEALED_MAX:
        raise EnvelopeError(
            f"remote node state of {size} bytes is larger than limit ({SEALED_MAX})"
        )
    yield from _until(arrived, 5 + size)
    with _told_to_the_peer():
        opened = keyring.open(bytes(arrived[5 : 5 + size]), associated=header + label)
    arrived.clear()
    for start in range(0, len(opened), READ_MAX):
        yield opened[start : start + READ_MAX]


def _until(arrived: bytearray, size: int) -> Iterator[bytes]:
    while len(arrived) < size:
        yield b""


def _unpacked(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Undo one compression, if there is one (gossip.md 3.2)."""
    head = b""
    found = None
    while found is None:
        piece = next(pieces, None)
        if piece is None:
            raise EnvelopeError("a message that ends too early")
        head += piece
        if head and head[0] != COMPRESS:
            yield head
            yield from pieces
            return
        if piece:
            with _told_to_the_peer():
                found = find_raw(head[1:], b"Buf", "compress")
        else:
            yield b""

    fields, start, left = found
    with _told_to_the_peer():
        check_algorithm(u8(fields, "compress", b"Algo"))
    decompressor = Decompressor(UNPACKED_MAX)
    for arrived in chain([head[1 + start :]], pieces):
        packed = arrived[:left]
        left -= len(packed)
        unpacked = bytearray()
        for step in range(0, len(packed), _PACKED_STEP):
            with _told_to_the_peer():
                unpacked += decompressor.feed(packed[step : step + _PACKED_STEP])
            if len(unpacked) >= READ_MAX:
                yield bytes(unpacked)
                unpacked.clear()
        if unpacked:
            yield bytes(unpacked)
        if decompressor.finished:
            return
        if not left:
            break
        if not packed:
            yield b""
    raise EnvelopeError("packed bytes stop without an end code")


@contextmanager
def _told_to_the_peer() -> Iterator[None]:
    """Faults in here are answered with an err message."""
    try:
        yield
    except WireError as error:
        raise EnvelopeError(str(error)) from error


def _contents(pieces: Iterator[bytes]) -> Iterator[_Slice]:
    """Read the one message there is (gossip.md 4.2)."""
    first = yield from _next_piece(pieces)
    kind = first[0]
    if kind not in (PING, ACK, ERR, USER, PUSH_PULL):
        raise WireError(f"message type {kind} has no place on a stream")
    values = ValueCutter("stream")
    values.feed(first[1:])
    (head,) = yield from _next_values(values, pieces, 1)
    if kind == PING:
        yield [decode_ping(head)], 0
    elif kind == ACK:
        yield [decode_ack(head)], 0
    elif kind == ERR:
        yield [decode_stream_error(head)], 0
    elif kind == USER:
        message = yield from _next_bytes(values.rest(), pieces, decode_user_length(head))
        yield [UserStream(message)], 0
    else:
        push_pull = decode_push_pull_head(head)
        yield [push_pull], 1
        left = push_pull.nodes
        while left:
            states = yield from _next_values(values, pieces, min(left, READ_MAX // _STATE_WORK))
            left -= len(states)
            yield [decode_node_state(state) for state in states], len(states) * _STATE_WORK
        user_state = yield from _next_bytes(values.rest(), pieces, push_pull.user_state_len)
        yield [UserState(user_state)], 0


def _next_piece(pieces: Iterator[bytes]) -> Generator[_Slice, None, bytes]:
    """The next piece that is not empty."""
    for piece in pieces:
        yield [], len(piece)
        if piece:
            return piece
    raise WireError("a message that ends too early")


def _next_values(
    values: ValueCutter, pieces: Iterator[bytes], most: int
) -> Generator[_Slice, None, list[bytes]]:
    """At least one value, at most so many."""
    while not (cut := values.take(most)):
        values.feed((yield from _next_piece(pieces)))
    return cut


def _next_bytes(begun: bytes, pieces: Iterator[bytes], size: int) -> Generator[_Slice, None, bytes]:
    """So many bytes, of which `begun` are there."""
    held = bytearray(begun[:size])
    while len(held) < size:
        held += yield from _next_piece(pieces)
    return bytes(held[:size])


def seal_stream(
    body: bytes,
    envelope: Envelope,
    *,
    calling: bool,
    nonce: NonceSource,
    key: bytes | None = None,
) -> bytes:
    """Wrap a message for a stream: compressed, sealed, labelled, as `envelope` says.

    The label is written by the `calling` side only, though both seal with it (gossip.md 3.5).
    `key`: this one of the keyring seals; None: the primary.
    """
    data = body
    if envelope.compress and len(body) <= STREAM_PACK_MAX:
        data = compressed(body)
    if envelope.seals:
        header = bytes((ENCRYPT,)) + (len(data) + SEALING_OVERHEAD).to_bytes(4, "big")
        associated = header + envelope.label
        data = header + envelope.keyring.seal(data, associated=associated, nonce=nonce(), key=key)
    return envelope.label_header + data if calling else data
