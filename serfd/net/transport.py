"""The UDP and TCP protocols: bytes to the driver and back."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from twisted.internet.error import ConnectError, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import ClientFactory, DatagramProtocol, Factory
from twisted.internet.protocol import Protocol as StreamBase
from twisted.internet.tcp import Connection
from twisted.python.failure import Failure

from serfd.effects import Address, StreamId
from serfd.net.sockets import peer_address

if TYPE_CHECKING:
    from twisted.internet.interfaces import IConnector

PACKET_MAX = 65_536
"""Bytes read of a datagram; Twisted would cut at 8,192, and a cut packet cannot be opened."""


class Listener(Protocol):
    """Who hears what the sockets bring; `serfd.net.driver.Driver`."""

    def packet_received(self, data: bytes, source: Address) -> None:
        """A datagram came in."""

    def stream_accepted(self, link: "StreamProtocol", peer: Address) -> StreamId | None:
        """A peer connected; None: it is not wanted."""

    def stream_received(self, stream: StreamId, data: bytes) -> None:
        """Bytes came in."""

    def stream_closed(self, stream: StreamId, error: str | None) -> None:
        """A stream ended or could not be opened."""


class PacketProtocol(DatagramProtocol):
    """Gossip's datagrams."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def datagramReceived(self, datagram: bytes, addr: tuple[str, int]) -> None:
        self._listener.packet_received(datagram, peer_address(addr[0], addr[1]))


class StreamProtocol(StreamBase):
    """One TCP connection, opened by this node or by a peer."""

    transport: Connection

    def __init__(self, listener: Listener, stream: StreamId | None = None) -> None:
        """`stream`: its number if this node opened it; a peer's gets one when it is accepted."""
        self._listener = listener
        self._stream = stream
        self._unsent: list[bytes] = []
        self._is_closing = False

    def write(self, data: bytes) -> None:
        """Send now, or as soon as the connection is open."""
        if self.connected:
            self.transport.write(data)
        else:
            self._unsent.append(data)

    def close(self) -> None:
        """Close after the last write."""
        self._is_closing = True
        if self.connected:
            self.transport.loseConnection()

    def abort(self) -> None:
        """Close now."""
        if self.connected:
            self.transport.abortConnection()

    def connectionMade(self) -> None:
        self.transport.setTcpNoDelay(True)
        if self._stream is None:
            peer = self.transport.getPeer()
            self._stream = self._listener.stream_accepted(self, peer_address(peer.host, peer.port))
        for data in self._unsent:
            self.transport.write(data)
        self._unsent.clear()
        if self._is_closing:
            self.transport.loseConnection()

    def dataReceived(self, data: bytes) -> None:
        if not self._is_closing and self._stream is not None:
            self._listener.stream_received(self._stream, data)

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        if self._stream is not None:
            error = None if reason.check(ConnectionDone) else _read_error(reason)
            self._listener.stream_closed(self._stream, error)


class AcceptFactory(Factory):
    """Builds the protocol for each peer that connects."""

    noisy = False

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def buildProtocol(self, addr: IAddress | None) -> StreamProtocol:
        return StreamProtocol(self._listener)


class ConnectFactory(ClientFactory):
    """Opens one connection."""

    noisy = False

    def __init__(self, link: StreamProtocol, to: Address, failed: Callable[[str], None]) -> None:
        """`failed` hears why there is no connection, in Go's words."""
        self._link = link
        self._to = to
        self._failed = failed

    def buildProtocol(self, addr: IAddress | None) -> StreamProtocol:
        return self._link

    def clientConnectionFailed(self, connector: "IConnector", reason: Failure) -> None:
        self._failed(f"dial tcp {self._to}: {_connect_error(reason)}")


def _connect_error(reason: Failure) -> str:
    """As a real agent words it; its users' scripts look for `connection refused`."""
    error = reason.value
    number = error.osError if isinstance(error, ConnectError) else None
    if isinstance(number, int):
        return f"connect: {os.strerror(number).lower()}"
    return str(error)


def _read_error(reason: Failure) -> str:
    if reason.check(ConnectionLost):
        return "read: connection reset by peer"
    return reason.getErrorMessage()
