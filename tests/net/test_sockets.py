"""Sockets bound before anything is started on them."""

import socket

import pytest

from serfd.errors import ConfigError
from serfd.net.sockets import bind_gossip, bind_rpc, resolve_host

HOST = "127.0.0.1"


def ports(*bound: socket.socket) -> list[int]:
    """Their ports; they are closed."""
    found = [each.getsockname()[1] for each in bound]
    for each in bound:
        each.close()
    return found


def test_gossip_gets_one_port_for_both_kinds():
    tcp, udp = bind_gossip(HOST, 0)
    assert (tcp.type, udp.type) == (socket.SOCK_STREAM, socket.SOCK_DGRAM)
    assert not tcp.getblocking()
    assert not udp.getblocking()
    with socket.create_connection(tcp.getsockname(), timeout=10):
        pass  # it listens
    # As much as a burst needs, or as much as the system gives.
    assert udp.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) >= 128 * 1024
    one, same = ports(tcp, udp)
    assert one == same != 0


def test_a_port_that_is_given_is_taken(port):
    assert ports(*bind_gossip(HOST, port)) == [port, port]


@pytest.mark.parametrize("host", ["::1", "::"])
def test_ipv6_works_and_the_wildcard_takes_ipv4_too(host):
    if not socket.has_ipv6:
        pytest.skip("this system has no IPv6")
    tcp, udp = bind_gossip(host, 0)
    port = tcp.getsockname()[1]
    with socket.create_connection((HOST if host == "::" else host, port), timeout=10):
        pass
    ports(tcp, udp)


@pytest.mark.parametrize(
    ("kind", "name"), [(socket.SOCK_STREAM, "TCP"), (socket.SOCK_DGRAM, "UDP")], ids=["TCP", "UDP"]
)
def test_a_gossip_port_that_is_taken_is_named_and_nothing_stays_open(port, kind, name):
    with socket.socket(socket.AF_INET, kind) as taken:
        taken.bind((HOST, port))
        with pytest.raises(ConfigError) as failed:
            bind_gossip(HOST, port)
    assert str(failed.value) == (
        f"cannot listen on {HOST}:{port} ({name}, bind): Address already in use; "
        "another agent may run there"
    )
    ports(*bind_gossip(HOST, port))


def test_an_rpc_port_that_is_taken_is_named():
    with bind_rpc(HOST, 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127.0.0.1:{port} \(TCP, rpc_addr\): Address alr"):
            bind_rpc(HOST, port)


@pytest.mark.parametrize("host", ["198.51.100.7", "2001:db8::1"])
def test_an_address_that_is_not_of_this_host_is_named(host):
    shown = f"[{host}]" if ":" in host else host
    with pytest.raises(ConfigError) as failed:
        bind_gossip(host, 7946)
    assert str(failed.value).startswith(f"cannot listen on {shown}:7946 (TCP, bind): ")


def test_a_port_can_be_taken_again_at_once_after_connections(port):
    address = (HOST, port)
    tcp, udp = bind_gossip(*address)
    with socket.create_connection(address, timeout=10):
        tcp.setblocking(True)
        accepted, _ = tcp.accept()
        accepted.close()  # this end closes first and stays in TIME_WAIT
    ports(tcp, udp)
    assert ports(*bind_gossip(*address)) == [port, port]


@pytest.mark.parametrize(
    ("host", "found"), [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("127.0.0.9", "127.0.0.9")]
)
def test_addresses_stay_as_they_are(host, found):
    assert resolve_host("bind", host) == found


def test_a_name_is_looked_up():
    assert resolve_host("bind", "localhost") in ("127.0.0.1", "::1")


def test_a_name_that_nobody_knows_is_named_with_its_setting():
    with pytest.raises(ConfigError, match=r"^advertise: cannot resolve 'nobody\.invalid': "):
        resolve_host("advertise", "nobody.invalid")
