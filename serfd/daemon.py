"""The program `serfd`: its command line, and what it makes of it."""

import importlib
import sys
import types
from collections.abc import Sequence
from typing import Any

from serfd import __version__, options
from serfd.config import Config, load, parse_duration
from serfd.errors import ConfigError, SerfdError
from serfd.options import Option, OptionError

EXIT_WRONG = 2
"""The command line or the configuration is wrong, or the daemon could not start."""

OPTIONS = (
    Option("config", "FILE", "read this configuration file; may be given again", many=True),
    Option("config-file", "FILE", "the same; Serf's name for it", many=True),
    Option("config-dir", "DIR", "read every .toml in this directory, sorted by name", many=True),
    Option("check", "", "check configuration and plugins, and exit", flag=True),
    Option("node", "NAME", "this node's name, unique in the cluster", default="the host's name"),
    Option("bind", "ADDR", "listen here for gossip, UDP and TCP", default="0.0.0.0:7946"),
    Option("advertise", "ADDR", "tell others to reach this node here", default="the bind address"),
    Option("iface", "NAME", "with bind 0.0.0.0: listen on this network interface"),
    Option("rpc-addr", "ADDR", "listen here for serfctl", default="127.0.0.1:7373"),
    Option("join", "ADDR", "join this address at start; may be given again", many=True),
    Option("retry-join", "ADDR", "join it in the background until it answers", many=True),
    Option("retry-interval", "DURATION", "time between two tries of retry-join", default="30s"),
    Option("retry-max", "N", "exit after this many failed tries", default="0, never"),
    Option("replay", "", "deliver the cluster's recent user events when joining", flag=True),
    Option("tag", "KEY=VALUE", "a tag of this node; may be given again", many=True),
    Option("profile", "NAME", "timings for the network: lan, wan or local", default="lan"),
    Option("protocol", "N", "Serf protocol version, 2 to 5", default="5"),
    Option("encrypt", "KEY", "base64 key all members share; better in the configuration file"),
    Option("keyring-file", "FILE", "JSON list of base64 keys"),
    Option("disable-compression", "", "send gossip and state exchanges unpacked", flag=True),
    Option("event-handler", "FILTER=SCRIPT", "run a script on events; may be repeated", many=True),
    Option("broadcast-timeout", "DURATION", "wait this long for news to spread", default="5s"),
    Option("snapshot", "FILE", "remember members there, to rejoin by itself after a restart"),
    Option("rejoin", "", "with -snapshot: rejoin even after a leave", flag=True),
    Option("log-level", "LEVEL", "TRACE, DEBUG, INFO, WARN or ERR", default="INFO"),
    Option("version", "", "print the version and exit", flag=True),
    Option("help", "", "print this help and exit", flag=True),
)

_KEYS = {
    "node": "node_name",
    "iface": "interface",
    "join": "start_join",
    "retry-max": "retry_max_attempts",
    "replay": "replay_on_join",
    "snapshot": "snapshot_path",
    "rejoin": "rejoin_after_leave",
    "encrypt": "encrypt_key",
    "event-handler": "event_handlers",
}
"""Options whose key in the file has another name; the others differ by `-` and `_` only."""
_NUMBERS = ("retry_max_attempts", "protocol")
_DURATIONS = ("retry_interval", "broadcast_timeout")
_NOT_SETTINGS = ("config", "config-file", "config-dir", "check", "version", "help")
HELP = options.usage(
    "serfd [options]",
    "A cluster agent: joins machines into a cluster, speaks Serf's gossip and RPC, and runs "
    "plugins.\nOptions win over configuration files. Serf's spelling -node=NAME works too.",
    OPTIONS,
    example="serfd --node agent-one --bind 10.0.0.7:7946 --join 10.0.0.8",
    notes="Settings without an option are in conf/serfd.toml. SIGHUP reads the files again.",
)


def main(argv: Sequence[str] | None = None) -> int:
    """The program `serfd`. Returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        given = options.parse(argv, OPTIONS)
        if given.flag("help"):
            print(HELP, end="")
            return 0
        if given.flag("version"):
            print(__version__)
            return 0
        if given.arguments:
            raise OptionError(f"unexpected argument {given.arguments[0]!r}")
        config = read_config(given)
        _import_lean()
        from serfd.service import Service

        service = Service(config, lambda: read_config(given))
        if given.flag("check"):
            print(service.check())
            return 0
        return service.run()
    except OptionError as error:
        print(f"serfd: {error}\nserfd --help lists the options.", file=sys.stderr)
        return EXIT_WRONG
    except SerfdError as error:
        print(f"serfd: {str(error).strip()}", file=sys.stderr)
        return EXIT_WRONG


def _import_lean() -> None:
    """Import Twisted without what it loads for others: 4 MB of memory and 40 ms of start.

    `twisted.python.compat` wants http.cookiejar for a deprecated alias, and asyncio, of which
    Twisted uses the futures only, wants ssl for its own servers. Both are back in their places
    afterwards, for plugins that need them.
    """
    assert "twisted" not in sys.modules
    stand_ins: dict[str, Any] = {"http.cookiejar": types.ModuleType("http.cookiejar"), "ssl": None}
    missing = {name: module for name, module in stand_ins.items() if name not in sys.modules}
    sys.modules.update(missing)
    try:
        importlib.import_module("twisted.internet.defer")
    finally:
        for name in missing:
            del sys.modules[name]


def read_config(given: options.Parsed) -> Config:
    """The configuration of files and options. Raises ConfigError."""
    paths = given.texts("config") + given.texts("config-file") + given.texts("config-dir")
    flags: dict[str, Any] = {}
    for name, value in given.values.items():
        if name in _NOT_SETTINGS:
            continue
        key = _KEYS.get(name, name.replace("-", "_"))
        if name == "tag":
            flags["tags"] = dict(_tag(text) for text in given.texts("tag"))
        elif name == "disable-compression":
            flags["enable_compression"] = not value
        elif key in _NUMBERS:
            try:
                flags[key] = int(str(value))
            except ValueError:
                raise ConfigError(f"-{name}: {value!r} is not a number") from None
        elif key in _DURATIONS:
            try:
                flags[key] = parse_duration(str(value))
            except ValueError as error:
                raise ConfigError(f"-{name}: {error}") from None
        else:
            flags[key] = value
    return load(paths, flags=flags)


def _tag(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ConfigError(f"Invalid tag: {text!r}, expected KEY=VALUE")
    return key, value


if __name__ == "__main__":
    sys.exit(main())
