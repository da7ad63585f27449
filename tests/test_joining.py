"""How a node finds others: whole agents on virtual time, in a network that is a dict."""

import logging
from collections import Counter
from random import Random
from typing import Any

import pytest
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone, ConnectionRefusedError
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from serfd.agent import Agent
from serfd.config import load
from serfd.effects import Address
from serfd.errors import ConfigError, JoinFailed
from serfd.joining import LOOK_INTERVAL, SHORTEST_WAIT, Joining
from serfd.net.transport import StreamProtocol
from serfd.serf.node import Node
from serfd.wire.sealing import Keyring

PORT = 7946


class Network(Clock):
    """A reactor that all agents share: whom names lead to, who listens, and who is cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.agents: dict[str, Agent] = {}
        self.names: dict[str, list[str]] = {}
        self.looked_up: Counter[str] = Counter()
        self.connected: Counter[str] = Counter()
        self.nameResolver = self

    def agent(self, name: str, host: str, **settings: Any) -> tuple[Agent, Joining]:
        """A node that runs, and its joining, which is not begun."""
        flags = {"profile": "local", "disable_coordinates": True, "reconnect_timeout": "1s"}
        # Nothing but the joining is to look for others.
        flags |= {"reconnect_interval": "24h", "gossip": {"push_pull_interval": "0s"}}
        config = load([], flags={**flags, **settings})
        node = Node(
            config, name=name, addr=bytes(map(int, host.split("."))), port=PORT, keyring=Keyring(),
            now=self.seconds(), rng=Random(host), nonce=lambda: bytes(12),
        )  # fmt: skip
        made = Agent(config, node, self, port=PORT, shut_down=lambda: None)
        made.driver.start(Udp(self, host), is_ipv6=False)  # type: ignore[arg-type]
        self.agents[host] = made
        return made, Joining(made, config, self, rng=Random(1))

    def fail(self, host: str) -> None:
        """Its machine is gone without a word."""
        self.agents.pop(host).driver.stop()

    def run(self, seconds: float) -> None:
        """Let time pass; whatever is due happens at its own moment."""
        end = self.seconds() + seconds
        while (calls := self.getDelayedCalls()) and (
            due := min(call.getTime() for call in calls)
        ) <= end:
            self.advance(max(0.0, due - self.seconds()))
        self.advance(end - self.seconds())

    # As a reactor.

    def resolveHostName(self, receiver: Any, name: str) -> None:
        self.looked_up[name] += 1
        receiver.resolutionBegan(None)
        for host in self.names.get(name, [name] if name[0].isdigit() else []):
            receiver.addressResolved(IPv4Address("TCP", host, 0))
        receiver.resolutionComplete()

    def connectTCP(self, host: str, port: int, factory: Any, timeout: float) -> Any:
        self.connected[host] += 1
        self.callLater(0, self._connect, host, factory)

    def _connect(self, host: str, factory: Any) -> None:
        there = self.agents.get(host)
        if there is None:
            refused = Failure(ConnectionRefusedError(111))
            factory.clientConnectionFailed(None, refused)
            return
        ours, theirs = factory.buildProtocol(None), StreamProtocol(there.driver)
        near, far = Wire(self, ours, theirs), Wire(self, theirs, ours)
        theirs.makeConnection(far)  # type: ignore[arg-type]
        ours.makeConnection(near)


class Udp:
    def __init__(self, network: Network, host: str) -> None:
        self._network = network
        self._host = host

    def write(self, data: bytes, to: tuple[str, int]) -> None:
        self._network.callLater(0, self._arrive, data, to[0])

    def _arrive(self, data: bytes, host: str) -> None:
        there = self._network.agents.get(host)
        if there is not None:
            there.driver.packet_received(data, Address(self._host, PORT))


class Wire:
    """One end of a TCP connection."""

    def __init__(self, network: Network, near: Any, far: Any) -> None:
        self._network, self._near, self._far = network, near, far
        self._is_open = True

    def setTcpNoDelay(self, enabled: bool) -> None:
        """There is nothing to wait for anyway."""

    def getPeer(self) -> IPv4Address:
        return IPv4Address("TCP", "10.0.0.99", 50_000)

    def write(self, data: bytes) -> None:
        self._network.callLater(0, self._far.dataReceived, data)

    def loseConnection(self) -> None:
        if self._is_open:
            self._is_open = False
            self._network.callLater(0, self._near.connectionLost, Failure(ConnectionDone()))
            self._network.callLater(0, self._far.transport.loseConnection)

    abortConnection = loseConnection


@pytest.fixture
def network() -> Network:
    return Network()


def begun(joining: Joining) -> list[Any]:
    """Both steps of a start; what comes of them will be in the list."""

    async def start() -> None:
        await joining.at_start()
        await joining.in_background()

    outcome: list[Any] = []
    Deferred.fromCoroutine(start()).addBoth(outcome.append)
    return outcome


def sees(agent: Agent) -> dict[str, str]:
    return {member.name: member.status.text for member in agent.members()}


# At start


def test_start_join_is_one_join_of_all_and_one_answer_is_enough(network):
    network.agent("n1", "10.0.0.1")
    agent, joining = network.agent("n2", "10.0.0.2", start_join=["10.0.0.7", "10.0.0.1"])
    started = begun(joining)
    network.run(1)
    assert started == [None]
    assert sees(agent) == {"n1": "alive", "n2": "alive"}


def test_a_start_join_that_nobody_answers_fails_and_is_not_tried_again(network):
    _, joining = network.agent("n2", "10.0.0.2", start_join=["10.0.0.7"])
    started = begun(joining)
    network.run(1)
    assert isinstance(started[0].value, JoinFailed)
    assert "Failed to join 10.0.0.7: dial tcp 10.0.0.7:7946" in str(started[0].value)
    network.run(2 * LOOK_INTERVAL)
    assert network.connected["10.0.0.7"] == 1


def test_retry_join_looks_its_names_up_at_every_try_until_somebody_answers(network):
    agent, joining = network.agent("n2", "10.0.0.2", retry_join=["seed"], retry_interval="10s")
    started = begun(joining)
    network.run(15)
    assert network.looked_up["seed"] == 2  # at once and after 10 s
    assert not started
    network.agent("n1", "10.0.0.1")
    network.names["seed"] = ["10.0.0.1"]
    network.run(10)
    assert started == [None]
    assert sees(agent) == {"n1": "alive", "n2": "alive"}


def test_a_short_retry_interval_is_raised_to_a_second(network):
    for number, interval in enumerate(("10ms", "-10s"), 7):
        to = f"10.0.0.{number}"
        _, joining = network.agent("n2", "10.0.0.2", retry_join=[to], retry_interval=interval)
        begun(joining)
        network.run(9.5 * SHORTEST_WAIT)
        assert network.connected[to] == 10
        joining.stop()


def test_a_try_that_fails_is_told_with_its_reason_in_one_line(network, caplog):
    caplog.set_level(logging.INFO, logger="serfd.agent")
    settings = {"retry_join": ["10.0.0.7", "10.0.0.1"], "retry_interval": "1m30s"}
    agent, joining = network.agent("n2", "10.0.0.2", **settings)
    begun(joining)
    network.run(1)
    reasons = " ".join(
        f"* Failed to join 10.0.0.{n}: dial tcp 10.0.0.{n}:7946: connect: connection refused"
        for n in (7, 1)
    )
    assert f"Join failed: 2 errors occurred: {reasons}, retrying in 90s" in caplog.messages
    network.agent("n1", "10.0.0.1")
    network.run(90)
    assert sees(agent) == {"n1": "alive", "n2": "alive"}
    assert caplog.messages.count("Joining cluster...(replay: false)") == 2
    assert "Join completed. Synced with 1 initial agents" in caplog.messages


def test_retry_join_gives_up_after_so_many_tries_more_than_one(network):
    settings = {"retry_join": ["10.0.0.7"], "retry_interval": "10s", "retry_max_attempts": 2}
    _, joining = network.agent("n2", "10.0.0.2", **settings)
    started = begun(joining)
    network.run(19)
    assert not started
    network.run(2)
    assert isinstance(started[0].value, ConfigError)
    assert str(started[0].value).startswith("no address of retry_join answered in 3 tries: ")


# Ever after


class Pair:
    """n2 has joined n1 through the name `seed`."""

    def __init__(self, network: Network, key: str, **settings: Any) -> None:
        self.network = network
        network.names["seed"] = ["10.0.0.1"]
        network.agent("n1", "10.0.0.1")
        self.agent, self.joining = network.agent(
            "n2", "10.0.0.2", retry_interval="10s", **{key: ["seed"], **settings}
        )
        started = begun(self.joining)
        network.run(1)
        assert started == [None]
        assert sees(self.agent) == {"n1": "alive", "n2": "alive"}
        network.looked_up.clear()

    def forget(self) -> None:
        """n1 is gone for so long that n2 knows nothing of it any more."""
        self.network.fail("10.0.0.1")
        self.network.run(120)
        assert sees(self.agent) == {"n2": "alive"}


@pytest.fixture(params=["start_join", "retry_join"])
def pair(network, request):
    return Pair(network, request.param)


def test_who_was_joined_once_is_found_again_after_an_outage_and_at_a_new_address(pair, caplog):
    pair.forget()
    pair.network.names["seed"] = ["10.0.0.3"]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        pair.network.run(30)
        assert caplog.messages == []
        pair.network.agent("n1", "10.0.0.3")
        pair.network.run(10)
    assert sees(pair.agent) == {"n1": "alive", "n2": "alive"}
    told = [record.getMessage() for record in caplog.records if record.name == "serfd.agent"]
    assert "found 1 members again through seed" in told


def test_while_others_live_the_names_are_looked_up_now_and_then_only(pair):
    pair.network.run(10 * LOOK_INTERVAL)
    assert 9 <= pair.network.looked_up["seed"] <= 11
    # n1 lives there: there is nobody to be found.
    assert pair.network.connected["10.0.0.1"] == 1


def test_a_name_that_leads_elsewhere_now_is_joined_although_others_live(pair):
    pair.network.agent("n3", "10.0.0.3")
    pair.network.names["seed"] = ["10.0.0.3"]
    pair.network.run(2 * LOOK_INTERVAL)
    assert sees(pair.agent) == {"n1": "alive", "n2": "alive", "n3": "alive"}


def test_a_name_that_leads_to_this_node_too_is_looked_for_elsewhere_only(pair):
    pair.forget()
    pair.network.names["seed"] = ["10.0.0.2", "10.0.0.3"]
    pair.network.connected.clear()
    pair.network.run(25)
    assert set(pair.network.connected) == {"10.0.0.3"}
    pair.network.names["seed"] = ["10.0.0.2"]
    pair.network.connected.clear()
    pair.network.run(25)
    assert not pair.network.connected
    assert pair.network.looked_up["seed"] >= 4


def test_a_name_that_is_gone_ends_nothing(pair):
    pair.forget()
    del pair.network.names["seed"]
    pair.network.run(60)
    pair.network.names["seed"] = ["10.0.0.1"]
    pair.network.agent("n1", "10.0.0.1")
    pair.network.run(10)
    assert sees(pair.agent) == {"n1": "alive", "n2": "alive"}


def test_nobody_is_looked_for_by_a_node_that_leaves(pair):
    pair.network.fail("10.0.0.1")
    left = pair.agent.leave()
    pair.network.run(2 * LOOK_INTERVAL)
    assert left.called
    assert pair.network.looked_up["seed"] == 0


def test_nobody_is_looked_for_after_a_stop(pair):
    pair.joining.stop()
    pair.network.fail("10.0.0.1")
    pair.network.run(2 * LOOK_INTERVAL)
    assert pair.network.looked_up["seed"] == 0


def test_a_node_that_leaves_before_somebody_answered_tries_no_more(network):
    agent, joining = network.agent("n2", "10.0.0.2", retry_join=["seed"], retry_interval="10s")
    started = begun(joining)
    network.run(1)
    agent.leave()
    network.run(60)
    assert started == [None]
    assert network.looked_up["seed"] == 1


def test_what_start_join_names_is_looked_for_while_retry_join_is_still_tried(network):
    pair = Pair(network, "start_join", retry_join=[])
    pair.joining.stop()
    network.fail("10.0.0.2")
    network.names["nobody"] = ["10.0.0.7"]
    agent, joining = network.agent(
        "n3", "10.0.0.3", start_join=["seed"], retry_join=["nobody"], retry_interval="10s"
    )
    begun(joining)
    network.run(1)
    network.fail("10.0.0.1")
    network.run(120)
    assert sees(agent) == {"n3": "alive"}
    network.agent("n1", "10.0.0.1")
    network.run(10)
    assert sees(agent) == {"n1": "alive", "n3": "alive"}


# mDNS


@pytest.mark.parametrize(
    "settings",
    [{"mdns": {"interface": "nope0"}}, {"interface": "nope0"}],
    ids=["[mdns]", "interface"],
)
def test_an_interface_for_mdns_that_does_not_exist_is_named_at_once(network, settings):
    with pytest.raises(ConfigError, match=r"^interface 'nope0' does not exist; there are "):
        network.agent("n1", "10.0.0.1", discover="clu", **settings)
