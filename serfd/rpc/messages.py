"""RPC messages: requests read strictly, replies and records written as Serf's, byte for byte.

Everything here is rpc.md 1, 4, 5 and 6. A request is a header, then a body if its command has one.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import msgpack

from serfd.errors import SerfdError
from serfd.serf.events import Event, Member, MemberEvent, UserEvent

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


I32: Final = integer(-(2**31), 2**31 - 1)
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


def members_body(members: Iterable[Member]) -> dict[str, object]:
    """The reply to `members` and `members-filtered`."""
    return {"Members": [_member(member) for member in members]}


def event_body(event: Event) -> bytes:
    """The body of a stream's record (rpc.md 6)."""
    match event:
        case MemberEvent():
            return pack({"Event": event.name, **members_body(event.members)})
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


def log_body(line: str) -> bytes:
    """The body of a monitor's record (rpc.md 7)."""
    return pack({"Log": line})


# `default` turns the mappings that are no dicts into one.
_pack: Final = msgpack.Packer(default=dict).pack
_pack_any_text: Final = msgpack.Packer(default=dict, unicode_errors="surrogateescape").pack


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
