"""Whatever strangers send, an agent lives, answers, remembers its members, and tells who it was."""

import os
import random
import re
import signal
import socket
import threading

import attacks
import pytest
from attacks import HOST, ON_PACKETS, ON_STREAMS, TRICKLES, connection, packets, stream
from processes import LIMIT, LOCAL, AgentProcess, Agents, Records, everyone_sees, until, until_is

from serfd.gossip.member_table import MEMBERS_MAX

pytestmark = pytest.mark.daemon

GROWTH_MAX = 100 << 20
"""Bytes of memory that an attack may cost: twice what the largest legal message needs."""
KEY = "MDEyMzQ1Njc4OWFiY2RlZg=="


class Target:
    """A member under attack, and one beside it that would notice."""

    def __init__(self, agents: Agents, beside: str, *options: str) -> None:
        self.agent = agents.start("serfd", "target", LOCAL, *options)
        self.beside = agents.start(beside, "beside", LOCAL, *options)
        self.beside.join(self.agent)
        self.members = {"target": "alive", "beside": "alive"}
        everyone_sees([self.agent, self.beside], self.members)
        self._failures = [Records(agent, "member-failed") for agent in (self.agent, self.beside)]
        self._rss = self.agent.rss()

    @property
    def port(self) -> int:
        return self.agent.port

    @property
    def dropped(self) -> int:
        return int(self.agent.stats()["serf"]["dropped_input"])

    def names(self, ports: "set[int]") -> bool:
        """Whether a line of the log says that something from one of these ports was dropped."""
        found = re.findall(rf"\[WARN\] memberlist: Dropped an? \w+ from {HOST}:(\d+): ", self.log)
        return not ports.isdisjoint(map(int, found))

    @property
    def log(self) -> str:
        return self.agent.log()

    def is_well(self) -> None:
        """Whether everything is as it was."""
        everyone_sees([self.agent, self.beside], self.members)
        stats = self.agent.stats()["serf"]
        assert stats["internal_errors"] == "0"
        assert "Traceback" not in self.log
        assert self.agent.rss() - self._rss < GROWTH_MAX
        assert [records.got for records in self._failures] == [[], []]


@pytest.fixture(scope="module", params=["serfd", pytest.param("serf", marks=pytest.mark.interop)])
def target(request, tmp_path_factory):
    """One target for all attacks: what one of them leaves behind, the next ones would show."""
    agents = Agents(tmp_path_factory.mktemp("hostile"))
    try:
        yield Target(agents, request.param)
    finally:
        agents.end()


@pytest.fixture(scope="module")
def sealed_target(tmp_path_factory):
    agents = Agents(tmp_path_factory.mktemp("hostile-sealed"))
    try:
        yield Target(agents, "serfd", f"-encrypt={KEY}")
    finally:
        agents.end()


def drops(target: Target, attack: attacks.Attack) -> None:
    """Attack once: it is counted, and nothing else has changed."""
    before = target.dropped
    attack(target.port)
    until("it is counted", lambda: target.dropped > before)
    target.is_well()


@pytest.mark.parametrize(
    "attack",
    [lambda port: packets(port, attacks.ALIVE[:-1]), lambda port: stream(port, b"\xff")],
    ids=["packet", "stream"],
)
def test_the_log_names_who_sent_what_was_dropped(target, attack):
    ports = set[int]()

    def named() -> bool:
        # Of a flood one line a second is told; it may just be over.
        ports.add(attack(target.port))
        return target.names(ports)

    until("the log names the attacker", named)


@pytest.mark.parametrize("name", ON_PACKETS)
def test_packets_that_say_nothing_are_dropped(target, name):
    drops(target, lambda port: packets(port, *ON_PACKETS[name]))


@pytest.mark.parametrize("name", ON_STREAMS)
def test_streams_that_say_nothing_are_closed(target, name):
    drops(target, lambda port: stream(port, ON_STREAMS[name]))


@pytest.mark.parametrize("name", ON_PACKETS)
def test_packets_that_say_nothing_are_dropped_by_a_cluster_with_a_key(sealed_target, name):
    drops(sealed_target, lambda port: packets(port, *ON_PACKETS[name]))


@pytest.mark.parametrize("name", ON_STREAMS)
def test_streams_that_say_nothing_are_closed_by_a_cluster_with_a_key(sealed_target, name):
    drops(sealed_target, lambda port: stream(port, ON_STREAMS[name]))


@pytest.mark.parametrize(
    "plain", [attacks.ALIVE, attacks.compound(attacks.ALIVE, attacks.ALIVE)], ids=["one", "two"]
)
def test_a_plain_message_is_not_heard_by_a_cluster_with_a_key(sealed_target, plain):
    drops(sealed_target, lambda port: packets(port, plain))


@pytest.mark.parametrize("name", TRICKLES)
def test_a_stream_that_stops_halfway_is_closed_in_time(target, name):
    with connection(target.port) as tcp:
        tcp.sendall(TRICKLES[name])
        assert tcp.recv(1) == b""
    target.is_well()


def test_two_hundred_idle_connections_are_not_all_kept_and_do_not_stay(target):
    held = [socket.create_connection((HOST, target.port), timeout=LIMIT) for _ in range(200)]
    try:
        assert target.agent.stats()
        for tcp in held:
            assert tcp.recv(1) == b""
    finally:
        for tcp in held:
            tcp.close()
    until("there is room again", lambda: target.beside.join(target.agent))
    target.is_well()


def test_connections_that_are_reset_at_once_leave_nothing(target):
    for _ in range(300):
        with socket.create_connection((HOST, target.port)) as tcp:
            # A reset instead of a farewell.
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            tcp.send(b"\x06")
    until("there is room again", lambda: target.beside.join(target.agent))
    target.is_well()


def open_files(agent: AgentProcess) -> int:
    return len(os.listdir(f"/proc/{agent.pid}/fd"))


# RPC


RPC_GARBAGE = {
    "random": random.Random(3).randbytes(50_000),
    "nil": b"\xc0",
    "numbers": bytes(range(100)),
    "a text of 4 GiB": b"\xdb\xff\xff\xff\xff" + b"x" * 3_000_000,
    "bytes of 4 GiB": b"\xc6\xff\xff\xff\xff" + b"x" * 3_000_000,
    "a list of 4 billion": b"\xdd\xff\xff\xff\xff" + b"\x01" * 3_000_000,
    "a map of 4 billion": b"\xdf\xff\xff\xff\xff" + b"\x01" * 3_000_000,
    "lists in lists": b"\x91" * 200_000,
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("name", RPC_GARBAGE)
def test_rpc_that_is_none_is_hung_up_on(target, name):
    port = int(target.agent.rpc_addr.rpartition(":")[2])
    with connection(port) as tcp:
        own = tcp.getsockname()[1]
        tcp.sendall(RPC_GARBAGE[name])
        while tcp.recv(1 << 16):
            pass
    until("the log names the client", lambda: f"request of {HOST}:{own}: " in target.log)
    target.is_well()


def test_rpc_clients_that_say_nothing_leave_room_for_others_when_they_go(target):
    port = int(target.agent.rpc_addr.rpartition(":")[2])
    before = open_files(target.agent)
    held = [socket.create_connection((HOST, port), timeout=LIMIT) for _ in range(300)]
    try:
        # Those over the limit are closed at once; the others have 30 s to shake hands.
        until("the last one is refused", lambda: f"Refused client: {HOST}:" in target.log)
        assert held[-1].recv(1) == b""
    finally:
        for tcp in held:
            tcp.close()
    until("all are forgotten", lambda: open_files(target.agent) <= before + 2)
    target.is_well()


def test_a_client_that_asks_and_never_reads_costs_little_and_delays_nobody(target):
    from msgpack import packb

    port = int(target.agent.rpc_addr.rpartition(":")[2])
    hello = packb({"Command": "handshake", "Seq": 0}) + packb({"Version": 1})
    ask = packb({"Command": "members", "Seq": 1}) * 1000
    with socket.create_connection((HOST, port), timeout=1.0) as tcp:
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        tcp.sendall(hello)
        # The agent stops to read when its answers are not read.
        with pytest.raises(TimeoutError):
            tcp.sendall(ask * 10_000)
        target.is_well()


def test_a_monitor_that_never_reads_misses_lines_and_delays_nobody(target):
    from msgpack import packb

    port = int(target.agent.rpc_addr.rpartition(":")[2])
    with socket.create_connection((HOST, port), timeout=LIMIT) as tcp:
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        tcp.sendall(packb({"Command": "handshake", "Seq": 0}) + packb({"Version": 1}))
        tcp.sendall(packb({"Command": "monitor", "Seq": 1}) + packb({"LogLevel": "TRACE"}))

        def noisy() -> bool:
            # Each of these is a line of the log at DEBUG.
            packets(target.port, *[attacks.NOT_FOR_US] * 500)
            return f"to client: {HOST}:{tcp.getsockname()[1]}: it does not read" in target.log

        until("lines are dropped", noisy)
        target.is_well()


def test_all_at_once(target):
    """Every attack again and again, while the cluster goes on with its work."""
    stop = threading.Event()
    before = target.dropped

    def flood(number: int) -> None:
        rng = random.Random(number)
        while not stop.is_set():
            if rng.random() < 0.5:
                packets(target.port, *rng.choice(list(ON_PACKETS.values()))[:50])
            else:
                stream(target.port, rng.choice(list(ON_STREAMS.values())))

    threads = [threading.Thread(target=flood, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        for step in range(100):
            with target.agent.client() as client:
                client.tags({"step": str(step)})
            until_is(
                "the tags as the other member sees them",
                lambda step=step: target.beside.members()["target"].tags,
                {"step": str(step)},
            )
            if step > 5 and target.dropped > before + 2000:
                break
        else:
            pytest.fail("the flood was not a flood")
    finally:
        stop.set()
        for thread in threads:
            thread.join(LIMIT)
    target.is_well()


def test_a_cluster_of_forged_members_has_a_limit(agents):
    alone = agents.start("serfd", "alone")
    # None of them answers: nobody listens at port 9 of these addresses.
    forged = (
        attacks.NodeState(f"n{n}", b"\x7f" + n.to_bytes(3, "big"), 9, b"", 1, 0, b"\1\5\2\2\5\5")
        for n in range(MEMBERS_MAX + 10_000)
    )
    before = alone.rss()
    stream(alone.port, attacks.encode_push_pull(forged, b"", join=True))
    until_is("the number of members", lambda: alone.stats()["serf"]["members"], str(MEMBERS_MAX))
    assert alone.rss() - before < GROWTH_MAX
    assert alone.stats()["serf"]["internal_errors"] == "0"
    alone.signal(signal.SIGTERM)
    assert alone.exit_code() == 1
