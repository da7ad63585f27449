"""The messages of the gossip layer: ping, ack, suspect, alive, dead, push/pull and their kin.

A message is a type byte and a body, nearly always one msgpack map. Field names and types are
memberlist's; which of them are written when zero is too, so that every message comes out with the
bytes of a real agent. gossip.md 2.2.

These are named tuples because a busy node makes thousands a second. They compare as tuples, so a
`Suspect` can equal a `Dead`: tell them apart by type.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from serfd.errors import WireError
from serfd.wire.gomsgpack import (
    Fields,
    boolean,
    pack,
    raw,
    signed,
    text,
    u16,
    u32,
    unpack,
)

PING = 0
INDIRECT_PING = 1
ACK = 2
SUSPECT = 3
ALIVE = 4
DEAD = 5
PUSH_PULL = 6
COMPOUND = 7
USER = 8
COMPRESS = 9
ENCRYPT = 10
NACK = 11
HAS_CRC = 12
ERR = 13
HAS_LABEL = 244

NODES_MAX = 1 << 20
"""Node states in one push/pull (gossip.md 4.3)."""

USER_BYTES_MAX = 20 << 20
"""Bytes of user state or of a user message on a stream (gossip.md 4.3)."""


class Ping(NamedTuple):
    """Are you there? Answered by an `Ack` with the same number."""

    seq: int
    node: str
    """Whom it is for; others ignore it, unless it is empty."""
    source_addr: bytes = b""
    """The sender's advertised address, 4 or 16 bytes; empty if it did not say."""
    source_port: int = 0
    source_node: str = ""


class IndirectPing(NamedTuple):
    """Ping that node for me."""

    seq: int
    target: bytes
    """The address to probe, 4 or 16 bytes."""
    port: int
    """0 stands for the receiver's own port."""
    node: str
    nack: bool
    """Whether the asker wants a `Nack` when no ack came in time."""
    source_addr: bytes = b""
    source_port: int = 0
    source_node: str = ""


class Ack(NamedTuple):
    """I am here; or, relayed, it is there."""

    seq: int
    payload: bytes = b""
    """Serf's network coordinate, in answers to a direct ping over UDP."""


class Nack(NamedTuple):
    """I am here, but the node you asked me to ping has not answered in time."""

    seq: int


class StreamError(NamedTuple):
    """An answer on a stream: your request could not be opened."""

    text: str


class Suspect(NamedTuple):
    """The accuser got no answer from `node`."""

    incarnation: int
    node: str
    accuser: str


class Alive(NamedTuple):
    """`node` is there, at this address and with this metadata."""

    incarnation: int
    node: str
    addr: bytes
    """Exactly as received; compared and passed on as bytes (gossip.md 13.2)."""
    port: int
    """0 stands for the receiver's own port."""
    meta: bytes
    """Serf's tags, encoded."""
    vsn: bytes
    """Six numbers: memberlist protocol min, max, current; Serf protocol min, max, current."""


class Dead(NamedTuple):
    """`node` is gone: declared by the accuser, or left by itself if it is its own accuser."""

    incarnation: int
    node: str
    accuser: str


class User(NamedTuple):
    """A message of the layer above, opaque here."""

    payload: bytes


class NodeState(NamedTuple):
    """One node as a push/pull tells of it."""

    name: str
    addr: bytes
    """Exactly as received, as in `Alive`."""
    port: int
    meta: bytes
    incarnation: int
    state: int
    """0 alive, 1 suspect, 2 dead, 3 left."""
    vsn: bytes


class PushPullHead(NamedTuple):
    """What a push/pull consists of."""

    nodes: int
    """How many node states follow."""
    user_state_len: int
    """Bytes of user state after them."""
    join: bool
    """Whether this exchange was started by a join."""


Message: TypeAlias = Ping | IndirectPing | Ack | Nack | Suspect | Alive | Dead | User
"""What a packet can carry."""


def encode(message: Message | StreamError) -> bytes:
    """The bytes of a message, type byte included, as a real agent writes them."""
    match message:
        case Ping(seq, node, addr, port, name):
            fields: dict[str, object] = {"Node": node, "SeqNo": seq}
            _add_source(fields, addr, port, name)
            return b"\x00" + pack(fields)
        case Ack(seq, payload):
            return b"\x02" + pack({"Payload": payload or None, "SeqNo": seq})
        case Alive(incarnation, node, addr, port, meta, vsn):
            return b"\x04" + pack(
                {
                    "Addr": addr,
                    "Incarnation": incarnation,
                    "Meta": meta or None,
                    "Node": node,
                    "Port": port,
                    "Vsn": vsn,
                }
            )
        case Suspect(incarnation, node, accuser):
            return b"\x03" + pack({"From": accuser, "Incarnation": incarnation, "Node": node})
        case Dead(incarnation, node, accuser):
            return b"\x05" + pack({"From": accuser, "Incarnation": incarnation, "Node": node})
        case User(payload):
            return b"\x08" + payload
        case IndirectPing():
            fields = {
                "Nack": message.nack,
                "Node": message.node,
                "Port": message.port,
                "SeqNo": message.seq,
            }
            _add_source(fields, message.source_addr, message.source_port, message.source_node)
            fields["Target"] = message.target
            return b"\x01" + pack(fields)
        case Nack(seq):
            return b"\x0b" + pack({"SeqNo": seq})
        case StreamError(reason):
            return b"\x0d" + pack({"Error": reason})


def _add_source(fields: dict[str, object], addr: bytes, port: int, node: str) -> None:
    if addr:
        fields["SourceAddr"] = addr
    if node:
        fields["SourceNode"] = node
    if port:
        fields["SourcePort"] = port


def decode(data: bytes) -> Message:
    """Read one message as a packet carries it, type byte included.

    Raises WireError for what is no such message: envelopes, what belongs on streams, broken bodies.
    """
    if not data:
        raise WireError("an empty message")
    decoder = _DECODERS.get(data[0])
    if decoder is None:
        raise WireError(f"message type {data[0]} has no place in a packet")
    return decoder(data[1:])


def decode_ping(body: bytes) -> Ping:
    """Read a ping, without its type byte. Raises WireError."""
    fields = unpack(body, "ping")
    return Ping(
        u32(fields, "ping", b"SeqNo"),
        text(fields, "ping", b"Node"),
        raw(fields, "ping", b"SourceAddr"),
        u16(fields, "ping", b"SourcePort"),
        text(fields, "ping", b"SourceNode"),
    )


def decode_ack(body: bytes) -> Ack:
    """Read an ack, without its type byte. Raises WireError."""
    fields = unpack(body, "ack")
    return Ack(u32(fields, "ack", b"SeqNo"), raw(fields, "ack", b"Payload"))


def decode_stream_error(body: bytes) -> StreamError:
    """Read an err answer, without its type byte. Raises WireError."""
    return StreamError(text(unpack(body, "err"), "err", b"Error"))


def encode_node_state(state: NodeState) -> bytes:
    """One node state of a push/pull."""
    name, addr, port, meta, incarnation, number, vsn = state
    return pack(
        {
            "Addr": addr,
            "Incarnation": incarnation,
            "Meta": meta or None,
            "Name": name,
            "Port": port,
            "State": number,
            "Vsn": vsn,
        }
    )


def decode_node_state(body: bytes) -> NodeState:
    """Read one node state of a push/pull. Raises WireError."""
    what = "node state"
    fields = unpack(body, what)
    return NodeState(
        text(fields, what, b"Name"),
        raw(fields, what, b"Addr"),
        u16(fields, what, b"Port"),
        _shared(raw(fields, what, b"Meta")),
        u32(fields, what, b"Incarnation"),
        signed(fields, what, b"State"),
        _shared(raw(fields, what, b"Vsn")),
    )


def encode_push_pull(nodes: Iterable[NodeState], user_state: bytes, *, join: bool) -> bytes:
    """The body of a push/pull stream, type byte included (gossip.md 4.2)."""
    states = [encode_node_state(node) for node in nodes]
    head = pack({"Join": join, "Nodes": len(states), "UserStateLen": len(user_state)})
    return b"".join([b"\x06", head, *states, user_state])


def decode_push_pull_head(body: bytes) -> PushPullHead:
    """Read the first map of a push/pull. Raises WireError, also over the limits (gossip.md 4.3)."""
    what = "push/pull"
    fields = unpack(body, what)
    nodes = signed(fields, what, b"Nodes")
    if not 0 <= nodes <= NODES_MAX:
        raise WireError(f"push/pull announces {nodes} nodes, at most {NODES_MAX} allowed")
    return PushPullHead(
        nodes,
        _user_length(fields, what, b"UserStateLen"),
        boolean(fields, what, b"Join"),
    )


def encode_user_stream(payload: bytes) -> bytes:
    """A user message in the form streams carry, type byte included (gossip.md 3.7)."""
    return b"\x08" + pack({"UserMsgLen": len(payload)}) + payload


def decode_user_length(body: bytes) -> int:
    """Read how many bytes a user message on a stream has, from its map. Raises WireError."""
    return _user_length(unpack(body, "user message"), "user message", b"UserMsgLen")


def _user_length(fields: Fields, what: str, key: bytes) -> int:
    length = signed(fields, what, key)
    if not 0 <= length <= USER_BYTES_MAX:
        raise WireError(
            f"{what}: {key.decode()} is {length}, at most {USER_BYTES_MAX} bytes allowed"
        )
    return length


def _indirect_ping(body: bytes) -> IndirectPing:
    what = "indirect ping"
    fields = unpack(body, what)
    return IndirectPing(
        u32(fields, what, b"SeqNo"),
        raw(fields, what, b"Target"),
        u16(fields, what, b"Port"),
        text(fields, what, b"Node"),
        boolean(fields, what, b"Nack"),
        raw(fields, what, b"SourceAddr"),
        u16(fields, what, b"SourcePort"),
        text(fields, what, b"SourceNode"),
    )


def _nack(body: bytes) -> Nack:
    return Nack(u32(unpack(body, "nack"), "nack", b"SeqNo"))


def _suspect(body: bytes) -> Suspect:
    fields = unpack(body, "suspect")
    return Suspect(
        u32(fields, "suspect", b"Incarnation"),
        text(fields, "suspect", b"Node"),
        text(fields, "suspect", b"From"),
    )


def _alive(body: bytes) -> Alive:
    fields = unpack(body, "alive")
    return Alive(
        u32(fields, "alive", b"Incarnation"),
        text(fields, "alive", b"Node"),
        raw(fields, "alive", b"Addr"),
        u16(fields, "alive", b"Port"),
        _shared(raw(fields, "alive", b"Meta")),
        _shared(raw(fields, "alive", b"Vsn")),
    )


def _dead(body: bytes) -> Dead:
    fields = unpack(body, "dead")
    return Dead(
        u32(fields, "dead", b"Incarnation"),
        text(fields, "dead", b"Node"),
        text(fields, "dead", b"From"),
    )


_DECODERS: dict[int, Callable[[bytes], Message]] = {
    PING: decode_ping,
    INDIRECT_PING: _indirect_ping,
    ACK: decode_ack,
    NACK: _nack,
    SUSPECT: _suspect,
    ALIVE: _alive,
    DEAD: _dead,
    USER: User,
}


def _shared(value: bytes) -> bytes:
    """The one copy of bytes that many nodes have in common, such as tags and versions."""
    return _one_copy(value) if len(value) <= 512 else value


@lru_cache(maxsize=1024)
def _one_copy(value: bytes) -> bytes:
    return value
