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
    Option("config-file", "FILE", "the same; Serf's name for it", many=True, into="config"),
    Option("config-dir", "DIR", "read all .toml and .json in it, sorted", many=True, into="config"),
    Option("check", "", "check configuration and plugins, and exit", flag=True),
    Option("node", "NAME", "this node's name, unique in the cluster", default="the host's name"),
    Option("bind", "ADDR", "listen here for gossip, UDP and TCP", default="0.0.0.0:7946"),
    Option("advertise", "ADDR", "tell others to reach this node here", default="the bind address"),
    Option("iface", "NAME", "with bind 0.0.0.0: listen on this network interface"),
    Option("rpc-addr", "ADDR", "listen here for serfctl; or unix:PATH", default="127.0.0.1:7373"),
    Option("join", "ADDR", "join this address at start; may be given again", many=True),
    Option("retry-join", "ADDR", "join it in the background until it answers", many=True),
    Option("retry-interval", "DURATION", "time between two tries of retry-join", default="30s"),
    Option("retry-max", "N", "exit after this many failed tries", default="0, never"),
    Option("discover", "NAME", "find others of this name in the local network by mDNS, join them"),
    Option("mdns-iface", "NAME", "with -discover: on this network interface", default="iface"),
    Option("mdns-disable-ipv4", "", "with -discover: do not use IPv4", flag=True),
    Option("mdns-disable-ipv6", "", "with -discover: do not use IPv6", flag=True),
    Option("replay", "", "deliver the cluster's recent user events when joining", flag=True),
    Option("tag", "KEY=VALUE", "a tag of this node; may be given again", many=True),
    Option("tags-file", "FILE", "keep the tags there, so that changes outlive a restart"),
    Option("role", "NAME", "set the tag `role`; -tag role=NAME is the new way"),
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
    Option("syslog", "", "send the log to the local syslog too", flag=True),
    Option("version", "", "print the version and exit", flag=True),
    Option("v", "", "the same", flag=True),
    Option("help", "", "print this help and exit", flag=True),
    Option("h", "", "the same", flag=True),
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
    "syslog": "enable_syslog",
}
"""Options whose key in the file has another name; the others differ by `-` and `_` only."""
_MDNS_KEYS = {
    "mdns-iface": "interface",
    "mdns-disable-ipv4": "disable_ipv4",
    "mdns-disable-ipv6": "disable_ipv6",
}
"""Options whose key stands in the table [mdns]."""
_NUMBERS = ("retry_max_attempts", "protocol")
_DURATIONS = ("retry_interval", "broadcast_timeout")
_NOT_SETTINGS = ("config", "check", "version", "v", "help", "h")
HELP = options.usage(
    "serfd [options]",
    "A cluster agent: joins machines into a cluster, speaks Serf's gossip and RPC, and runs "
    "plugins.\nOptions win over configuration files. Serf's spelling -node=NAME works too, and so "
    "do its\nJSON files and `serfd agent -node=NAME`.",
    OPTIONS,
    example="serfd --node agent-one --bind 10.0.0.7:7946 --join 10.0.0.8",
    notes="Settings without an option are in conf/serfd.toml. SIGHUP reads the files again.",
)


def main(argv: Sequence[str] | None = None) -> int:
    """The program `serfd`. Returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["agent"]:
        # A unit with `serf agent -node=...` needs another program's name, and no more.
        argv = argv[1:]
    try:
        given = options.parse(argv, OPTIONS)
        if given.flag("help") or given.flag("h"):
            print(HELP, end="")
            return 0
        if given.flag("version") or given.flag("v"):
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
    Twisted uses the futures only, wants ssl for its own servers. Its reactor wants pyOpenSSL where
    that is installed: 12 MB more. All are back in their places afterwards, for plugins and for RPC
    over TLS, which need nothing of that from the reactor.
    """
    assert "twisted" not in sys.modules
    stand_ins: dict[str, Any] = {
        "http.cookiejar": types.ModuleType("http.cookiejar"),
        "ssl": None,
        "OpenSSL": None,
    }
    missing = {name: module for name, module in stand_ins.items() if name not in sys.modules}
    sys.modules.update(missing)
    try:
        importlib.import_module("serfd.net.reactor")
    finally:
        for name in missing:
            del sys.modules[name]


def read_config(given: options.Parsed) -> Config:
    """The configuration of files and options. Raises ConfigError."""
    flags: dict[str, Any] = {}
    for name, value in given.values.items():
        if name in _NOT_SETTINGS or value == "":
            continue  # an empty text is none, as in Serf
        key = _KEYS.get(name, name.replace("-", "_"))
        if name == "tag":
            flags["tags"] = dict(_tag(text) for text in given.texts("tag"))
        elif name in _MDNS_KEYS:
            flags.setdefault("mdns", {})[_MDNS_KEYS[name]] = value
        elif name == "disable-compression":
            flags["enable_compression"] = not value
        elif key in _NUMBERS:
            try:
                number = int(str(value))
            except ValueError:
                raise ConfigError(f"-{name}: {value!r} is not a number") from None
            if number >= 0:  # less is none, as in Serf
                flags[key] = number
        elif key in _DURATIONS:
            try:
                flags[key] = parse_duration(str(value), signed=True)
            except ValueError as error:
                raise ConfigError(f"-{name}: {error}") from None
        else:
            flags[key] = value
    return load(given.texts("config"), flags=flags)


def _tag(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ConfigError(f"Invalid tag: {text!r}, expected KEY=VALUE")
    return key, value


if __name__ == "__main__":
    sys.exit(main())
