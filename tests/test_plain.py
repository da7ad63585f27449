"""What is not printable is shown as an escape."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serfd.plain import lines, plain


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü日本 text", "plain ü日本 text"),
        ("a\nb\tc\rd", r"a\nb\tc\rd"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("\x9b2J\x7f", r"\x9b2J\x7f"),
        ("\u202eevil\u2028", r"\u202eevil\u2028"),
        ("n\udcff", r"n\xff"),
        ("n\ud800", r"n\ud800"),
    ],
)
def test_what_could_steer_a_terminal_is_shown_as_an_escape(text: str, shown: str) -> None:
    assert plain(text) == shown


def test_lines_and_columns_can_be_kept() -> None:
    assert lines("a\n\tb\x1b[2J\r\n") == "a\n\tb\\x1b[2J\\r\n"


@given(st.text(st.characters(exclude_categories=())))
def test_whatever_it_is_comes_out_as_one_printable_line(text: str) -> None:
    assert plain(text).isprintable()
    assert "".join(lines(text).split()).isprintable()
    plain(text).encode()
