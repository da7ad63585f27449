"""What a real agent and ours tell statsd of the same life: the same names, of the same types."""

import re
import socket
from collections.abc import Iterator

import pytest
from processes import AgentProcess, Agents, everyone_sees, run, until

pytestmark = pytest.mark.interop

TOLD = {
    ("agent.ipc.accept", "c"),
    ("agent.ipc.command", "c"),
    ("memberlist.msg.alive", "c"),
    ("memberlist.msg.dead", "c"),
    ("memberlist.probeNode", "ms"),
    ("memberlist.tcp.sent", "c"),
    ("memberlist.udp.received", "c"),
    ("memberlist.udp.sent", "c"),
    ("serf.coordinate.adjustment-ms", "ms"),
    ("serf.events", "c"),
    ("serf.events.de_p_loy", "c"),
    ("serf.member.join", "c"),
    ("serf.member.left", "c"),
    ("serf.member.update", "c"),
    ("serf.msgs.received", "ms"),
    ("serf.msgs.sent", "ms"),
    ("serf.queries", "c"),
    ("serf.queries.load", "c"),
    ("serf.query_acks", "c"),
    ("serf.query_responses", "c"),
    ("HOST.runtime.alloc_bytes", "g"),
    ("HOST.runtime.heap_objects", "g"),
    ("HOST.runtime.num_goroutines", "g"),
    ("HOST.runtime.sys_bytes", "g"),
    ("HOST.runtime.total_gc_pause_ns", "g"),
    ("HOST.runtime.total_gc_runs", "g"),
}
"""Both tell of it in every such life."""
ONLY_SERFS = {
    ("memberlist.gossip", "ms"),
    ("HOST.runtime.malloc_count", "g"),
    ("HOST.runtime.free_count", "g"),
}
"""As docs/metrics.md says."""


class Statsd:
    """Every name and type that one agent told, the script's aside."""

    def __init__(self, bound: socket.socket) -> None:
        self._socket = bound
        self._names: set[tuple[str, str]] = set()
        self.values: list[str] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._socket.getsockname()[1]}"

    def names(self) -> set[tuple[str, str]]:
        while True:
            try:
                datagram = self._socket.recv(65536).decode()
            except BlockingIOError:
                return self._names
            for line in datagram.splitlines():
                name, value, kind = re.fullmatch(r"serf-agent\.(.+):(.+)\|(.+)", line).groups()
                if not name.startswith("agent.invoke."):
                    host = socket.gethostname()
                    self._names.add((name.replace(f"{host}.", "HOST.", 1), kind))
                self.values.append(value)


@pytest.fixture
def statsds() -> Iterator[list[Statsd]]:
    with socket.socket(type=socket.SOCK_DGRAM) as one, socket.socket(type=socket.SOCK_DGRAM) as two:
        for bound in (one, two):
            bound.bind(("127.0.0.1", 0))
            bound.settimeout(0)
        yield [Statsd(one), Statsd(two)]


def live(agents: Agents, agent: AgentProcess) -> None:
    """A friend comes, is told and asked something, sees a change, and goes."""
    friend = agents.start("serf", f"friend-of-{agent.name}")
    friend.join(agent)
    everyone_sees([agent, friend], {agent.name: "alive", friend.name: "alive"})
    rpc = f"-rpc-addr={agent.rpc_addr}"
    assert run("serf", "event", "-coalesce=false", rpc, "de:p loy", "x").returncode == 0
    asked = run("serf", "query", "-timeout=2s", rpc, "load", "x")
    assert f"Response from '{agent.name}': here" in asked.stdout
    assert run("serf", "tags", rpc, "-set", "a=b").returncode == 0
    with friend.client() as client:
        client.leave()
    everyone_sees([agent], {agent.name: "alive", friend.name: "left"})


def test_a_real_agent_and_ours_tell_statsd_the_same(agents, statsds):
    theirs, ours = statsds
    for kind, statsd in (("serf", theirs), ("serfd", ours)):
        config = {
            "statsd_addr": statsd.address, "event_handlers": ["query:load=echo here"],
        }  # fmt: skip
        live(agents, agents.start(kind, f"{kind}-one", config=config))
        until(f"{kind} tells all", lambda statsd=statsd: statsd.names() >= TOLD)
    # Of garbage either is told only if there was some.
    assert theirs.names() - ours.names() <= ONLY_SERFS | {("runtime.gc_pause_ns", "ms")}
    assert ours.names() & ONLY_SERFS == set()
    for statsd in statsds:
        assert all(re.fullmatch(r"-?\d+\.\d{6}", value) for value in statsd.values)
