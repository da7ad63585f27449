"""Bytes over real sockets on loopback, to a listener and back."""

import socket
import struct
from collections.abc import Callable

import pytest

from serfd.effects import Address, StreamId
from serfd.net.transport import (
    PACKET_MAX,
    AcceptFactory,
    ConnectFactory,
    PacketProtocol,
    StreamProtocol,
)

HOST = "127.0.0.1"


class Heard:
    """What a driver would hear."""

    def __init__(self) -> None:
        self.packets: list[tuple[bytes, Address]] = []
        self.links: list[StreamProtocol] = []
        self.peers: list[Address] = []
        self.data: dict[StreamId, bytes] = {}
        self.closed: list[tuple[StreamId, str | None]] = []

    def packet_received(self, data: bytes, source: Address) -> None:
        self.packets.append((data, source))

    def stream_accepted(self, link: StreamProtocol, peer: Address) -> StreamId:
        self.links.append(link)
        self.peers.append(peer)
        self.data[len(self.links)] = b""
        return len(self.links)

    def stream_received(self, stream: StreamId, data: bytes) -> None:
        self.data[stream] = self.data.get(stream, b"") + data

    def stream_closed(self, stream: StreamId, error: str | None) -> None:
        self.closed.append((stream, error))


@pytest.fixture
def heard():
    return Heard()


@pytest.fixture
def listening(reactor, heard):
    """The port where links are accepted."""
    return reactor.listenTCP(0, AcceptFactory(heard), interface=HOST).getHost().port


def everything(tcp: socket.socket, run_until: Callable[[Callable[[], object]], None]) -> bytes:
    """All that comes until the other side closes; meanwhile the reactor works."""
    got = bytearray()
    tcp.setblocking(False)

    def is_over() -> bool:
        try:
            while part := tcp.recv(1 << 20):
                got.extend(part)
        except BlockingIOError:
            return False
        return True

    run_until(is_over)
    return bytes(got)


@pytest.mark.parametrize("size", [0, 1, 8192, 8193, 65_507])
def test_a_datagram_of_any_size_arrives_whole(reactor, run_until, heard, size):
    port = reactor.listenUDP(0, PacketProtocol(heard), HOST, maxPacketSize=PACKET_MAX)
    data = bytes(range(256)) * 256
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind((HOST, 0))
        udp.sendto(data[:size], (HOST, port.getHost().port))
        run_until(lambda: heard.packets)
        assert heard.packets == [(data[:size], Address(*udp.getsockname()))]


def test_a_peer_is_accepted_heard_answered_and_left(reactor, run_until, heard, listening):
    with socket.create_connection((HOST, listening), timeout=10) as tcp:
        tcp.sendall(b"hello")
        run_until(lambda: heard.data.get(1) == b"hello")
        assert heard.peers == [Address(*tcp.getsockname())]
        [link] = heard.links
        assert link.transport.getTcpNoDelay()
        # More than the system takes at once: closing waits for it.
        answer = b"x" * 20_000_000
        link.write(answer)
        link.close()
        assert everything(tcp, run_until) == answer
    run_until(lambda: heard.closed)
    assert heard.closed == [(1, None)]


def test_after_closing_nothing_is_heard_any_more(reactor, run_until, heard, listening):
    with socket.create_connection((HOST, listening), timeout=10) as tcp:
        run_until(lambda: heard.links)
        heard.links[0].write(b"x" * 20_000_000)
        heard.links[0].close()
        tcp.sendall(b"too late")
        for _ in range(10):
            reactor.iterate(0)
        assert heard.data[1] == b""
        heard.links[0].abort()
        run_until(lambda: heard.closed)


def test_a_reset_is_told_in_gos_words(reactor, run_until, heard, listening):
    tcp = socket.create_connection((HOST, listening))
    run_until(lambda: heard.links)
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    tcp.close()
    run_until(lambda: heard.closed)
    assert heard.closed == [(1, "read: connection reset by peer")]


def test_what_is_written_before_the_connection_is_there_is_sent_when_it_is(
    reactor, run_until, heard
):
    with socket.create_server((HOST, 0)) as server:
        to = Address(*server.getsockname())
        link = StreamProtocol(heard, 7)
        link.write(b"first ")
        link.write(b"second")
        link.close()
        reactor.connectTCP(*to, ConnectFactory(link, to, pytest.fail))
        run_until(lambda: link.connected)
        peer, _ = server.accept()
        with peer:
            assert everything(peer, run_until) == b"first second"
    run_until(lambda: heard.closed)
    assert heard.closed == [(7, None)]
    assert heard.peers == []


def test_a_refusal_is_told_in_gos_words(reactor, run_until, heard):
    with socket.socket() as nobody:
        nobody.bind((HOST, 0))
        to = Address(*nobody.getsockname())
        why: list[str] = []
        reactor.connectTCP(*to, ConnectFactory(StreamProtocol(heard, 7), to, why.append))
        run_until(lambda: why)
    assert why == [f"dial tcp {to}: connect: connection refused"]


def test_a_connection_that_does_not_come_is_told_too(reactor, run_until, heard):
    with socket.socket() as full:
        # A listener that accepts nobody, and has no room for more to wait.
        full.bind((HOST, 0))
        full.listen(0)
        to = Address(*full.getsockname())
        waiting = [socket.socket() for _ in range(4)]
        for tcp in waiting:
            tcp.setblocking(False)
            tcp.connect_ex(to)
        why: list[str] = []
        factory = ConnectFactory(StreamProtocol(heard, 7), to, why.append)
        reactor.connectTCP(*to, factory, timeout=0.2)
        run_until(lambda: why)
        for tcp in waiting:
            tcp.close()
    assert len(why) == 1
    assert why[0].startswith(f"dial tcp {to}: ")


def test_an_aborted_connection_is_gone_at_once(reactor, run_until, heard, listening):
    with socket.create_connection((HOST, listening), timeout=10) as tcp:
        run_until(lambda: heard.links)
        heard.links[0].abort()
        run_until(lambda: heard.closed)
        with pytest.raises(ConnectionResetError):
            tcp.recv(1)
