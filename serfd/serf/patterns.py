"""Go's regular expressions, in linear time and bounded memory (serf.md 11, rpc.md 4)."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

PATTERN_MAX = 1024
"""Bytes of a pattern."""
MEMORY_MAX = 256 << 10
"""Bytes one compiled pattern may take; RE2 then matches slower, but in linear time."""
KEPT_MAX = 64
"""Patterns that are kept for the next one who asks: compiled, or why they are none."""


class PatternTooLong(ValueError):
    """A pattern over `PATTERN_MAX`."""


def matcher(pattern: str, *, whole: bool) -> Callable[[str], bool]:
    """What tells whether a text has the pattern in it; with `whole`, matches `^pattern$`.

    Go's agents do not put brackets around it: `a|b` is `^a|b$` then. Raises PatternTooLong, and
    ValueError with RE2's reason for what is no pattern, which shows it as it was written.
    """
    if whole and pattern.replace("-", "").replace("_", "").isalnum():
        # Just a word, as in nearly every call: spares the daemon the 2.6 MB of RE2.
        return pattern.__eq__
    encoded = pattern.encode("utf-8", "surrogateescape")
    if len(encoded) > PATTERN_MAX:
        raise PatternTooLong(
            f"a regular expression of {len(encoded)} bytes, at most {PATTERN_MAX} are possible"
        )
    compiled = _compiled(b"^" + encoded + b"$" if whole else encoded)
    if isinstance(compiled, str):
        raise ValueError(compiled.replace(f"^{pattern}$", pattern))
    search = compiled.search
    return lambda value: search(value.encode("utf-8", "surrogateescape")) is not None


@lru_cache(KEPT_MAX)
def _compiled(pattern: bytes) -> Any:
    """RE2's pattern; or as text why it is none: to find that out once more takes as long."""
    import re2  # imported by who needs it

    options = re2.Options()
    options.max_mem = MEMORY_MAX
    options.log_errors = False
    options.never_capture = True
    try:
        # Bytes, because a name from the network may hold some that are no UTF-8.
        return re2.compile(pattern, options)
    except re2.error as error:
        return error.args[0].decode("utf-8", "replace")
