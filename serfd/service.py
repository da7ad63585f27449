"""The running process: one agent with its sockets, plugins and signals."""

import base64
import faulthandler
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred, DeferredLock, TimeoutError, maybeDeferred
from twisted.internet.task import LoopingCall
from twisted.internet.threads import deferToThreadPool

from serfd import __version__, logs, systemd
from serfd.agent import Agent
from serfd.config import GOSSIP_PORT, RPC_PORT, Config
from serfd.effects import Address
from serfd.errors import CommandError, ConfigError, SerfdError
from serfd.hooks.host import PluginHost
from serfd.hooks.loader import LoadedPlugin
from serfd.hooks.loader import load as load_plugins
from serfd.hooks.mailbox import Journal
from serfd.joining import SHORTEST_WAIT, Joining
from serfd.metrics import Metrics, report
from serfd.net.interfaces import addresses_of, interface_address, private_address
from serfd.net.keyring_file import load_keyring
from serfd.net.reactor import install
from serfd.net.snapshot_file import SnapshotFile
from serfd.net.sockets import (
    ANYWHERE,
    bind_gossip,
    bind_rpc,
    bind_unix,
    find_group,
    resolve_address,
)
from serfd.net.statsd import Sink, Statsd, Statsite, Telemetry, measure_process
from serfd.net.tags_file import load_tags
from serfd.net.transport import PACKET_MAX, AcceptFactory, PacketProtocol
from serfd.net.unix_port import UnixPort
from serfd.rpc.server import RpcFactory
from serfd.serf.events import ip_text
from serfd.serf.node import BROADCAST_TIMEOUT_MIN, Node
from serfd.wire.sealing import Keyring

if TYPE_CHECKING:
    from serfd.rpc.server_tls import ServerTls

EXIT_DONE = 0
EXIT_NOT_LEFT = 1
"""Stopped by a signal, without leaving the cluster."""
EXIT_CANNOT = 2
"""It could not start, or could not go on."""

STATUS_INTERVAL = 5.0
"""Seconds between two looks at what systemd is told."""
FLUSH_TIME_MAX = 1.0
"""Seconds that RPC clients have to read their last replies when the daemon stops; statsite too."""

_RELOADABLE = frozenset(
    {"log_level", "tags", "role", "leave_on_terminate", "skip_leave_on_interrupt", "plugins",
     "plugin_dirs", "event_handlers", "rpc_tls"}
)  # fmt: skip

_log = logging.getLogger("serfd.agent")
_serf_log = logging.getLogger("serfd.serf")


class Service:
    """The process: one agent with its sockets, plugins and signals."""

    def __init__(self, config: Config, read_again: Callable[[], Config]) -> None:
        """`read_again`: gives the configuration of a reload; raises ConfigError."""
        self._config = config
        self._read_config = read_again
        self._status = EXIT_DONE
        self._is_leaving = False
        self._is_stopping = False
        self._reactor = install()
        self._metrics = Metrics()
        self._telemetry: Telemetry | None = None
        self._agent: Agent
        self._host: PluginHost
        self._plugins: list[LoadedPlugin]
        self._joining: Joining
        self._rpc: RpcFactory
        self._rpc_port: Any
        self._tls: ServerTls | None = None
        self._told = ""
        self._work = DeferredLock()
        """Held by the start and by each reload."""
        # What runs in the background; kept, so that each is seen to have its failures handled.
        self._starting: Deferred[None]
        self._changing: Deferred[None]
        self._ending: Deferred[None]
        self._loops: list[Deferred[Any]] = []

    def run(self) -> int:
        """Start, and serve until stopped. Returns the exit status; raises SerfdError."""
        _end_with_stacks_on(signal.SIGQUIT)
        self._build(self._set_up_logs())
        # Had it failed, its reason alone would have been told.
        logs.show_held()
        # After Twisted's own handlers, so that these win.
        self._reactor.callWhenRunning(self._handle_signals)
        self._reactor.callWhenRunning(self._begin)
        self._reactor.run()
        return self._status

    def check(self) -> str:
        """Go through the start without binding or telling anybody. Raises SerfdError."""
        logs.set_up("ERR", sys.stderr)
        _server_tls(self._config)
        if self._config.rpc_socket is not None:
            find_group(self._config.rpc_socket_group)
        else:
            _rpc_address(self._config)
        host, port = _gossip_address(self._config)
        node = self._node(_advertised(self._config, host, port))
        agent = Agent(self._config, node, self._reactor, port=port, shut_down=lambda: None)
        Joining(agent, self._config, self._reactor, rng=Random())
        names = ", ".join(plugin.name for plugin in load_plugins(self._config, agent))
        return f"The configuration is good. Plugins: {names or 'none'}."

    # Start.

    def _set_up_logs(self) -> logs.LogRing:
        config = self._config
        return logs.set_up(
            config.log_level,
            sys.stderr,
            as_json=config.log_format == "json",
            syslog=logs.Syslog(config.syslog_facility) if config.enable_syslog else None,
            held=True,
        )

    def _build(self, ring: logs.LogRing) -> None:
        config = self._config
        self._tls = _server_tls(config)
        host, port = _gossip_address(config)
        tcp, udp = bind_gossip(host, port)
        port = tcp.getsockname()[1]
        rpc = _bind_rpc(config)
        advertised = _advertised(config, host, port)
        snapshot: SnapshotFile | None = None
        if config.snapshot_path:
            snapshot = SnapshotFile(
                config.snapshot_path, self._reactor, self._in_thread, self._metrics
            )
        node = self._node(advertised, snapshot.lines() if snapshot is not None else None)
        self._agent = agent = Agent(
            config,
            node,
            self._reactor,
            port=port,
            shut_down=lambda: self._stop(EXIT_DONE),
            snapshot=snapshot,
        )
        self._host = PluginHost(
            agent, self._reactor, hook_timeout=config.hook_timeout, journal=_journal
        )
        agent.plugins = self._host.stats
        self._plugins = load_plugins(config, agent)
        self._joining = Joining(agent, config, self._reactor, rng=Random())
        self._joining.listen()

        reactor = self._reactor
        packets = PacketProtocol(agent.driver)
        reactor.adoptStreamPort(tcp.fileno(), tcp.family, AcceptFactory(agent.driver))
        port_udp = reactor.adoptDatagramPort(
            udp.fileno(), udp.family, packets, maxPacketSize=PACKET_MAX
        )
        self._rpc = RpcFactory(agent, ring, auth=config.rpc_auth, clock=reactor)
        self._rpc_port = self._serve_rpc(rpc)
        self._banner(host, port, advertised, rpc.getsockname())
        for adopted in (tcp, udp, rpc):
            adopted.close()  # Twisted has its own copies
        # Before the node speaks: no event is to be missed, its own join included.
        self._host.attach(self._plugins)
        agent.driver.start(port_udp, is_ipv6=udp.family == socket.AF_INET6)
        self._tell_metrics()

    def _tell_metrics(self) -> None:
        config, metrics, reactor = self._config, self._metrics, self._reactor
        sinks: list[Sink] = []
        if config.statsd_addr:
            sinks.append(Statsd(config.statsd_addr, metrics, reactor))
        if config.statsite_addr:
            sinks.append(Statsite(config.statsite_addr, metrics, reactor))
        if sinks:
            self._telemetry = Telemetry(metrics, sinks, reactor, host=socket.gethostname())
            self._telemetry.start()

    def _serve_rpc(self, bound: socket.socket) -> Any:
        if bound.family == socket.AF_UNIX:
            port = UnixPort(bound.dup(), self._rpc, self._reactor)
            port.startListening()
            return port
        served = self._rpc if self._tls is None else self._tls.around(self._rpc)
        return self._reactor.adoptStreamPort(bound.fileno(), bound.family, served)

    def _in_thread(self, function: Callable[..., Any], *args: Any) -> "Deferred[Any]":
        return deferToThreadPool(self._reactor, self._reactor.getThreadPool(), function, *args)

    def _node(self, advertised: tuple[bytes, int], remembered: list[str] | None = None) -> Node:
        seed = int.from_bytes(os.urandom(8), "big")
        _log.debug("seed of the protocol's choices: %d", seed)
        config = self._config
        return Node(
            config,
            name=config.node_name or socket.gethostname(),
            addr=advertised[0],
            port=advertised[1],
            keyring=_keyring(config),
            now=self._reactor.seconds(),
            rng=Random(seed),
            nonce=lambda: os.urandom(12),
            tags=load_tags(config.tags_file) if config.tags_file else None,
            remembered=remembered,
            metrics=self._metrics,
        )

    def _banner(
        self, host: str, port: int, advertised: tuple[bytes, int], rpc: tuple[Any, ...] | str
    ) -> None:
        shown = str(Address(host, port))
        rpc_shown = f"unix:{rpc}" if isinstance(rpc, str) else str(Address(rpc[0], rpc[1]))
        config = self._config
        lines = [
            f"serfd {__version__} running!",
            f"     Node name: {self._agent.name!r}",
            f"     Bind addr: {shown!r}",
            f"    Advertised: {ip_text(advertised[0])!r} port {advertised[1]}",
            f"      RPC addr: {rpc_shown!r}{' (TLS)' if self._tls is not None else ''}",
            f"     Encrypted: {str(bool(config.encrypt_key or config.keyring_file)).lower()}",
            f"       Profile: {config.profile}",
            f"   Compression: {str(config.enable_compression).lower()}",
            f"       Plugins: {', '.join(plugin.name for plugin in self._plugins) or 'none'}",
        ]
        if config.discover:
            lines.append(f"  mDNS cluster: {config.discover!r}")
        print("\n".join(lines), flush=True)

    def _begin(self) -> None:
        self._starting = Deferred.fromCoroutine(self._start()).addErrback(self._cannot_go_on)

    async def _start(self) -> None:
        _log.info("Serf agent starting")
        _warn_of(self._config)
        await self._work.run(lambda: Deferred.fromCoroutine(self._get_ready()))
        await self._joining.in_background()

    async def _get_ready(self) -> None:
        await self._joining.at_start()
        await self._host.start()
        self._watch()
        systemd.notify("READY=1", self._summary())

    def _cannot_go_on(self, failure: Any) -> None:
        if self._is_stopping:
            return
        if failure.check(SerfdError):
            # The text of a failed join has a line for each address.
            print(f"serfd: {' '.join(str(failure.value).split())}", file=sys.stderr)
        else:
            _log.error("Start failed", extra={"details": failure})
        self._stop(EXIT_CANNOT)

    # systemd.

    def _watch(self) -> None:
        def beat() -> None:
            systemd.notify("WATCHDOG=1")

        def tell() -> None:
            summary = self._summary()
            if summary != self._told:
                self._told = summary
                systemd.notify(summary)

        for call, interval in ((beat, systemd.watchdog_interval()), (tell, STATUS_INTERVAL)):
            if interval is not None and systemd.is_listening():
                loop = LoopingCall(call)
                loop.clock = self._reactor
                self._loops.append(loop.start(interval).addErrback(self._cannot_go_on))

    def _summary(self) -> str:
        counts = self._agent.stats()["serf"]
        return (
            f"STATUS={self._agent.name}: {counts['members']} members, {counts['failed']} failed, "
            f"{counts['left']} left"
        )

    # Signals and end.

    def _handle_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, self._signalled)

    def _signalled(self, number: int, frame: object) -> None:
        self._reactor.callFromThread(self._on_signal, signal.Signals(number))

    def _on_signal(self, number: signal.Signals) -> None:
        if number is signal.SIGUSR1:
            self._report()
            return
        if self._is_leaving or self._is_stopping:
            # Whoever asks twice does not want to wait.
            self._status = EXIT_NOT_LEFT
            self._stop_now()
            return
        _log.info("Caught signal: %s", str(signal.strsignal(number)).lower())
        config = self._config
        if number is signal.SIGHUP:
            self._reload()
        elif (number is signal.SIGINT and not config.skip_leave_on_interrupt) or (
            number is signal.SIGTERM and config.leave_on_terminate
        ):
            self._leave()
        else:
            self._stop(EXIT_NOT_LEFT)

    def _report(self) -> None:
        measure_process(self._metrics)
        now = time.strftime("%Y-%m-%d %H:%M:%S +0000 UTC", time.gmtime())
        print("\n".join(report(self._metrics, now)), file=sys.stderr, flush=True)

    def _leave(self) -> None:
        self._is_leaving = True
        self._joining.stop()
        _log.info("Gracefully shutting down agent...")
        systemd.notify("STOPPING=1", "STATUS=leaving the cluster")

        def left(_: None) -> None:
            self._stop(EXIT_DONE)

        def failed(failure: Any) -> None:
            _log.error("Leaving failed: %s", failure.getErrorMessage())
            self._stop(EXIT_NOT_LEFT)

        self._ending = self._agent.leave().addCallbacks(left, failed)

    def _stop(self, status: int) -> None:
        if not self._is_stopping:
            self._is_stopping = True
            self._status = status
            self._joining.stop()
            systemd.notify("STOPPING=1")
            _log.info("requesting serf shutdown")
            if status != EXIT_DONE:
                _serf_log.warning("Shutdown without a Leave")
            self._ending = Deferred.fromCoroutine(self._end()).addErrback(self._cannot_end)

    async def _end(self) -> None:
        await self._host.stop()
        await maybeDeferred(self._rpc_port.stopListening)
        try:
            # The reply to an RPC leave is still on its way.
            await self._rpc.all_gone().addTimeout(FLUSH_TIME_MAX, self._reactor)
        except TimeoutError:
            _log.debug("RPC clients that do not read are cut off")
        if self._telemetry is not None:
            try:
                await self._telemetry.stop().addTimeout(FLUSH_TIME_MAX, self._reactor)
            except TimeoutError:
                _log.debug("the last metrics are lost: statsite does not read")
        self._stop_now()

    def _cannot_end(self, failure: Any) -> None:
        _log.error("Stopping in order failed", extra={"details": failure})
        self._stop_now()

    def _stop_now(self) -> None:
        self._agent.driver.stop()
        _log.info("shutdown complete")
        if self._reactor.running:
            self._reactor.stop()

    # Reload.

    def _reload(self) -> None:
        # One after the other, and not before the start is done.
        self._changing = self._work.run(
            lambda: Deferred.fromCoroutine(self._read_again())
        ).addErrback(lambda failure: _log.error("Reload failed", extra={"details": failure}))

    async def _read_again(self) -> None:
        """Read the files again. All that is new takes effect, or nothing does."""
        systemd.reloading()
        _log.info("Reloading configuration...")
        old = self._config
        try:
            config = self._read_config()
            # Only what changed in the files, so that what was set by RPC stays.
            changed = {k: v for k, v in config.tags.items() if old.tags.get(k) != v}
            removed = [k for k in old.tags if k not in config.tags]
            self._agent.check_tags(changed, delete=removed)
            tls = _server_tls(config)
            # Last, because it builds those that are new.
            plugins = load_plugins(config, self._agent, held=self._host.kept())
        except SerfdError as error:
            _log.error("Failed to reload configs, nothing is changed: %s", error)
            systemd.notify("READY=1")
            return
        self._config = config
        logs.set_level(config.log_level)
        _warn_of(config)
        for key in config.__struct_fields__:
            if key not in _RELOADABLE and getattr(config, key) != getattr(old, key):
                _log.warning("%s has changed: needs a restart", key)
        if self._tls is not None and tls is not None:
            self._tls.take_over(tls)
        elif self._tls is not tls:
            _log.warning("rpc_tls is switched on or off: needs a restart")
        await self._host.reload(plugins)
        if changed or removed:
            try:
                await self._agent.update_tags(changed, delete=removed)
            except CommandError as error:
                _log.error("Failed to update tags: %s", error)
        systemd.notify("READY=1")
        _log.info("Reload complete")


def _end_with_stacks_on(number: signal.Signals) -> None:
    """At this signal tell stderr where each thread is, even of what hangs, and end, as Go does."""
    signal.signal(number, lambda number, frame: os._exit(EXIT_CANNOT))
    # It writes by itself, from within the signal, and then comes what was set above.
    faulthandler.register(number, all_threads=True, chain=True)


def _journal(plugin: LoadedPlugin) -> Journal:
    """What keeps a durable plugin's mailbox. Raises ConfigError."""
    from serfd.hooks.journal import FILE, SqliteJournal  # SQLite takes 1 MB

    return SqliteJournal(plugin.agent.state_dir / FILE)


def _gossip_address(config: Config) -> tuple[str, int]:
    """Where to listen: an IP address and a port."""
    host, port = resolve_address("bind", config.bind, default_port=GOSSIP_PORT)
    if config.interface:
        address = interface_address(config.interface)
        if host == ANYWHERE:
            host = address
        elif host not in map(str, addresses_of(config.interface)):
            raise ConfigError(f"interface {config.interface!r} has no address {host!r} (bind)")
    return host, port


def _advertised(config: Config, host: str, port: int) -> tuple[bytes, int]:
    """What others are told: address bytes as real agents give them (gossip.md 13.1), and port."""
    if config.advertise:
        host, port = resolve_address("advertise", config.advertise, default_port=GOSSIP_PORT)
        return _packed(host), port
    if host == ANYWHERE:
        address = _packed(private_address())
        return (b"\0" * 10 + b"\xff\xff" + address)[-16:], port
    return _packed(private_address() if host == "::" else host), port


def _bind_rpc(config: Config) -> socket.socket:
    if config.rpc_socket is not None:
        return bind_unix(
            config.rpc_socket,
            mode=int(config.rpc_socket_mode, 8),
            group=config.rpc_socket_group,
        )
    return bind_rpc(*_rpc_address(config))


def _rpc_address(config: Config) -> tuple[str, int]:
    return resolve_address("rpc_addr", config.rpc_addr, default_port=RPC_PORT)


def _server_tls(config: Config) -> "ServerTls | None":
    """What RPC is encrypted with, if it is. Raises ConfigError."""
    if not config.rpc_tls.certificate:
        return None
    try:
        from serfd.rpc.server_tls import ServerTls
    except ImportError as error:
        raise ConfigError(
            f"rpc_tls needs more Python packages ({error}): pip install 'serfd[tls]'"
        ) from None
    return ServerTls(config.rpc_tls)


def _packed(ip: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in ip else socket.AF_INET, ip)


def _warn_of(config: Config) -> None:
    """Tell of settings that mean something else than they say, in Serf's words (agent.md 1)."""
    if config.role:
        _log.warning("Deprecation warning: 'role' has been replaced with 'tags'")
    if config.retry_interval < SHORTEST_WAIT:
        _log.warning("'RetryInterval' is too low. Setting to %gs", SHORTEST_WAIT)
    if config.broadcast_timeout < BROADCAST_TIMEOUT_MIN:
        _log.warning("'BroadcastTimeout' is too low. Setting to %gs", BROADCAST_TIMEOUT_MIN)
    if config.rejoin_after_leave and not config.snapshot_path:
        _log.warning("'RejoinAfterLeave' enabled without snapshot file")


def _keyring(config: Config) -> Keyring:
    """The keys of the configuration. Raises ConfigError, which does not repeat them."""
    if config.encrypt_key:
        return Keyring([base64.b64decode(config.encrypt_key)])
    return Keyring(load_keyring(config.keyring_file) if config.keyring_file else [])
