"""Serf's own configuration files, as tables of serfd's keys.

The names are the same in both. Serf's files are JSON, and have rules of their own for what is read
and what counts as not given (agent.md 1).
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

KEYS: Mapping[str, type] = {
    **dict.fromkeys(
        ("node_name", "role", "tags_file", "bind", "advertise", "interface", "encrypt_key",
         "keyring_file", "rpc_addr", "rpc_auth", "profile", "log_level", "retry_interval",
         "snapshot_path", "discover", "syslog_facility", "broadcast_timeout", "reconnect_interval",
         "reconnect_timeout", "tombstone_timeout", "statsite_addr", "statsd_addr"),
        str,
    ),
    **dict.fromkeys(
        ("protocol", "retry_max_attempts", "query_response_size_limit", "query_size_limit",
         "user_event_size_limit"),
        int,
    ),
    **dict.fromkeys(
        ("replay_on_join", "rejoin_after_leave", "enable_syslog", "enable_compression",
         "disable_coordinates", "disable_name_resolution", "leave_on_terminate",
         "skip_leave_on_interrupt", "validate_node_names", "MsgpackUseNewTimeFormat"),
        bool,
    ),
    **dict.fromkeys(("event_handlers", "start_join", "retry_join"), list),
    **dict.fromkeys(("tags", "mdns"), dict),
}  # fmt: skip
"""Every key of Serf's, and what its value is in JSON."""

_MDNS: Mapping[str, type] = {"interface": str, "disable_ipv4": bool, "disable_ipv6": bool}
_WITHOUT_EFFECT = ("enable_compression", "validate_node_names", "MsgpackUseNewTimeFormat")
"""Serf reads them and does nothing with them."""
_NEVER_NEGATIVE = ("protocol", "retry_max_attempts")
"""Negative, they count as not given too."""
_DURATIONS = (
    "retry_interval", "broadcast_timeout", "reconnect_interval", "reconnect_timeout",
    "tombstone_timeout",
)  # fmt: skip
_NO_TIME = re.compile(r"(?:0*\.?0*(?:ns|us|µs|ms|s|m|h))+|0")
_WORDS: Mapping[type, str] = {
    str: "a text", int: "a number", bool: "true or false", list: "a list of texts",
    dict: "an object",
}  # fmt: skip
_FOUND: Mapping[type, str] = {**_WORDS, float: "a number", list: "a list", type(None): "null"}
_SHOWN_MAX = 60
"""Characters that an error shows of a key."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_INT_DIGITS_MAX = 19


def is_one(name: str, text: str) -> bool:
    """Whether a file of this name and content is one of Serf's: no TOML begins with `{`."""
    return name.endswith(".json") or text.lstrip().startswith("{")


def read(text: str) -> dict[str, Any]:
    """What a file says, by serfd's keys; without what counts as not given.

    Raises ValueError, which names the key, what was found and what was expected, and no value.
    """
    return significant(
        {
            key: value
            for key, value in _checked(_parse(text), KEYS, "").items()
            if key not in _WITHOUT_EFFECT
        }
    )


def significant(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table without what, to Serf, does not replace an earlier value.

    An empty text, 0, no time and false: what one file switches on, a later one or an option cannot
    switch off.
    """
    return {
        key: significant(value) if key == "mdns" else value
        for key, value in table.items()
        # It is the option's, and false is what it can say.
        if key == "enable_compression" or not _is_unset(key, value)
    }


def _is_unset(key: str, value: Any) -> bool:
    if key in _DURATIONS and isinstance(value, str):
        return value == "" or _NO_TIME.fullmatch(value) is not None
    if key in _NEVER_NEGATIVE:
        return isinstance(value, int) and value <= 0
    return value in ("", 0, False)


# JSON as Go reads it.


def _parse(text: str) -> dict[str, Any]:
    decoder = json.JSONDecoder(
        object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer, parse_float=_number
    )
    try:
        # What follows the object is not looked at.
        found, _ = decoder.raw_decode(text.lstrip(" \t\r\n"))
    except json.JSONDecodeError as error:
        at = error.pos + len(text) - len(text.lstrip(" \t\r\n"))
        line = text.count("\n", 0, at) + 1
        column = at - text.rfind("\n", 0, at)
        raise ValueError(f"not valid JSON: {error.msg}: line {line} column {column}") from None
    except RecursionError:
        raise ValueError("not a configuration: its lists and objects are too deep") from None
    if not isinstance(found, dict):
        raise ValueError(f"found {_FOUND[type(found)]}, expected an object of Serf's settings")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {_shown(key)} stands twice: give it once")
        found[key] = value
    return found


def _constant(name: str) -> float:
    raise ValueError(f"not valid JSON: {name} is not a number there")


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _INT_DIGITS_MAX else _number(digits)


def _number(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise ValueError(f"not valid JSON: {_cut(digits)} is too large for a number")
    return number


# Names and types.


def _checked(found: Mapping[str, Any], known: Mapping[str, type], inside: str) -> dict[str, Any]:
    """The values by the names that are right; null is left out. `inside` is for errors."""
    names = {key.lower(): key for key in known}
    table: dict[str, Any] = {}
    for name, value in found.items():
        key = names.get(name.lower())
        if key is None:
            raise ValueError(f"unknown key {_shown(inside + name)}{_hint(name, known)}")
        if key in table:
            raise ValueError(f"key {key!r} stands twice, in two spellings: give it once")
        table[key] = None if value is None else _value(inside + key, value, known[key])
    return {key: value for key, value in table.items() if value is not None}


def _value(key: str, value: Any, kind: type) -> Any:
    found = type(value)
    if kind is int and found is float:
        return int(value)
    if found is not kind:
        raise ValueError(f"{key}: found {_FOUND[found]}, expected {_WORDS[kind]}")
    if key == "mdns":
        return _checked(value, _MDNS, "mdns.")
    if kind is dict:
        return {_text("tags", k): _text(f"tags.{_shown(k)[1:-1]}", v) for k, v in value.items()}
    if kind is list:
        return [_text(f"{key}[{number}]", item) for number, item in enumerate(value)]
    return _text(key, value) if kind is str else value


def _text(key: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{key}: found {_FOUND[type(value)]}, expected a text")
    return _SURROGATE.sub("\ufffd", value)


def _hint(name: str, known: Iterable[str]) -> str:
    from difflib import get_close_matches  # only a mistake needs it

    near = get_close_matches(_cut(name).lower(), list(known), 1)
    return (
        f"; did you mean {near[0]!r}?"
        if near
        else "; Serf has none of this name, and settings of serfd alone belong in a .toml file"
    )


def _shown(name: str) -> str:
    return repr(_cut(name))


def _cut(name: str) -> str:
    return name if len(name) <= _SHOWN_MAX else f"{name[:_SHOWN_MAX]}…"
