"""The msgpack dialect Go peers speak: maps with text keys, one raw form for text and bytes.

Everything raw is read as bytes and turned into text field by field, since only a field's name says
which of the two it is. What a peer sent becomes `Fields`; the typed readers take one field out of
it, and raise WireError naming message and field. Sources: gossip.md 2.1, serf.md 1.

Decoders give a list its announced length before they see what is in it. So nothing that may hold
a list is read before its end was found.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, TypeAlias

from msgpack import ExtraData, OutOfData, Packer, Unpacker, unpackb

from serfd.errors import WireError

Fields: TypeAlias = dict[bytes, Any]
"""A map as a peer wrote it: raws are bytes, whether they are meant as text or not."""

FIELDS_MAX = 256
"""Fields of one message; the longest has eleven."""

VALUE_BYTES_MAX = 65536
"""The longest map read in one go; a packet is no longer, and a node state of an honest peer has
under 2 kB. What a decoder builds can take 60 times as much memory."""

RAW_HEAD_MAX = 1024
"""Bytes of a map before the bytes of a raw too long to wait for; real agents have 13."""

_NOTHING = (b"", b"\xc0")

_UNREADABLE = object()
"""Stands for a value that no field we know can have."""

_LENGTH_SIZES = {0xD9: 1, 0xC4: 1, 0xDA: 2, 0xC5: 2, 0xDB: 4, 0xC6: 4}
"""The first byte of a raw that is longer than 31 bytes, and how many bytes its length has."""

pack: Callable[[object], bytes] = Packer(use_bin_type=False, unicode_errors="surrogateescape").pack
"""Write a value. Maps are written in their own order: a message's fields must be sorted by name."""


def as_bytes(name: str) -> bytes:
    """Text as it goes on the wire; also the key that sorts names as Go does."""
    return name.encode("utf-8", "surrogateescape")


def unpack(data: bytes, what: str) -> Fields:
    """Read the map that `data` starts with; bytes after it are ignored.

    Raises WireError, which calls the message `what`, if there is no whole map.
    """
    return unpack_head(data, what)[0]


def unpack_head(data: bytes, what: str) -> tuple[Fields, bytes]:
    """Read the map that `data` starts with, and give the bytes after it too. Raises WireError."""
    if len(data) > VALUE_BYTES_MAX:
        return _unpack_carefully(data, what)
    rest = b""
    try:
        # Most messages hold no lists, so the common way needs no look ahead.
        fields = unpackb(data, raw=True, max_array_len=0)
    except ExtraData as extra:
        fields, rest = extra.unpacked, extra.extra
    except Exception:  # noqa: BLE001 - msgpack raises many kinds; the careful way names the fault
        return _unpack_carefully(data, what)
    if type(fields) is not dict:
        raise WireError(f"{what}: is {_shown(fields)}, expected a map")
    return fields, rest


def _unpack_carefully(data: bytes, what: str) -> tuple[Fields, bytes]:
    """Read a map with nested values, or find out what is wrong with it."""
    spans, end = _spans(data, what)
    if end > VALUE_BYTES_MAX:
        raise WireError(f"{what}: {end} bytes, at most {VALUE_BYTES_MAX} expected")
    return {key: _value(data[start:stop]) for key, start, stop in spans}, data[end:]


def _value(data: bytes) -> Any:
    """Any one value that is known to be whole."""
    try:
        return unpackb(data, raw=True)
    except Exception:  # noqa: BLE001 - well-formed, but nothing Python has, such as a list as key
        return _UNREADABLE


def split(data: bytes, what: str) -> dict[bytes, bytes]:
    """Cut the map that `data` starts with into its values' own bytes, without reading them.

    For messages with long lists. Raises WireError if there is no whole map.
    """
    return {key: data[start:stop] for key, start, stop in _spans(data, what)[0]}


def singles(parts: dict[bytes, bytes], keys: Iterable[bytes], what: str) -> Fields:
    """Read those values of a split map that are neither lists nor maps. Raises WireError."""
    with _decoding(what, "single values"):
        return {key: _stepper(parts[key]).unpack() for key in keys if key in parts}


def _spans(data: bytes, what: str) -> tuple[list[tuple[bytes, int, int]], int]:
    """The keys of a map with the place of each value, and the end of the map."""
    with _decoding(what, "a map"):
        unpacker = _stepper(data)
        many = _within(unpacker.read_map_header(), what, FIELDS_MAX)
        spans = []
        for _ in range(many):
            key = unpacker.unpack()
            if type(key) is not bytes:
                raise WireError(f"{what}: has {_shown(key)} as a key, expected text")
            start = unpacker.tell()
            unpacker.skip()
            spans.append((key, start, unpacker.tell()))
        return spans, unpacker.tell()


def find_raw(start: bytes, key: bytes, what: str) -> tuple[Fields, int, int] | None:
    """Find a raw too long to wait for in a map of which `start` has arrived so far.

    Gives the fields before it, where its bytes begin and how many they will be; a missing one is
    empty. None if `start` does not reach that far. Raises WireError, also if the raw does not
    begin within `RAW_HEAD_MAX` bytes.
    """
    head = start[:RAW_HEAD_MAX]
    fields: Fields = {}
    with _decoding(what, "a map"):
        unpacker = _stepper(head)
        try:
            for _ in range(unpacker.read_map_header()):
                name = unpacker.unpack()
                at = unpacker.tell()
                if name == key:
                    length = _raw_length(head[at : at + 5])
                    if length is not None:
                        return fields, at + length[0], length[1]
                    raise OutOfData
                unpacker.skip()
                fields[name] = _value(head[at : unpacker.tell()])
            return fields, unpacker.tell(), 0
        except OutOfData:
            if len(start) < RAW_HEAD_MAX:
                return None
            raise


def _raw_length(head: bytes) -> tuple[int, int] | None:
    """How many bytes say how long a raw is, and how long it is; None if some are missing."""
    first = head[0] if head else 0xD9
    if first == 0xC0:
        return 1, 0
    if 0xA0 <= first <= 0xBF:
        return 1, first - 0xA0
    size = 1 + _LENGTH_SIZES[first]
    return (size, int.from_bytes(head[1:size], "big")) if len(head) >= size else None


def elements(data: bytes, what: str, *, limit: int) -> list[bytes]:
    """Cut a list into the bytes of its elements; missing (no bytes) or nil is empty.

    Raises WireError if it is no list, or has more than `limit` elements.
    """
    if data in _NOTHING:
        return []
    with _decoding(what, "a list"):
        unpacker = _stepper(data)
        many = _within(unpacker.read_array_header(), what, limit)
        cuts = [unpacker.tell()]
        for _ in range(many):
            unpacker.skip()
            cuts.append(unpacker.tell())
    return [data[start:stop] for start, stop in pairwise(cuts)]


def scalars(data: bytes, what: str, *, limit: int) -> list[Any]:
    """Read a list that holds no lists or maps; missing (no bytes) or nil is empty.

    Raises WireError if it is something else, or has more than `limit` elements.
    """
    if data in _NOTHING:
        return []
    with _decoding(what, "a list of single values"):
        unpacker = _stepper(data)
        many = _within(unpacker.read_array_header(), what, limit)
        return [unpacker.unpack() for _ in range(many)]


def scalar_pairs(data: bytes, what: str, *, limit: int) -> list[tuple[Any, Any]]:
    """Read a map that holds no lists or maps; missing (no bytes) or nil is empty.

    Raises WireError if it is something else, or has more than `limit` pairs.
    """
    if data in _NOTHING:
        return []
    with _decoding(what, "a map of single values"):
        unpacker = _stepper(data)
        many = _within(unpacker.read_map_header(), what, limit)
        return [(unpacker.unpack(), unpacker.unpack()) for _ in range(many)]


@contextmanager
def _decoding(what: str, expected: str) -> Iterator[None]:
    try:
        yield
    except WireError:
        raise
    except Exception as error:
        raise WireError(f"{what}: not msgpack, or not {expected}") from error


def _stepper(data: bytes) -> Unpacker:
    """Steps through `data`; whatever it builds is a single value, never a list or a map."""
    unpacker = Unpacker(
        raw=True, max_array_len=0, max_map_len=0, read_size=1, max_buffer_size=len(data) or 1
    )
    unpacker.feed(data)
    return unpacker


def _within(many: int, what: str, limit: int) -> int:
    if many > limit:
        raise WireError(f"{what}: {many} entries, at most {limit} expected")
    return many


class ValueCutter:
    """Cuts whole msgpack values out of bytes that arrive in pieces, without reading them."""

    __slots__ = ("_bytes", "_start", "_unpacker", "_what")

    def __init__(self, what: str) -> None:
        self._what = what
        self._unpacker = Unpacker(raw=True, read_size=1)
        self._bytes = bytearray()
        self._start = 0

    def feed(self, data: bytes) -> None:
        """Add what arrived."""
        self._unpacker.feed(data)
        self._bytes += data

    def take(self, most: int) -> list[bytes]:
        """Give up to `most` values that are complete.

        Raises WireError for what is not msgpack, and for a value over `VALUE_BYTES_MAX`.
        """
        ends = []
        try:
            for _ in range(most):
                self._unpacker.skip()
                ends.append(self._unpacker.tell() - self._start)
        except OutOfData:
            held = len(self._bytes) - (ends[-1] if ends else 0)
            if held > VALUE_BYTES_MAX:
                raise WireError(
                    f"{self._what}: over {VALUE_BYTES_MAX} bytes and no end of a value"
                ) from None
        except Exception as error:
            raise WireError(f"{self._what}: not msgpack") from error
        if not ends:
            return []
        cut = bytes(self._bytes[: ends[-1]])
        del self._bytes[: ends[-1]]
        self._start += ends[-1]
        return [cut[start:end] for start, end in pairwise([0, *ends])]

    def rest(self) -> bytes:
        """What came after the values taken."""
        return bytes(self._bytes)


def _unsigned(bits: int) -> Callable[[Fields, str, bytes], int]:
    highest = (1 << bits) - 1

    def read(fields: Fields, what: str, key: bytes) -> int:
        value = fields.get(key, 0)
        if type(value) is int and 0 <= value <= highest:
            return value
        if value is None:
            return 0
        raise _wrong(value, what, key, f"an unsigned {bits} bit number")

    return read


u8 = _unsigned(8)
u16 = _unsigned(16)
u32 = _unsigned(32)
u64 = _unsigned(64)


def signed(fields: Fields, what: str, key: bytes) -> int:
    """A number of a signed field of 64 bits; missing or nil is 0. Raises WireError."""
    value = fields.get(key, 0)
    if type(value) is int and value < 1 << 63:
        return value
    if value is None:
        return 0
    raise _wrong(value, what, key, "a signed 64 bit number")


def boolean(fields: Fields, what: str, key: bytes) -> bool:
    """True or false; missing or nil is false. Raises WireError."""
    value = fields.get(key, False)
    if type(value) is bool:
        return value
    if value is None:
        return False
    raise _wrong(value, what, key, "true or false")


def raw(fields: Fields, what: str, key: bytes) -> bytes:
    """Bytes; missing or nil is empty. Raises WireError."""
    value = fields.get(key, b"")
    if type(value) is bytes:
        return value
    if value is None:
        return b""
    raise _wrong(value, what, key, "bytes")


def text(fields: Fields, what: str, key: bytes) -> str:
    """Text, its bytes that are not UTF-8 as surrogates; missing or nil is "". Raises WireError."""
    value = fields.get(key, b"")
    if type(value) is bytes:
        return value.decode("utf-8", "surrogateescape")
    if value is None:
        return ""
    raise _wrong(value, what, key, "text")


def raws(fields: Fields, what: str, key: bytes) -> list[bytes]:
    """A list of bytes; missing or nil is empty. Raises WireError."""
    values = fields.get(key)
    if values is None:
        return []
    if type(values) is not list:
        raise _wrong(values, what, key, "a list")
    return [as_raw(value, what, key) for value in values]


def as_raw(value: object, what: str, key: bytes) -> bytes:
    """One raw of a list or map in the field `key`; nil is empty. Raises WireError."""
    if type(value) is bytes:
        return value
    if value is None:
        return b""
    raise _wrong(value, what, key, "raws only")


def as_text(value: object, what: str, key: bytes) -> str:
    """One text of a list or map in the field `key`; nil is "". Raises WireError."""
    return as_raw(value, what, key).decode("utf-8", "surrogateescape")


def _wrong(value: object, what: str, key: bytes, expected: str) -> WireError:
    name = key[:64].decode("utf-8", "replace")
    return WireError(f"{what}: {name} is {_shown(value)}, expected {expected}")


def _shown(value: object) -> str:
    """A value in words; never long, and never what may be a secret."""
    if isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, bytes):
        return repr(value.decode("ascii", "replace")) if len(value) < 16 else "a long raw"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "a map"
    return "nil" if value is None else "something else"
