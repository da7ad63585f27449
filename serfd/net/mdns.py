"""mDNS: nodes of one cluster's name find each other in the local network (agent.md 8; RFC 6762).

Every node answers questions for the name, and asks for it now and then. Import it only when
`discover` is set: DNS costs memory.
"""

import errno
import hashlib
import logging
import socket
import struct
from collections.abc import Callable, Collection, Iterable
from random import Random
from typing import Any

from twisted.internet.interfaces import IDelayedCall, IReadDescriptor
from twisted.names import dns
from twisted.python.failure import Failure
from zope.interface import implementer

from serfd.effects import Address
from serfd.errors import ConfigError
from serfd.serf.events import ip_text

PORT = 5353
GROUPS = {socket.AF_INET: "224.0.0.251", socket.AF_INET6: "ff02::fb"}

POLL_INTERVAL = 60.0
"""Seconds from one question to the next."""
BATCH_WAIT = 0.1
"""Addresses are collected until no new one came for so many seconds."""
TTL = 120
"""Seconds that others may believe an answer."""

PACKET_MAX = 1500
"""Bytes; an answer of a node has some 150."""
RECORDS_MAX = 64
"""Questions and records of one packet; one that announces more is not read."""
ENTRIES_MAX = 16
"""Addresses taken from one packet."""
FOUND_MAX = 32
"""New addresses from one question to the next; who knows one of them soon knows all."""
PACKETS_PER_SECOND_MAX = 100
"""Packets that are read, of those that may be for this node."""
ANSWERS_PER_SECOND_MAX = 50
READS_MAX = 32
"""Packets read from one socket in one turn of the reactor."""

_LABEL_MAX = 63
_NAME_MAX = 255
_SERVICES = b"_services._dns-sd._udp.local"
_IP_MULTICAST_ALL = 49
"""ip(7); Python has no name for it."""
_RECORDS = {dns.A: dns.Record_A, dns.AAAA: dns.Record_AAAA, dns.SRV: dns.Record_SRV}
"""What is read of an answer."""

_log = logging.getLogger("serfd.agent.mdns")


# What is said.


def service_name(cluster: str) -> bytes:
    """What nodes of this cluster ask for; DNS names are bytes without the dot at the end."""
    return f"_serf_{cluster}._tcp.local".encode()


def question(cluster: str, number: int) -> bytes:
    """Who is there? `number`, 16 bits, is the packet's ID."""
    message = dns.Message(id=number)
    message.addQuery(service_name(cluster), dns.PTR, dns.IN)
    return message.toStr()


def decode(data: bytes) -> dns.Message:
    """A packet's questions and records. Raises ValueError if it is none."""
    if len(data) > PACKET_MAX:
        raise ValueError(f"more than {PACKET_MAX} bytes")
    message = _Message()
    try:
        counts = struct.unpack_from("!4H", data, 4)
        if sum(counts) > RECORDS_MAX:
            raise ValueError(f"{sum(counts)} questions and records, at most {RECORDS_MAX} expected")
        message.fromStr(data)
    except (struct.error, EOFError):
        raise ValueError(f"{len(data)} bytes are too short") from None
    return message


class _Message(dns.Message):
    def lookupRecordType(self, type: int) -> Any:
        """Records that nobody looks at are skipped; reading some of them makes Twisted warn."""
        return _RECORDS.get(type, dns.UnknownRecord)


class Service:
    """What a node tells of itself."""

    def __init__(self, cluster: str, *, node: str, host: str, addr: bytes, port: int) -> None:
        """`host` is the host's name; `addr`, as gossiped, and `port` are the advertised ones."""
        self.cluster = cluster
        service = service_name(cluster)
        instance = _fitting(node, room=_NAME_MAX - len(service) - 3) + b"." + service
        machine = _fitting(host, room=_NAME_MAX - 2)
        ip = ip_text(addr)
        pointer = _record(service, dns.Record_PTR(instance))
        place = _record(instance, dns.Record_SRV(10, 1, port, machine))
        address = _record(machine, dns.Record_AAAA(ip) if ":" in ip else dns.Record_A(ip))
        text = _record(instance, dns.Record_TXT(f"Serf '{cluster}' cluster".encode()))
        overview = _record(_SERVICES, dns.Record_PTR(service))
        answers = {
            (service, dns.PTR): [pointer, place, address, text],
            (instance, dns.SRV): [place, address],
            (instance, dns.TXT): [text],
            (machine, address.type): [address],
            (_SERVICES, dns.PTR): [overview],
        }
        everything = {name: records for (name, _), records in answers.items()}
        everything[instance] = [place, address, text]
        answers |= {(name, dns.ALL_RECORDS): records for name, records in everything.items()}
        self._answers = {(name.lower(), kind): found for (name, kind), found in answers.items()}
        first = [name.lower().partition(b".")[0] for name in (service, machine, _SERVICES)]
        self._labels = [bytes([len(label)]) + label for label in first]

    def may_concern(self, packet: bytes) -> bool:
        """False for most of what others say in a local network; found out without decoding it."""
        packet = packet.lower()
        return any(label in packet for label in self._labels)

    def answer(self, asked: dns.Message) -> bytes:
        """The answer to a question, empty if this node has none."""
        message = dns.Message(id=0, answer=1, auth=True, maxSize=0)
        for query in asked.queries:
            # The highest bit of the class asks for an answer to the asker alone; ours always is.
            if query.cls & 0x7FFF in (dns.IN, dns.ANY):
                for record in self._answers.get((query.name.name.lower(), query.type), ()):
                    if record not in message.answers:
                        message.answers.append(record)
        return message.toStr() if message.answers else b""


def entries(answer: dns.Message, cluster: str) -> list[Address]:
    """Where an answer says that nodes of this cluster are: each with its address, port and text."""
    service = b"." + service_name(cluster).lower()
    records: list[Any] = [*answer.answers, *answer.additional]
    told = {record.name.name.lower() for record in records if record.type == dns.TXT}
    found: dict[Address, None] = {}
    for record in records:
        name = record.name.name.lower()
        if record.type == dns.SRV and record.ttl and name.endswith(service) and name in told:
            target, port = record.payload.target, record.payload.port
            for other in records:
                if other.type in (dns.A, dns.AAAA) and other.name == target and port:
                    found[Address(ip_text(other.payload.address), port)] = None
    return list(found)[:ENTRIES_MAX]


def _record(name: bytes, payload: Any) -> dns.RRHeader:
    return dns.RRHeader(name, payload.TYPE, dns.IN, TTL, payload)


def _fitting(name: str, *, room: int) -> bytes:
    """A name as it may stand in DNS; one that may not is told by its digest."""
    written = name.encode("utf-8", "surrogateescape").strip(b".")
    if len(written) <= room and all(0 < len(x) <= _LABEL_MAX for x in written.split(b".")):
        return written
    return hashlib.sha256(written).hexdigest()[:32].encode()


# How it is said.


class Mdns:
    """Answers the questions of others, and asks."""

    def __init__(
        self,
        reactor: Any,
        service: Service,
        *,
        families: Iterable[socket.AddressFamily],
        interface: str,
        known: Callable[[], Collection[Address]],
        found: Callable[[list[Address]], None],
        rng: Random,
    ) -> None:
        """`found` gets new addresses, each once from one question to the next; not those `known`.

        `interface` is its name, empty for the system's choice.
        """
        self._reactor = reactor
        self._service = service
        self._families = tuple(families)
        self._interface = interface
        self._known_now = known
        self._found = found
        self._rng = rng
        self._listeners: dict[int, _Socket] = {}
        self._askers: list[_Socket] = []
        self._known: Collection[Address] = ()
        self._seen: set[Address] = set()
        self._batch: list[Address] = []
        self._timers: dict[str, IDelayedCall] = {}
        self._read = _PerSecond(PACKETS_PER_SECOND_MAX, reactor)
        self._answered = _PerSecond(ANSWERS_PER_SECOND_MAX, reactor)
        self._told = _PerSecond(1, reactor)
        self._trouble = ""
        self.ignored = 0
        """Packets that were malformed, or too many."""

    def listen(self) -> None:
        """Answer from now on. Raises ConfigError if others have the port and do not share it."""
        for family in self._families:
            try:
                self._listen(family)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise ConfigError(
                        f"cannot listen on {GROUPS[family]} port {PORT} (UDP, discover): another "
                        "program has it and does not share it"
                    ) from None
                # No IPv6, or no network yet: each poll tries again.
                _log.debug("cannot answer on %s: %s", GROUPS[family], error)

    def poll(self) -> None:
        """Ask now, and every minute."""
        self._timers["poll"] = self._reactor.callLater(POLL_INTERVAL, self.poll)
        self._known = frozenset(self._known_now())
        self._seen.clear()
        self._forget_askers()
        troubles: list[str] = []
        for family in self._families:
            try:
                self._listen(family)
                self._ask(family)
            except OSError as error:
                _log.debug("cannot ask on %s: %s", GROUPS[family], error)
                troubles.append(f"{GROUPS[family]}: {error.strerror}")
        trouble = "; ".join(troubles) if len(troubles) == len(self._families) else ""
        if trouble and trouble != self._trouble:
            _log.error("Failed to poll for new hosts: %s", trouble)
        self._trouble = trouble

    def stop(self) -> None:
        """Neither ask nor answer any more."""
        for timer in self._timers.values():
            if timer.active():
                timer.cancel()
        self._forget_askers()
        for listener in self._listeners.values():
            listener.close()
        self._listeners.clear()

    # Steps.

    def _listen(self, family: socket.AddressFamily) -> None:
        """Open the socket if it is not, and be a member of the group on today's interface."""
        index = socket.if_nametoindex(self._interface) if self._interface else 0
        listener = self._listeners.get(family)
        if listener is not None and listener.index != index:
            listener.close()  # the interface was taken away, and another has its name now
        if listener is None or listener.is_closed:
            listener = _Socket(self._reactor, _bound(family, index), index, self._received)
            self._listeners[family] = listener
        try:
            listener.socket.setsockopt(*_membership(family, index))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:  # it is a member already
                raise

    def _ask(self, family: socket.AddressFamily) -> None:
        # A port of its own for each question: answers come to it until the next one.
        asking = socket.socket(family, socket.SOCK_DGRAM)
        index = self._listeners[family].index
        self._askers.append(_Socket(self._reactor, asking, index, self._received))
        if index:
            asking.setsockopt(*_way_out(family, index))
        packet = question(self._service.cluster, self._rng.getrandbits(16))
        asking.sendto(packet, (GROUPS[family], PORT))

    def _forget_askers(self) -> None:
        for asker in self._askers:
            asker.close()
        self._askers.clear()

    def _received(self, at: "_Socket", data: bytes, source: Any) -> None:
        if not self._service.may_concern(data):
            return
        if not self._read.allows():
            self._ignore(source, f"more than {PACKETS_PER_SECOND_MAX} in a second")
            return
        try:
            message = decode(data)
        except ValueError as error:
            self._ignore(source, str(error))
            return
        if message.opCode or message.rCode:
            return
        if message.answer:
            self._take(entries(message, self._service.cluster))
        elif at not in self._askers:
            self._answer(at, self._service.answer(message), source)

    def _answer(self, at: "_Socket", answer: bytes, source: Any) -> None:
        if not answer:
            return
        if not self._answered.allows():
            self._ignore(source, f"more than {ANSWERS_PER_SECOND_MAX} questions in a second")
            return
        try:
            at.socket.sendto(answer, source)
        except OSError as error:
            _log.debug("cannot answer %s: %s", source[0], error)

    def _take(self, addresses: list[Address]) -> None:
        for address in addresses:
            if address in self._known or address in self._seen or len(self._seen) >= FOUND_MAX:
                continue
            self._seen.add(address)
            self._batch.append(address)
            timer = self._timers.get("batch")
            if timer is not None and timer.active():
                timer.reset(BATCH_WAIT)
            else:
                self._timers["batch"] = self._reactor.callLater(BATCH_WAIT, self._hand_on)

    def _hand_on(self) -> None:
        batch, self._batch = self._batch, []
        self._found(batch)

    def _ignore(self, source: Any, why: str) -> None:
        self.ignored += 1
        if self._told.allows():
            _log.debug("a packet from %s is ignored: %s; %d so far", source[0], why, self.ignored)


class _PerSecond:
    """At most so many in a second of the clock."""

    def __init__(self, most: int, clock: Any) -> None:
        self._most = most
        self._clock = clock
        self._second = 0
        self._count = 0

    def allows(self) -> bool:
        """Whether one more is within the limit."""
        second = int(self._clock.seconds())
        if second != self._second:
            self._second, self._count = second, 0
        self._count += 1
        return self._count <= self._most


@implementer(IReadDescriptor)
class _Socket:
    """Reads datagrams. Twisted's own port loses the scope of link-local IPv6 addresses."""

    def __init__(
        self,
        reactor: Any,
        bound: socket.socket,
        index: int,
        received: Callable[["_Socket", bytes, Any], None],
    ) -> None:
        bound.settimeout(0)
        self.socket = bound
        self.index = index
        """Of its interface; 0 if the system chooses."""
        self.is_closed = False
        self._reactor = reactor
        self._received = received
        reactor.addReader(self)

    def fileno(self) -> int:
        return self.socket.fileno()

    def logPrefix(self) -> str:
        return "mDNS"

    def doRead(self) -> None:
        for _ in range(READS_MAX):
            if self.is_closed:
                return
            try:
                data, source = self.socket.recvfrom(PACKET_MAX + 1)
            except OSError:
                return  # no more of them, or one was lost
            self._received(self, data, source)

    def connectionLost(self, reason: Failure) -> None:
        """Twisted gives the socket up: reading it has failed in an unexpected way."""
        self.close()

    def close(self) -> None:
        """Read no more."""
        if not self.is_closed:
            self.is_closed = True
            self._reactor.removeReader(self)
            self.socket.close()


def _bound(family: socket.AddressFamily, index: int) -> socket.socket:
    """A socket that hears what is said to the group, beside other programs. Raises OSError."""
    bound = socket.socket(family, socket.SOCK_DGRAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Bound to the group, so that nothing is taken that was sent to another program alone.
        if family == socket.AF_INET:
            # Nor what comes in where this socket is no member.
            bound.setsockopt(socket.IPPROTO_IP, _IP_MULTICAST_ALL, 0)
            bound.bind((GROUPS[family], PORT))
        else:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            # A link-local group is bound to on one interface only.
            host = GROUPS[family] if index else "::"
            bound.bind((host, PORT, 0, index))
    except OSError:
        bound.close()
        raise
    return bound


def _membership(family: socket.AddressFamily, index: int) -> tuple[int, int, bytes]:
    """What makes a socket a member of the group; for setsockopt."""
    group = socket.inet_pton(family, GROUPS[family])
    if family == socket.AF_INET:
        request = struct.pack("@4s4si", group, bytes(4), index)
        return socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request
    request = struct.pack("@16sI", group, index)
    return socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, request


def _way_out(family: socket.AddressFamily, index: int) -> tuple[int, int, bytes]:
    """What makes a socket send to groups on this interface; for setsockopt."""
    if family == socket.AF_INET:
        request = struct.pack("@4s4si", bytes(4), bytes(4), index)
        return socket.IPPROTO_IP, socket.IP_MULTICAST_IF, request
    return socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, struct.pack("@i", index)
