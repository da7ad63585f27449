"""Real Serf agents and ours find each other by mDNS, in a network of their own."""

import socket
from functools import partial
from itertools import permutations

import pytest
from own_network import HOST, INTERFACE, own_network
from processes import SERFD, AgentProcess, Agents, Kind, everyone_sees, run, until

pytestmark = pytest.mark.interop

__all__ = ["own_network"]


@pytest.fixture
def discovering(own_network, agents):
    """Starts an agent that looks for others; nobody tells it of any."""
    return lambda kind, name, *options: _start(agents, kind, name, "-discover=clu", *options)


def _start(agents: Agents, kind: Kind, name: str, *options: str) -> AgentProcess:
    return agents.start(kind, name, *options, host=HOST)


def joined(agent: AgentProcess) -> list[str]:
    """What it says that it has joined by mDNS."""
    return [line for line in agent.log().splitlines() if "[INFO] agent.mdns: Joined" in line]


@pytest.mark.parametrize("kinds", sorted(set(permutations(["serf", "serfd", "serfd"]))))
def test_whoever_comes_later_finds_those_who_are_there(discovering, kinds):
    first, *others = kinds
    all_agents = [discovering(first, "first")]
    for number, kind in enumerate(others):
        newest = discovering(kind, f"{kind}-{number}")
        all_agents.append(newest)
        everyone_sees(all_agents, {agent.name: "alive" for agent in all_agents})
        # Those who were there ask again in a minute only.
        until(f"{newest.name} has joined by mDNS", partial(joined, newest))


@pytest.mark.parametrize(
    "options",
    [
        ("-mdns-disable-ipv6",),
        ("-mdns-disable-ipv4",),
        (f"-mdns-iface={INTERFACE}",),
        (f"-mdns-iface={INTERFACE}", "-mdns-disable-ipv4"),
        (f"-iface={INTERFACE}", "-bind=0.0.0.0:0"),
    ],
    ids=" ".join,
)
def test_by_either_protocol_and_on_one_interface(discovering, options):
    pair = [discovering("serf", "real"), discovering("serfd", "ours", *options)]
    everyone_sees(pair, {"real": "alive", "ours": "alive"})
    pair.append(discovering("serf", "real-2"))
    everyone_sees(pair, dict.fromkeys(("real", "ours", "real-2"), "alive"))


def test_another_name_is_another_cluster(own_network, agents):
    one = _start(agents, "serfd", "one", "-discover=clu")
    other = _start(agents, "serfd", "other", "-discover=clu-2")
    third = _start(agents, "serfd", "third", "-discover=clu")
    everyone_sees([one, third], {"one": "alive", "third": "alive"})
    everyone_sees([other], {"other": "alive"})
    assert "mDNS cluster: 'clu-2'" in other.log()


def test_a_port_that_others_do_not_share_is_told_at_the_start(own_network):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as selfish:
        selfish.bind(("", 5353))
        done = run(SERFD, "-discover=clu", f"-bind={HOST}:0", "-rpc-addr=127.0.0.1:0")
    assert done.returncode == 2
    assert "serfd: cannot listen on 224.0.0.251 port 5353 (UDP, discover): another" in done.stderr
