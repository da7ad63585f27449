"""Texts of a join to addresses, by Twisted's resolver on a reactor of its own."""

import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, fail, succeed
from twisted.names import dns
from twisted.names.common import ResolverBase
from twisted.names.error import DNSNameError, ResolverError
from twisted.names.server import DNSServerFactory

from serfd.effects import Address
from serfd.net.resolve import ADDRESSES_MAX, SRV_TARGETS_MAX, SRV_WAITS, resolve


@pytest.fixture
def resolved(reactor, run_until):
    """Resolves a text; gives the addresses, or raises."""
    # The resolver works in threads, which a reactor starts when it runs.
    pool = reactor.getThreadPool()
    pool.start()

    def resolved(text: str, default_port: int = 7946, servers: Any = ()) -> list[Address]:
        found: list[Any] = []
        deferred = Deferred.fromCoroutine(
            resolve(reactor, text, default_port=default_port, servers=servers)
        )
        deferred.addBoth(found.append)
        run_until(lambda: found)
        if isinstance(found[0], list):
            return found[0]
        raise found[0].value

    yield resolved
    pool.stop()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1", Address("127.0.0.1", 7946)),
        ("127.0.0.1:7000", Address("127.0.0.1", 7000)),
        ("::1", Address("::1", 7946)),
        ("[::1]", Address("::1", 7946)),
        ("[::1]:7000", Address("::1", 7000)),
        ("node/127.0.0.1:7000", Address("127.0.0.1", 7000)),
        ("node/127.0.0.1", Address("127.0.0.1", 7946)),
        ("node/[::1]:7000", Address("::1", 7000)),
    ],
)
def test_addresses_are_taken_as_written_and_the_name_before_a_slash_is_left_out(
    resolved, text, address
):
    assert resolved(text) == [address]


def test_the_port_that_is_not_written_is_the_one_that_is_given(resolved):
    assert resolved("127.0.0.1", 17001) == [Address("127.0.0.1", 17001)]


def test_a_name_gives_all_its_addresses_once(resolved):
    found = resolved("localhost:7000")
    assert found
    assert set(found) <= {Address("127.0.0.1", 7000), Address("::1", 7000)}
    assert len(found) == len(set(found))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nobody.invalid", "lookup nobody.invalid: no such host"),
        ("/127.0.0.1", "empty node name provided"),
        ("", "address '' has no host"),
        (":7946", "address ':7946' has no host"),
        ("node/", "address 'node/' has no host"),
        ("127.0.0.1:x", "'x' is not a port, expected 0 to 65535"),
        ("127.0.0.1:70000", "'70000' is not a port, expected 0 to 65535"),
        ("[::1", "address '[::1' is not an address like '[::1]:7946'"),
        ("a b", "lookup a b: no such host"),
        ("a..b", "lookup a..b: no such host"),
        (f"{'x' * 64}.org", f"lookup {'x' * 64}.org: no such host"),
    ],
)
def test_what_is_no_address_is_told(resolved, text, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        resolved(text)


# SRV


class Zone(ResolverBase):
    """What a name server knows: SRV records by name."""

    def __init__(self) -> None:
        super().__init__()
        self.records: dict[bytes, list[dns.Record_SRV]] = {}
        self.asked: list[bytes] = []

    def _lookup(self, name: bytes, cls: int, type: int, timeout: Any) -> "Deferred[Any]":
        self.asked.append(name)
        if name.startswith(b"_broken"):
            return fail(ResolverError())
        if type != dns.SRV or name not in self.records:
            return fail(DNSNameError())
        answers = [dns.RRHeader(name, dns.SRV, payload=record) for record in self.records[name]]
        return succeed((answers, [], []))


class Answers(DNSServerFactory):
    """As real servers do, sends no more than 512 bytes over UDP."""

    noisy = False

    def sendReply(self, protocol: Any, message: dns.Message, address: Any) -> None:
        message.maxSize = 0 if address is None else 512
        super().sendReply(protocol, message, address)


class NameServer:
    """A DNS server on loopback, UDP and TCP."""

    def __init__(self, reactor: Any, port: int) -> None:
        self.zone = Zone()
        self.address = ("127.0.0.1", port)
        factory = Answers(clients=[self.zone])
        answering = dns.DNSDatagramProtocol(factory, reactor=reactor)
        self._ports = [
            reactor.listenUDP(port, answering, interface="127.0.0.1"),
            reactor.listenTCP(port, factory, interface="127.0.0.1"),
        ]

    def knows(self, name: str, *records: tuple[int, int, int, str]) -> None:
        """Each: priority, weight, port, target."""
        self.zone.records[name.encode()] = [dns.Record_SRV(*record) for record in records]

    def stop(self) -> None:
        for port in self._ports:
            port.stopListening()


@pytest.fixture
def name_server(reactor, port) -> Iterator[NameServer]:
    server = NameServer(reactor, port)
    yield server
    server.stop()
    reactor.iterate(0)  # in which it closes its sockets


@pytest.mark.parametrize("text", ["_serf._tcp.example.org", "node/_serf._tcp.example.org"])
def test_a_name_with_an_underscore_gives_its_targets_with_their_ports_best_first(
    resolved, name_server, text
):
    name_server.knows(
        "_serf._tcp.example.org",
        (20, 9, 7003, "127.0.0.3"),
        (10, 1, 7001, "127.0.0.1"),
        (10, 5, 7002, "127.0.0.2"),
        (10, 1, 7001, "127.0.0.1"),
    )
    assert resolved(text, servers=[name_server.address]) == [
        Address("127.0.0.2", 7002),
        Address("127.0.0.1", 7001),
        Address("127.0.0.3", 7003),
    ]


def test_targets_are_names_and_those_without_address_are_left_out(resolved, name_server):
    name_server.knows(
        "_serf._tcp.example.org",
        (1, 0, 7001, "nobody.invalid"), (3, 0, 0, "127.0.0.1"), (4, 0, 7004, "localhost"),
    )  # fmt: skip
    found = resolved("_serf._tcp.example.org", servers=[name_server.address])
    assert found
    assert set(found) <= {Address("127.0.0.1", 7004), Address("::1", 7004)}


def test_the_name_is_looked_up_anew_every_time(resolved, name_server):
    for port in (7001, 7002):
        name_server.knows("_serf._tcp.example.org", (1, 1, port, "127.0.0.1"))
        found = resolved("_serf._tcp.example.org", servers=[name_server.address])
        assert found == [Address("127.0.0.1", port)]


def test_more_targets_than_fit_into_a_datagram_come_over_tcp_and_only_so_many_are_taken(
    resolved, name_server
):
    name_server.knows(
        "_serf._tcp.example.org",
        *((number, 0, 7946, f"127.0.1.{number}") for number in range(SRV_TARGETS_MAX + 20)),
    )
    found = resolved("_serf._tcp.example.org", servers=[name_server.address])
    assert found == [Address(f"127.0.1.{number}", 7946) for number in range(SRV_TARGETS_MAX)]
    assert len(name_server.zone.asked) == 2  # cut off by UDP, whole by TCP


def test_a_server_that_says_nothing_is_passed_over(resolved, name_server):
    name_server.knows("_serf._tcp.example.org", (1, 1, 7001, "127.0.0.1"))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        servers = [silent.getsockname(), name_server.address]
        found = resolved("_serf._tcp.example.org", servers=servers)
    assert found == [Address("127.0.0.1", 7001)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("_serf._tcp.nobody.invalid", "lookup _serf._tcp.nobody.invalid: no such host"),
        ("_serf..org", "lookup _serf..org: no such host"),
        ("_none._tcp.org", "lookup _none._tcp.org: no such host"),
        ("_off._tcp.org", "lookup _off._tcp.org: no such host"),
        ("_lost._tcp.org", "lookup _lost._tcp.org: none of its targets has an address"),
        ("_broken._tcp.org", "lookup _broken._tcp.org: server misbehaving"),
        ("_serf._tcp.org:7946", "address '_serf._tcp.org:7946' has a port, but the answer to an"),
    ],
)
def test_what_is_no_service_is_told(resolved, name_server, text, says):
    name_server.knows("_none._tcp.org")
    name_server.knows("_off._tcp.org", (0, 0, 7946, ""))
    name_server.knows("_lost._tcp.org", (0, 0, 7946, "nobody.invalid"))
    with pytest.raises(ValueError, match=re.escape(says)):
        resolved(text, servers=[name_server.address])


def test_servers_that_are_silent_are_asked_again_and_then_given_up(hand_turned):
    found: list[Any] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        silent.setblocking(False)
        looking = resolve(
            hand_turned, "_serf._tcp.org", default_port=7946, servers=[silent.getsockname()]
        )
        Deferred.fromCoroutine(looking).addBoth(found.append)
        for _ in range(sum(SRV_WAITS) + 1):
            assert not found
            hand_turned.turn()
            hand_turned.now += 1
        hand_turned.turn()
        assert str(found[0].value) == "lookup _serf._tcp.org: i/o timeout"
        for _ in SRV_WAITS:
            assert b"\x05_serf\x04_tcp\x03org\x00" in silent.recv(512)


def test_a_name_gives_so_many_addresses_at_most(resolved, reactor):
    class Generous:
        def resolveHostName(self, receiver: Any, name: str) -> None:
            for number in range(ADDRESSES_MAX + 10):
                address = f"10.1.{number // 256}.{number % 256}"
                receiver.addressResolved(IPv4Address("TCP", address, 0))
            receiver.resolutionComplete()

    reactor.installNameResolver(Generous())
    assert len(resolved("everybody.org")) == ADDRESSES_MAX
