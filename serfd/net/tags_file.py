"""This node's tags on disk, in Serf's format: a JSON object of texts (agent.md 9)."""

import json
import logging
import re
from collections.abc import Mapping

from serfd.errors import CommandError, ConfigError
from serfd.net.whole_file import write_whole

SIZE_MAX = 1 << 20
"""Bytes; tags take a few hundred."""
_SHOWN_MAX = 60
"""Characters that an error shows of a tag's name."""

_SPECIAL = re.compile('["\\\\\x00-\x1f<>&\u2028\u2029\ud800-\udfff]')
_SURROGATE = re.compile("[\ud800-\udfff]")
_SHORT = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}

_log = logging.getLogger("serfd.agent")


def load_tags(file: str) -> dict[str, str]:
    """The tags of the file; none if there is no file yet. Raises ConfigError."""
    try:
        with open(file, "rb") as held:
            content = held.read(SIZE_MAX + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"tags_file {file}: {error.strerror}") from None
    try:
        tags = _decode(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"tags_file {file}: Failed to decode tags file: {error}") from None
    _log.info("Restored %d tag(s) from %s", len(tags), file)
    return tags


def save_tags(file: str, tags: Mapping[str, str]) -> None:
    """Replace the file as a whole, readable by its owner only. Raises CommandError."""
    lines = ",\n".join(f"  {_quoted(key)}: {_quoted(tags[key])}" for key in sorted(tags))
    try:
        write_whole(file, f"{{\n{lines}\n}}" if tags else "{}")
    except OSError as error:
        raise CommandError(f"cannot write the tags file {file}: {error.strerror}") from None


def _decode(content: bytes) -> dict[str, str]:
    if len(content) > SIZE_MAX:
        raise ValueError(f"longer than {SIZE_MAX} bytes")
    found = json.loads(content.decode("utf-8", "replace"))
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError("expected a JSON object of texts")
    return {_unicode(key): _unicode(value, of=key) for key, value in found.items()}


def _unicode(text: object, *, of: str = "") -> str:
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"expected a text for the tag {of[:_SHOWN_MAX]!r}")
    return _SURROGATE.sub("\ufffd", text)


def _quoted(text: str) -> str:
    """As Go writes it; what came in as bytes that are no UTF-8 is lost."""
    return f'"{_SPECIAL.sub(_escape, text)}"'


def _escape(special: re.Match[str]) -> str:
    char = special[0]
    return _SHORT.get(char) or f"\\u{0xFFFD if _SURROGATE.match(char) else ord(char):04x}"
