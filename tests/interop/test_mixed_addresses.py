"""Where agents listen, and what address they tell others: as real ones, in a network of its own."""

import socket
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from own_network import INTERFACE, ip, own_network
from processes import LIMIT, Kind, everyone_sees, until

pytestmark = pytest.mark.interop

__all__ = ["own_network"]

RPC = "127.0.0.1:7373"
KINDS = pytest.mark.parametrize("kind", ["serf", "serfd"])
by_name = partial(
    pytest.param,
    marks=pytest.mark.skipif(
        not Path("/etc/services").exists(), reason="no services: apt-get install netbase"
    ),
)


@pytest.fixture
def launched(own_network, agents):
    """Starts an agent with options that say where it listens, RPC not at its usual place included.

    The host has the addresses that are given, and loopback's.
    """
    ip(f"addr flush dev {INTERFACE}")

    def launch(kind: Kind, addresses: Sequence[str], *options: str, rpc: str = RPC):
        for address in addresses:
            ip(f"addr add {address} dev {INTERFACE} {'nodad' if ':' in address else ''}")
        agent = agents.prepare(kind, "told", *options)
        agent.launch("0.0.0.0", RPC)
        agent.rpc_addr = rpc
        until("it answers", agent.answers)
        return agent

    return launch


@KINDS
@pytest.mark.parametrize(
    ("addresses", "options", "told"),
    [
        (["fd00::7/64"], [], "[fd00::7]:7946"),
        (["fd00::7/64", "10.5.0.1/16"], [], "10.5.0.1:7946"),
        (["10.6.0.1/24", "10.5.0.1/16"], [], "10.5.0.1:7946"),
        (["10.6.0.1/24", "10.5.0.1/16"], [f"-iface={INTERFACE}"], "10.6.0.1:7946"),
        (["10.6.0.1/24", "10.5.0.1/16"], [f"-iface={INTERFACE}", "-bind=10.5.0.1"],
         "10.5.0.1:7946"),
        (["100::5/64"], [], "[100::5]:7946"),
        by_name([], ["-bind=127.0.0.1:http-alt"], "127.0.0.1:8080"),
        by_name([], ["-bind=127.0.0.1:7000", "-advertise=127.0.0.1:HTTPS"], "127.0.0.1:443"),
    ],
)  # fmt: skip
def test_both_kinds_tell_others_the_same_address(launched, kind, addresses, options, told):
    agent = launched(kind, addresses, *options)
    assert agent.members()["told"].address == told


def reached(port: int) -> set[str]:
    """By which addresses of this host somebody can connect."""
    found = set()
    for host in ("127.0.0.1", "::1", "10.5.0.1", "fd00::7"):
        try:
            socket.create_connection((host, port), timeout=10).close()
        except ConnectionRefusedError:
            continue
        found.add(host)
    return found


@KINDS
@pytest.mark.parametrize(
    ("options", "rpc", "port"),
    [
        ([], RPC, 7946),
        (["-bind=:7000"], RPC, 7000),
        (["-rpc-addr=:7374"], "127.0.0.1:7374", 7374),
        (["-rpc-addr=0.0.0.0:7374"], "127.0.0.1:7374", 7374),
        by_name(["-rpc-addr=0.0.0.0:http-alt"], "127.0.0.1:8080", 8080),
    ],
)
def test_both_kinds_listen_on_all_addresses_unless_told_otherwise(
    launched, kind, options, rpc, port
):
    launched(kind, ["10.5.0.1/16", "fd00::7/64"], *options, rpc=rpc)
    assert reached(port) == {"127.0.0.1", "::1", "10.5.0.1", "fd00::7"}


def test_they_find_each_other_where_there_is_ipv6_alone(launched, agents):
    first = launched("serf", ["fd00::7/64"])
    second = agents.prepare("serfd", "second")
    second.launch("0.0.0.0:7000", "127.0.0.1:7374")
    until("it answers", second.answers)
    with second.client() as client:
        assert client.join(["[fd00::7]:7946"]) == 1
    everyone_sees([first, second], {"told": "alive", "second": "alive"})
    for agent in (first, second):
        with agent.client() as client:
            # Question and acks are packets.
            answers = client.query("anybody", want_ack=True, timeout=LIMIT)
            acks = {next(answers)["From"] for _ in range(2)}
        assert acks == {"told", "second"}
