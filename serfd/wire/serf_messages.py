"""The messages of the Serf layer: intents, user events, queries, responses, keys, relays.

They travel inside user messages and push/pulls of the gossip layer; conflict and key messages
inside the payloads of queries. A type byte and one msgpack map. Source: serf.md 1-4, 11, 12.

Named tuples compare as tuples: tell messages apart by type.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

from serfd.errors import WireError
from serfd.wire.gomsgpack import (
    Fields,
    as_bytes,
    as_text,
    boolean,
    elements,
    pack,
    raw,
    raws,
    scalar_pairs,
    scalars,
    signed,
    singles,
    split,
    text,
    u8,
    u16,
    u32,
    u64,
    unpack,
    unpack_head,
)

EVENT_SLOTS = 512
"""Slots of the ring of events that a push/pull carries; an event's is its ltime modulo this."""

LTIME_MAX = 2**64 - 2
"""The highest Lamport time accepted; one more wraps a real agent's clock to zero (serf.md 5)."""

_EVENTS_MAX = 65536
"""Slots, and events in all of them, that a push/pull may have; real agents have 512 slots."""

_MEMBERS_MAX = 1 << 20
"""Members that a push/pull may tell of, as in the layer below."""

WANTS_ACK = 1
"""Flag of a query."""
IS_ACK = 1
"""Flag of a query response."""
NO_BROADCAST = 2
"""Flag of a query that is not to be spread further."""


class LeaveIntent(NamedTuple):
    """`node` leaves, or somebody else says it has left."""

    ltime: int
    node: str
    prune: bool = False
    """Forget the node altogether."""


class JoinIntent(NamedTuple):
    """`node` has joined."""

    ltime: int
    node: str


class PushPullState(NamedTuple):
    """Serf's part of a push/pull."""

    ltime: int
    status_ltimes: dict[str, int]
    """For each member the time of the last intent about it."""
    left_members: list[str]
    event_ltime: int
    events: list[tuple[int, list[tuple[str, bytes]]]]
    """Recent events: their ltime, then name and payload of each that has this ltime."""
    query_ltime: int


class UserEventMessage(NamedTuple):
    """Something a user told the cluster."""

    ltime: int
    name: str
    payload: bytes
    coalesce: bool
    """Whether only the newest of several with this name is of interest."""


class QueryMessage(NamedTuple):
    """A question to the cluster."""

    ltime: int
    id: int
    addr: bytes
    """Where answers go, 4 or 16 bytes."""
    port: int
    source_node: str
    filters: tuple[bytes, ...]
    """Each encoded; only members that pass all of them answer."""
    flags: int
    relay_factor: int
    """How many other members should pass on each answer too."""
    timeout_ns: int
    name: str
    payload: bytes


class QueryResponse(NamedTuple):
    """An answer to a query, or only the word that it has arrived."""

    ltime: int
    id: int
    sender: str
    flags: int
    payload: bytes


class ConflictMember(NamedTuple):
    """A member as another one knows it."""

    name: str
    addr: bytes
    port: int
    tags: dict[str, str]
    status: int
    versions: bytes
    """Six numbers: memberlist protocol min, max, current; Serf protocol min, max, current."""


class ConflictResponse(NamedTuple):
    """What a member knows of a disputed name; None if nothing."""

    member: ConflictMember | None


class KeyRequest(NamedTuple):
    """The key to install, use or remove; empty when all are to be listed."""

    key: bytes

    def __repr__(self) -> str:
        """Say how long the key is, not what."""
        return f"KeyRequest(<{len(self.key)} bytes>)"


class KeyResponse(NamedTuple):
    """How a member fared with a key request."""

    result: bool
    message: str
    keys: list[str]
    """All its keys in base64, if it was asked for them."""
    primary_key: str
    """The one it seals with, in base64."""

    def __repr__(self) -> str:
        """Say how many keys there are, not which."""
        return f"KeyResponse({self.result}, {self.message!r}, <{len(self.keys)} keys>)"


class Relay(NamedTuple):
    """A message to be passed on unchanged."""

    addr: bytes
    """4 or 16 bytes."""
    port: int
    name: str
    """The node it is for."""
    inner: bytes
    """A whole Serf message."""


SerfMessage: TypeAlias = (
    LeaveIntent
    | JoinIntent
    | PushPullState
    | UserEventMessage
    | QueryMessage
    | QueryResponse
    | ConflictResponse
    | KeyRequest
    | KeyResponse
    | Relay
)
"""What the type bytes 0 to 9 stand for."""


def encode(message: SerfMessage) -> bytes:
    """The bytes of a message, type byte included, as a real agent writes them."""
    match message:
        case LeaveIntent(ltime, node, prune):
            return b"\x00" + pack({"LTime": ltime, "Node": node, "Prune": prune})
        case JoinIntent(ltime, node):
            return b"\x01" + pack({"LTime": ltime, "Node": node})
        case PushPullState():
            return b"\x02" + pack(_push_pull_fields(message))
        case UserEventMessage(ltime, name, payload, coalesce):
            return b"\x03" + pack(
                {"CC": coalesce, "LTime": ltime, "Name": name, "Payload": payload or None}
            )
        case QueryMessage():
            return b"\x04" + pack(
                {
                    "Addr": message.addr,
                    "Filters": message.filters or None,
                    "Flags": message.flags,
                    "ID": message.id,
                    "LTime": message.ltime,
                    "Name": message.name,
                    "Payload": message.payload or None,
                    "Port": message.port,
                    "RelayFactor": message.relay_factor,
                    "SourceNode": message.source_node,
                    "Timeout": message.timeout_ns,
                }
            )
        case QueryResponse(ltime, number, sender, flags, payload):
            return b"\x05" + pack(
                {
                    "Flags": flags,
                    "From": sender,
                    "ID": number,
                    "LTime": ltime,
                    "Payload": payload or None,
                }
            )
        case ConflictResponse(member):
            return b"\x06" + pack(None if member is None else _member_fields(member))
        case KeyRequest(key):
            return b"\x07" + pack({"Key": key})
        case KeyResponse(result, reason, keys, primary_key):
            return b"\x08" + pack(
                {
                    "Keys": keys or None,
                    "Message": reason,
                    "PrimaryKey": primary_key,
                    "Result": result,
                }
            )
        case Relay(addr, port, name, inner):
            target = {"IP": addr, "Port": port, "Zone": ""}
            return b"\x09" + pack({"DestAddr": target, "DestName": name}) + inner


def decode(data: bytes) -> SerfMessage:
    """Read one message, type byte included.

    Raises WireError for unknown types, broken bodies, and Lamport times above `LTIME_MAX`.
    """
    if not data:
        raise WireError("an empty Serf message")
    decoder = _DECODERS.get(data[0])
    if decoder is None:
        raise WireError(f"unknown Serf message type {data[0]}")
    return decoder(data[1:])


def encode_tags(tags: Mapping[str, str], *, protocol: int) -> bytes:
    """A node's metadata: its tags; in Serf protocol 2 only the value of `role` (serf.md 3)."""
    if protocol < 3:
        return as_bytes(tags.get("role", ""))
    return b"\xff" + pack({name: tags[name] for name in sorted(tags, key=as_bytes)})


def decode_tags(meta: bytes) -> dict[str, str]:
    """Read a node's metadata; empty if it claims to be tags but cannot be read (serf.md 3)."""
    if not meta.startswith(b"\xff"):
        return {"role": meta.decode("utf-8", "surrogateescape")}
    try:
        return _tags(unpack(meta[1:], "tags"), "tags")
    except WireError:
        return {}


def _tags(fields: Fields, what: str) -> dict[str, str]:
    return {as_text(name, what, b"Tags"): text(fields, what, name) for name in fields}


def _push_pull_fields(state: PushPullState) -> dict[str, object]:
    slots: list[object] = [None] * EVENT_SLOTS
    for ltime, events in state.events:
        slots[ltime % EVENT_SLOTS] = {
            "Events": [{"Name": name, "Payload": payload or None} for name, payload in events],
            "LTime": ltime,
        }
    return {
        "EventLTime": state.event_ltime,
        "Events": slots,
        "LTime": state.ltime,
        "LeftMembers": state.left_members,
        "QueryLTime": state.query_ltime,
        "StatusLTimes": state.status_ltimes,
    }


def _push_pull(body: bytes) -> PushPullState:
    what = "push/pull state"
    # Its lists can be long: they are read step by step, each with a limit.
    parts = split(body, what)
    clocks = singles(parts, (b"LTime", b"EventLTime", b"QueryLTime"), what)
    statuses = scalar_pairs(parts.get(b"StatusLTimes", b""), what, limit=_MEMBERS_MAX)
    left = scalars(parts.get(b"LeftMembers", b""), what, limit=_MEMBERS_MAX)
    events: list[tuple[int, list[tuple[str, bytes]]]] = []
    room = _EVENTS_MAX
    for slot in elements(parts.get(b"Events", b""), what, limit=_EVENTS_MAX):
        if slot != b"\xc0":
            events.append(_event_slot(slot, limit=room))
            room -= len(events[-1][1])
    return PushPullState(
        _ltime(clocks, what, b"LTime"),
        {
            as_text(name, what, b"StatusLTimes"): _ltime(
                {b"StatusLTimes": ltime}, what, b"StatusLTimes"
            )
            for name, ltime in statuses
        },
        [as_text(name, what, b"LeftMembers") for name in left],
        _ltime(clocks, what, b"EventLTime"),
        events,
        _ltime(clocks, what, b"QueryLTime"),
    )


def _event_slot(slot: bytes, *, limit: int) -> tuple[int, list[tuple[str, bytes]]]:
    what = "push/pull event"
    parts = split(slot, what)
    ltime = _ltime(singles(parts, (b"LTime",), what), what, b"LTime")
    events = []
    for event in elements(parts.get(b"Events", b""), what, limit=limit):
        fields = unpack(event, what)
        events.append((text(fields, what, b"Name"), raw(fields, what, b"Payload")))
    return ltime, events


def _leave(body: bytes) -> LeaveIntent:
    what = "leave intent"
    fields = unpack(body, what)
    return LeaveIntent(
        _ltime(fields, what, b"LTime"),
        text(fields, what, b"Node"),
        boolean(fields, what, b"Prune"),
    )


def _join(body: bytes) -> JoinIntent:
    fields = unpack(body, "join intent")
    return JoinIntent(_ltime(fields, "join intent", b"LTime"), text(fields, "join intent", b"Node"))


def _user_event(body: bytes) -> UserEventMessage:
    what = "user event"
    fields = unpack(body, what)
    return UserEventMessage(
        _ltime(fields, what, b"LTime"),
        text(fields, what, b"Name"),
        raw(fields, what, b"Payload"),
        boolean(fields, what, b"CC"),
    )


def _query(body: bytes) -> QueryMessage:
    fields = unpack(body, "query")
    return QueryMessage(
        _ltime(fields, "query", b"LTime"),
        u32(fields, "query", b"ID"),
        raw(fields, "query", b"Addr"),
        u16(fields, "query", b"Port"),
        text(fields, "query", b"SourceNode"),
        tuple(raws(fields, "query", b"Filters")),
        u32(fields, "query", b"Flags"),
        u8(fields, "query", b"RelayFactor"),
        signed(fields, "query", b"Timeout"),
        text(fields, "query", b"Name"),
        raw(fields, "query", b"Payload"),
    )


def _query_response(body: bytes) -> QueryResponse:
    what = "query response"
    fields = unpack(body, what)
    return QueryResponse(
        _ltime(fields, what, b"LTime"),
        u32(fields, what, b"ID"),
        text(fields, what, b"From"),
        u32(fields, what, b"Flags"),
        raw(fields, what, b"Payload"),
    )


_VERSION_FIELDS = (
    "ProtocolMin",
    "ProtocolMax",
    "ProtocolCur",
    "DelegateMin",
    "DelegateMax",
    "DelegateCur",
)


def _member_fields(member: ConflictMember) -> dict[str, object]:
    fields: dict[str, object] = {
        "Addr": member.addr,
        "Name": member.name,
        "Port": member.port,
        "Status": member.status,
        "Tags": {name: member.tags[name] for name in sorted(member.tags, key=as_bytes)},
        **dict(zip(_VERSION_FIELDS, member.versions, strict=True)),
    }
    return dict(sorted(fields.items()))


def _conflict_response(body: bytes) -> ConflictResponse:
    if body.startswith(b"\xc0"):
        return ConflictResponse(None)
    what = "conflict response"
    fields = unpack(body, what)
    tags = fields.get(b"Tags") or {}
    if type(tags) is not dict:
        raise WireError(f"{what}: Tags is something else than a map")
    return ConflictResponse(
        ConflictMember(
            text(fields, what, b"Name"),
            raw(fields, what, b"Addr"),
            u16(fields, what, b"Port"),
            _tags(tags, what),
            signed(fields, what, b"Status"),
            bytes(u8(fields, what, name.encode()) for name in _VERSION_FIELDS),
        )
    )


def _key_request(body: bytes) -> KeyRequest:
    return KeyRequest(raw(unpack(body, "key request"), "key request", b"Key"))


def _key_response(body: bytes) -> KeyResponse:
    what = "key response"
    fields = unpack(body, what)
    return KeyResponse(
        boolean(fields, what, b"Result"),
        text(fields, what, b"Message"),
        [as_text(key, what, b"Keys") for key in raws(fields, what, b"Keys")],
        text(fields, what, b"PrimaryKey"),
    )


def _relay(body: bytes) -> Relay:
    fields, inner = unpack_head(body, "relay")
    target = fields.get(b"DestAddr") or {}
    if type(target) is not dict:
        raise WireError("relay: DestAddr is something else than a map")
    return Relay(
        raw(target, "relay", b"IP"),
        u16(target, "relay", b"Port"),
        text(fields, "relay", b"DestName"),
        inner,
    )


def _ltime(fields: Fields, what: str, key: bytes) -> int:
    value = u64(fields, what, key)
    if value > LTIME_MAX:
        raise WireError(f"{what}: {key.decode()} is {value}, expected at most {LTIME_MAX}")
    return value


_DECODERS: dict[int, Callable[[bytes], SerfMessage]] = {
    0: _leave,
    1: _join,
    2: _push_pull,
    3: _user_event,
    4: _query,
    5: _query_response,
    6: _conflict_response,
    7: _key_request,
    8: _key_response,
    9: _relay,
}
