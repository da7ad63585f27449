"""RPC messages: requests read strictly, replies and records written as Serf's, byte for byte.

Everything here is rpc.md 1, 4 to 8. A request is a header, then a body if its command has one.
"""

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Final, NamedTuple, TypeAlias

import msgpack

from serfd.errors import SerfdError
from serfd.serf.coordinates import Coordinate
from serfd.serf.events import Member, MemberEvent, Query, UserEvent
from serfd.serf.keys import LIST, KeyResult
from serfd.serf.queries import QueryAnswer

UNREAD_MAX: Final = 1 << 20
"""Bytes one client may have sent that no command has taken yet; so also of a single request."""

ITEMS_MAX: Final = 1024
"""Entries of one list or map in a request."""

Reader: TypeAlias = Callable[[object], Any]
"""Takes a value as decoded and gives it back with the right type; None becomes the zero value."""

Fields: TypeAlias = Sequence[tuple[str, Reader]]
"""A body's fields in the order of their declaration: the name on the wire, and the reader."""


class BadRequest(SerfdError):
    """A client sent what gets no reply: the connection is closed, the reason logged (rpc.md 3)."""


class Header(NamedTuple):
    """What comes before every request's body."""

    command: str
    seq: int
    """Chosen by the client and echoed in what answers it; 0 to 2⁶⁴-1."""


def unpacker() -> msgpack.Unpacker:
    """For one connection. What it cannot decode is one of `UNDECODABLE`."""
    return msgpack.Unpacker(
        raw=False,
        unicode_errors="surrogateescape",
        strict_map_key=False,
        read_size=4096,
        max_buffer_size=UNREAD_MAX,
        # The decoder makes room for a list when it sees its announced length, nested ones too.
        max_array_len=ITEMS_MAX,
        max_map_len=ITEMS_MAX,
    )


UNDECODABLE: Final = (ValueError, TypeError, msgpack.UnpackException)
"""What decoding raises for bytes that are no msgpack, or announce too much."""


# What a field may hold (rpc.md 4). Readers raise BadRequest.


def text(value: object) -> str:
    """A text; also given as bytes, as newer agents take it. Bytes that are no UTF-8 are kept."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    raise _unfit("text", value)


def octets(value: object) -> bytes:
    """Bytes; also given as text."""
    if value is None:
        return b""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape")
    raise _unfit("bytes", value)


def boolean(value: object) -> bool:
    """True or false."""
    if value is None:
        return False
    if isinstance(value, bool):
        return value
    raise _unfit("a bool", value)


def integer(least: int, most: int) -> Reader:
    """A reader of integers from `least` to `most`, both included."""

    def read(value: object) -> int:
        if value is None:
            return 0
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
            return value
        raise _unfit(f"an integer from {least} to {most}", value)

    return read


U8: Final = integer(0, 255)
I32: Final = integer(-(2**31), 2**31 - 1)
I64: Final = integer(-(2**63), 2**63 - 1)
U64: Final = integer(0, 2**64 - 1)


def texts(value: object) -> list[str]:
    """A list of texts."""
    if value is None:
        return []
    if isinstance(value, list):
        return [text(item) for item in value]
    raise _unfit("a list of texts", value)


def text_map(value: object) -> dict[str, str]:
    """A map from text to text."""
    if value is None:
        return {}
    if isinstance(value, dict):
        return {text(key): text(item) for key, item in value.items()}
    raise _unfit("a map of texts", value)


def read_header(value: object, last: Header) -> Header:
    """A header; what it does not say is as in the `last` one (rpc.md 1). Raises BadRequest."""
    if isinstance(value, dict):
        given = value
    elif isinstance(value, list):
        given = dict(zip(("Command", "Seq"), value, strict=False))
    else:
        raise _unfit("a map", value)
    return Header(
        text(given["Command"]) if "Command" in given else last.command,
        U64(given["Seq"]) if "Seq" in given else last.seq,
    )


def read_body(fields: Fields, value: object) -> list[Any]:
    """The values of `fields`, in their order; missing ones are zero. Raises BadRequest."""
    if isinstance(value, dict):
        given = [value.get(name) for name, _ in fields]
    elif isinstance(value, list):
        given = [*value, *[None] * len(fields)]
    elif value is None:
        given = [None] * len(fields)
    else:
        raise _unfit("a map", value)
    values = []
    for (name, read), item in zip(fields, given, strict=False):
        try:
            values.append(read(item))
        except BadRequest as error:
            raise BadRequest(f"{name}: {error}") from None
    return values


def pack(value: Mapping[str, object]) -> bytes:
    """A body's bytes. Maps are written in their own order: Serf's structs need it alphabetical."""
    packed: bytes
    try:
        packed = _pack(value)
    except UnicodeEncodeError:
        # Some name from the network is no UTF-8. To provide for it always costs half as much again.
        packed = _pack_any_text(value)
    return packed


def header(seq: int, error: str = "") -> bytes:
    """The header of a reply or record."""
    return pack({"Error": error, "Seq": seq})


class PackedMembers:
    """Members, and the replies to `members` and `members-filtered` that list all or some of them.

    Of 5,000 members it holds 1.3 MB; to make it takes as long as a hundred replies from it.
    """

    __slots__ = ("_ends", "body", "members")

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        packed = [pack(_member(member)) for member in members]
        head = _members_head(len(members))
        self.body = b"".join((head, *packed))
        """The reply that lists all."""
        self._ends = array("Q", accumulate(map(len, packed), initial=len(head)))

    def body_of(self, chosen: Iterable[int]) -> bytes:
        """The reply that lists those at these places of `members`."""
        body, ends = self.body, self._ends
        some = [body[ends[i] : ends[i + 1]] for i in chosen]
        return b"".join((_members_head(len(some)), *some))


def event_body(event: MemberEvent | UserEvent) -> bytes:
    """The body of a stream's record (rpc.md 6)."""
    match event:
        case MemberEvent():
            members = [_member(member) for member in event.members]
            return pack({"Event": event.name, "Members": members})
        case UserEvent():
            return pack(
                {
                    "Coalesce": event.coalesce,
                    "Event": "user",
                    "LTime": event.ltime,
                    "Name": event.name,
                    "Payload": event.payload or None,
                }
            )


def query_body(number: int, rest: bytes) -> bytes:
    """The body of a record that tells of a query; `number` is for `respond` (rpc.md 6)."""
    packed: bytes = _pack(number)
    return _QUERY_HEAD + packed + rest


def query_rest(query: Query) -> bytes:
    """What is the same in all records that tell of this query."""
    fields = {"LTime": query.ltime, "Name": query.name, "Payload": query.payload or None}
    packed = pack(fields)
    return packed[1:]


def answer_body(answer: QueryAnswer) -> bytes:
    """The body of a query's record (rpc.md 8)."""
    return pack(
        {
            "From": answer.sender,
            "Payload": answer.payload or None,
            "Type": "ack" if answer.is_ack else "response",
        }
    )


def keys_body(query: str, result: KeyResult | None) -> dict[str, object]:
    """The reply to a key command, `query` being its name among members; None: nobody was asked."""
    found = result or KeyResult({}, {}, 0, 0, 0, "")
    return {
        "Keys": found.keys if query == LIST else None,
        "Messages": found.messages,
        "NumErr": found.errors,
        "NumNodes": found.nodes,
        "NumResp": found.responses,
    }


def coordinate_body(found: Coordinate | None) -> dict[str, object]:
    """The reply to `get-coordinate`; None: it is not known."""
    vec, error, adjustment, height = found or (None, 0.0, 0.0, 0.0)
    coordinate = {"Adjustment": adjustment, "Error": error, "Height": height, "Vec": vec}
    return {"Coord": coordinate, "Ok": found is not None}


def log_body(line: str) -> bytes:
    """The body of a monitor's record (rpc.md 7)."""
    return pack({"Log": line})


# `default` turns the mappings that are no dicts into one.
_pack: Final = msgpack.Packer(default=dict).pack
_pack_any_text: Final = msgpack.Packer(default=dict, unicode_errors="surrogateescape").pack


DONE: Final = pack({"From": "", "Payload": None, "Type": "done"})
"""The body of a query's last record."""

_QUERY_HEAD: Final = b"\x85" + pack({"Event": "query", "ID": 0})[1:-1]


def _members_head(count: int) -> bytes:
    head: bytes = b"\x81\xa7Members" + msgpack.Packer().pack_array_header(count)
    return head


def _member(member: Member) -> dict[str, object]:
    protocol_min, protocol_max, protocol, delegate_min, delegate_max, delegate = member.versions
    return {
        "Addr": member.addr,
        "DelegateCur": delegate,
        "DelegateMax": delegate_max,
        "DelegateMin": delegate_min,
        "Name": member.name,
        "Port": member.port,
        "ProtocolCur": protocol,
        "ProtocolMax": protocol_max,
        "ProtocolMin": protocol_min,
        "Status": member.status.text,
        "Tags": member.tags,
    }


def _unfit(expected: str, value: object) -> BadRequest:
    return BadRequest(f"expected {expected}, found {type(value).__name__}")
