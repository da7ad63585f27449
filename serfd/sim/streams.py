"""TCP between processes: connections that are refused, slow, broken, or lead nowhere."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

from serfd.effects import Address, StreamId
from serfd.sim.agenda import Agenda
from serfd.sim.faults import RETRANSMIT, Network
from serfd.sim.process import Process, Socket

SEGMENT_MAX = 14_480
"""Bytes of a stream that arrive at a time."""
SYN_RETRANSMIT = 1.0
"""Seconds after which a connection attempt is repeated, then doubled."""
TRIES_MAX = 8
"""How often a segment is sent again before the network gives up without a word."""
PORTS_FROM, PORTS = 32_768, 28_000
"""The ports that callers have."""

Ending: TypeAlias = tuple[str | None]
"""The end of a stream, with the error if it did not end well."""
Input: TypeAlias = Callable[..., None]
"""Hands a step to a process: `input(process, step, *args)` calls `step(process, *args)` when it
listens."""


class Streams:
    """All connections of a cluster. A stream's bytes come in order, in pieces, or not at all."""

    def __init__(
        self,
        agenda: Agenda,
        network: Network,
        listeners: Mapping[Address, Process],
        give: Input,
    ) -> None:
        """`listeners`: the last process at each address, ended or not."""
        self._agenda = agenda
        self._network = network
        self._listeners = listeners
        self._give = give
        self._opened = 0

    # What processes ask.

    def connect(self, process: Process, stream: StreamId, to: Address) -> None:
        """Open a connection; who closed its port refuses, who cannot be reached is silent."""
        socket = Socket(process, stream)
        process.sockets[stream] = socket
        self._knock(socket, to, 0)

    def write(self, process: Process, stream: StreamId, data: bytes) -> None:
        """Send these bytes as soon as the connection is there."""
        socket = process.sockets.get(stream)
        if socket is None:
            return
        for start in range(0, len(data), SEGMENT_MAX):
            segment = data[start : start + SEGMENT_MAX]
            if socket.is_connected:
                self._transmit(socket, segment)
            else:
                socket.unsent.append(segment)

    def close(self, process: Process, stream: StreamId) -> None:
        """End the stream after what was written; this side hears no more of it."""
        socket = process.sockets.get(stream)
        if socket is None:
            return
        self._forget(socket)
        if socket.is_connected:
            self._transmit(socket, (None,))

    def reset(self, process: Process) -> None:
        """Its process has ended: all its connections break."""
        for socket in list(process.sockets.values()):
            self._forget(socket)
            if socket.is_connected:
                self._transmit(socket, ("read: connection reset by peer",))

    # How a connection comes about.

    def _knock(self, socket: Socket, to: Address, tries: int) -> None:
        """Send a SYN; if it or its answer is lost, again, until somebody gives up."""
        if not socket.is_open or tries > TRIES_MAX:
            return
        target = self._listeners.get(to)
        if target is None or not self._get_through(socket.process, target):
            self._agenda.after(SYN_RETRANSMIT * 2**tries, self._knock, socket, to, tries + 1)
            return
        delay = self._network.segment_delay(socket.process.key, target.key)
        self._agenda.after(delay, self._knocked, socket, to)

    def _knocked(self, caller: Socket, to: Address) -> None:
        target = self._listeners[to]
        delay = self._network.segment_delay(target.key, caller.process.key)
        if not target.is_running:
            self._agenda.after(delay, self._refused, caller, to)
            return
        accepted = Socket(target, None)
        accepted.peer, caller.peer = caller, accepted
        accepted.is_connected = True
        self._opened += 1
        peer = Address(caller.process.address.host, PORTS_FROM + self._opened % PORTS)
        self._give(target, self._accept, accepted, peer)
        self._agenda.after(delay, self._connected, caller)

    def _refused(self, caller: Socket, to: Address) -> None:
        text = f"dial tcp {to}: connect: connection refused"
        self._give(caller.process, self._ended, caller, text)

    def _accept(self, process: Process, socket: Socket, peer: Address) -> None:
        socket.stream = process.node.stream_opened(self._agenda.now, peer)
        process.sockets[socket.stream] = socket

    def _connected(self, caller: Socket) -> None:
        caller.is_connected = True
        for data in caller.unsent:
            self._transmit(caller, data)
        caller.unsent.clear()
        if not caller.is_open:
            self._transmit(caller, (None,))

    # What goes through it.

    def _transmit(self, socket: Socket, segment: bytes | Ending) -> None:
        assert socket.peer is not None, "only a connected socket transmits"
        delay = self._network.segment_delay(socket.process.key, socket.peer.process.key)
        socket.arrives = max(socket.arrives, self._agenda.now + delay)
        self._agenda.push(socket.arrives, self._deliver, socket, segment, 0)

    def _deliver(self, socket: Socket, segment: bytes | Ending, tries: int) -> None:
        peer = socket.peer
        assert peer is not None
        now = self._agenda.now
        if not peer.is_open:
            return
        if now >= socket.held_until and not self._get_through(socket.process, peer.process):
            # Neither the segment nor its acknowledgement gets through: what is behind it waits.
            if tries >= TRIES_MAX:
                return
            socket.held_until = now + RETRANSMIT * 2**tries
            tries += 1
        if now < socket.held_until:
            socket.arrives = max(socket.arrives, socket.held_until)
            self._agenda.push(socket.held_until, self._deliver, socket, segment, tries)
        elif isinstance(segment, bytes):
            self._give(peer.process, self._received, peer, segment)
        else:
            self._give(peer.process, self._ended, peer, segment[0])

    def _received(self, process: Process, socket: Socket, segment: bytes) -> None:
        if socket.is_open:
            assert socket.stream is not None
            process.node.stream_received(self._agenda.now, socket.stream, segment)

    def _ended(self, process: Process, socket: Socket, error: str | None) -> None:
        if socket.is_open:
            assert socket.stream is not None
            self._forget(socket)
            process.node.stream_closed(self._agenda.now, socket.stream, error)

    # Steps.

    def _get_through(self, one: Process, other: Process) -> bool:
        """Whether what one sends arrives, and the acknowledgement comes back."""
        passes = self._network.passes
        return passes(one.key, other.key) and passes(other.key, one.key)

    def _forget(self, socket: Socket) -> None:
        socket.is_open = False
        if socket.stream is not None:
            socket.process.sockets.pop(socket.stream, None)
