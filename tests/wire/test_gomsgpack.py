"""The msgpack dialect of Go peers: what is written, what is read, what is refused."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serfd.errors import WireError
from serfd.wire import gomsgpack
from serfd.wire.gomsgpack import VALUE_BYTES_MAX, Fields, ValueCutter, find_raw, pack, unpack

Peak = Callable[[int], AbstractContextManager[None]]


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("a" * 31, b"\xbf" + b"a" * 31),
        ("a" * 32, b"\xda\x00\x20" + b"a" * 32),
        (b"a" * 255, b"\xda\x00\xff" + b"a" * 255),
        (b"a" * 65536, b"\xdb\x00\x01\x00\x00" + b"a" * 65536),
        ("\udcff", b"\xa1\xff"),
        (127, b"\x7f"),
        (128, b"\xcc\x80"),
        (3_000_000_000, b"\xce\xb2\xd0\x5e\x00"),
        (2**64 - 1, b"\xcf" + b"\xff" * 8),
        (True, b"\xc3"),
        (None, b"\xc0"),
        ({"B": 1, "a": 2}, b"\x82\xa1B\x01\xa1a\x02"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_values_are_written_as_old_agents_write_them(value: object, written: bytes) -> None:
    assert pack(value) == written


def test_names_sort_by_their_bytes() -> None:
    names = ["z", "é", "\udcff", "Z"]
    assert sorted(names, key=gomsgpack.as_bytes) == ["Z", "z", "é", "\udcff"]


def test_bytes_after_the_map_are_ignored_or_given() -> None:
    data = pack({"A": 1}) + b"rest"
    assert unpack(data, "ping") == {b"A": 1}
    assert gomsgpack.unpack_head(data, "relay") == ({b"A": 1}, b"rest")


UNKNOWN_VALUES = [
    b"\x93\x01\x02\x03",
    b"\x91\x91\x91\x90",
    b"\x81\x01\x02",
    b"\x81\x91\x01\x02",
    b"\xd4\x05\x00",
    b"\xd6\xff\x00\x00\x00\x01",
    b"\xc7\x01\xff\x00",
    b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",
    b"\xc4\x01\xff",
    b"\xd9\x01\xff",
]


@pytest.mark.parametrize("value", UNKNOWN_VALUES, ids=bytes.hex)
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_an_unknown_field_is_skipped_whatever_its_type(value: bytes, *, first: bool) -> None:
    known = b"\xa5SeqNo\x07"
    unknown = b"\xa3New" + value
    data = b"\x82" + (unknown + known if first else known + unknown)
    fields, rest = gomsgpack.unpack_head(data + b"rest", "ping")
    assert gomsgpack.u32(fields, "ping", b"SeqNo") == 7
    assert rest == b"rest"


@pytest.mark.parametrize("value", UNKNOWN_VALUES[:8], ids=bytes.hex)
def test_such_a_value_in_a_known_field_is_a_wire_error(value: bytes) -> None:
    fields = unpack(b"\x81\xa5SeqNo" + value, "ping")
    with pytest.raises(WireError, match=r"ping: SeqNo is .+, expected an unsigned 32 bit number"):
        gomsgpack.u32(fields, "ping", b"SeqNo")


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "not msgpack, or not a map"),
        (b"\x82\xa1A\x01", "not msgpack, or not a map"),
        (b"\xc1", "not msgpack, or not a map"),
        (b"\x81\xa1A\xc1", "not msgpack, or not a map"),
        (b"\x93\x01\x02\x03", "not msgpack, or not a map"),
        (b"\x07", "is 7, expected a map"),
        (b"\xc0", "is nil, expected a map"),
        (b"\xa1x", "is 'x', expected a map"),
        (b"\xda\x00\x20" + b"k" * 32, "is a long raw, expected a map"),
        (b"\x90", "is a list, expected a map"),
        (b"\xd4\x05\x00", "is something else, expected a map"),
        (b"\x81\x01\x02", "has 1 as a key, expected text"),
        (b"\x81\x90\x02", "has a list as a key, expected text"),
        (b"\x81\x91\x01\x02", "not msgpack, or not a map"),
        (b"\xde\x01\x01" + b"\xa0\x91\x01" * 257, "257 entries, at most 256 expected"),
        (b"\x81\xa1A\x91" + b"\xdb\x00\x01\x00\x00" + b"x" * 65536, "at most 65536 expected"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_what_is_no_whole_map_is_a_wire_error(data: bytes, fault: str) -> None:
    with pytest.raises(WireError, match=f"^ping: .*({fault})"):
        unpack(data, "ping")


NUMBERS = [
    (b"\x07", 7),
    (b"\xcc\x07", 7),
    (b"\xcd\x00\x07", 7),
    (b"\xce\x00\x00\x00\x07", 7),
    (b"\xcf" + (7).to_bytes(8, "big"), 7),
    (b"\xd0\x07", 7),
    (b"\xd1\x00\x07", 7),
    (b"\xd2\x00\x00\x00\x07", 7),
    (b"\xd3" + (7).to_bytes(8, "big"), 7),
    (b"\xc0", 0),
    (None, 0),
]


@pytest.mark.parametrize(("value", "number"), NUMBERS)
@pytest.mark.parametrize(
    "read", [gomsgpack.u8, gomsgpack.u16, gomsgpack.u32, gomsgpack.u64, gomsgpack.signed]
)
def test_a_number_may_come_in_any_form(
    read: Callable[[Fields, str, bytes], int], value: bytes | None, number: int
) -> None:
    data = b"\x80" if value is None else b"\x81\xa1A" + value
    assert read(unpack(data, "ping"), "ping", b"A") == number


@pytest.mark.parametrize(
    ("reader", "value", "shown", "expected"),
    [
        ("u8", 256, "256", "an unsigned 8 bit number"),
        ("u16", 65536, "65536", "an unsigned 16 bit number"),
        ("u32", 2**32, "4294967296", "an unsigned 32 bit number"),
        ("u32", "x", "'x'", "an unsigned 32 bit number"),
        ("u32", True, "True", "an unsigned 32 bit number"),
        ("u64", -1, "-1", "an unsigned 64 bit number"),
        ("u64", 1.5, "1.5", "an unsigned 64 bit number"),
        ("signed", 2**63, "9223372036854775808", "a signed 64 bit number"),
        ("signed", 1.5, "1.5", "a signed 64 bit number"),
        ("boolean", 1, "1", "true or false"),
        ("raw", 1, "1", "bytes"),
        ("raw", [1], "a list", "bytes"),
        ("text", {"a": 1}, "a map", "text"),
        ("text", False, "False", "text"),
        ("raws", "k" * 16, "a long raw", "a list"),
        ("raws", [1], "1", "raws only"),
    ],
)
def test_a_value_of_a_wrong_type_names_message_and_field(
    reader: str, value: object, shown: str, expected: str
) -> None:
    fields = unpack(pack({"SeqNo": value}), "ping")
    with pytest.raises(WireError) as caught:
        getattr(gomsgpack, reader)(fields, "ping", b"SeqNo")
    assert str(caught.value) == f"ping: SeqNo is {shown}, expected {expected}"


@pytest.mark.parametrize(
    ("reader", "zero"),
    [("boolean", False), ("raw", b""), ("text", ""), ("raws", []), ("signed", 0)],
)
def test_nil_and_missing_are_zero(reader: str, zero: object) -> None:
    read = getattr(gomsgpack, reader)
    assert read({b"A": None}, "ping", b"A") == zero
    assert read({}, "ping", b"A") == zero


def test_values_are_read_as_their_field_says() -> None:
    fields = unpack(pack({"T": b"\xc3\xa9\xff", "L": [b"\xff", None], "N": -5, "B": True}), "x")
    assert gomsgpack.text(fields, "x", b"T") == "é\udcff"
    assert gomsgpack.raw(fields, "x", b"T") == b"\xc3\xa9\xff"
    assert gomsgpack.raws(fields, "x", b"L") == [b"\xff", b""]
    assert gomsgpack.as_text(b"\xc3\xa9", "x", b"L") == "é"
    assert gomsgpack.signed(fields, "x", b"N") == -5
    assert gomsgpack.boolean(fields, "x", b"B") is True


def test_text_and_bytes_are_taken_in_newer_forms_too() -> None:
    fields = unpack(b"\x82\xa1A\xc4\x02ab\xa1B\xd9\x02cd", "x")
    assert gomsgpack.text(fields, "x", b"A") == "ab"
    assert gomsgpack.raw(fields, "x", b"B") == b"cd"


def test_a_long_map_is_split_without_reading_it() -> None:
    data = pack({"A": [1, [2]], "B": {"x": 1}, "C": 5})
    parts = gomsgpack.split(data, "state")
    assert parts == {b"A": pack([1, [2]]), b"B": pack({"x": 1}), b"C": b"\x05"}
    assert gomsgpack.elements(parts[b"A"], "state", limit=2) == [b"\x01", b"\x91\x02"]
    assert gomsgpack.scalar_pairs(parts[b"B"], "state", limit=1) == [(b"x", 1)]
    assert gomsgpack.singles(parts, (b"C", b"D"), "state") == {b"C": 5}
    assert gomsgpack.scalars(pack(["a", None, 2]), "state", limit=3) == [b"a", None, 2]


@pytest.mark.parametrize("reader", ["elements", "scalars", "scalar_pairs"])
def test_a_list_that_is_missing_or_nil_is_empty(reader: str) -> None:
    read = getattr(gomsgpack, reader)
    assert read(b"", "state", limit=0) == []
    assert read(b"\xc0", "state", limit=0) == []


@pytest.mark.parametrize(
    ("reader", "data", "fault"),
    [
        ("elements", pack([1, 2, 3]), "3 entries, at most 2 expected"),
        ("scalars", pack([1, 2, 3]), "3 entries, at most 2 expected"),
        ("scalar_pairs", pack({1: 1, 2: 2, 3: 3}), "3 entries, at most 2 expected"),
        ("elements", b"\x92\x01", "not msgpack, or not a list"),
        ("elements", b"\x05", "not msgpack, or not a list"),
        ("scalars", pack([[1]]), "not msgpack, or not a list of single values"),
        ("scalar_pairs", pack({"a": {"b": 1}}), "not msgpack, or not a map of single values"),
    ],
)
def test_lists_that_are_not_what_they_should_be(reader: str, data: bytes, fault: str) -> None:
    with pytest.raises(WireError, match=f"^state: {fault}$"):
        getattr(gomsgpack, reader)(data, "state", limit=2)


def test_single_values_are_neither_lists_nor_maps() -> None:
    with pytest.raises(WireError, match=r"^state: not msgpack, or not single values$"):
        gomsgpack.singles({b"A": b"\x91\x01"}, (b"A",), "state")


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"\x82\xa4Algo\x00\xa3Buf\xa2ab", ({b"Algo": 0}, 12, 2)),
        (b"\x82\xa4Algo\x00\xa3Buf\xda\x01\x00ab", ({b"Algo": 0}, 14, 256)),
        (b"\x82\xa3Buf\xc4\x02ab", ({}, 7, 2)),
        (b"\x81\xa3Buf\xc6\xff\xff\xff\xff", ({}, 10, 2**32 - 1)),
        (b"\x81\xa3Buf\xc0", ({}, 6, 0)),
        (b"\x81\xa4Algo\x01", ({b"Algo": 1}, 7, 0)),
        (b"\x82\xa1x\x92\x01\x02\xa3Buf\xa1a", ({b"x": [1, 2]}, 11, 1)),
    ],
)
def test_a_raw_is_found_before_it_has_arrived(
    data: bytes, found: tuple[dict[bytes, Any], int, int]
) -> None:
    assert find_raw(data, b"Buf", "compress") == found


def test_it_is_not_found_while_its_length_is_missing() -> None:
    whole = b"\x82\xa4Algo\x00\xa3Buf\xda\x01\x00"
    for size in range(len(whole)):
        assert find_raw(whole[:size], b"Buf", "compress") is None
    assert find_raw(whole, b"Buf", "compress") == ({b"Algo": 0}, 14, 256)


@pytest.mark.parametrize(
    "data",
    [
        b"\x81\xa3Buf\x05",
        b"\x81\xa3Buf\x91\x01",
        b"\xc1",
        b"\x82\xa1A\xda\x10\x00" + b"x" * 4096 + b"\xa3Buf\xa0",
        b"\xcf",
        b"\x90",
    ],
    ids=lambda data: data[:8].hex(),
)
def test_a_raw_that_is_something_else_is_a_wire_error(data: bytes) -> None:
    with pytest.raises(WireError, match=r"^compress: "):
        find_raw(data, b"Buf", "compress")


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.binary(max_size=3), inner),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(values, max_size=8), st.integers(1, 30), st.integers(1, 5))
def test_values_are_cut_out_of_pieces_of_any_size(
    originals: list[Any], step: int, most: int
) -> None:
    written = [pack(value) for value in originals]
    stream = b"".join(written)
    cutter = ValueCutter("stream")
    cut: list[bytes] = []
    for start in range(0, len(stream), step):
        cutter.feed(stream[start : start + step])
        while found := cutter.take(most):
            assert len(found) <= most
            cut += found
    assert cut == written
    assert cutter.rest() == b""


def test_what_follows_the_values_is_left() -> None:
    cutter = ValueCutter("stream")
    cutter.feed(b"\x81\xa1A\x01raw bytes")
    assert cutter.take(1) == [b"\x81\xa1A\x01"]
    assert cutter.rest() == b"raw bytes"


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"\xc1", "stream: not msgpack"),
        (b"\x91" * 3000, "stream: not msgpack"),
        (b"\xdb\x40\x00\x00\x00" + bytes(VALUE_BYTES_MAX), "over 65536 bytes and no end"),
    ],
    ids=["a byte that means nothing", "too deep", "too long"],
)
def test_a_cutter_refuses(data: bytes, fault: str) -> None:
    cutter = ValueCutter("stream")
    cutter.feed(data)
    with pytest.raises(WireError, match=fault):
        cutter.take(10)


def test_many_values_may_wait_together() -> None:
    cutter = ValueCutter("stream")
    cutter.feed(pack("x" * 1000) * 100)
    assert len(cutter.take(200)) == 100


READERS: list[Callable[[bytes], object]] = [
    lambda data: unpack(data, "ping"),
    lambda data: gomsgpack.split(data, "ping"),
    lambda data: gomsgpack.elements(data, "ping", limit=100),
    lambda data: gomsgpack.scalars(data, "ping", limit=100),
    lambda data: gomsgpack.scalar_pairs(data, "ping", limit=100),
    lambda data: gomsgpack.singles({b"A": data}, (b"A",), "ping"),
    lambda data: find_raw(data, b"Buf", "ping"),
]


@settings(max_examples=100, deadline=None)
@given(
    st.binary(max_size=60) | values.map(msgpack.packb), st.integers(0, 60), st.binary(max_size=2)
)
def test_readers_raise_nothing_but_wire_errors(data: bytes, place: int, noise: bytes) -> None:
    for broken in (data, b"\x81\xa1A" + data, data[:place] + noise + data[place + 1 :]):
        for read in READERS:
            try:
                read(broken)
            except WireError:
                continue


@pytest.mark.parametrize(
    "bomb",
    [
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
        b"\xdd\x00\x00\xff\xf0" * 13_000,
        b"\xdd\x01\x00\x00\x00" * 4_000_000,
        b"\x81\xa1A" * 20_000,
        b"\x81\xa1A\xdd\x00\xff\xff\xff" + b"\x80" * 10_000_000,
        b"\x81\xa1A\xdd" + (10_000_000).to_bytes(4, "big") + b"\x80" * 10_000_000,
        b"\xdf" + (5_000_000).to_bytes(4, "big") + b"\xa0\x80" * 5_000_000,
        b"\x91" * 1000 + b"\xc0",
    ],
    ids=lambda bomb: bomb[:8].hex(),
)
def test_what_announces_too_much_uses_no_memory(bomb: bytes, peak_below: Peak) -> None:
    for read in READERS:
        # The stepping readers copy what they are given once.
        with peak_below(len(bomb) + (1 << 20)):
            try:
                read(bomb)
            except WireError:
                continue


def test_the_costliest_map_allowed_stays_small(peak_below: Peak) -> None:
    nested = b"\x81\xa1A\xdc\xff\xf0" + b"\x80" * 0xFFF0
    assert len(nested) < VALUE_BYTES_MAX
    with peak_below(6 << 20):
        unpack(nested, "ping")
