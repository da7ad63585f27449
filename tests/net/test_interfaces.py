"""The host's own addresses, as this host has them."""

import ipaddress
import resource
import socket

import pytest
from own_network import INTERFACE, ip, own_network

from serfd.errors import ConfigError
from serfd.net.interfaces import addresses_of, interface_address, private_address

__all__ = ["own_network"]

# What every host that has a private address has it of, but for rare ones.
PRIVATE = [
    ipaddress.ip_network(block)
    for block in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")
]
NAMES = [name for _, name in socket.if_nameindex()]


def is_here(address: object) -> bool:
    """Whether a socket can be bound to it, which the system allows for own addresses only."""
    family = socket.AF_INET6 if ":" in str(address) else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError:
            return False
        return True


def test_loopback_has_its_address():
    assert ipaddress.IPv4Address("127.0.0.1") in addresses_of("lo")
    assert interface_address("lo") == "127.0.0.1"


@pytest.mark.parametrize("name", NAMES)
def test_an_interfaces_addresses_are_of_this_host(name):
    for address in addresses_of(name):
        assert address.is_link_local or is_here(address)


def test_an_interface_that_does_not_exist_has_none_and_is_told_with_those_that_do():
    assert addresses_of("nope0") == []
    with pytest.raises(ConfigError) as failed:
        interface_address("nope0")
    assert str(failed.value) == f"interface 'nope0' does not exist; there are {', '.join(NAMES)}"


def test_an_interface_without_an_address_is_told():
    empty = [name for name in NAMES if not addresses_of(name)]
    if not empty:
        pytest.skip("every interface of this host has an address")
    with pytest.raises(ConfigError, match=f"interface '{empty[0]}' has no usable address"):
        interface_address(empty[0])


def test_the_address_for_others_is_private_of_this_host():
    if any(a in block for name in NAMES for a in addresses_of(name) for block in PRIVATE):
        assert is_here(private_address())
    else:
        with pytest.raises(ConfigError, match="no private IP address found to advertise"):
            private_address()


# In a network of the test's own.


@pytest.fixture
def links(own_network):
    """The interface v0, without addresses, and another one that is up, w0."""
    ip(f"addr flush dev {INTERFACE}")
    ip("link add w0 type veth peer name w1")
    ip("link set w1 mtu 1279 up")
    ip("link set w0 addrgenmode none up")


def have(*addresses: str) -> None:
    """Add addresses, as `10.0.0.1/8 v0`."""
    for address, interface in map(str.split, addresses):
        family, at_once = ("-6", "nodad") if ":" in address else ("-4", "")
        ip(f"{family} addr add {address} dev {interface} {at_once}")


def test_every_address_of_an_interface_is_seen_and_ipv4_comes_first(links):
    have("fe80::7/64 v0", "10.5.0.1/16 v0", "10.6.0.1/24 v0", "fd00::7/64 v0", "10.7.0.1/24 w0")
    assert set(map(str, addresses_of("v0"))) == {"10.5.0.1", "10.6.0.1", "fe80::7", "fd00::7"}
    assert list(map(str, addresses_of("v0")[:2])) == ["10.5.0.1", "10.6.0.1"]
    assert interface_address("v0") == "10.5.0.1"


def test_of_a_link_from_point_to_point_the_near_end_is_seen(links):
    ip("addr add 10.0.0.5 peer 10.0.0.6/32 dev v0")
    assert list(map(str, addresses_of("v0"))) == ["10.0.0.5"]


def test_an_interface_that_is_down_has_its_addresses_but_others_cannot_use_them(links):
    have("10.5.0.1/16 v0")
    ip("link set v0 down")
    assert interface_address("v0") == "10.5.0.1"
    with pytest.raises(ConfigError, match="no private IP address found to advertise"):
        private_address()
    have("10.6.0.1/24 w0")
    assert private_address() == "10.6.0.1"


def test_hundreds_of_addresses_are_seen(links):
    have(*[f"10.5.{number}.1/24 v0" for number in range(250)])
    assert len(addresses_of("v0")) == 250


# Each was tried with a real agent.
@pytest.mark.parametrize(
    ("addresses", "gateway", "found"),
    [
        (["10.5.0.1/16 v0"], "", "10.5.0.1"),
        (["8.8.8.1/24 v0", "10.5.0.1/16 v0"], "", "10.5.0.1"),
        (["fd00::7/64 v0"], "", "fd00::7"),
        (["fd00::7/64 v0", "10.5.0.1/16 w0"], "", "10.5.0.1"),
        (["100.64.0.1/24 v0"], "", "100.64.0.1"),
        (["100::5/64 v0"], "", "100::5"),
        (["2001:0:1::5/64 v0"], "", "2001:0:1::5"),
        (["2001:db8::5/64 v0"], "", ""),
        (["2001:10::5/64 v0"], "", ""),
        (["8.8.8.1/24 v0", "169.254.1.1/16 v0", "192.0.0.9/24 w0", "fe80::7/64 v0"], "", ""),
        # The larger network first, on one interface and on two.
        (["10.6.0.1/24 v0", "10.5.0.1/16 v0"], "", "10.5.0.1"),
        (["10.6.0.1/24 v0", "10.5.0.1/16 w0"], "", "10.5.0.1"),
        (["10.6.0.1/24 v0", "10.5.0.1/24 v0"], "", "10.6.0.1"),
        # But not one that is more than private.
        (["192.168.7.1/8 v0", "10.6.0.1/24 v0"], "", "10.6.0.1"),
        (["192.168.7.1/8 v0"], "", ""),
        # The interface of the default route before all.
        (["10.6.0.1/24 v0", "10.5.0.1/16 w0"], "10.6.0.254", "10.6.0.1"),
        (["10.6.0.1/24 v0", "8.8.8.1/24 w0", "fd00::8/64 w0"], "8.8.8.2", "fd00::8"),
        (["10.6.0.1/24 v0", "8.8.8.1/24 w0"], "8.8.8.2", "10.6.0.1"),
    ],
)
def test_the_address_for_others_is_the_first_by_route_then_version_then_network(
    links, addresses, gateway, found
):
    have(*addresses)
    if gateway:
        ip(f"route add default via {gateway}")
    if found:
        assert private_address() == found
    else:
        with pytest.raises(ConfigError, match="no private IP address found to advertise"):
            private_address()


def test_of_several_default_routes_the_one_with_the_lowest_metric_counts(links):
    have("10.6.0.1/24 v0", "10.5.0.1/24 w0")
    ip("route add default via 10.6.0.254 metric 50")
    ip("route add default via 10.5.0.254 metric 5")
    # A network of its own that begins with zeros is no default.
    ip("route add 0.0.0.0/1 via 10.6.0.254")
    assert private_address() == "10.5.0.1"


def test_a_system_that_does_not_tell_is_named_and_not_guessed_at():
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limit[1]))
    try:
        with pytest.raises(ConfigError) as failed:
            private_address()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert str(failed.value) == "the system does not tell its addresses: Too many open files"
