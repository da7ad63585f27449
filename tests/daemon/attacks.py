"""What a stranger may send to an agent's gossip port, one function each.

Each takes the port and returns the port it came from, so that its traces can be found in a log.
"""

import random
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from serfd.wire.envelope import Envelope, compressed
from serfd.wire.gomsgpack import pack
from serfd.wire.packet import PacketCodec
from serfd.wire.sealing import Keyring
from serfd.wire.stream import seal_stream
from serfd.wire.swim_messages import Alive, NodeState, Ping, encode, encode_push_pull

Attack = Callable[[int], int]

HOST = "127.0.0.1"
ALIVE = encode(Alive(7, "forged", b"\x7f\0\0\1", 7946, b"", b"\1\5\2\2\5\5"))
NOT_FOR_US = encode(Ping(1, "nobody"))
PUSH_PULL = encode_push_pull(
    [NodeState("forged", b"\x7f\0\0\1", 7946, b"", 1, 0, b"\1\5\2\2\5\5")], b"", join=True
)
CLOSED_BY_PEER = (BrokenPipeError, ConnectionResetError)


def packets(port: int, *data: bytes) -> int:
    """Send datagrams from one socket."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind((HOST, 0))
        for datagram in data:
            udp.sendto(datagram, (HOST, port))
        return int(udp.getsockname()[1])


@contextmanager
def connection(port: int, *, patience: float = 30.0) -> Iterator[socket.socket]:
    """A TCP connection; in its block it is no error if the other side hangs up."""
    with socket.create_connection((HOST, port), timeout=patience) as tcp, suppress(*CLOSED_BY_PEER):
        yield tcp


def stream(port: int, data: bytes) -> int:
    """Send bytes over TCP, and read until the other side hangs up, which it must do."""
    with connection(port) as tcp:
        own = int(tcp.getsockname()[1])
        tcp.sendall(data)
        while tcp.recv(1 << 16):
            pass
    return own


def bomb(size: int) -> bytes:
    """At least `size` zero bytes as LZW packs them, without unpacking them here (gossip.md 3.2)."""
    bits, width, count = 0, 9, 0
    packed = bytearray()

    def write(code: int) -> None:
        nonlocal bits, count
        bits |= code << count
        count += width
        while count >= 8:
            packed.append(bits & 0xFF)
            bits >>= 8
            count -= 8

    unpacked = 0
    while unpacked < size:
        write(256)
        width, newest = 9, 257
        # 0, then every code the moment it comes to be: runs of 1, 2, 3 … zeros.
        for run in range(1, 3838):
            write(0 if run == 1 else newest)
            unpacked += run
            newest += 1
            if newest == 1 << width:
                width += 1
        # A clear is written while the table is one short of full.
    write(257)
    packed.append(bits & 0xFF)
    return bytes(packed)


def compress_message(packed: bytes) -> bytes:
    return b"\x09" + pack({"Algo": 0, "Buf": packed})


def compound(*parts: bytes) -> bytes:
    lengths = struct.pack(f">{len(parts)}H", *map(len, parts))
    return bytes((7, len(parts))) + lengths + b"".join(parts)


def nested(depth: int, wrap: Callable[[bytes], bytes], inner: bytes = ALIVE) -> bytes:
    for _ in range(depth):
        inner = wrap(inner)
    return inner


def sealed_packet(key: bytes, message: bytes) -> bytes:
    codec = PacketCodec(Envelope(keyring=Keyring([key])))
    return codec.seal([message], crc=False, nonce=lambda: bytes(12))


def sealed_stream(key: bytes, body: bytes) -> bytes:
    envelope = Envelope(keyring=Keyring([key]))
    return seal_stream(body, envelope, calling=True, nonce=lambda: bytes(12))


def garbage(count: int, size: int) -> list[bytes]:
    rng = random.Random(count)
    return [rng.randbytes(rng.randrange(size)) for _ in range(count)]


ON_PACKETS: dict[str, list[bytes]] = {
    "garbage": garbage(2000, 1500),
    "large garbage": [random.Random(1).randbytes(65_507)] * 20,
    "nothing": [b""] * 100,
    "every type alone": [bytes((kind,)) for kind in range(256)],
    "a message cut short anywhere": [ALIVE[:end] for end in range(1, len(ALIVE))],
    "fields of wrong types": [
        b"\x04" + pack({"Node": 1, "Incarnation": "x", "Addr": [], "Vsn": {}}),
        b"\x00" + pack({"SeqNo": -1, "Node": "x"}),
        b"\x03" + pack({"Incarnation": 2**40, "Node": "x", "From": "x"}),
        b"\x05" + b"\x91" * 60_000,
    ],
    "lengths of 4 GiB": [
        bytes((kind,)) + head + b"\xff\xff\xff\xff"
        for kind in (0, 1, 2, 3, 4, 5, 8, 9, 11)
        for head in (b"\xdb", b"\xdd", b"\xdf", b"\xc6", b"\x81\xa4Node\xdb")
    ],
    "a compound that is shorter than it says": [
        b"\x07\xff" + b"\xff" * 100,
        b"\x07\xff" + b"\xff" * 510,
        compound(NOT_FOR_US, ALIVE)[:-1],
    ],
    "compounds in compounds": [nested(1000, lambda inner: compound(inner))],
    "compressions in compressions": [nested(12, compressed)],
    "a bomb": [compress_message(bomb(20 << 20))],
    "packets of bombs": [compound(*[compress_message(bomb(1)[:880])] * 70)] * 20,
    "a wrong checksum": [b"\x0c\0\0\0\0" + ALIVE],
    "a label": [b"\xf4\x01x" + ALIVE],
    "a foreign key": [sealed_packet(bytes(16), ALIVE)],
}
"""Nothing of this is a message for the agent."""

ON_STREAMS: dict[str, bytes] = {
    "garbage": b"\xff" + random.Random(2).randbytes(100_000),
    "a type that has no place there": b"\x04" + ALIVE,
    "sealed bytes of 4 GiB": b"\x0a\xff\xff\xff\xff" + bytes(1000),
    "sealed with a foreign key": sealed_stream(bytes(16), PUSH_PULL),
    "a text of 4 GiB": b"\x06\x81\xa5Nodes\xdb\xff\xff\xff\xff" + bytes(100_000),
    "a list of 4 billion": b"\x06\xdd\xff\xff\xff\xff" + b"\x01" * 3_000_000,
    "a map of 4 billion": b"\x06\xdf\xff\xff\xff\xff" + b"\x01" * 3_000_000,
    "two million announced nodes": b"\x06" + pack({"Join": True, "Nodes": 2_000_000}),
    "less than no nodes": b"\x06" + pack({"Join": True, "Nodes": -1}),
    "a state of 4 GiB": b"\x06" + pack({"Nodes": 0, "UserStateLen": 2**32}),
    "a message of 4 GiB": b"\x08" + pack({"UserMsgLen": 2**32}),
    "lists in lists": b"\x06" + b"\x91" * 200_000,
    "packed in packed": compressed(compressed(PUSH_PULL)),
    "packed that is none": compress_message(b"\xff" * 1000),
    "packed by an unknown algorithm": b"\x09" + pack({"Algo": 7, "Buf": b"x"}),
    "a bomb": compress_message(bomb(60 << 20)),
    "a label": b"\xf4\x01x" + PUSH_PULL,
}
"""After each of these the agent hangs up at once."""

TRICKLES: dict[str, bytes] = {
    "nothing": b"",
    "a request cut short": PUSH_PULL[:-5],
    "a million announced nodes": b"\x06" + pack({"Join": True, "Nodes": 1_000_000}),
    "20 MB announced": b"\x06" + pack({"Nodes": 0, "UserStateLen": 20 << 20}) + bytes(1000),
}
"""And then nothing more: the agent hangs up when the time for an exchange is over."""
