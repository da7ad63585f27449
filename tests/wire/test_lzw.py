"""Go's LZW. That it makes the very bytes of real agents is checked in test_golden.py."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import accumulate, islice
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serfd.errors import WireError
from serfd.wire.lzw import Decompressor, compress, decompress

LIMIT = 1 << 20


def packed(*codes: int, width: int = 9) -> bytes:
    """Codes of one width, as they are on the wire."""
    bits = sum(code << width * place for place, code in enumerate(codes))
    return bits.to_bytes((width * len(codes) + 7) // 8, "little")


def test_data_is_framed_by_a_clear_and_an_end() -> None:
    assert compress(b"") == packed(256, 257)
    assert compress(b"a") == packed(256, 97, 257)
    assert compress(b"abab") == packed(256, 97, 98, 258, 257)


# Random bytes hardly repeat, so there is about a code for each: around these lengths the codes get
# wider and the table is thrown away, also by the very last code.
@pytest.mark.parametrize(
    "length",
    [*range(250, 260), *range(762, 772), *range(1785, 1800), *range(3826, 3856), 9000],
)
def test_what_is_packed_comes_out_again_wherever_the_width_changes(length: int) -> None:
    data = Random(length).randbytes(length)
    assert decompress(compress(data), limit=LIMIT) == data


def test_the_last_code_widens_the_end_code() -> None:
    data = bytes(range(255))
    assert compress(data)[-2:] == (257 << 9 * 256 % 8).to_bytes(2, "little")
    assert decompress(compress(data), limit=LIMIT) == data


def test_the_last_code_can_throw_the_table_away() -> None:
    # Going round in odd steps meets each pair of bytes once: nothing repeats, a code for each byte.
    steps = (step for step in range(1, 256, 2) for _ in range(256))
    data = bytes(total % 256 for total in islice(accumulate(steps), 3838))
    packed_data = compress(data)
    bits = 9 + 255 * 9 + 512 * 10 + 1024 * 11 + 2047 * 12 + 12 + 9
    assert len(packed_data) == (bits + 7) // 8
    assert decompress(packed_data, limit=LIMIT) == data


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=3000), st.lists(st.integers(1, 600), max_size=20))
def test_pieces_of_any_size_unpack_to_the_same(data: bytes, sizes: list[int]) -> None:
    rest = compress(data)
    decompressor = Decompressor(len(data))
    unpacked = b""
    for size in [*sizes, len(rest)]:
        unpacked += decompressor.feed(rest[:size])
        rest = rest[size:]
    assert unpacked == data
    assert decompressor.finished


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab", max_size=4000))
def test_repetitions_come_out_again(text: str) -> None:
    data = text.encode()
    assert decompress(compress(data), limit=LIMIT) == data


def test_the_starting_clear_is_optional() -> None:
    assert decompress(packed(97, 98, 257), limit=LIMIT) == b"ab"


def test_bytes_after_the_end_are_ignored() -> None:
    assert decompress(compress(b"abc") + b"\xff" * 1000, limit=LIMIT) == b"abc"
    decompressor = Decompressor(LIMIT)
    decompressor.feed(compress(b"abc"))
    assert decompressor.feed(b"\x00" * 1000) == b""


def test_a_full_table_is_used_on_until_it_is_cleared() -> None:
    # Our writer, like Go's, clears before it comes to this; other writers need not.
    literals = bytes(range(256)) * 16
    bits = place = 0
    newest, width = 257, 9
    for code in [*literals, 97, 98, 4095, 256]:
        bits |= code << place
        place += width
        newest += 1
        if newest == 1 << width and width < 12:
            width += 1
    bits |= (99 | 257 << 9) << place
    unpacked = decompress(bits.to_bytes(place // 8 + 4, "little"), limit=LIMIT)
    last_entry = literals[3837:3839]
    assert unpacked == literals + b"ab" + last_entry + b"c"


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "without an end code"),
        (packed(256, 97), "without an end code"),
        (compress(b"abcdefgh")[:-1], "without an end code"),
        (packed(256, 258, 257), "impossible code 258"),
        (packed(258, 257), "impossible code 258"),
        (packed(256, 97, 259, 257), "impossible code 259"),
        (packed(256, 97, 98, 511, 257), "impossible code 511"),
        (compress(b"a" * 11), "more than 10 bytes"),
    ],
    ids=str,
)
def test_what_is_no_lzw_is_a_wire_error(data: bytes, fault: str) -> None:
    with pytest.raises(WireError, match=fault):
        decompress(data, limit=10)


def test_exactly_the_limit_is_allowed() -> None:
    assert decompress(compress(b"a" * 10), limit=10) == b"a" * 10


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.binary(max_size=60), st.integers(0, 100))
def test_arbitrary_and_broken_bytes_raise_nothing_but_wire_errors(
    noise: bytes, data: bytes, place: int
) -> None:
    whole = compress(data)
    broken = whole[:place] + noise[:2] + whole[place:]
    for one in (noise, b"\x00" + noise, broken):
        try:
            assert len(decompress(one, limit=5000)) <= 5000
        except WireError:
            continue


def test_a_bomb_stops_at_the_limit(
    peak_below: Callable[[int], AbstractContextManager[None]],
) -> None:
    bomb = compress(bytes(5 << 20))
    assert len(bomb) < 6000
    with peak_below(2 << 20), pytest.raises(WireError, match="more than 262144 bytes"):
        decompress(bomb, limit=256 * 1024)
