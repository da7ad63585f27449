"""The driver: inputs in, effects out, one alarm, and what Twisted must not do to the core."""

import errno
import logging
import random
import socket
from collections.abc import Callable
from typing import Any

import pytest
from twisted.internet.address import IPv4Address
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionDone, ConnectionRefusedError
from twisted.internet.testing import FakeDatagramTransport, MemoryReactorClock, StringTransport
from twisted.python.failure import Failure
from twisted.test.iosim import FakeTransport, connect

from serfd.config import load
from serfd.effects import Address, Command, StreamId
from serfd.errors import CommandError
from serfd.gossip.member_table import State
from serfd.net.driver import CLOSE_GRACE, Driver
from serfd.net.transport import PACKET_MAX, AcceptFactory, PacketProtocol
from serfd.serf.events import Event, MemberEvent, MemberEventKind, Query
from serfd.serf.node import Node
from serfd.serf.queries import EVERYBODY, QueryDone, QueryParams
from serfd.wire import serf_messages
from serfd.wire.envelope import Envelope
from serfd.wire.packet import PacketCodec
from serfd.wire.sealing import Keyring
from serfd.wire.serf_messages import QueryResponse
from serfd.wire.swim_messages import Ack, Alive, IndirectPing, Message, Ping, Suspect, encode

CONFIG = load([], flags={"profile": "local", "disable_coordinates": True})
VERSIONS = b"\1\5\2\2\5\5"
HERE = socket.inet_aton("127.0.0.1")
PEER = Address("127.0.0.1", 17002)


def make_node(name: str = "a", *, now: float = 0.0, port: int = 17001, kind: type = Node) -> Node:
    return kind(
        CONFIG,
        name=name,
        addr=HERE,
        port=port,
        keyring=Keyring(),
        now=now,
        rng=random.Random(1),
        nonce=lambda: bytes(12),
    )


def alive(name: str, *, port: int = PEER.port) -> bytes:
    return encode(Alive(1, name, HERE, port, b"", VERSIONS))


def messages(data: bytes) -> list[Message]:
    found, faults = PacketCodec(Envelope()).open(data)
    assert faults == []
    return found


class Stage:
    """A driver on Twisted's stand-ins, and all that came out of it."""

    def __init__(
        self, name: str = "a", *, kind: type = Node, strict: bool = True, is_ipv6: bool = False
    ) -> None:
        self.reactor = MemoryReactorClock()
        self.udp = FakeDatagramTransport()
        self.events: list[Event] = []
        self.node = make_node(name, kind=kind)
        self.driver = Driver(self.node, self.reactor, self.publish, strict=strict)
        self.is_ipv6 = is_ipv6
        self.listener: Callable[[Event], object] = lambda event: None

    def publish(self, event: Event) -> None:
        self.events.append(event)
        self.listener(event)

    def start(self) -> "Stage":
        self.driver.start(self.udp, is_ipv6=self.is_ipv6)
        return self

    def heard(self) -> list[tuple[MemberEventKind, str]]:
        return [
            (event.kind, member.name)
            for event in self.events
            if isinstance(event, MemberEvent)
            for member in event.members
        ]

    def accept(self) -> tuple[Any, "Pipe"]:
        """A peer connects."""
        link = AcceptFactory(self.driver).buildProtocol(None)
        pipe = Pipe(peerAddress=IPv4Address("TCP", "127.0.0.1", 40_000))
        link.makeConnection(pipe)
        return link, pipe


class Pipe(StringTransport):
    """A connection's near end."""

    no_delay = aborted = False

    def abortConnection(self) -> None:
        self.aborted = True
        super().abortConnection()

    def setTcpNoDelay(self, enabled: bool) -> None:
        self.no_delay = enabled


def result_of(deferred: "Deferred[Any]") -> Any:
    """What it has fired with; a failure as its exception."""
    found: list[Any] = []
    deferred.addCallbacks(found.append, lambda failure: found.append(failure.value))
    assert found, "it has not fired"
    return found[0]


# Effects


def test_what_the_node_wants_waits_until_the_socket_is_there():
    stage = Stage()
    assert stage.events == []
    stage.start()
    assert stage.heard() == [(MemberEventKind.JOIN, "a")]


@pytest.mark.parametrize(
    ("is_ipv6", "host"), [(False, "127.0.0.1"), (True, "::ffff:127.0.0.1")], ids=["IPv4", "IPv6"]
)
def test_packets_are_sent_in_the_form_the_sockets_family_needs(is_ipv6, host):
    stage = Stage(is_ipv6=is_ipv6).start()
    stage.driver.packet_received(encode(Ping(7, "a")), PEER)
    [(data, to)] = stage.udp.written
    assert messages(data)[0] == Ack(7)
    assert to == (host, PEER.port)


def test_a_packet_becomes_an_event():
    stage = Stage().start()
    stage.driver.packet_received(alive("b"), PEER)
    assert stage.heard() == [(MemberEventKind.JOIN, "a"), (MemberEventKind.JOIN, "b")]


class Unreachable(FakeDatagramTransport):
    """A socket that refuses some ports."""

    def __init__(self, *ports: int) -> None:
        super().__init__()
        self.ports = ports

    def write(self, packet: bytes, addr: tuple[str, int]) -> None:
        if addr[1] in self.ports:
            raise OSError(errno.ENETUNREACH, "Network is unreachable")
        super().write(packet, addr)


def test_an_address_that_cannot_be_reached_does_not_keep_news_from_others(caplog):
    caplog.set_level(logging.DEBUG, logger="serfd.agent")
    logging.getLogger("serfd").propagate = True
    stage = Stage()
    stage.udp = Unreachable(1, 3)
    stage.start()
    for port in (1, 2, 3, 4):
        stage.driver.packet_received(alive(f"n{port}", port=port), PEER)
    stage.reactor.pump([0.05] * 100)
    assert {to[1] for _, to in stage.udp.written} == {2, 4}
    assert stage.driver.send_errors > 0
    assert "Network is unreachable" in caplog.text
    assert stage.driver.internal_errors == 0


def test_a_probe_that_cannot_be_sent_asks_others_in_the_same_moment():
    stage = Stage()
    stage.udp = Unreachable(1)
    stage.start()
    for port in (1, 2, 3):
        stage.driver.packet_received(alive(f"n{port}", port=port), PEER)
    asked = False
    while not asked:
        assert stage.reactor.seconds() < 30.0
        stage.udp.written.clear()
        stage.reactor.advance(0.01)
        sent = [m for data, _ in stage.udp.written for m in messages(data)]
        for ping in sent:
            if isinstance(ping, Ping):
                stage.driver.packet_received(encode(Ack(ping.seq)), PEER)
        asked = any(isinstance(m, IndirectPing) and m.node == "n1" for m in sent)
    probe = stage.node.memberlist._probe
    assert probe.peer.name == "n1"
    assert stage.reactor.seconds() - probe.started < 0.02
    assert stage.driver.internal_errors == 0


# Time


def test_there_is_one_alarm_for_the_nodes_next_timer():
    stage = Stage().start()
    for _ in range(50):
        [alarm] = stage.reactor.getDelayedCalls()
        assert alarm.getTime() == pytest.approx(stage.node.next_wakeup())
        stage.driver.packet_received(alive(f"n{random.Random(_).random()}"), PEER)
        stage.reactor.advance(0.01)
    [alarm] = stage.reactor.getDelayedCalls()


def test_a_node_is_woken_when_it_wants():
    stage = Stage().start()
    stage.driver.packet_received(alive("b"), PEER)
    stage.udp.written.clear()
    stage.reactor.pump([0.1] * 30)
    pings = [m for data, _ in stage.udp.written for m in messages(data) if isinstance(m, Ping)]
    assert [ping.node for ping in pings][:1] == ["b"]


class Probed:
    """A driver on a real socket and a clock set by hand, and a member it probes."""

    def __init__(self, reactor: Any) -> None:
        self.reactor = reactor
        self.node = make_node(now=reactor.now)
        self.driver = Driver(self.node, reactor, lambda event: None, strict=True)
        port = reactor.listenUDP(
            0, PacketProtocol(self.driver), "127.0.0.1", maxPacketSize=PACKET_MAX
        )
        self.address = ("127.0.0.1", port.getHost().port)
        self.peer = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.peer.bind(("127.0.0.1", 0))
        self.peer.setblocking(False)
        self.heard: list[Message] = []
        self.driver.start(port, is_ipv6=False)
        self.says(Alive(1, "b", HERE, self.peer.getsockname()[1], b"", VERSIONS))

    def says(self, message: Message) -> None:
        """What the member says waits in the socket from now on."""
        self.peer.sendto(encode(message), self.address)

    def passes(self, seconds: float, *, until: Callable[[], object] = lambda: False) -> None:
        """Time passes in small steps, up to so many seconds."""
        for _ in range(int(seconds / 0.01)):
            self.reactor.now += 0.01
            self.turns(2)
            if until():
                return

    def turns(self, count: int) -> None:
        for _ in range(count):
            self.reactor.turn()
        while True:
            try:
                self.heard += messages(self.peer.recv(65_536))
            except BlockingIOError:
                return

    def ping(self) -> Ping | None:
        """The ping it got."""
        return next((m for m in self.heard if isinstance(m, Ping)), None)

    @property
    def state(self) -> State:
        member = self.node.memberlist.table.get("b")
        assert member is not None
        return member.state


@pytest.fixture
def probed(hand_turned):
    probed = Probed(hand_turned)
    probed.passes(5, until=probed.ping)
    assert probed.ping() is not None
    yield probed
    probed.driver.stop()
    probed.peer.close()


def test_after_a_stall_an_ack_that_waits_in_the_socket_counts_before_the_timers(probed):
    ping = probed.ping()
    probed.says(Ack(ping.seq))
    # Long past everything the probe would have waited for.
    probed.reactor.now += 5
    probed.turns(3)
    assert probed.state is State.ALIVE
    assert not any(isinstance(m, Suspect | IndirectPing) for m in probed.heard)
    assert probed.node.stats()["health_score"] == "0"


def test_after_a_stall_without_an_ack_the_timers_count(probed):
    probed.reactor.now += 5
    probed.turns(3)
    assert probed.state is State.SUSPECT


def test_a_member_that_answers_is_never_suspected_however_the_process_stalls(probed):
    rng = random.Random(1)
    for _ in range(40):
        while (ping := probed.ping()) is not None:
            probed.heard.remove(ping)
            probed.says(Ack(ping.seq))
        probed.reactor.now += rng.choice([0.01, 0.3, 1.5, 3])
        probed.turns(2)
        assert probed.state is State.ALIVE
    assert not any(isinstance(m, Suspect) for m in probed.heard)


# Streams and commands


def exchange(asks: Stage, answers: Stage) -> tuple[FakeTransport, FakeTransport]:
    """Connect what one wants to open with the other, and let all bytes through."""
    *_, (host, port, factory, _timeout, _bind) = asks.reactor.tcpClients
    assert (host, port) == PEER
    client = factory.buildProtocol(None)
    server = AcceptFactory(answers.driver).buildProtocol(None)
    here, there = IPv4Address("TCP", "127.0.0.1", 40_000), IPv4Address("TCP", *PEER)
    ends = (
        FakeTransport(server, isServer=True, hostAddress=there, peerAddress=here),
        FakeTransport(client, isServer=False, hostAddress=here, peerAddress=there),
    )
    connect(server, ends[0], client, ends[1]).flush()
    return ends


def test_a_join_opens_a_stream_and_ends_with_who_answered():
    a, b = Stage("a").start(), Stage("b").start()
    joining = a.driver.run(a.node.join, [PEER])
    ends = exchange(a, b)
    assert result_of(joining) == (1, ())
    assert (MemberEventKind.JOIN, "b") in a.heard()
    assert (MemberEventKind.JOIN, "a") in b.heard()
    assert all(end.disconnected for end in ends)
    # Nothing is kept: neither streams nor the alarms that would cut them.
    for stage in (a, b):
        assert len(stage.reactor.getDelayedCalls()) == 1


def test_a_join_that_is_refused_ends_with_why():
    stage = Stage().start()
    joining = stage.driver.run(stage.node.join, [PEER])
    [(_, _, factory, _, _)] = stage.reactor.tcpClients
    refused = ConnectionRefusedError(errno.ECONNREFUSED, "x")
    factory.clientConnectionFailed(None, Failure(refused))
    assert result_of(joining) == (
        0,
        ("Failed to join 127.0.0.1: dial tcp 127.0.0.1:17002: connect: connection refused",),
    )


def test_a_join_that_takes_too_long_is_given_up_and_its_connection_with_it():
    stage = Stage().start()
    joining = stage.driver.run(stage.node.join, [PEER])
    [connector] = stage.reactor.connectors
    stage.reactor.pump([0.1] * 20)
    assert result_of(joining) == (0, ("Failed to join 127.0.0.1: i/o timeout",))
    assert connector._disconnected


def test_a_command_that_is_refused_fails_its_deferred():
    stage = Stage().start()
    asked = stage.driver.run(stage.node.update_tags, {"a": "x" * 600})
    assert isinstance(result_of(asked), CommandError)


def test_a_stream_that_makes_no_sense_is_closed_and_cut_if_the_peer_does_not_go():
    stage = Stage().start()
    link, pipe = stage.accept()
    assert pipe.no_delay
    link.dataReceived(b"\xff")
    assert pipe.disconnecting
    assert not pipe.aborted
    link.dataReceived(b"\xff" * 1000)  # not heard any more
    stage.reactor.pump([0.5] * int(CLOSE_GRACE / 0.5 + 1))
    assert pipe.aborted
    assert stage.node.stats()["dropped_input"] == "1"


def test_a_stream_that_ends_is_forgotten():
    stage = Stage().start()
    link, pipe = stage.accept()
    link.dataReceived(b"\xff")
    link.connectionLost(Failure(ConnectionDone()))
    stage.reactor.pump([0.5] * 30)
    assert not pipe.aborted
    assert len(stage.reactor.getDelayedCalls()) == 1


def test_the_end_cuts_streams_and_fails_commands():
    stage = Stage().start()
    stage.driver.packet_received(alive("b"), PEER)
    link, pipe = stage.accept()
    link.dataReceived(b"\xff")
    _, idle = stage.accept()
    leaving = stage.driver.run(stage.node.leave)
    stage.udp.written.clear()
    stage.driver.stop()
    assert pipe.aborted
    assert idle.aborted
    assert str(result_of(leaving)) == "the agent is shutting down"
    assert str(result_of(stage.driver.run(stage.node.leave))) == "the agent is shutting down"
    stage.driver.packet_received(encode(Ping(7, "a")), PEER)
    assert stage.udp.written == []
    assert stage.reactor.getDelayedCalls() == []


# One after the other


def test_what_a_listener_asks_comes_after_what_is_being_told():
    stage = Stage().start()
    told: list[str] = []

    def listener(event: Event) -> None:
        assert isinstance(event, MemberEvent)
        told.append(f"begin {event.name}")
        if event.kind is MemberEventKind.JOIN:
            # Each of these is an input, and each makes an event at once.
            stage.driver.run(stage.node.update_tags, {"x": "1"}).addErrback(lambda _: None)
            stage.driver.packet_received(alive("c"), PEER) if len(told) == 1 else None
        told.append(f"end {event.name}")

    stage.listener = listener
    stage.driver.packet_received(alive("b"), PEER)
    assert told == [
        "begin member-join",
        "end member-join",
        "begin member-update",
        "end member-update",
        "begin member-join",
        "end member-join",
        "begin member-update",
        "end member-update",
    ]


class Poisoned(Node):
    """A node with mistakes in it: each breaks off when half is done."""

    def packet_received(self, now: float, data: bytes, source: Address) -> None:
        super().packet_received(now, data, source)
        if source.port == 666:
            raise ZeroDivisionError

    def stream_opened(self, now: float, peer: Address) -> StreamId:
        super().stream_opened(now, peer)
        raise ZeroDivisionError

    def user_event(
        self, now: float, name: str, payload: bytes, *, coalesce: bool = True
    ) -> Command[None]:
        super().user_event(now, name, payload, coalesce=coalesce)
        raise ZeroDivisionError

    def query(
        self, now: float, name: str, payload: bytes, params: QueryParams
    ) -> Command[QueryDone]:
        super().query(now, name, payload, params)
        raise ZeroDivisionError


def test_a_mistake_of_ours_costs_one_input_is_counted_and_logged(caplog):
    logging.getLogger("serfd").propagate = True
    stage = Stage(kind=Poisoned, strict=False).start()
    stage.driver.packet_received(encode(Ping(1, "a")), Address("127.0.0.1", 666))
    stage.driver.packet_received(encode(Ping(2, "a")), PEER)
    assert stage.driver.internal_errors == 1
    assert "ZeroDivisionError" in caplog.text
    assert (messages(stage.udp.written[-1][0])[0], stage.udp.written[-1][1][1]) == (
        Ack(2),
        PEER.port,
    )


def test_in_tests_a_mistake_of_ours_is_raised():
    stage = Stage(kind=Poisoned).start()
    with pytest.raises(ZeroDivisionError):
        stage.driver.packet_received(b"", Address("127.0.0.1", 666))


def internal_error(stage: Stage, caplog: pytest.LogCaptureFixture, what: str) -> None:
    """One was counted, and the log says in what."""
    assert stage.driver.internal_errors == 1
    assert f"An input was dropped by an internal error: {what}" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_a_mistake_of_ours_fails_the_command_it_is_in(caplog):
    logging.getLogger("serfd").propagate = True
    stage = Stage(kind=Poisoned, strict=False).start()
    # The node has finished this command, so its result comes out too: for nobody.
    told = stage.driver.run(stage.node.user_event, "deploy", b"")
    assert str(result_of(told)) == "internal error, see the log"
    internal_error(stage, caplog, "user_event")
    leaving = stage.driver.run(stage.node.leave)
    stage.reactor.pump([0.1] * 20)
    assert result_of(leaving) is None


def test_a_mistake_of_ours_fails_the_question_it_is_in(caplog):
    logging.getLogger("serfd").propagate = True
    stage = Stage(kind=Poisoned, strict=False).start()
    answers: list[Any] = []
    asking = stage.driver.ask(stage.node.query, answers.append, "load", b"", EVERYBODY)
    assert str(result_of(asking)) == "internal error, see the log"
    internal_error(stage, caplog, "query")
    # The node goes on with its half: what comes in for it is for nobody.
    [query] = [event for event in stage.events if isinstance(event, Query)]
    stage.driver.run(stage.node.respond, query, b"17").addErrback(lambda _: None)
    response = QueryResponse(query.ltime, query.id, "a", 0, b"17")
    stage.driver.packet_received(b"\x08" + serf_messages.encode(response), PEER)
    stage.reactor.pump([1.0] * 60)
    assert answers == []
    assert stage.driver.internal_errors == 1


def test_a_question_that_is_cancelled_is_asked_no_longer():
    stage = Stage().start()
    answers: list[Any] = []
    asking = stage.driver.ask(
        stage.node.query, answers.append, "load", b"", QueryParams(timeout=3600.0)
    )
    [query] = [event for event in stage.events if isinstance(event, Query)]
    asking.cancel()
    assert isinstance(result_of(asking), CancelledError)
    response = QueryResponse(query.ltime, query.id, "a", 0, b"17")
    stage.driver.packet_received(b"\x08" + serf_messages.encode(response), PEER)
    assert answers == []
    late = stage.driver.run(stage.node.respond, query, b"17")
    assert "past the deadline" in str(result_of(late))
    stage.driver.stop()
    assert stage.driver.internal_errors == 0


def test_a_command_that_is_cancelled_is_done_nevertheless():
    stage = Stage().start()
    leaving = stage.driver.run(stage.node.leave)
    leaving.cancel()
    assert isinstance(result_of(leaving), CancelledError)
    assert isinstance(result_of(stage.driver.run(stage.node.leave)), CommandError)
    stage.reactor.pump([0.1] * 20)
    assert result_of(stage.driver.run(stage.node.leave)) is None  # it has left


def test_a_mistake_of_ours_costs_the_stream_that_was_accepted(caplog):
    logging.getLogger("serfd").propagate = True
    stage = Stage(kind=Poisoned, strict=False).start()
    link, pipe = stage.accept()
    assert pipe.aborted
    internal_error(stage, caplog, "stream_opened")
    link.dataReceived(b"\xff")
    link.connectionLost(Failure(ConnectionDone()))
    assert stage.driver.internal_errors == 1


def test_after_the_end_no_stream_is_accepted():
    stage = Stage().start()
    stage.driver.stop()
    _, pipe = stage.accept()
    assert pipe.aborted
