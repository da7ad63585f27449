"""Sends metrics to statsd over UDP and to statsite over TCP, in Serf's form (agent.md 10)."""

import gc
import logging
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

from twisted.internet.defer import Deferred, DeferredList, succeed
from twisted.internet.interfaces import IDelayedCall, IPushProducer
from twisted.internet.protocol import ClientFactory, connectionDone
from twisted.internet.protocol import Protocol as StreamBase
from twisted.internet.task import LoopingCall
from twisted.python.failure import Failure
from zope.interface import implementer

from serfd.config import METRICS_PORT
from serfd.effects import Address
from serfd.metrics import Metrics, factor, line_name
from serfd.net.resolve import resolve

FLUSH_INTERVAL: Final = 0.1
"""Seconds between two looks at what is new."""
GAUGE_INTERVAL: Final = 1.0
"""Seconds after which all gauges are sent again."""
DATAGRAM_MAX: Final = 1400
"""Bytes."""
WAITING_MAX: Final = 4096
"""Lines that wait for a name to be found or for a connection; of more the oldest are dropped."""
LOOK_UP_INTERVAL: Final = 60.0
"""Seconds after which statsd's name is looked up again: it may have moved."""
RETRY_MIN: Final = 1.0
"""Seconds until the next try after a first failure; it doubles with each."""
RETRY_MAX: Final = 30.0
CONNECT_TIME_MAX: Final = 10.0
"""Seconds."""

Reactor: TypeAlias = Any
"""`IReactorTime`, `IReactorTCP`, and what `resolve` needs."""

_STATM = Path("/proc/self/statm")
_PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")

_log = logging.getLogger("serfd.agent")


class Sink(Protocol):
    """Where lines go."""

    def send(self, lines: Sequence[bytes]) -> None:
        """Send these lines, each with its end, now or as soon as may be."""

    def stop(self) -> "Deferred[None]":
        """There will be no more; fires when what can be sent is."""


class Telemetry:
    """Tells sinks what is new in a node's metrics, as long as it runs."""

    def __init__(
        self, metrics: Metrics, sinks: Sequence[Sink], reactor: Reactor, *, host: str
    ) -> None:
        """`host`: this machine's name, which gauges have in theirs."""
        self._metrics = metrics
        self._sinks = sinks
        self._reactor = reactor
        self._host = host
        self._sent: dict[str, float] = {}
        """How far each counter was told."""
        self._gauges_due = 0.0
        self._pauses = GarbagePauses()
        self._loop = LoopingCall(self._flush)
        self._loop.clock = reactor
        self._running: Deferred[Any]

    def start(self) -> None:
        """Begin; what was counted before is told too."""
        self._metrics.keep_raw()
        self._pauses.start()
        self._running = self._loop.start(FLUSH_INTERVAL).addErrback(_tell_of_mistake)

    def stop(self) -> "Deferred[Any]":
        """Tell the rest; fires when the sinks have sent it."""
        if self._loop.running:
            self._loop.stop()
            self._flush()
        self._pauses.stop()
        return DeferredList([sink.stop() for sink in self._sinks])

    def _flush(self) -> None:
        lines = [*self._gauge_lines(), *self._counter_lines(), *self._sample_lines()]
        if lines:
            for sink in self._sinks:
                sink.send(lines)

    def _gauge_lines(self) -> Iterator[bytes]:
        now = self._reactor.seconds()
        if now < self._gauges_due:
            return
        # Half a turn less: or, a little early, the tenth turn would be taken for too soon.
        self._gauges_due = now + GAUGE_INTERVAL - FLUSH_INTERVAL / 2
        measure_process(self._metrics)
        self._metrics.gauge("runtime.total_gc_pause_ns", self._pauses.total)
        for name, value in self._metrics.gauges.items():
            yield _line(line_name(name, self._host), value, "g")

    def _counter_lines(self) -> Iterator[bytes]:
        for name, value in self._metrics.counters.items():
            new = value - self._sent.get(name, 0)
            if new:
                self._sent[name] = value
                yield _line(line_name(name), new, "c")

    def _sample_lines(self) -> Iterator[bytes]:
        for pause in self._pauses.take():
            self._metrics.sample("runtime.gc_pause_ns", pause)
        for name, value in self._metrics.take_raw():
            yield _line(line_name(name), value * factor(self._metrics.samples[name].unit), "ms")


class Statsd:
    """A statsd server, reached over UDP; whether it hears is not known."""

    def __init__(self, address: str, metrics: Metrics, reactor: Reactor) -> None:
        """`address`: host and port."""
        self._address = address
        self._reactor = reactor
        self._waiting = Waiting(metrics, "agent.statsd.dropped")
        self._trouble = Trouble(f"statsd at {address}")
        self._target: Address | None = None
        self._socket: socket.socket | None = None
        self._look_up_due = 0.0
        self._looking: Deferred[None]
        self._is_stopped = False

    def send(self, lines: Sequence[bytes]) -> None:
        """Send them in datagrams, once the name is found."""
        self._waiting.add(lines)
        if self._reactor.seconds() >= self._look_up_due:
            self._look_up_due = inf
            self._looking = Deferred.fromCoroutine(self._look_up()).addErrback(self._not_found)
        self._send_waiting()

    def stop(self) -> "Deferred[None]":
        """Forget what waits."""
        self._is_stopped = True
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        return succeed(None)

    async def _look_up(self) -> None:
        found = await resolve(self._reactor, self._address, default_port=METRICS_PORT)
        self._look_up_due = self._reactor.seconds() + LOOK_UP_INTERVAL
        if self._target not in found and not self._is_stopped:
            # A server that has both mostly hears IPv4 only: nobody would tell that it does not.
            self._target = min(found, key=lambda address: ":" in address.host)
            if self._socket is not None:
                self._socket.close()
            family = socket.AF_INET6 if ":" in self._target.host else socket.AF_INET
            self._socket = socket.socket(family, socket.SOCK_DGRAM)
            self._socket.settimeout(0)
        self._send_waiting()

    def _not_found(self, failure: Failure) -> None:
        failure.trap(ValueError)
        self._look_up_due = self._reactor.seconds() + RETRY_MAX
        self._trouble.begins(failure.getErrorMessage())

    def _send_waiting(self) -> None:
        if self._socket is None or self._target is None:
            return
        for datagram in datagrams(self._waiting.take()):
            try:
                self._socket.sendto(datagram, self._target)
            except OSError as error:
                self._waiting.dropped(datagram.count(b"\n"))
                self._trouble.begins(os.strerror(error.errno or 0))
            else:
                self._trouble.ends()


@implementer(IPushProducer)
class Statsite:
    """A statsite server, reached over TCP, again and again. To its transport it is a producer."""

    def __init__(self, address: str, metrics: Metrics, reactor: Reactor) -> None:
        """`address`: host and port."""
        self._address = address
        self._reactor = reactor
        self._waiting = Waiting(metrics, "agent.statsite.dropped")
        self._trouble = Trouble(f"statsite at {address}")
        self._link: _Link | None = None
        self._is_full = False
        self._tries = 0
        self._connector: Any = None
        self._next_try: IDelayedCall | None = None
        self._trying: Deferred[None] | None = None
        self._stopped: Deferred[None] | None = None

    def send(self, lines: Sequence[bytes]) -> None:
        """Write them, once there is a connection and it takes more."""
        self._waiting.add(lines)
        if self._trying is None and self._next_try is None and self._link is None:
            self._try()
        self._write_waiting()

    def stop(self) -> "Deferred[None]":
        """Close; fires when what was written is sent, or nobody takes it."""
        self._stopped = Deferred()
        if self._next_try is not None:
            self._next_try.cancel()
        if self._link is not None:
            self._link.close()
        else:
            if self._connector is not None:
                self._connector.disconnect()
            self._stopped.callback(None)
        return self._stopped

    # What the connection tells.

    def connected(self, link: "_Link") -> None:
        """It is open."""
        self._link = link
        self._tries = 0
        self._is_full = False
        self._trouble.ends()
        self._write_waiting()

    def lost(self, why: str) -> None:
        """It ended, or could not be opened."""
        self._link = self._connector = self._trying = None
        if self._stopped is not None:
            if not self._stopped.called:
                self._stopped.callback(None)
            return
        self._trouble.begins(why)
        delay = min(RETRY_MIN * 2**self._tries, RETRY_MAX)
        self._tries += 1
        self._next_try = self._reactor.callLater(delay, self._try)

    def pauseProducing(self) -> None:
        """The transport holds all it should."""
        self._is_full = True

    def resumeProducing(self) -> None:
        """The transport is empty again."""
        self._is_full = False
        self._write_waiting()

    def stopProducing(self) -> None:
        """The transport needs no more; `lost` follows."""

    # Steps.

    def _try(self) -> None:
        self._next_try = None
        self._trying = Deferred.fromCoroutine(self._connect()).addErrback(self._not_found)

    async def _connect(self) -> None:
        found = await resolve(self._reactor, self._address, default_port=METRICS_PORT)
        if self._stopped is None:
            to = found[self._tries % len(found)]
            self._connector = self._reactor.connectTCP(
                to.host, to.port, _LinkFactory(self), timeout=CONNECT_TIME_MAX
            )

    def _not_found(self, failure: Failure) -> None:
        failure.trap(ValueError)
        self.lost(failure.getErrorMessage())

    def _write_waiting(self) -> None:
        if self._link is not None and not self._is_full:
            self._link.write(b"".join(self._waiting.take()))


class _Link(StreamBase):
    """One connection to statsite, which never says anything."""

    transport: Any  # ITCPTransport and IConsumer

    def __init__(self, owner: Statsite) -> None:
        self._owner = owner

    def connectionMade(self) -> None:
        self.transport.setTcpKeepAlive(True)
        self.transport.registerProducer(self._owner, streaming=True)
        self._owner.connected(self)

    def write(self, data: bytes) -> None:
        """Send it."""
        if data:
            self.transport.write(data)

    def close(self) -> None:
        """Close after the last write."""
        self.transport.unregisterProducer()
        self.transport.loseConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._owner.lost(reason.getErrorMessage())


class _LinkFactory(ClientFactory):
    """Opens one connection."""

    noisy = False

    def __init__(self, owner: Statsite) -> None:
        self._owner = owner

    def buildProtocol(self, addr: object) -> _Link:
        return _Link(self._owner)

    def clientConnectionFailed(self, connector: object, reason: Failure) -> None:
        self._owner.lost(reason.getErrorMessage())


class Waiting:
    """Lines that cannot be sent yet: the latest `WAITING_MAX`."""

    def __init__(self, metrics: Metrics, counter: str) -> None:
        """`counter` counts in `metrics` the lines that are dropped."""
        self._metrics = metrics
        self._counter = counter
        self._lines: deque[bytes] = deque(maxlen=WAITING_MAX)

    def add(self, lines: Sequence[bytes]) -> None:
        """Keep these too."""
        too_many = len(self._lines) + len(lines) - WAITING_MAX
        if too_many > 0:
            self.dropped(too_many)
        self._lines += lines

    def take(self) -> list[bytes]:
        """All that wait; they wait no more."""
        lines = list(self._lines)
        self._lines.clear()
        return lines

    def dropped(self, count: int) -> None:
        """So many lines are lost."""
        self._metrics.count(self._counter, count)


class Trouble:
    """Tells once that something does not work, and once that it does again."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._is_there = False

    def begins(self, why: str) -> None:
        """It does not work."""
        if not self._is_there:
            self._is_there = True
            _log.warning("Metrics do not reach %s, trying on: %s", self._what, why)

    def ends(self) -> None:
        """It works."""
        if self._is_there:
            self._is_there = False
            _log.info("Metrics reach %s again", self._what)


class GarbagePauses:
    """How long Python's garbage collections take; they stop all threads."""

    def __init__(self) -> None:
        self.total = 0
        """Nanoseconds since the start."""
        self._began = 0
        self._new: list[int] = []

    def start(self) -> None:
        """Begin to measure."""
        gc.callbacks.append(self._collecting)

    def stop(self) -> None:
        """Measure no more."""
        if self._collecting in gc.callbacks:
            gc.callbacks.remove(self._collecting)

    def take(self) -> list[int]:
        """Nanoseconds of each since the last time."""
        new, self._new = self._new, []
        return new

    def _collecting(self, phase: str, info: Mapping[str, int]) -> None:
        # In whichever thread the collection is; so it only touches what is its own.
        if phase == "start":
            self._began = time.perf_counter_ns()
        else:
            took = time.perf_counter_ns() - self._began
            self.total += took
            self._new.append(took)


def measure_process(metrics: Metrics) -> None:
    """Set the gauges that tell of this process: Python's counterparts of a real agent's."""
    _, resident, shared = map(int, _STATM.read_text().split()[:3])
    metrics.gauge("runtime.num_goroutines", threading.active_count())
    metrics.gauge("runtime.alloc_bytes", (resident - shared) * _PAGE_SIZE)
    metrics.gauge("runtime.sys_bytes", resident * _PAGE_SIZE)
    metrics.gauge("runtime.heap_objects", sys.getallocatedblocks())
    metrics.gauge("runtime.total_gc_runs", sum(each["collections"] for each in gc.get_stats()))


def datagrams(lines: Sequence[bytes]) -> Iterator[bytes]:
    """The lines in as few datagrams as may be, none longer than `DATAGRAM_MAX`, in order."""
    packed = b""
    for line in lines:
        if packed and len(packed) + len(line) > DATAGRAM_MAX:
            yield packed
            packed = b""
        packed += line
    if packed:
        yield packed


def _line(name: str, value: float, kind: str) -> bytes:
    return f"{name}:{value:.6f}|{kind}\n".encode("utf-8", "replace")


def _tell_of_mistake(failure: Failure) -> None:
    _log.error("Metrics are not sent any more", extra={"details": failure})
