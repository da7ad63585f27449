"""Every setting: its type, unit, default and limits.

The file's keys at the top level are Serf's own (agent.md 1), so that its documentation and habits
carry over. What is new has a table: `[gossip]`, `[plugins.NAME]`. Serf's own files are read by
`serfd.serf_config`.
"""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec
import tomli
from msgspec import Meta, Struct, field

from serfd import serf_config
from serfd.errors import ConfigError


class Seconds(float):
    """A span of time. In files it is written `"500ms"`, `"10s"`, `"1h30m"`."""

    __slots__ = ()


class SignedSeconds(Seconds):
    """One that may have a sign, `"-1s"`, as Serf takes it; below 0 it counts as too short."""

    __slots__ = ()


FILE_SIZE_MAX = 1 << 24
"""Bytes; what is longer is no configuration."""
GOSSIP_PORT = 7946
RPC_PORT = 7373
KEY_SIZES = (16, 24, 32)
DISCOVER_SIZE_MAX = 57
"""Bytes of `discover`; with `_serf_` before them they are a label of a DNS name."""
LABEL_SIZE_MAX = 255
"""Bytes; the header has one for the length (gossip.md 3.5)."""
SOCKET_PATH_MAX = 107
"""Bytes of a unix socket's path; the kernel keeps one more, for the end."""
LOG_LEVELS = ("TRACE", "DEBUG", "INFO", "WARN", "ERR")
LOG_FORMATS = ("text", "json")
SYSLOG_FACILITIES: Mapping[str, int] = {
    "KERN": 0, "USER": 1, "MAIL": 2, "DAEMON": 3, "AUTH": 4, "SYSLOG": 5, "LPR": 6, "NEWS": 7,
    "UUCP": 8, "CRON": 9, "AUTHPRIV": 10, "FTP": 11, "LOCAL0": 16, "LOCAL1": 17, "LOCAL2": 18,
    "LOCAL3": 19, "LOCAL4": 20, "LOCAL5": 21, "LOCAL6": 22, "LOCAL7": 23,
}  # fmt: skip
"""Their numbers (RFC 3164, 4.1.1)."""
SYSLOG_PATHS = ("/dev/log", "/var/run/syslog", "/var/run/log")
"""Where a syslog listens, in the order in which it is sought (agent.md 7)."""
METRICS_PORT = 8125
"""Where statsd and statsite listen if nothing else is said."""

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|ms|s|m|h)")
_DURATION_MAX = 2**63 / 1e9
"""Seconds; Go counts nanoseconds in 64 bits."""
_KINDS: Mapping[str, type] = {"`str`": str, "`object`": Mapping}
"""What the values of a table may have to be, in msgspec's words."""
_SECRETS = re.compile(r"(encrypt_key|rpc_auth|plugins)\b")
"""Places of which an error never shows the value; a plugin's settings may be a token."""

_UNIX = "unix:"
_SOCKET_MODE = re.compile(r"0?[0-7]{3}", re.ASCII)

Positive = Annotated[int, Meta(ge=1)]
Network: TypeAlias = IPv4Network | IPv6Network


def parse_duration(text: str, *, signed: bool = False) -> Seconds:
    """`"1h30m"` → 5400.0. Go's syntax; a sign only if it may be `signed`.

    Raises ValueError with what was expected.
    """
    begin = 1 if signed and text.startswith(("-", "+")) else 0
    total, end = 0.0, begin
    for part in _DURATION.finditer(text, begin):
        if part.start() != end:
            break
        total += float(part[1]) * _UNITS[part[2]]
        end = part.end()
    if text[begin:] == "0":
        return Seconds(0.0)
    if begin == end or end != len(text):
        raise ValueError(f"{text!r} is not a duration like '500ms', '10s', '5m' or '24h'")
    if total >= _DURATION_MAX:
        raise ValueError(f"{text[:20]!r} is too long for a duration, at most 2562047h is allowed")
    return Seconds(-total if text.startswith("-") else total)


def _check_positive(settings: Struct, *durations: str) -> None:
    for name in durations:
        if getattr(settings, name) <= 0:
            raise ValueError(f"{name} must be longer than 0")


class GossipConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Failure detection and gossip. The defaults are memberlist's for a LAN (gossip.md 9)."""

    probe_interval: Seconds = Seconds(1.0)
    """One member is probed this often, stretched by local health (Lifeguard)."""

    probe_timeout: Seconds = Seconds(0.5)
    """Wait this long for an ack before asking others to probe. About the 99th percentile of round
    trips."""

    indirect_checks: Annotated[int, Meta(ge=0, le=64)] = 3
    """So many members are asked to probe one that does not answer."""

    suspicion_mult: Positive = 4
    """A suspect has this many probe intervals, times the logarithm of the cluster's size, to
    refute."""

    suspicion_max_timeout_mult: Positive = 6
    """The suspicion timeout starts this many times longer and shrinks as others confirm."""

    awareness_max_multiplier: Positive = 8
    """A node in bad health stretches its probe interval up to this factor."""

    retransmit_mult: Positive = 4
    """Every piece of news is sent this many times, times the logarithm of the cluster's size."""

    gossip_interval: Seconds = Seconds(0.2)
    """News that was sent already is sent again this often, until its retransmits are used up."""

    gossip_nodes: Positive = 3
    """Each round of gossip goes to this many members."""

    gossip_to_the_dead_time: Seconds = Seconds(30.0)
    """A failed member is still gossiped to for this long, so that it can refute."""

    push_pull_interval: Seconds = Seconds(30.0)
    """Full state is exchanged with one member this often; stretched in clusters over 32. 0 is
    never."""

    tcp_timeout: Seconds = Seconds(10.0)
    """Limit for connecting to a peer, and for each exchange with one."""

    packet_size_max: Annotated[int, Meta(ge=512, le=65000)] = 1400
    """Bytes of a gossip datagram, all envelopes included."""

    dead_node_reclaim_time: Seconds = Seconds(0.0)
    """A failed member's name may be taken from another address after this long, so that a machine
    that comes back with a new address is welcome at once."""

    def __post_init__(self) -> None:
        """Check values against each other."""
        _check_positive(self, "probe_interval", "probe_timeout", "gossip_interval", "tcp_timeout")
        if self.probe_timeout >= self.probe_interval:
            raise ValueError(
                f"probe_timeout ({self.probe_timeout:g}s) must be shorter than "
                f"probe_interval ({self.probe_interval:g}s)"
            )


PROFILES: Mapping[str, GossipConfig] = {
    "lan": GossipConfig(),
    "wan": GossipConfig(
        tcp_timeout=Seconds(30.0),
        suspicion_mult=6,
        push_pull_interval=Seconds(60.0),
        probe_timeout=Seconds(3.0),
        probe_interval=Seconds(5.0),
        gossip_nodes=4,
        gossip_interval=Seconds(0.5),
        gossip_to_the_dead_time=Seconds(60.0),
    ),
    "local": GossipConfig(
        tcp_timeout=Seconds(1.0),
        indirect_checks=1,
        retransmit_mult=2,
        suspicion_mult=3,
        push_pull_interval=Seconds(15.0),
        probe_timeout=Seconds(0.2),
        gossip_interval=Seconds(0.1),
        gossip_to_the_dead_time=Seconds(15.0),
    ),
}
"""memberlist's three sets of timings (gossip.md 9)."""


class MdnsConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Discovery in the local network (agent.md 8)."""

    interface: str = ""
    """Ask and answer on this network interface only. Empty: on that of `interface`, else on the
    system's choice."""

    disable_ipv4: bool = False
    """Do not use IPv4."""

    disable_ipv6: bool = False
    """Do not use IPv6."""


class RpcTlsConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """RPC over TLS. Needs `pip install serfd[tls]`."""

    certificate: str = ""
    """PEM file with the server's certificate, and those between it and its authority."""

    private_key: str = ""
    """PEM file with the certificate's key."""

    client_authority: str = ""
    """PEM file with an authority: clients must show a certificate that it signed. Empty: none is
    asked for."""

    def __post_init__(self) -> None:
        """Check values against each other."""
        if bool(self.certificate) != bool(self.private_key):
            raise ValueError("certificate and private_key belong together: give both, or neither")
        if self.client_authority and not self.certificate:
            raise ValueError("client_authority needs a certificate and a private_key")


class Config(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole configuration file."""

    node_name: str = ""
    """This node's name, unique in the cluster. Empty: the host's name."""

    role: str = ""
    """Sets the tag `role`; Serf's old way, [tags] is the new one."""

    tags_file: str = ""
    """Keep this node's tags in this file, so that changes by serfctl outlive a restart. Not
    together with [tags]."""

    bind: str = "0.0.0.0:7946"
    """Listen here for gossip, UDP and TCP."""

    advertise: str = ""
    """Tell others to reach this node here. Empty: the bind address; for 0.0.0.0 the host's private
    address."""

    interface: str = ""
    """With bind 0.0.0.0: listen on the first address of this network interface."""

    cluster_label: str = ""
    """Only nodes with the same label can speak with each other; at most 255 bytes. Real Serf agents
    have none."""

    cidrs_allowed: list[str] = field(default_factory=list)
    """Only members with an address in one of these networks are let in. Empty: all are."""

    rpc_addr: str = "127.0.0.1:7373"
    """Listen here for serfctl and other RPC clients: "host:port" or "unix:/path"."""

    rpc_auth: str = ""
    """RPC clients must show this token. Empty: none is asked for."""

    rpc_socket_mode: str = "0600"
    """With a unix rpc_addr: who may connect, as the file's mode in octal digits."""

    rpc_socket_group: str = ""
    """With a unix rpc_addr: the file's group, by its name. Empty: serfd's own."""

    start_join: list[str] = field(default_factory=list)
    """Join these at start; the start fails if none answers."""

    retry_join: list[str] = field(default_factory=list)
    """Join these in the background, again and again until one answers."""

    retry_interval: SignedSeconds = SignedSeconds(30.0)
    """Time between two tries of retry_join; at least 1s."""

    retry_max_attempts: Annotated[int, Meta(ge=0)] = 0
    """Give up and exit after this many failed tries. 0: never."""

    replay_on_join: bool = False
    """Deliver the cluster's recent user events when joining."""

    discover: str = ""
    """Find others of this name in the local network by mDNS, and join them. Empty: do not."""

    profile: str = "lan"
    """Timings for the network: lan, wan or local (one machine)."""

    protocol: Annotated[int, Meta(ge=2, le=5)] = 5
    """Serf protocol version to announce, 2 to 5."""

    encrypt_key: str = ""
    """Base64 of 16, 24 or 32 bytes that all members share (serfctl keygen). Empty: plain text."""

    keyring_file: str = ""
    """A JSON list of base64 keys, the first is used for sending. Not together with encrypt_key."""

    encrypt_verify_incoming: bool = True
    """With a key: refuse what is not encrypted. false while a living cluster is being encrypted."""

    encrypt_verify_outgoing: bool = True
    """With a key: encrypt what is sent. false while a living cluster is being encrypted."""

    enable_compression: bool = True
    """Compress gossip and state exchanges. Packed ones are always understood."""

    log_level: str = "INFO"
    """TRACE, DEBUG, INFO, WARN or ERR."""

    log_format: str = "text"
    """text, or json: one object a line."""

    enable_syslog: bool = False
    """Send the log to the local syslog too."""

    syslog_facility: str = "LOCAL0"
    """What syslog shall take the lines for: KERN, USER, DAEMON, LOCAL0 to LOCAL7 and so on."""

    statsd_addr: str = ""
    """Send metrics to this statsd, "host:port", over UDP. Empty: to none."""

    statsite_addr: str = ""
    """Send metrics to this statsite, "host:port", over TCP. Empty: to none."""

    leave_on_terminate: bool = False
    """Leave the cluster on SIGTERM, instead of just stopping."""

    skip_leave_on_interrupt: bool = False
    """Just stop on SIGINT, instead of leaving the cluster."""

    broadcast_timeout: SignedSeconds = SignedSeconds(5.0)
    """Wait this long for news of a leave or tag change to be passed on; at least 1s."""

    reconnect_interval: Seconds = Seconds(30.0)
    """Try to reach one failed member this often."""

    reconnect_timeout: Seconds = Seconds(86400.0)
    """A failed member is forgotten after this long, but still looked for now and then."""

    tombstone_timeout: Seconds = Seconds(86400.0)
    """A member that left is forgotten after this long."""

    query_timeout_mult: Positive = 16
    """A query without a timeout waits this many gossip intervals, times the logarithm of the
    cluster's size."""

    query_size_limit: Annotated[int, Meta(ge=1, le=9216)] = 1024
    """Bytes of an encoded query, at most. What fits no packet is refused in any case."""

    query_response_size_limit: Annotated[int, Meta(ge=1, le=9216)] = 1024
    """Bytes of an encoded answer to a query, at most."""

    user_event_size_limit: Annotated[int, Meta(ge=1, le=9216)] = 512
    """Bytes of a user event, name and payload, and of the whole when encoded, at most. What fits no
    packet is refused in any case."""

    snapshot_path: str = ""
    """Remember members and clocks in this file, to rejoin by itself after a restart; Serf's
    format."""

    rejoin_after_leave: bool = False
    """With snapshot_path: rejoin even after a leave."""

    disable_name_resolution: bool = False
    """Do not ask the cluster who is right when another node has this node's name."""

    disable_coordinates: bool = False
    """Do not estimate round-trip times."""

    coalesce_period: Seconds = Seconds(0.0)
    """Collect changes of members for up to this long and tell them as one event. 0: tell each at
    once."""

    quiescent_period: Seconds = Seconds(1.0)
    """With coalesce_period: tell them earlier, when nothing has changed for this long."""

    user_coalesce_period: Seconds = Seconds(3.0)
    """Of user events that may coalesce, hand on only the newest of each name in this time. 0: hand
    on each at once."""

    user_quiescent_period: Seconds = Seconds(1.0)
    """With user_coalesce_period: hand it on earlier, when no more came for this long."""

    event_handlers: list[str] = field(default_factory=list)
    """Serf's event scripts, "FILTER=SCRIPT"; run by the bundled plugin `script`."""

    plugin_dirs: list[str] = field(default_factory=list)
    """Directories with plugins, one file each, beside those that come with serfd."""

    state_dir: str = ""
    """Plugins keep their files in this directory. Empty: in the one that systemd gives, if any."""

    hook_timeout: Seconds = Seconds(30.0)
    """A plugin's hook that has not finished after this long is cancelled."""

    tags: dict[str, str] = field(default_factory=dict)
    """What this node tells others about itself."""

    gossip: GossipConfig = field(default_factory=GossipConfig)
    """Single timing values; what is not given comes from the profile."""

    mdns: MdnsConfig = field(default_factory=MdnsConfig)
    """How `discover` uses the network."""

    rpc_tls: RpcTlsConfig = field(default_factory=RpcTlsConfig)
    """Encrypts RPC over TCP. Without a certificate RPC is plain."""

    plugins: dict[str, dict[str, Any]] = field(default_factory=dict)
    """A table [plugins.NAME] switches a plugin on; the table is its settings."""

    def __post_init__(self) -> None:
        """Check texts that have a form of their own; what `role` says becomes a tag."""
        for key in self.__struct_fields__:
            if isinstance(text := getattr(self, key), str) and "\0" in text:
                raise ValueError(f"{key} contains a NUL character")
        if self.log_level.upper() not in LOG_LEVELS:
            raise ValueError(
                f"log_level {self.log_level!r} is unknown, expected one of {', '.join(LOG_LEVELS)}"
            )
        if self.log_format not in LOG_FORMATS:
            raise ValueError(
                f"log_format {self.log_format!r} is unknown, expected one of "
                f"{', '.join(LOG_FORMATS)}"
            )
        if self.syslog_facility.upper() not in SYSLOG_FACILITIES:
            raise ValueError(
                f"syslog_facility {self.syslog_facility!r} is unknown, expected one of "
                f"{', '.join(SYSLOG_FACILITIES)}"
            )
        for key in ("statsd_addr", "statsite_addr"):
            if getattr(self, key):
                host, _ = split_address(getattr(self, key), default_port=METRICS_PORT, key=key)
                if not host:
                    raise ValueError(f"{key} {getattr(self, key)!r} has no host")
        if self.profile not in PROFILES:
            raise ValueError(
                f"profile {self.profile!r} is unknown, expected one of {', '.join(PROFILES)}"
            )
        _check_positive(self, "reconnect_interval", "hook_timeout")
        for key in ("bind", "rpc_addr", "advertise"):
            if getattr(self, key) and not (key == "rpc_addr" and self.rpc_socket is not None):
                host, _ = split_service(getattr(self, key), key=key)
                if not host and key == "advertise":
                    raise ValueError(f"advertise {self.advertise!r} has no host")
        if self.rpc_socket is not None:
            _check_socket_path(self.rpc_socket)
            if self.rpc_tls.certificate:
                raise ValueError(
                    "rpc_tls and a unix rpc_addr exclude each other: TLS is for RPC over TCP"
                )
        if not _SOCKET_MODE.fullmatch(self.rpc_socket_mode):
            raise ValueError(
                f"rpc_socket_mode {self.rpc_socket_mode!r} is not a mode like '0600' or '0660'"
            )
        size = len(self.cluster_label.encode("utf-8", "surrogateescape"))
        if size > LABEL_SIZE_MAX:
            raise ValueError(
                f"cluster_label has {size} bytes of UTF-8, at most {LABEL_SIZE_MAX} are allowed"
            )
        parse_networks(self.cidrs_allowed, key="cidrs_allowed")
        if self.discover:
            _check_discovery(self.discover, self.mdns)
        elif self.mdns.interface:
            raise ValueError(
                "mDNS interface specified without enabling mDNS discovery: [mdns] has an "
                "interface, but there is no `discover`"
            )
        if self.encrypt_key:
            decode_key(self.encrypt_key, what="encrypt_key")
            if self.keyring_file:
                raise ValueError("encrypt_key and keyring_file exclude each other: give one")
        for tag in self.tags:
            if not tag:
                raise ValueError("tags: a tag needs a name, found an empty one")
        if self.role:
            self.tags["role"] = self.role
        if self.tags_file and self.tags:
            raise ValueError(
                "Tags config not allowed while using tag files: found tags_file and the tag "
                f"{next(iter(self.tags))!r}"
            )

    @property
    def rpc_socket(self) -> str | None:
        """The path of a unix `rpc_addr`; None if that is a host and port."""
        return self.rpc_addr.removeprefix(_UNIX) if self.rpc_addr.startswith(_UNIX) else None


def _check_discovery(name: str, mdns: MdnsConfig) -> None:
    labels = [len(label) for label in name.encode("utf-8", "surrogateescape").split(b".")]
    if sum(labels) > DISCOVER_SIZE_MAX or not all(labels):
        raise ValueError(
            f"discover {name!r} cannot be part of a DNS name: expected at most "
            f"{DISCOVER_SIZE_MAX} bytes of UTF-8, and none of the parts between dots empty"
        )
    if mdns.disable_ipv4 and mdns.disable_ipv6:
        raise ValueError("Invalid mDNS configuration: both IPv4 and IPv6 are disabled")


def _check_socket_path(path: str) -> None:
    if not path.startswith("/") or "\0" in path:
        raise ValueError(
            f"rpc_addr {_UNIX + path!r}: expected a whole path, like 'unix:/run/serfd/rpc.sock'"
        )
    size = len(path.encode("utf-8", "surrogateescape"))
    if size > SOCKET_PATH_MAX:
        raise ValueError(
            f"rpc_addr: the path of the socket has {size} bytes, at most {SOCKET_PATH_MAX} are "
            "allowed: choose a shorter one, like 'unix:/run/serfd/rpc.sock'"
        )


_TABLES: Mapping[str, type[Struct]] = {
    "gossip": GossipConfig,
    "mdns": MdnsConfig,
    "rpc_tls": RpcTlsConfig,
}


def split_address(text: str, *, default_port: int, key: str) -> tuple[str, int]:
    """`host`, `host:port`, `[v6]`, `[v6]:port`, `v6` → host and port. Raises ValueError."""
    host, port = split_service(text, key=key)
    if port and not _is_number(port):
        raise _not_a_port(text, port, key)
    return host, int(port) if port else default_port


def split_service(text: str, *, key: str) -> tuple[str, str]:
    """As `split_address`, but the port may be a service's name, and is empty if there is none."""
    host, port = text, ""
    if text.startswith("["):
        host, closed, rest = text[1:].partition("]")
        if not closed or (rest and not rest.startswith(":")):
            raise ValueError(f"{key} {text!r} is not an address like '[::1]:7946'")
        port = rest[1:]
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    if _is_number(port) and int(port) > 65535:
        raise _not_a_port(text, port, key)
    return host, port


def _is_number(port: str) -> bool:
    return port.isascii() and port.isdigit()


def _not_a_port(text: str, port: str, key: str) -> ValueError:
    return ValueError(f"{key} {text!r}: {port!r} is not a port, expected 0 to 65535")


def parse_networks(entries: Sequence[str], *, key: str) -> tuple[Network, ...]:
    """`10.0.0.0/8`, `fd00::/8`, `10.0.0.7` → networks; of IPv4 ones in IPv6 form, IPv4 ones.

    Raises ValueError, which names the entry that is none.
    """
    networks: list[Network] = []
    for entry in entries:
        try:
            network = ip_network(entry, strict=False)
        except ValueError:
            raise ValueError(
                f"{key}: {entry!r} is not a network like '10.0.0.0/8' or 'fd00::/8'"
            ) from None
        if isinstance(network, IPv6Network) and network.prefixlen >= 96:
            mapped = network.network_address.ipv4_mapped
            if mapped is not None:
                network = IPv4Network((mapped, network.prefixlen - 96))
        networks.append(network)
    return tuple(networks)


def decode_key(text: str, *, what: str) -> bytes:
    """An encryption key from its base64. Raises ValueError, which does not repeat the key."""
    try:
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{what} is not base64; `serfctl keygen` prints a good key") from None
    if len(key) not in KEY_SIZES:
        raise ValueError(
            f"{what} holds {len(key)} bytes, expected 16, 24 or 32; `serfctl keygen` prints a "
            "good key"
        )
    return key


def load(paths: Sequence[str | Path], *, flags: Mapping[str, Any] | None = None) -> Config:
    """The configuration from files in order, then flags over them.

    A path may be a directory: every `.toml` and `.json` in it, sorted by name. Lists are appended,
    tables joined, later values win. `flags` has the file's keys. A JSON file is one of Serf's, and
    beside one, flags win as Serf's do: none switches off what a file says.

    Raises:
        ConfigError: it names the file, the key, what was found and what was expected.
    """
    read = [(path, _text(path)) for path in _files(paths)]
    tables = [(str(path), _table(path, text)) for path, text in read]
    if flags:
        beside_serfs = any(serf_config.is_one(path.name, text) for path, text in read)
        given = serf_config.significant(flags) if beside_serfs else dict(flags)
        tables.append(("command line", given))
    merged: dict[str, Any] = {}
    for _, table in tables:
        _merge(merged, table)
    try:
        return _convert(merged, " + ".join(source for source, _ in tables))
    except ConfigError:
        # Name the one file that is wrong by itself; if each is right alone, it is their sum.
        for source, table in tables:
            _convert(table, source)
        raise


def _files(paths: Sequence[str | Path]) -> list[Path]:
    files: list[Path] = []
    for path in map(Path, paths):
        try:
            found = sorted(path.iterdir()) if path.is_dir() else [path]
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from None
        files += [p for p in found if p == path or (p.suffix in (".toml", ".json") and p.is_file())]
    return files


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(FILE_SIZE_MAX + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    if len(content) > FILE_SIZE_MAX:
        raise ConfigError(f"{path}: longer than {FILE_SIZE_MAX} bytes, not a configuration")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error}") from None


def _table(path: Path, text: str) -> dict[str, Any]:
    if serf_config.is_one(path.name, text):
        try:
            return serf_config.read(text)
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from None
    try:
        return tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        held = into.get(key)
        if isinstance(held, dict) and isinstance(value, Mapping):
            _merge(held, value)
        elif isinstance(held, list) and isinstance(value, list):
            held.extend(value)
        elif isinstance(value, Mapping):
            into[key] = {}
            _merge(into[key], value)
        else:
            into[key] = list(value) if isinstance(value, list) else value


def _convert(table: dict[str, Any], source: str) -> Config:
    profile = PROFILES.get(str(table.get("profile", "lan")))
    gossip = table.get("gossip", {})
    if profile is not None and isinstance(gossip, dict):
        held = {name: getattr(profile, name) for name in profile.__struct_fields__}
        table = {**table, "gossip": {**held, **gossip}}
    try:
        return msgspec.convert(table, Config, dec_hook=_duration)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {_explain(str(error), table)}") from None


def _duration(kind: type, value: Any) -> Any:
    assert issubclass(kind, Seconds), kind
    if isinstance(value, Seconds):
        return kind(value)
    if not isinstance(value, str):
        raise ValueError(
            f"found {value!r}, expected a duration in quotes like '500ms', '10s', '5m' or '24h'"
        )
    return kind(parse_duration(value, signed=kind is SignedSeconds))


def _explain(text: str, table: Mapping[str, Any]) -> str:
    """What msgspec says, with what was found and the nearest right name for an unknown key."""
    what, _, place = text.partition(" - at `$.")
    place = place.rstrip("`")
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", what.partition(" - at ")[0])
    if unknown is not None:
        known = _TABLES.get(place, Config)
        from difflib import get_close_matches  # only a mistake needs it

        near = get_close_matches(unknown[1], known.__struct_fields__, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"unknown key {unknown[1]!r}" + (f" in [{place}]" if place else "") + hint
    if not what.startswith("Expected"):
        return what.partition(" - at ")[0] + (f" - at `{place}`" if place else "")
    found: Any = table
    for step in re.findall(r"\[\.\.\.\]|[^.\[\]]+", place):
        if step == "[...]":
            # msgspec does not say which value of a table it is: the first one of a wrong type.
            kind = _KINDS[what.removeprefix("Expected ").partition(",")[0]]
            step = next(key for key, value in found.items() if not isinstance(value, kind))
            place = place.replace("[...]", f".{step}")
        found = found[int(step)] if isinstance(found, list) else found.get(step)
        if not isinstance(found, (Mapping, list)):
            break
    shown = "" if _SECRETS.match(place) else f", found {found!r}"
    return f"{what}{shown} - at `{place}`"
