"""Go's regular expressions: what matches, and what is refused."""

import pytest

from serfd.serf.patterns import PATTERN_MAX, PatternTooLong, _compiled, matcher


@pytest.mark.parametrize(
    ("pattern", "value", "whole", "found"),
    [
        ("web", "web-1", False, True),
        ("web", "web-1", True, False),
        ("web-1", "web-1", True, True),
        ("w.b.*", "web-1", True, True),
        ("", "", True, True),
        ("", "web", True, False),
        ("a|b", "ax", True, True),  # ^a|b$, as Go's agents have it
        ("a|b", "xa", True, False),
        (r"\d+$", "é1", False, True),
        ("x$", "\udcffx", False, True),  # bytes from the network that are no UTF-8
    ],
)
def test_a_pattern_is_found_anywhere_or_matches_as_a_whole(pattern, value, whole, found) -> None:
    assert matcher(pattern, whole=whole)(value) is found


def test_a_pattern_takes_linear_time() -> None:
    assert not matcher("(a+)+$", whole=False)("a" * 5000 + "b")


@pytest.mark.parametrize("pattern", ["(a", "a(?=b)", "*", "(x{900}y{900}z{900}){1}" * 40])
def test_what_is_no_pattern_or_takes_too_much_memory_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        matcher(pattern, whole=False)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("pattern", "reason"), [("we(b", "missing ): we(b"), ("\\q", "invalid escape sequence: \\q")]
)
def test_an_error_shows_the_pattern_as_it_was_written(pattern, reason, whole) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        matcher(pattern, whole=whole)
    assert str(caught.value) == reason


def test_what_is_no_pattern_is_compiled_only_once() -> None:
    before = _compiled.cache_info()
    for _ in range(3):
        with pytest.raises(ValueError, match="missing"):
            matcher("only(once", whole=False)
    after = _compiled.cache_info()
    assert (after.misses - before.misses, after.hits - before.hits) == (1, 2)


def test_a_pattern_that_is_too_long_is_refused() -> None:
    with pytest.raises(PatternTooLong, match="of 1025 bytes, at most 1024"):
        matcher("x" * (PATTERN_MAX + 1), whole=False)
