"""Reads a command line by a table of options; the same table prints the help.

One small parser for `serfd` and `serfctl`. Importing argparse and building its parsers takes longer
than all the rest of a `serfctl members`.
"""

from __future__ import annotations

from serfd.errors import SerfdError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_TRUE = ("1", "t", "T", "true", "True", "TRUE")
_UNITS = {
    "ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0,
}  # fmt: skip
_FALSE = ("0", "f", "F", "false", "False", "FALSE")


class OptionError(SerfdError):
    """The command line is wrong. The text names the option and, if there is one, the right name."""


class Option:
    """One option: `Option("node", "NAME", "this node's name")` is written `-node NAME`."""

    __slots__ = ("choices", "default", "flag", "help", "into", "many", "name", "value")

    def __init__(
        self,
        name: str,
        value: str = "",
        help: str = "",
        *,
        default: str = "",
        many: bool = False,
        into: str = "",
        flag: bool = False,
        choices: tuple[str, ...] = (),
    ) -> None:
        """Describe an option.

        Args:
            name: without dashes.
            value: what its value is called in the help; a `flag` has none.
            help: what it does, in one line.
            default: for the help only; `parse` returns what was given and nothing else.
            many: it may be given again and again, and its value is the list of them. Of any other
                option the last one counts.
            into: with `many`: the option to whose list its values are added, in the order of the
                command line.
            flag: it is `-name`, or `-name=true` and `-name=false`.
            choices: what its value can be, for completion only; `parse` takes anything.
        """
        self.name = name
        self.value = value
        self.help = help
        self.default = default
        self.many = many
        self.into = into
        self.flag = flag
        self.choices = choices


class Parsed:
    """What a command line says."""

    __slots__ = ("arguments", "values")

    def __init__(self, values: dict[str, str | bool | list[str]], arguments: list[str]) -> None:
        self.values = values
        """By option name, only what was given: text, bool for flags, list for `many`."""
        self.arguments = arguments
        """What is not an option, in order."""

    def text(self, name: str, default: str = "") -> str:
        """The value of a plain option, or `default`."""
        value = self.values.get(name, default)
        assert isinstance(value, str), name
        return value

    def flag(self, name: str) -> bool:
        """Whether a flag was given and is true."""
        return self.values.get(name) is True

    def texts(self, name: str) -> list[str]:
        """All values of an option that may be repeated, in order."""
        values = self.values.get(name, [])
        assert isinstance(values, list), name
        return values

    def integer(self, name: str, default: int = 0) -> int:
        """The whole number that a plain option gives, or `default`. Raises OptionError."""
        text = self.text(name)
        if not text:
            return default
        if not text.removeprefix("-").removeprefix("+").isdecimal():
            raise _bad_value(name, text, "a whole number")
        return int(text)

    def seconds(self, name: str, default: float = 0.0) -> float:
        """The duration that a plain option gives, in Go's syntax, or `default`.

        Raises OptionError.
        """
        text = self.text(name)
        return _seconds(name, text) if text else default


def parse(argv: Sequence[str], options: Sequence[Option], *, options_first: bool = False) -> Parsed:
    """Sort `argv`, without the program's name, into options and arguments.

    Options are written as Serf's (agent.md 1): `-name value`, `-name=value`, or with two dashes.
    They may stand before, between and after the arguments; `--` ends them, and so does the first
    argument with `options_first`. The word after an option that needs a value is its value,
    whatever it looks like. `-` and `-5` are arguments.

    Raises:
        OptionError: with Go's words, and the nearest option's name for an unknown one.
    """
    known = {option.name: option for option in options}
    values: dict[str, str | bool | list[str]] = {}
    arguments: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--":
            arguments += words
        elif word[:1] != "-" or word == "-" or word[1:2].isdigit():
            arguments.append(word)
            if options_first:
                arguments += words
        else:
            name, equals, value = word[2 if word[1] == "-" else 1 :].partition("=")
            if not name or name[0] == "-":
                raise OptionError(f"bad flag syntax: {word}")
            option = known.get(name)
            if option is None:
                near = nearest(name, known)
                hint = f"\nDid you mean -{near}?" if near else ""
                raise OptionError(f"flag provided but not defined: -{name}{hint}")
            if option.flag:
                values[name] = _bool(name, value) if equals else True
                continue
            if not equals:
                following = next(words, None)
                if following is None:
                    raise OptionError(f"flag needs an argument: -{name}")
                value = following
            held = values.setdefault(option.into or name, []) if option.many else None
            if isinstance(held, list):
                held.append(value)
            else:
                values[name] = value
    return Parsed(values, arguments)


def nearest(name: str, known: dict[str, Option] | Sequence[str]) -> str:
    """The known name that `name` most looks like, or an empty text."""
    # Imported here because only a mistake needs it, and it takes as long as the whole parser.
    from difflib import get_close_matches

    return next(iter(get_close_matches(name, list(known), 1)), "")


def usage(
    line: str, about: str, options: Sequence[Option], *, example: str = "", notes: str = ""
) -> str:
    """A help text: the usage line, what it does, an example, every option, and notes."""
    parts = [f"Usage: {line}", about]
    if example:
        parts.append("Example:\n" + _indent(example))
    if options:
        heads = [f"-{option.name} {option.value}".rstrip() for option in options]
        width = max(map(len, heads))
        rows = [
            f"{head:<{width}}  {_explain(option)}"
            for head, option in zip(heads, options, strict=True)
        ]
        parts.append("Options:\n" + _indent("\n".join(rows)))
    if notes:
        parts.append(notes)
    return "\n\n".join(parts) + "\n"


def _bool(name: str, text: str) -> bool:
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise OptionError(
        f'invalid boolean value "{text}" for -{name}: parse error\nExpected true or false.'
    )


def _seconds(name: str, text: str) -> float:
    rest = text.removeprefix("-").removeprefix("+")
    total = 0.0
    while rest != "0":
        number, unit = _leading(rest, "0123456789.")
        unit, rest = _leading(unit, "nuµμmsh")
        try:
            total += float(number) * _UNITS[unit]
        except (KeyError, ValueError):
            raise _bad_value(name, text, "a duration like 500ms, 10s or 1m30s") from None
        if not rest:
            break
    return -total if text[0] == "-" else total


def _leading(text: str, chars: str) -> tuple[str, str]:
    """What `text` begins with of these characters, and the rest."""
    rest = text.lstrip(chars)
    return text[: len(text) - len(rest)], rest


def _bad_value(name: str, text: str, expected: str) -> OptionError:
    return OptionError(
        f'invalid value "{text}" for flag -{name}: parse error\nExpected {expected}.'
    )


def _explain(option: Option) -> str:
    more = []
    if option.many:
        more.append("repeatable")
    if option.default:
        more.append(f"default: {option.default}")
    return option.help + (f" ({'; '.join(more)})" if more else "")


def _indent(text: str) -> str:
    return "\n".join("  " + line for line in text.split("\n"))
