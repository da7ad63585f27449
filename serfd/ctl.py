"""`serfctl`: arguments in, RPC calls, text or JSON out.

Commands, texts and exit codes are Serf's (cli.md), but errors go to stderr. One table at the end of
this file drives dispatch, usage and help.
"""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper

from serfd import __version__
from serfd.errors import SerfdError
from serfd.options import Option, OptionError, Parsed, nearest, parse, usage
from serfd.rpc.client import CannotConnect, Client, ConnectionClosed, RpcError, address_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

RPC_ADDR = "127.0.0.1:7373"
"""Where to look for the agent if nothing else is said."""

EXIT_USAGE = 127
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

_HELP = ("-h", "-help", "--help")
_VERSION = ("-v", "-version", "--version")

_ENVIRONMENT = """\
Environment:
  SERF_RPC_ADDR  the agent's address, unless -rpc-addr is given
  SERF_RPC_AUTH  the agent's token, unless -rpc-auth is given; keeps it out of `ps`"""


class Command:
    """One command of serfctl."""

    __slots__ = (
        "about", "arguments", "example", "failure", "name", "options", "run", "summary",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        run: Callable[[Parsed], str],
        summary: str,
        *,
        arguments: str = "",
        options: tuple[Option, ...] = (),
        failure: str = "",
        example: str = "",
        about: str = "",
    ) -> None:
        self.name = name
        self.run = run
        """Does it; returns what to print."""
        self.summary = summary
        self.arguments = arguments
        """As the usage line shows them; empty if it takes none."""
        self.options = options
        self.failure = failure
        """What stands before the agent's error text."""
        self.example = example
        self.about = about
        """What the summary does not say."""

    def help(self) -> str:
        """Usage, what it does, an example, every option."""
        words = ("serfctl", self.name, "[options]" if self.options else "", self.arguments)
        return usage(
            " ".join(filter(None, words)),
            f"{self.summary}.\n{self.about}".strip(),
            self.options,
            example=self.example,
            notes=_ENVIRONMENT if _AGENT[0] in self.options else "",
        )


class Failure(SerfdError):
    """The command failed; the text is all there is to say."""


class Misuse(SerfdError):
    """The command was given wrong arguments; its help follows the text."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line, `sys.argv` by default; returns the exit code."""
    if isinstance(sys.stdout, TextIOWrapper):
        # UTF-8 in every locale, as Serf's.
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except OSError as error:
        # The client turns errors of its socket into its own: this one is stdout's. What is left in
        # the buffer must not be tried again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return EXIT_BROKEN_PIPE
        return _complain(f"serfctl: cannot write its output: {error.strerror}")


def _dispatch(argv: list[str]) -> int:
    before_dashes = argv[: argv.index("--")] if "--" in argv else argv
    name = next((word for word in before_dashes if word[:1] != "-"), "")
    command = COMMANDS.get(name)
    if any(word in _VERSION for word in before_dashes):
        sys.stdout.write(_version(Parsed({}, [])))
        return 0
    if any(word in _HELP for word in before_dashes) and (command or not name):
        sys.stdout.write(command.help() if command else general_usage())
        return 0
    if command is None:
        _complain((f"{_unknown(name)}\n\n" if name else "") + general_usage())
        return EXIT_USAGE
    if argv[0] != name:
        return _complain(
            "Invalid flags before the subcommand. If these flags are for\n"
            f"the subcommand, please put them after the subcommand.\n\n{command.help()}"
        )
    return _run(command, argv[1:])


def _run(command: Command, argv: list[str]) -> int:
    try:
        given = parse(argv, command.options)
        if given.arguments and not command.arguments:
            _complain(f"serfctl {command.name}: ignored: {' '.join(given.arguments)}")
        sys.stdout.write(command.run(given))
        return 0
    except (OptionError, Misuse) as error:
        return _complain(f"{error}\n\n{command.help()}")
    except CannotConnect as error:
        return _complain(f"Error connecting to Serf agent: {error}")
    except RpcError as error:
        advice = f"\n{error.advice}" if error.advice else ""
        return _complain(f"{command.failure}{error}{advice}")
    except Failure as error:
        return _complain(str(error))


def _complain(text: str) -> int:
    """Tell stderr; returns the exit code of an error."""
    print(lines(text), file=sys.stderr)
    return 1


# The commands, in the order of the alphabet.


def _force_leave(given: Parsed) -> str:
    if len(given.arguments) != 1:
        raise Misuse("A node name must be specified to force leave.")
    with _client(given, "the agent to spread the news (at most 5 s)") as client:
        client.force_leave(given.arguments[0], prune=given.flag("prune"))
    return ""


def _help(given: Parsed) -> str:
    if not given.arguments:
        return general_usage()
    name = given.arguments[0]
    if name not in COMMANDS:
        raise Failure(_unknown(name))
    return COMMANDS[name].help()


def _info(given: Parsed) -> str:
    as_json = _wants_json(given)
    with _client(given) as client:
        stats = client.stats()
    return _written(info_json if as_json else info_text, stats)


def _join(given: Parsed) -> str:
    if not given.arguments:
        raise Misuse("At least one address to join must be specified.")
    with _client(given, "the nodes to answer (up to 10 s each)") as client:
        count = client.join(given.arguments, replay=given.flag("replay"))
    return f"Successfully joined cluster by contacting {count} nodes.\n"


def _keygen(given: Parsed) -> str:
    from binascii import b2a_base64

    return b2a_base64(os.urandom(32)).decode()


def _leave(given: Parsed) -> str:
    with _client(given, "the agent to tell the others and to stop (some seconds)") as client:
        client.leave()
    return "Graceful leave complete\n"


def _members(given: Parsed) -> str:
    as_json = _wants_json(given)
    tags = _tags_of(given.texts("tag"))
    if given.text("role"):
        _complain("Deprecation warning: 'Role' has been replaced with 'Tags'")
        tags["role"] = given.text("role")
    filters = {"status": given.text("status"), "name": given.text("name")}
    with _client(given) as client:
        try:
            members = client.members_filtered(tags=tags, **filters)
        except ConnectionClosed as error:
            if tags or any(filters.values()):
                error.advice = "The agent closes like this when a pattern is no valid regex."
            raise
    if as_json:
        return _written(members_json, members)
    return _written(detailed_text if given.flag("detailed") else members_text, members)


def _monitor(given: Parsed) -> str:
    client = _client(given)
    streams: list[int] = []
    try:
        try:
            streams.append(client.start("stream", {"Type": "*"}))
        except RpcError as error:
            raise Failure(f"Error starting stream: {error}\n{error.advice}".rstrip()) from None
        streams.append(client.start("monitor", {"LogLevel": given.text("log-level", "INFO")}))
        try:
            for stream, record in client.records():
                write = event_text if stream == streams[0] else log_text
                sys.stdout.write(_written(write, record))
                sys.stdout.flush()
        except ConnectionClosed:
            raise Failure(
                "\nRemote side ended the monitor! This usually means that the\n"
                "remote side has exited or crashed."
            ) from None
    except KeyboardInterrupt:
        # Serf's agents may crash if a client goes while an event is on its way to it (rpc.md 11).
        try:
            for stream in reversed(streams):
                client.stop(stream)
        except ConnectionClosed:
            return ""
    finally:
        client.close()
    return ""


def _tags(given: Parsed) -> str:
    if not given.values.keys() & {"set", "delete"}:
        raise Misuse("At least one -set or -delete must be specified.")
    tags = _tags_of(given.texts("set"))
    with _client(given, "the agent to spread the news (at most 5 s)") as client:
        client.tags(tags, delete=given.texts("delete"))
    return "Successfully updated agent tags\n"


def _version(given: Parsed) -> str:
    return f"{__version__}\nAgent Protocol: 5 (Understands back to: 2)\n"


def _client(given: Parsed, awaited: str = "the agent to answer") -> Client:
    """A connection to the agent that options and environment name. Raises CannotConnect."""

    def waiting() -> None:
        print(f"Waiting for {awaited} ...", file=sys.stderr)

    return Client(
        given.text("rpc-addr", os.environ.get("SERF_RPC_ADDR") or RPC_ADDR),
        given.text("rpc-auth", os.environ.get("SERF_RPC_AUTH", "")),
        waiting=waiting if sys.stderr.isatty() else None,
    )


def _unknown(name: str) -> str:
    near = nearest(name, list(COMMANDS))
    return f"Unknown command: {name}" + (f"\nDid you mean {near}?" if near else "")


def _wants_json(given: Parsed) -> bool:
    form = given.text("format", "text")
    if form not in ("text", "json"):
        raise Failure(f'Encoding error: Invalid output format "{form}"\nExpected text or json.')
    return form == "json"


def _tags_of(texts: Sequence[str]) -> dict[str, str]:
    """`["role=web"]` → `{"role": "web"}`."""
    tags = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise Failure(f"Error: Invalid tag: '{text}'\nExpected KEY=VALUE.")
        tags[key] = value
    return tags


# What is printed.


def _written(write: Callable[[Any], str], answer: object) -> str:
    try:
        return write(answer)
    except (AttributeError, TypeError, ValueError) as error:
        raise RpcError(f"the agent's answer is not as Serf's: {error}") from None


def members_text(members: Sequence[Mapping[str, Any]]) -> str:
    """One line per member, sorted by name, in columns (cli.md 2); of nobody, an empty line."""
    return columns([_row(member) for member in sorted(members, key=_name)])


def detailed_text(members: Sequence[Mapping[str, Any]]) -> str:
    """As `members_text`, with two more columns for the versions of Serf's protocol."""
    rows = [
        (
            *_row(member),
            f"Protocol Version: {member.get('DelegateCur') or 0}",
            "Available Protocol Range: "
            f"[{member.get('DelegateMin') or 0}, {member.get('DelegateMax') or 0}]",
        )
        for member in sorted(members, key=_name)
    ]
    return columns(rows)


def _row(member: Mapping[str, Any]) -> tuple[str, ...]:
    tags = sorted((member.get("Tags") or {}).items())
    return (
        plain(_name(member)),
        address_text(member),
        plain(member.get("Status") or ""),
        plain(",".join([f"{key}={value}" for key, value in tags])),
    )


def _name(member: Mapping[str, Any]) -> str:
    return member.get("Name") or ""


def columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of equal length as lines: columns padded to the widest, but for the last."""
    if not rows:
        return "\n"
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    line = "".join(f"%-{width}s  " for width in widths) + "%s"
    return "\n".join([line % row for row in rows]).rstrip() + "\n"


def members_json(members: Sequence[Mapping[str, Any]]) -> str:
    """All members as JSON, sorted by name (cli.md 2)."""
    found = [
        {
            "name": _name(member),
            "addr": address_text(member),
            "port": member.get("Port") or 0,
            "tags": dict(sorted((member.get("Tags") or {}).items())),
            "status": member.get("Status") or "",
            "protocol": {
                "max": member.get("DelegateMax") or 0,
                "min": member.get("DelegateMin") or 0,
                "version": member.get("DelegateCur") or 0,
            },
        }
        for member in sorted(members, key=_name)
    ]
    return json_text({"members": found or None})


def info_text(stats: Mapping[str, Mapping[str, str]]) -> str:
    """Sections and their values, sorted (cli.md 2)."""
    found = []
    for section, values in sorted(stats.items()):
        found.append(f"{plain(section)}:")
        found += [f"\t{plain(key)} = {plain(value)}" for key, value in sorted(values.items())]
    return "\n".join(found).strip() + "\n"


def info_json(stats: Mapping[str, Mapping[str, str]]) -> str:
    """The same as JSON (cli.md 2)."""
    return json_text({name: dict(sorted(values.items())) for name, values in sorted(stats.items())})


def event_text(record: Mapping[str, Any]) -> str:
    """An event as `monitor` prints it (cli.md 2)."""
    found = ["Event Info:"]
    for key in sorted(record, key=lambda key: (key != "Event", key)):
        value = record[key]
        if key == "Members" and isinstance(value, list):
            found.append("\tMembers:")
            found += ["\t\t" + line for line in members_text(value).rstrip().split("\n")]
        elif key == "Payload" and isinstance(value, str):
            found.append(f"\t{key}: {_go_syntax(value.encode('utf-8', 'surrogateescape'))}")
        else:
            found.append(f"\t{plain(key)}: {_go_syntax(value)}")
    return "\n".join(found) + "\n"


def log_text(record: Mapping[str, Any]) -> str:
    """A log line as `monitor` prints it; further lines of one message stand behind blanks."""
    return lines(str(record.get("Log", ""))).replace("\n", "\n    ") + "\n"


def json_text(value: object) -> str:
    """JSON as Go writes it, indented; characters that could steer a terminal are escaped."""
    from json import dumps
    from json.encoder import encode_basestring

    # json.dumps(indent=2) writes the same in three times the time: with 5,000 members that is half
    # of what the whole command takes.
    def written(value: object, margin: str) -> str:
        if isinstance(value, str):
            return encode_basestring(value)
        inner = margin + "  "
        if isinstance(value, dict) and value:
            items = [f"{inner}{written(k, '')}: {written(v, inner)}" for k, v in value.items()]
            return "{" + ",".join(items) + margin + "}"
        if isinstance(value, list) and value:
            return "[" + ",".join([inner + written(item, inner) for item in value]) + margin + "]"
        return str(value) if type(value) is int else dumps(value)

    return written(value, "\n").translate(_JsonEscapes()) + "\n"


def plain(text: str) -> str:
    r"""Text that stays in its line and cannot steer a terminal: a newline is written `\n`."""
    if text.isprintable():
        return text
    return "".join([char if char.isprintable() else _escaped(char) for char in text])


def lines(text: str) -> str:
    """As `plain`, but newlines and tabs are kept."""
    return "\n".join(["\t".join(map(plain, line.split("\t"))) for line in text.split("\n")])


def _escaped(char: str) -> str:
    # What was not UTF-8 comes as a lone surrogate that holds the byte.
    if "\udc80" <= char <= "\udcff":
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()


class _JsonEscapes(dict[int, str]):
    """For `str.translate`: what Go escapes (`<`, `>`, `&`), and what is not printable.

    Bytes that were not UTF-8, here lone surrogates, become U+FFFD, as Go writes them.
    """

    def __missing__(self, code: int) -> str:
        char = chr(code)
        if "\ud800" <= char <= "\udfff":
            char = "\\ufffd"
        elif char in "<>&" or (code <= 0xFFFF and char != "\n" and not char.isprintable()):
            char = f"\\u{code:04x}"
        self[code] = char
        return char


def _go_syntax(value: object) -> str:
    if value is None:
        return "<nil>"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, bytes):
        return "[]byte{" + ", ".join([f"0x{byte:x}" for byte in value]) + "}"
    if isinstance(value, str):
        quoted = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{plain(quoted)}"'
    return plain(str(value))


def general_usage() -> str:
    """All commands."""
    width = max(map(len, COMMANDS))
    found = "\n".join([f"    {name:<{width}}    {c.summary}" for name, c in COMMANDS.items()])
    return (
        "Usage: serfctl [--version] [--help] <command> [<args>]\n\n"
        f"Available commands are:\n{found}\n\n"
        "`serfctl <command> --help` shows what a command takes, with an example.\n\n"
        f"{_ENVIRONMENT}\n"
    )


_AGENT = (
    Option("rpc-addr", "HOST:PORT", "where the agent listens for RPC", default=RPC_ADDR),
    Option("rpc-auth", "TOKEN", "the agent's rpc_auth", default="none"),
)
_FORMAT = Option("format", "text|json", "for people or for programs", default="text")

COMMANDS = {
    command.name: command
    for command in (
        Command(
            "force-leave",
            _force_leave,
            "Forces a failed member to leave the cluster",
            arguments="NAME",
            about="A member that is still alive comes back by itself.",
            example="serfctl force-leave -prune web3",
            options=(
                Option("prune", help="forget the member altogether", flag=True),
                *_AGENT,
            ),
            failure="Error force leaving: ",
        ),
        Command(
            "help",
            _help,
            "Shows what a command does and takes",
            arguments="[COMMAND]",
            example="serfctl help members",
        ),
        Command(
            "info",
            _info,
            "Shows what the agent tells about itself",
            about="Its name, tags and event handlers, and numbers of its runtime and of Serf.",
            example="serfctl info -format json",
            options=(_FORMAT, *_AGENT),
            failure="Error querying agent: ",
        ),
        Command(
            "join",
            _join,
            "Joins the agent to a cluster",
            arguments="ADDRESS...",
            about="One address that answers is enough; the port is the agent's own if left out.",
            example="serfctl join 10.0.0.7 10.0.0.8:7946",
            options=(
                Option("replay", help="deliver the cluster's recent user events", flag=True),
                *_AGENT,
            ),
            failure="Error joining the cluster: ",
        ),
        Command(
            "keygen",
            _keygen,
            "Prints a new encryption key",
            about="32 random bytes in base64, for encrypt_key or the keyring file.",
            example="serfctl keygen",
        ),
        Command(
            "leave",
            _leave,
            "Lets the agent leave its cluster and stop",
            about="The others see that it left, and not that it failed.",
            example="serfctl leave",
            options=_AGENT,
            failure="Error leaving: ",
        ),
        Command(
            "members",
            _members,
            "Lists the members of the cluster",
            about="Patterns are regular expressions for the whole text.",
            example="serfctl members -status 'alive|leaving' -tag role=web",
            options=(
                Option("detailed", help="show protocol versions (text only)", flag=True),
                _FORMAT,
                Option("name", "REGEX", "only members with such a name"),
                Option("status", "REGEX", "only alive, leaving, left or failed ones"),
                Option("tag", "KEY=REGEX", "only members with such a tag", many=True),
                Option("role", "REGEX", "deprecated: -tag role=REGEX"),
                *_AGENT,
            ),
            failure="Error retrieving members: ",
        ),
        Command(
            "monitor",
            _monitor,
            "Shows the agent's events and log as they come",
            about="It begins with the last 512 lines of the log. Ctrl-C ends it.",
            example="serfctl monitor -log-level debug",
            options=(
                Option("log-level", "LEVEL", "trace, debug, info, warn or err", default="info"),
                *_AGENT,
            ),
            failure="Error starting monitor: ",
        ),
        Command(
            "tags",
            _tags,
            "Changes the agent's tags",
            about="The whole cluster sees the change.",
            example="serfctl tags -set role=web -set dc=east -delete canary",
            options=(
                Option("set", "KEY=VALUE", "create or change a tag", many=True),
                Option("delete", "KEY", "remove a tag, if it is there", many=True),
                *_AGENT,
            ),
            failure="Error setting tags: ",
        ),
        Command("version", _version, "Prints the version"),
    )
}
