"""Metrics on their way to statsd and statsite, over real sockets on loopback."""

import gc
import re
import socket
import threading
from itertools import pairwise

import pytest
from twisted.internet.task import Clock

from serfd.metrics import Metrics
from serfd.net.statsd import (
    DATAGRAM_MAX,
    FLUSH_INTERVAL,
    LOOK_UP_INTERVAL,
    RETRY_MAX,
    WAITING_MAX,
    GarbagePauses,
    Statsd,
    Statsite,
    Telemetry,
    datagrams,
    measure_process,
)


def lines_of(data: bytes) -> list[str]:
    """Lines without Serf's prefix, those of this very process left out."""
    lines = [line.removeprefix("serf-agent.") for line in data.decode().splitlines()]
    return [line for line in lines if "runtime." not in line]


# What is sent


class Kept:
    """A sink that keeps what it gets."""

    def __init__(self):
        self.lines, self.stopped = [], False

    def send(self, lines):
        assert lines
        self.lines += lines

    def stop(self):
        from twisted.internet.defer import succeed

        self.stopped = True
        return succeed(None)

    def take(self):
        lines, self.lines = self.lines, []
        return lines_of(b"".join(lines))


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
def sink():
    return Kept()


@pytest.fixture
def telemetry(metrics, sink, clock):
    made = Telemetry(metrics, [sink], clock, host="vm.example.org")
    made.start()
    yield made
    made.stop()


def test_what_is_new_is_sent_each_time_and_nothing_else(telemetry, metrics, sink, clock):
    sink.take()
    metrics.count("serf.member.join")
    metrics.count("memberlist.udp.sent", 178)
    clock.advance(FLUSH_INTERVAL)
    assert sink.take() == ["serf.member.join:1.000000|c", "memberlist.udp.sent:178.000000|c"]
    metrics.count("memberlist.udp.sent", 2)
    metrics.count("memberlist.udp.sent", 3)
    clock.advance(FLUSH_INTERVAL)
    assert sink.take() == ["memberlist.udp.sent:5.000000|c"]
    clock.advance(FLUSH_INTERVAL)
    assert sink.lines == []


def test_what_was_counted_before_the_start_is_sent_too(metrics, sink, clock):
    metrics.count("serf.member.join")
    telemetry = Telemetry(metrics, [sink], clock, host="vm")
    telemetry.start()
    assert sink.take() == ["serf.member.join:1.000000|c"]
    telemetry.stop()


def test_samples_are_sent_one_by_one_and_durations_in_milliseconds(telemetry, metrics, sink, clock):
    sink.take()
    metrics.sample("memberlist.probeNode", 0.000469931)
    metrics.sample("serf.msgs.sent", 17)
    metrics.sample("memberlist.probeNode", 1.5)
    clock.advance(FLUSH_INTERVAL)
    assert sink.take() == [
        "memberlist.probeNode:0.469931|ms",
        "serf.msgs.sent:17.000000|ms",
        "memberlist.probeNode:1500.000000|ms",
    ]


def test_gauges_have_the_hosts_name_and_come_every_second(telemetry, metrics, sink, clock):
    sink.take()
    metrics.gauge("memberlist.health.score", 2)
    clock.pump([FLUSH_INTERVAL] * 9)
    assert sink.lines == []
    clock.pump([FLUSH_INTERVAL] * 11)
    assert sink.take() == ["vm.example.org.memberlist.health.score:2.000000|g"] * 2


def test_the_process_is_measured_each_second(telemetry, metrics, sink, clock):
    gc.collect()
    clock.advance(1.0)
    sent = b"".join(sink.lines).decode()
    for name in (
        "num_goroutines", "alloc_bytes", "sys_bytes", "heap_objects", "total_gc_runs",
        "total_gc_pause_ns",
    ):  # fmt: skip
        found = re.findall(rf"serf-agent\.vm\.example\.org\.runtime\.{name}:(.*)\|g\n", sent)
        assert float(found[-1]) > 0, name
    pauses = re.findall(r"serf-agent\.runtime\.gc_pause_ns:(.*)\|ms\n", sent)
    assert sum(map(float, pauses)) == metrics.gauges["runtime.total_gc_pause_ns"]


def test_the_end_sends_the_rest_and_stops_the_sinks(telemetry, metrics, sink, clock):
    sink.take()
    metrics.count("serf.member.left")
    done = []
    telemetry.stop().addCallback(done.append)
    assert sink.take() == ["serf.member.left:1.000000|c"]
    assert sink.stopped
    assert done
    assert clock.getDelayedCalls() == []
    callbacks = len(gc.callbacks)
    telemetry.stop()
    assert len(gc.callbacks) == callbacks


def test_the_figures_of_a_process_are_plausible(metrics):
    measure_process(metrics)
    gauges = metrics.gauges
    assert gauges["runtime.num_goroutines"] == threading.active_count()
    assert 1 << 20 < gauges["runtime.alloc_bytes"] < gauges["runtime.sys_bytes"] < 1 << 34
    assert gauges["runtime.heap_objects"] > 10_000


def test_pauses_are_taken_once():
    pauses = GarbagePauses()
    pauses.start()
    gc.collect()
    pauses.stop()
    gc.collect()
    taken = pauses.take()
    assert len(taken) >= 1
    assert sum(taken) == pauses.total > 0
    assert pauses.take() == []


@pytest.mark.parametrize(
    ("sizes", "packed"),
    [
        ([], []),
        ([700, 700], [1400]),
        ([700, 701], [700, 701]),
        ([1400, 1, 1399, 1], [1400, 1400, 1]),
        ([1500, 10], [1500, 10]),
    ],
)
def test_datagrams_are_filled_up_and_no_line_is_torn(sizes, packed):
    assert DATAGRAM_MAX == 1400
    made = [b"%d" % number * size for number, size in enumerate(sizes)]
    found = list(datagrams(made))
    assert b"".join(found) == b"".join(made)
    assert list(map(len, found)) == packed


# statsd


@pytest.fixture
def udp():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bound:
        bound.bind(("127.0.0.1", 0))
        bound.settimeout(10)
        yield bound


@pytest.fixture
def resolving(reactor):
    """The daemon's reactor. Names are looked up in threads, which it starts when it runs."""
    pool = reactor.getThreadPool()
    pool.start()
    yield reactor
    pool.stop()


@pytest.mark.parametrize(
    ("family", "host"),
    [
        (socket.AF_INET, "127.0.0.1"),
        (socket.AF_INET6, "[::1]"),
        (socket.AF_INET, "localhost"),
    ],
)
def test_datagrams_reach_statsd_once_it_is_found(family, host, metrics, resolving, run_until):
    with socket.socket(family, socket.SOCK_DGRAM) as bound:
        bound.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        bound.settimeout(0)
        statsd = Statsd(f"{host}:{bound.getsockname()[1]}", metrics, resolving)
        got = []

        def arrived():
            try:
                got.append(bound.recv(65536))
            except BlockingIOError:
                return False
            return True

        statsd.send([b"a:1|c\n", b"b:2|c\n"])
        statsd.send([b"c:3|c\n"])
        assert not arrived()
        run_until(arrived)
        statsd.send([b"x" * 1399 + b"\n", b"d:4|c\n"])
        run_until(arrived)
        run_until(arrived)
        assert got == [b"a:1|c\nb:2|c\nc:3|c\n", b"x" * 1399 + b"\n", b"d:4|c\n"]
        statsd.stop()
    assert metrics.counters == {}


class Names:
    """Knows addresses of names, and how often it was asked. A `Clock` with a resolver."""

    def __init__(self, clock, *addresses):
        self.addresses, self.asked = list(addresses), 0
        self.nameResolver = self
        self.seconds = clock.seconds

    def resolveHostName(self, receiver, name):
        from twisted.internet.address import IPv4Address

        self.asked += 1
        receiver.resolutionBegan(None)
        for address in self.addresses:
            receiver.addressResolved(IPv4Address("TCP", address, 0))
        receiver.resolutionComplete()


def test_a_statsd_that_moved_is_found_again(udp, clock, metrics):
    port = udp.getsockname()[1]
    names = Names(clock, "127.0.0.77")
    statsd = Statsd(f"statsd:{port}", metrics, names)
    statsd.send([b"nobody:1|c\n"])
    names.addresses = ["127.0.0.78", "127.0.0.77"]
    clock.advance(LOOK_UP_INTERVAL)
    statsd.send([b"nobody:1|c\n"])  # the old address still counts
    names.addresses = ["127.0.0.1"]
    clock.advance(LOOK_UP_INTERVAL - 1)
    statsd.send([b"nobody:1|c\n"])
    assert names.asked == 2
    clock.advance(1)
    statsd.send([b"a:1|c\n"])
    assert udp.recv(65536) == b"a:1|c\n"
    assert names.asked == 3
    statsd.stop()


def test_of_lines_that_wait_too_long_the_oldest_are_dropped_and_counted(
    udp, clock, metrics, caplog
):
    names = Names(clock)
    statsd = Statsd(f"statsd:{udp.getsockname()[1]}", metrics, names)
    for number in range(WAITING_MAX + 5):
        statsd.send([b"%d:1|c\n" % number])
    statsd.send([b"last:1|c\n"] * 2)
    assert metrics.counters == {"agent.statsd.dropped": 7}
    assert names.asked == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"Metrics do not reach statsd at statsd:{udp.getsockname()[1]}, trying on: "
        "lookup statsd: no such host"
    ]
    names.addresses = ["127.0.0.1"]
    clock.advance(RETRY_MAX)
    statsd.send([b"a:1|c\n"])
    assert udp.recv(65536).startswith(b"8:1|c\n")
    statsd.stop()


def test_what_the_system_does_not_send_is_counted_and_told_once(clock, metrics, caplog):
    caplog.set_level("INFO")
    names = Names(clock, "255.255.255.255")  # a broadcast, which is not allowed
    statsd = Statsd("everybody:8125", metrics, names)
    for _ in range(3):
        statsd.send([b"a:1|c\n", b"b:1|c\n"])
    assert metrics.counters == {"agent.statsd.dropped": 6}
    names.addresses = ["127.0.0.1"]
    clock.advance(LOOK_UP_INTERVAL)
    statsd.send([b"a:1|c\n"])
    assert [record.getMessage() for record in caplog.records] == [
        "Metrics do not reach statsd at everybody:8125, trying on: Permission denied",
        "Metrics reach statsd at everybody:8125 again",
    ]
    statsd.stop()


# statsite


class Server:
    """A statsite: takes connections and reads, as far as it is told to."""

    def __init__(self, port=0):
        self._listening = socket.socket()
        self._listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listening.bind(("127.0.0.1", port))
        self._listening.listen()
        self._listening.settimeout(0)
        self.connection = None
        self.got = b""

    @property
    def port(self):
        return self._listening.getsockname()[1]

    def read(self):
        """Read what is there; whether the other side closed."""
        try:
            if self.connection is None:
                self.connection, _ = self._listening.accept()
                self.connection.settimeout(0)
            while piece := self.connection.recv(1 << 20):
                self.got += piece
        except BlockingIOError:
            return False
        return True

    def has(self, data):
        self.read()
        return self.got == data

    def close(self):
        if self.connection is not None:
            self.connection.close()
        self._listening.close()


@pytest.fixture
def server():
    made = Server()
    yield made
    made.close()


def test_lines_reach_statsite_over_one_connection(server, metrics, resolving, run_until):
    statsite = Statsite(f"127.0.0.1:{server.port}", metrics, resolving)
    statsite.send([b"a:1|c\n"])
    statsite.send([b"b:1|c\n", b"c:1|c\n"])
    run_until(lambda: server.has(b"a:1|c\nb:1|c\nc:1|c\n"))
    statsite.send([b"d:1|c\n"])
    done = []
    statsite.stop().addCallback(done.append)
    run_until(lambda: done)
    assert server.read()
    assert server.got.endswith(b"d:1|c\n")
    assert metrics.counters == {}


def test_a_statsite_that_comes_later_gets_what_waited(metrics, resolving, port, run_until, caplog):
    caplog.set_level("INFO")
    statsite = Statsite(f"127.0.0.1:{port}", metrics, resolving)
    for number in range(WAITING_MAX + 3):
        statsite.send([b"%d:1|c\n" % number])
    run_until(lambda: caplog.records)
    server = Server(port)
    expected = b"".join(b"%d:1|c\n" % number for number in range(3, WAITING_MAX + 3))
    run_until(lambda: server.has(expected))
    assert metrics.counters == {"agent.statsite.dropped": 3}
    first, *_, last = [record.getMessage() for record in caplog.records]
    assert first.startswith(f"Metrics do not reach statsite at 127.0.0.1:{port}, trying on: ")
    assert "refused" in first
    assert last == f"Metrics reach statsite at 127.0.0.1:{port} again"
    assert len(caplog.records) == 2
    statsite.stop()
    server.close()


def test_a_statsite_that_starts_anew_is_connected_again(server, metrics, resolving, run_until):
    statsite = Statsite(f"127.0.0.1:{server.port}", metrics, resolving)
    statsite.send([b"a:1|c\n"])
    run_until(lambda: server.has(b"a:1|c\n"))
    server.connection.close()
    server.connection, server.got = None, b""
    run_until(lambda: statsite._link is None)
    statsite.send([b"b:1|c\n"])
    run_until(lambda: server.has(b"b:1|c\n"))
    statsite.stop()


def test_a_statsite_that_does_not_read_costs_bounded_memory(server, metrics, resolving, run_until):
    statsite = Statsite(f"127.0.0.1:{server.port}", metrics, resolving)
    line = b"x" * 999 + b"\n"
    statsite.send([line])
    run_until(lambda: server.has(line))
    sent = 1

    def is_full():
        nonlocal sent
        sent += 100
        statsite.send([line] * 100)
        return metrics.counters

    run_until(is_full)
    dropped = metrics.counters["agent.statsite.dropped"]
    # Then it reads again: of what was not dropped nothing is missing.
    run_until(lambda: server.has(line * (sent - dropped)))
    statsite.stop()


class Refusing(Clock):
    """Virtual time; connections are refused, names are found or not."""

    def __init__(self):
        super().__init__()
        self.names = Names(self, "10.0.0.1", "10.0.0.2")
        self.nameResolver = self.names
        self.tries = []

    def connectTCP(self, host, port, factory, timeout):
        from twisted.internet.error import ConnectionRefusedError
        from twisted.python.failure import Failure

        self.tries.append((self.seconds(), host, port))
        self.callLater(0, factory.clientConnectionFailed, None, Failure(ConnectionRefusedError()))

        class Connector:
            def disconnect(self):
                pass

        return Connector()


def test_tries_are_ever_longer_apart_and_go_through_all_addresses(metrics):
    reactor = Refusing()
    statsite = Statsite("statsite", metrics, reactor)
    statsite.send([b"a:1|c\n"])
    for _ in range(1000):
        reactor.advance(0.1)
        statsite.send([b"a:1|c\n"])
    times = [round(at) for at, _, _ in reactor.tries]
    assert [later - sooner for sooner, later in pairwise(times)] == [
        1, 2, 4, 8, 16, 30, 30,
    ]  # fmt: skip
    assert [host for _, host, _ in reactor.tries[:3]] == ["10.0.0.1", "10.0.0.2", "10.0.0.1"]
    assert {port for _, _, port in reactor.tries} == {8125}
    statsite.stop()
    assert reactor.getDelayedCalls() == []


def test_a_name_that_is_not_found_is_looked_up_again(metrics, caplog):
    reactor = Refusing()
    reactor.names.addresses = []
    statsite = Statsite("statsite", metrics, reactor)
    statsite.send([b"a:1|c\n"])
    reactor.pump([0.1] * 20)
    assert reactor.names.asked == 2
    assert [record.getMessage() for record in caplog.records] == [
        "Metrics do not reach statsite at statsite, trying on: lookup statsite: no such host"
    ]
    done = []
    statsite.stop().addCallback(done.append)
    assert done
    reactor.pump([1.0] * 60)
    assert reactor.names.asked == 2


def test_an_end_while_it_connects_is_an_end(metrics):
    reactor = Refusing()
    statsite = Statsite("statsite", metrics, reactor)
    statsite.send([b"a:1|c\n"])
    done = []
    statsite.stop().addCallback(done.append)
    assert done
    reactor.pump([1.0] * 60)
    assert len(reactor.tries) == 1
