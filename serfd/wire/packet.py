"""A datagram's envelope: label, encryption, CRC, compression, compound (gossip.md 3)."""

import struct
from collections.abc import Sequence
from functools import lru_cache
from zlib import crc32

from serfd.effects import NonceSource
from serfd.errors import WireError
from serfd.wire.envelope import Envelope, compressed, decompressed
from serfd.wire.swim_messages import COMPOUND, COMPRESS, Message, decode

PARTS_MAX = 127
"""Parts of a compound we send; old peers misread more (gossip.md 3.1)."""

MESSAGES_MAX = 1024
"""Messages taken from one packet; honest peers send at most 255."""

DEPTH_MAX = 8
"""Compounds and compressions around one message; real agents use one of each."""

UNPACKED_MAX = 256 * 1024
"""Bytes that one packet's compressed parts may have altogether; a plain one has under 64 kB."""
UNPACK_COST = UNPACKED_MAX // 32
"""Bytes that unpacking takes off this at least, so that a packet is unpacked 32 times at most."""


class PacketCodec:
    """Opens the packets of others and seals our own."""

    __slots__ = ("_envelope",)

    def __init__(self, envelope: Envelope) -> None:
        self._envelope = envelope

    @property
    def overhead(self) -> int:
        """Bytes to keep free in every packet for label and sealing (gossip.md 8.1, 8.3)."""
        return self._envelope.overhead

    def open(self, data: bytes) -> tuple[list[Message], list[WireError]]:
        """The messages in a packet, in order, and what was wrong with parts of it.

        Raises WireError if nothing in it can be used: not for us, not sealed, wrong checksum, …
        A fault in one part of a compound loses that part only, unless the lengths are broken.
        """
        envelope = self._envelope
        if envelope.label or data[:1] == b"\xf4":
            data = self._without_label(data)
        if envelope.keyring:
            data = self._unsealed(data)
        if data[:1] == b"\x0c" and len(data) >= 5:
            data = _checked(data)
        kind = data[0] if data else None
        if kind != COMPOUND and kind != COMPRESS:
            return [decode(data)], []
        contents = _Contents()
        contents.take(data, depth=0)
        if contents.faults and not contents.messages:
            raise contents.faults[0]
        return contents.messages, contents.faults

    def seal(
        self, messages: Sequence[bytes], *, crc: bool, nonce: NonceSource, pack: bool = True
    ) -> bytes:
        """One packet with all `messages`: 1 to 127 encoded ones, none of them empty.

        `crc` adds a checksum, which is for targets that are known to understand it (gossip.md 3.3).
        `pack=False` saves the time of trying compression.
        """
        envelope = self._envelope
        data = messages[0] if len(messages) == 1 else _compound(messages)
        assert data, "an empty message ends an old peer (gossip.md 3.1)"
        if pack and envelope.compress:
            data = _shortest(data)
        if crc:
            data = b"\x0c" + crc32(data).to_bytes(4, "big") + data
        if envelope.seals:
            data = envelope.keyring.seal(data, associated=envelope.label, nonce=nonce())
        return envelope.label_header + data if envelope.label else data

    def _without_label(self, data: bytes) -> bytes:
        label = self._envelope.label
        found = data[2 : 2 + data[1]] if data[:1] == b"\xf4" and len(data) > 1 else b""
        if not found or len(found) < data[1]:
            raise WireError(f"a packet without a whole label, expected {label!r}")
        if found != label:
            raise WireError(f"a packet with the label {found!r}, expected {label!r}")
        return data[2 + len(found) :]

    def _unsealed(self, data: bytes) -> bytes:
        envelope = self._envelope
        try:
            return envelope.keyring.open(data, associated=envelope.label)
        except WireError:
            if envelope.verify_incoming:
                raise
            return data


class _Contents:
    """What is found in a packet of many messages, and how much more it may hold."""

    __slots__ = ("_left", "faults", "messages")

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.faults: list[WireError] = []
        self._left = UNPACKED_MAX

    def take(self, data: bytes, *, depth: int) -> None:
        """Take all messages out of `data`. Raises WireError where there are none."""
        if depth > DEPTH_MAX:
            raise WireError(f"envelopes nested more than {DEPTH_MAX} deep")
        kind = data[0] if data else None
        if kind == COMPOUND:
            self._take_parts(data, depth)
        elif kind == COMPRESS:
            if self._left <= 0:
                raise WireError(f"more than {UNPACKED_MAX} bytes when unpacked")
            # Charged before it is known what comes out, so that bad ones are not free.
            limit = self._left
            self._left -= UNPACK_COST
            inner = decompressed(data, limit=limit)
            self._left = limit - max(UNPACK_COST, len(inner))
            self.take(inner, depth=depth + 1)
        else:
            self.messages.append(decode(data))

    def _take_parts(self, data: bytes, depth: int) -> None:
        if len(data) < 2 or len(data) < 2 + 2 * data[1]:
            raise WireError("a compound cut short in its lengths")
        count = data[1]
        start = 2 + 2 * count
        for number, length in enumerate(struct.unpack(f">{count}H", data[2:start]), 1):
            if len(self.messages) + len(self.faults) >= MESSAGES_MAX:
                self.faults.append(WireError(f"more than {MESSAGES_MAX} messages in a packet"))
                return
            part = data[start : start + length]
            start += length
            if len(part) < length:
                self.faults.append(WireError(f"a compound cut short in part {number} of {count}"))
                return
            try:
                self.take(part, depth=depth + 1)
            except WireError as fault:
                # Without its traceback, which would keep what was unpacked.
                self.faults.append(fault.with_traceback(None))


def _checked(data: bytes) -> bytes:
    """What follows the checksum, if it is right (gossip.md 3.3)."""
    claimed = int.from_bytes(data[1:5], "big")
    message = data[5:]
    if crc32(message) != claimed:
        raise WireError(f"wrong checksum {claimed:08x}, expected {crc32(message):08x}")
    return message


def _compound(messages: Sequence[bytes]) -> bytes:
    """Several messages as one (gossip.md 3.1)."""
    count = len(messages)
    assert 1 < count <= PARTS_MAX
    assert all(messages), "an empty part ends an old peer (gossip.md 3.1)"
    lengths = struct.pack(f">{count}H", *map(len, messages))
    return b"".join((bytes((COMPOUND, count)), lengths, *messages))


@lru_cache(maxsize=8)
def _shortest(message: bytes) -> bytes:
    """`message`, compressed if that is shorter. Gossip sends the same bytes to several peers."""
    packed = compressed(message)
    return packed if len(packed) < len(message) else message
