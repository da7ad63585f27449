"""`Driver`: feeds inputs into the core, carries its effects out.

It holds one alarm, the open connections and the Deferreds that wait for commands. It knows nothing
of what the messages mean.
"""

import logging
from collections import deque
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IUDPTransport

from serfd.effects import (
    Address,
    Answer,
    Close,
    Command,
    Connect,
    Effect,
    Emit,
    Finish,
    Remember,
    SaveKeyring,
    SendPacket,
    Stop,
    StreamId,
    Write,
)
from serfd.errors import CommandError
from serfd.net.snapshot_file import SnapshotFile
from serfd.net.transport import ConnectFactory, StreamProtocol
from serfd.serf.events import Event
from serfd.serf.node import Node

P = ParamSpec("P")
T = TypeVar("T")

CLOSE_GRACE = 10.0
"""Seconds a peer has to read what was written before its stream is cut."""
CONNECT_TIMEOUT = 60.0
"""Seconds until Twisted gives up a connection; the core's own, shorter limits come first."""
STALL = 0.005
"""Seconds an alarm may be late before it counts as a stall of the process."""

_log = logging.getLogger("serfd.agent")


class Reactor(Protocol):
    """What the driver asks of Twisted's reactor; `IReactorTime` and `IReactorTCP`."""

    def seconds(self) -> float:
        """Monotonic seconds."""

    def callLater(
        self, delay: float, function: Callable[..., object], *args: object
    ) -> IDelayedCall:
        """Call `function` after `delay` seconds."""

    def connectTCP(self, host: str, port: int, factory: ConnectFactory, timeout: float) -> Any:
        """Open a connection."""


class Driver:
    """Between one `Node` and Twisted."""

    def __init__(
        self,
        node: Node,
        reactor: Reactor,
        publish: Callable[[Event], None],
        *,
        save_keyring: Callable[[tuple[bytes, ...]], str | None] = lambda keys: None,
        stop: Callable[[str], None] = lambda reason: None,
        snapshot: SnapshotFile | None = None,
        strict: bool = False,
    ) -> None:
        """`publish` gets every event; `strict` raises what would only be logged: for tests.

        `save_keyring` replaces the keyring file and gives what went wrong, or None; `stop` ends the
        process for a reason.
        """
        self._save_keyring = save_keyring
        self._stop_process = stop
        self._snapshot = snapshot
        self._node = node
        self._reactor = reactor
        self._publish = publish
        self._strict = strict
        self._udp: IUDPTransport | None = None
        self._is_ipv6 = False
        self._links: dict[StreamId, StreamProtocol] = {}
        self._connectors: dict[StreamId, Any] = {}
        self._cuts: dict[StreamId, IDelayedCall] = {}
        self._waiting: dict[Command[Any], Deferred[Any]] = {}
        self._answered: dict[Command[Any], Callable[[Any], None]] = {}
        self._effects: deque[Effect] = deque()
        self._is_carrying = False
        self._alarm: IDelayedCall | None = None
        self._is_ringing = False
        self._is_stopped = False
        self.internal_errors = 0
        """Inputs that raised: mistakes of ours. Each was logged and dropped."""
        self.send_errors = 0
        """Packets the system refused to send."""

    def start(self, udp: IUDPTransport, *, is_ipv6: bool) -> None:
        """Begin: the packet socket is bound."""
        self._udp = udp
        self._is_ipv6 = is_ipv6
        self._carry_out()

    def stop(self) -> None:
        """No more effects are carried out; streams are cut. Waiting commands fail."""
        self._is_stopped = True
        if self._alarm is not None and self._alarm.active():
            self._alarm.cancel()
        for link in list(self._links.values()):
            link.abort()
        for cut in self._cuts.values():
            cut.cancel()
        self._cuts.clear()
        if self._snapshot is not None:
            self._snapshot.close()
        while self._waiting:
            deferred = self._waiting.pop(next(iter(self._waiting)))
            deferred.errback(CommandError("the agent is shutting down"))

    def run(
        self,
        ask: Callable[Concatenate[float, P], Command[T]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> "Deferred[T]":
        """Ask the node something; fires with the result, or with a CommandError.

        Who cancels it hears no more of it: a query ends then, all else is done nevertheless.
        """

        def forget(_: Deferred[T]) -> None:
            assert command is not None  # or it had failed already
            del self._waiting[command]
            self._answered.pop(command, None)
            self._feed(self._node.forget, command)

        deferred: Deferred[T] = Deferred(forget)
        if self._is_stopped:
            deferred.errback(CommandError("the agent is shutting down"))
            return deferred
        command = self._input(ask, *args, **kwargs)
        if command is None:
            deferred.errback(CommandError("internal error, see the log"))
        else:
            self._waiting[command] = deferred
        self._carry_out()
        return deferred

    def ask(
        self,
        ask: Callable[Concatenate[float, P], Command[T]],
        answered: Callable[[Any], None],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> "Deferred[T]":
        """As `run`; `answered` gets what comes in for the command until then."""

        @wraps(ask)
        def noting(now: float, /, *args: P.args, **kwargs: P.kwargs) -> Command[T]:
            command = ask(now, *args, **kwargs)
            self._answered[command] = answered
            return command

        return self.run(noting, *args, **kwargs)

    # From the sockets (`serfd.net.transport.Listener`).

    def packet_received(self, data: bytes, source: Address) -> None:
        """A datagram came in."""
        self._feed(self._node.packet_received, data, source)

    def stream_accepted(self, link: StreamProtocol, peer: Address) -> StreamId | None:
        """A peer connected. None: the stream was cut, nothing of it is wanted."""
        stream = None if self._is_stopped else self._input(self._node.stream_opened, peer)
        if stream is None:
            link.abort()
        else:
            self._links[stream] = link
        self._carry_out()
        return stream

    def stream_received(self, stream: StreamId, data: bytes) -> None:
        """Bytes came in."""
        self._feed(self._node.stream_received, stream, data)

    def stream_closed(self, stream: StreamId, error: str | None) -> None:
        """A stream ended, or could not be opened."""
        self._links.pop(stream, None)
        self._connectors.pop(stream, None)
        cut = self._cuts.pop(stream, None)
        if cut is not None:
            cut.cancel()
        self._feed(self._node.stream_closed, stream, error)

    # Steps.

    def _feed(self, happened: Callable[..., None], *args: Any) -> None:
        if not self._is_stopped:
            self._input(happened, *args)
            self._carry_out()

    def _input(
        self,
        happened: Callable[Concatenate[float, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T | None:
        """The one place where the core is told anything. None: our mistake cost this input."""
        try:
            return happened(self._reactor.seconds(), *args, **kwargs)
        except Exception:
            self.internal_errors += 1
            _log.exception("An input was dropped by an internal error: %s", happened.__name__)
            if self._strict:
                raise
            return None

    def _carry_out(self) -> None:
        self._effects += self._node.take_effects()
        if self._is_carrying or self._udp is None:
            return
        self._is_carrying = True
        try:
            while self._effects and not self._is_stopped:
                self._do(self._effects.popleft())
        finally:
            self._is_carrying = False
        self._set_alarm()

    def _do(self, effect: Effect) -> None:
        match effect:
            case SendPacket(data, to):
                self._send(data, to)
            case Emit(event):
                self._publish(event)
            case Finish(command, result):
                self._finish(command, result)
            case Answer(command, answer):
                answered = self._answered.get(command)
                if answered is not None:
                    answered(answer)
            case SaveKeyring(keys):
                self._feed(self._node.keyring_saved, self._save_keyring(keys))
            case Remember(lines, sync, replace):
                self._remember(lines, sync=sync, replace=replace)
            case Stop(reason):
                self._stop_process(reason)
            case Connect(stream, to):
                self._connect(stream, to)
            case Write(stream, data):
                link = self._links.get(stream)
                if link is not None:
                    link.write(data)
            case Close(stream):
                self._close(stream)

    def _send(self, data: bytes, to: Address) -> None:
        assert self._udp is not None
        host = f"::ffff:{to.host}" if self._is_ipv6 and ":" not in to.host else to.host
        try:
            self._udp.write(data, (host, to.port))
        except (OSError, ValueError) as error:
            # One address that cannot be reached must not stop a round of gossip.
            self.send_errors += 1
            _log.debug("cannot send %d bytes to %s: %s", len(data), to, error)
            self._feed(self._node.packet_unsent, to)

    def _finish(self, command: Command[Any], result: Any) -> None:
        self._answered.pop(command, None)
        deferred = self._waiting.pop(command, None)
        if deferred is None:
            # Its caller knows already: an internal error broke off the asking.
            return
        if isinstance(result, CommandError):
            deferred.errback(result)
        else:
            deferred.callback(result)

    def _remember(self, lines: tuple[str, ...], *, sync: bool, replace: bool) -> None:
        assert self._snapshot is not None
        if replace:
            self._snapshot.replace(lines)
        else:
            self._snapshot.append(lines)
        if sync:
            self._snapshot.flush(sync=True)

    def _connect(self, stream: StreamId, to: Address) -> None:
        link = StreamProtocol(self, stream)
        self._links[stream] = link

        def failed(why: str) -> None:
            self.stream_closed(stream, why)

        self._connectors[stream] = self._reactor.connectTCP(
            to.host, to.port, ConnectFactory(link, to, failed), timeout=CONNECT_TIMEOUT
        )

    def _close(self, stream: StreamId) -> None:
        link = self._links.get(stream)
        if link is None:
            return
        link.close()
        connector = self._connectors.pop(stream, None)
        if connector is not None and not link.connected:
            del self._links[stream]
            connector.disconnect()
        else:
            self._cuts[stream] = self._reactor.callLater(CLOSE_GRACE, self._cut, stream)

    def _cut(self, stream: StreamId) -> None:
        del self._cuts[stream]
        link = self._links.get(stream)
        if link is not None:
            link.abort()

    def _set_alarm(self) -> None:
        due = self._node.next_wakeup()
        if due is None or self._is_stopped or self._is_ringing:
            return
        delay = max(0.0, due - self._reactor.seconds())
        if self._alarm is not None and self._alarm.active():
            self._alarm.reset(delay)
        else:
            self._alarm = self._reactor.callLater(delay, self._ring)

    def _ring(self) -> None:
        due = self._node.next_wakeup()
        if due is None or self._reactor.seconds() - due < STALL:
            self._wake()
            return
        # Twisted runs due timers before it reads sockets. After a stall the ack of a probe may
        # wait in the socket: one more turn, and it is read before the probe is given up.
        self._is_ringing = True
        self._alarm = self._reactor.callLater(0, self._wake)

    def _wake(self) -> None:
        self._is_ringing = False
        self._alarm = None
        self._feed(self._node.wake)
