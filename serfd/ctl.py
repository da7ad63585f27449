"""`serfctl`: which command a command line means, and how it ends.

Commands, texts and exit codes are Serf's (cli.md), but errors go to stderr. One table at the end of
this file drives dispatch, usage, help and completion.
"""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper

from serfd import ctl_commands
from serfd.ctl_commands import RPC_ADDR, Failure, Misuse, complain
from serfd.options import Option, OptionError, Parsed, nearest, parse, usage
from serfd.rpc.client import CannotConnect, RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

EXIT_USAGE = 127
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

_HELP = ("-h", "-help", "--help")
_VERSION = ("-v", "-version", "--version")

_ENVIRONMENT = """\
Environment:
  SERF_RPC_ADDR  the agent's address, unless -rpc-addr is given
  SERF_RPC_AUTH  the agent's token, unless -rpc-auth is given; keeps it out of `ps`
  SERFD_RPC_TLS_CA, SERFD_RPC_TLS_CERT, SERFD_RPC_TLS_KEY  likewise, for TLS"""


class Command:
    """One command of serfctl."""

    __slots__ = (
        "about", "arguments", "example", "failure", "name", "options", "options_first", "run",
        "summary",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        run: Callable[[Parsed], str],
        summary: str,
        *,
        arguments: str = "",
        options: tuple[Option, ...] = (),
        options_first: bool = False,
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
        self.options_first = options_first
        """Whether none stands behind the first argument: a payload may begin with a dash."""
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
        return complain(f"serfctl: cannot write its output: {error.strerror}")


def _dispatch(argv: list[str]) -> int:
    before_dashes = argv[: argv.index("--")] if "--" in argv else argv
    name = next((word for word in before_dashes if word[:1] != "-"), "")
    command = COMMANDS.get(name)
    if any(word in _VERSION for word in before_dashes):
        sys.stdout.write(ctl_commands.version(Parsed({}, [])))
        return 0
    if any(word in _HELP for word in before_dashes) and (command or not name):
        sys.stdout.write(command.help() if command else general_usage())
        return 0
    if command is None:
        complain((f"{_unknown(name)}\n\n" if name else "") + general_usage())
        return EXIT_USAGE
    if argv[0] != name:
        return complain(
            "Invalid flags before the subcommand. If these flags are for\n"
            f"the subcommand, please put them after the subcommand.\n\n{command.help()}"
        )
    return _run(command, argv[1:])


def _run(command: Command, argv: list[str]) -> int:
    try:
        given = parse(argv, command.options, options_first=command.options_first)
        if given.arguments and not command.arguments:
            complain(f"serfctl {command.name}: ignored: {' '.join(given.arguments)}")
        sys.stdout.write(command.run(given))
        return 0
    except (OptionError, Misuse) as error:
        return complain(f"{error}\n\n{command.help()}")
    except CannotConnect as error:
        return complain(f"Error connecting to Serf agent: {error}")
    except RpcError as error:
        advice = f"\n{error.advice}" if error.advice else ""
        return complain(f"{command.failure}{error}{advice}")
    except Failure as error:
        return complain(str(error))


def _help(given: Parsed) -> str:
    if not given.arguments:
        return general_usage()
    name = given.arguments[0]
    if name not in COMMANDS:
        raise Failure(_unknown(name))
    return COMMANDS[name].help()


def _completion(given: Parsed) -> str:
    from serfd.ctl_completion import SCRIPTS

    if len(given.arguments) != 1 or given.arguments[0] not in SCRIPTS:
        raise Misuse(f"A shell must be specified: {', '.join(SCRIPTS)}.")
    return SCRIPTS[given.arguments[0]](COMMANDS.values())


def _unknown(name: str) -> str:
    near = nearest(name, list(COMMANDS))
    return f"Unknown command: {name}" + (f"\nDid you mean {near}?" if near else "")


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
    Option("rpc-addr", "HOST:PORT", "where the agent listens, or unix:PATH", default=RPC_ADDR),
    Option("rpc-auth", "TOKEN", "the agent's rpc_auth", default="none"),
    Option("rpc-tls-ca", "FILE", "speak TLS; this authority signed the agent's certificate"),
    Option("rpc-tls-cert", "FILE", "the certificate to show to an agent that asks for one"),
    Option("rpc-tls-key", "FILE", "its key", default="in the certificate's file"),
)
_FORMAT = Option(
    "format", "text|json", "for people or for programs", default="text", choices=("text", "json")
)

COMMANDS = {
    command.name: command
    for command in (
        Command(
            "completion",
            _completion,
            "Prints a script that completes command lines",
            arguments="bash|zsh|fish",
            example="serfctl completion bash > /etc/bash_completion.d/serfctl",
        ),
        Command(
            "event",
            ctl_commands.event,
            "Sends a user event to the cluster",
            arguments="NAME [PAYLOAD]",
            about="Every member hears it. Options stand before NAME: a payload may begin with -.",
            example="serfctl event -coalesce=false deploy v1.2",
            options=(
                Option(
                    "coalesce",
                    help="let a later event of this name take its place",
                    default="true",
                    flag=True,
                ),
                _FORMAT,
                *_AGENT,
            ),
            options_first=True,
            failure="Error sending event: ",
        ),
        Command(
            "force-leave",
            ctl_commands.force_leave,
            "Forces a failed member to leave the cluster",
            arguments="NAME",
            about="A member that is still alive comes back by itself.",
            example="serfctl force-leave -prune web3",
            options=(
                Option("prune", help="forget the member altogether", flag=True),
                _FORMAT,
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
            ctl_commands.info,
            "Shows what the agent tells about itself",
            about="Its name, tags and event handlers, and numbers of its runtime and of Serf.",
            example="serfctl info -format json",
            options=(_FORMAT, *_AGENT),
            failure="Error querying agent: ",
        ),
        Command(
            "join",
            ctl_commands.join,
            "Joins the agent to a cluster",
            arguments="ADDRESS...",
            about="One address that answers is enough; the port is the agent's own if left out.",
            example="serfctl join 10.0.0.7 10.0.0.8:7946",
            options=(
                Option("replay", help="deliver the cluster's recent user events", flag=True),
                _FORMAT,
                *_AGENT,
            ),
            failure="Error joining the cluster: ",
        ),
        Command(
            "keygen",
            ctl_commands.keygen,
            "Prints a new encryption key",
            about="32 random bytes in base64, for encrypt_key or the keyring file.",
            example="serfctl keygen",
            options=(_FORMAT,),
        ),
        Command(
            "keys",
            ctl_commands.keys,
            "Changes or lists the encryption keys of all members",
            about="To change the key: install the new one, use it, then remove the old one.",
            example="serfctl keys -list",
            options=(
                Option("install", "KEY", "give all members one more key, in base64"),
                Option("use", "KEY", "encrypt with this key, which all must have"),
                Option("remove", "KEY", "take a key, which must not be in use, from all"),
                Option("list", help="show the keys, and how many members have each", flag=True),
                _FORMAT,
                *_AGENT,
            ),
        ),
        Command(
            "leave",
            ctl_commands.leave,
            "Lets the agent leave its cluster and stop",
            about="The others see that it left, and not that it failed.",
            example="serfctl leave",
            options=(_FORMAT, *_AGENT),
            failure="Error leaving: ",
        ),
        Command(
            "members",
            ctl_commands.members,
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
                Option("watch", help="print changes as they come, until Ctrl-C", flag=True),
                *_AGENT,
            ),
            failure="Error retrieving members: ",
        ),
        Command(
            "monitor",
            ctl_commands.monitor,
            "Shows the agent's events and log as they come",
            about="It begins with the last 512 lines of the log. Ctrl-C ends it.\n"
            "JSON is one object a line, for each event and each line of the log.",
            example="serfctl monitor -log-level debug",
            options=(
                Option(
                    "log-level",
                    "LEVEL",
                    "trace, debug, info, warn or err",
                    default="info",
                    choices=("trace", "debug", "info", "warn", "err"),
                ),
                _FORMAT,
                *_AGENT,
            ),
            failure="Error starting monitor: ",
        ),
        Command(
            "plugin",
            ctl_commands.plugin,
            "Writes a new plugin, and tests for it",
            arguments="new NAME",
            about="NAME.py has settings and two hooks, test_NAME.py runs it in whole clusters.",
            example="serfctl plugin new -dir /etc/serfd/plugins notebook",
            options=(Option("dir", "DIR", "write them there", default="the working directory"),),
        ),
        Command(
            "plugins",
            ctl_commands.plugins,
            "Shows the agent's plugins, where they are from and how they are",
            example="serfctl plugins",
            options=(_FORMAT, *_AGENT),
            failure="Error querying agent: ",
        ),
        Command(
            "query",
            ctl_commands.query,
            "Asks the cluster something and shows the answers",
            arguments="NAME [PAYLOAD]",
            about="It ends when all have answered, or at its timeout. Ctrl-C ends it too.\n"
            "Options stand before NAME: a payload may begin with -.",
            example="serfctl query -tag role=web -timeout 5s load",
            options=(
                _FORMAT,
                Option("node", "NAME", "only this member is to answer", many=True),
                Option("tag", "KEY=REGEX", "only members with such a tag", many=True),
                Option("timeout", "DURATION", "wait so long", default="0: by the cluster's size"),
                Option("no-ack", help="do not ask who has heard it", flag=True),
                Option("relay-factor", "N", "so many pass each answer on", default="0"),
                Option("wait-all", help="wait for the timeout in any case", flag=True),
                *_AGENT,
            ),
            options_first=True,
            failure="Error sending query: ",
        ),
        Command(
            "reachability",
            ctl_commands.reachability,
            "Tests whether gossip reaches all members",
            about="It takes some seconds, the more the larger the cluster.",
            example="serfctl reachability -verbose",
            options=(
                Option("verbose", help="show who answers, and how fast", flag=True),
                _FORMAT,
                *_AGENT,
            ),
            failure="Error sending query: ",
        ),
        Command(
            "rtt",
            ctl_commands.rtt,
            "Estimates the round trip time between two members",
            arguments="NODE [NODE2]",
            about="NODE2 is the agent's own node if left out.",
            example="serfctl rtt web1 db1",
            options=(_FORMAT, *_AGENT),
            failure="Error querying agent: ",
        ),
        Command(
            "status",
            ctl_commands.status,
            "Shows on one screen how the agent is",
            about="Exits with 1 if it is isolated, slow, leaving, or has made errors of its own.",
            example="serfctl status",
            options=(_FORMAT, *_AGENT),
            failure="Error querying agent: ",
        ),
        Command(
            "tags",
            ctl_commands.tags,
            "Changes the agent's tags",
            about="The whole cluster sees the change.",
            example="serfctl tags -set role=web -set dc=east -delete canary",
            options=(
                Option("set", "KEY=VALUE", "create or change a tag", many=True),
                Option("delete", "KEY", "remove a tag, if it is there", many=True),
                _FORMAT,
                *_AGENT,
            ),
            failure="Error setting tags: ",
        ),
        Command(
            "version",
            ctl_commands.version,
            "Prints the version",
            example="serfctl version -format json",
            options=(_FORMAT,),
        ),
    )
}
