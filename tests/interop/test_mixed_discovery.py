"""Real Serf agents and ours find each other by mDNS, in a network of their own."""

import re
import socket
import subprocess
from functools import partial
from itertools import permutations

import pytest
from own_network import HOST, INTERFACE, own_network
from processes import SERFD, AgentProcess, Agents, Kind, everyone_sees, run, until_is

pytestmark = pytest.mark.interop

__all__ = ["own_network"]


@pytest.fixture
def discovering(own_network, agents):
    """Starts an agent that looks for others; nobody tells it of any."""
    return lambda kind, name, *options: _start(agents, kind, name, "-discover=clu", *options)


def _start(agents: Agents, kind: Kind, name: str, *options: str) -> AgentProcess:
    return agents.start(kind, name, *options, host=HOST)


def joined(agent: AgentProcess) -> int:
    """How many it says that it has joined by mDNS."""
    return sum(map(int, re.findall(r"\[INFO\] agent\.mdns: Joined (\d+) hosts", agent.log())))


@pytest.mark.parametrize("kinds", sorted(set(permutations(["serf", "serfd", "serfd"]))))
def test_whoever_comes_later_finds_those_who_are_there(discovering, kinds):
    first, *others = kinds
    all_agents = [discovering(first, "first")]
    for number, kind in enumerate(others):
        newest = discovering(kind, f"{kind}-{number}")
        all_agents.append(newest)
        everyone_sees(all_agents, {agent.name: "alive" for agent in all_agents})
        # Those who were there ask again in a minute only. A real agent joins itself, too.
        found = len(all_agents) - (kind == "serfd")
        until_is(f"what {newest.name} has joined", partial(joined, newest), found)


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


def memberships() -> set[tuple[str, str]]:
    """The groups of mDNS that somebody here is a member of, each with its interface."""
    shown = subprocess.run(["ip", "maddr"], capture_output=True, text=True, check=True).stdout
    found: set[tuple[str, str]] = set()
    interface = ""
    for words in map(str.split, shown.splitlines()):
        if words[0].endswith(":"):
            interface = words[1]
        elif words[1] in ("224.0.0.251", "ff02::fb"):
            found.add((words[0], interface))
    return found


@pytest.mark.parametrize(
    ("options", "used"),
    [
        ((), {("inet", INTERFACE), ("inet6", INTERFACE)}),
        (("-mdns-disable-ipv4",), {("inet6", INTERFACE)}),
        (("-mdns-disable-ipv6",), {("inet", INTERFACE)}),
        (("-mdns-iface=lo",), {("inet", "lo"), ("inet6", "lo")}),
        (("-iface=lo", "-bind=0.0.0.0:0"), {("inet", "lo"), ("inet6", "lo")}),
        (("-iface=lo", "-bind=0.0.0.0:0", f"-mdns-iface={INTERFACE}", "-mdns-disable-ipv6"),
         {("inet", INTERFACE)}),
    ],
)  # fmt: skip
def test_it_listens_where_it_is_told_to(discovering, options, used):
    discovering("serfd", "one", *options)
    assert memberships() == used


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
