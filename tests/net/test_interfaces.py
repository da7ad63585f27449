"""The host's own addresses, as this host has them."""

import ipaddress
import socket

import pytest

from serfd.errors import ConfigError
from serfd.net.interfaces import addresses_of, interface_address, private_address

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


def test_the_address_for_others_is_private_of_this_host_and_ipv4_if_it_can_be():
    private = [
        str(address)
        for name in NAMES
        for address in addresses_of(name)
        if any(address in block for block in PRIVATE)
    ]
    if private:
        found = private_address()
        assert is_here(found)
        assert ":" not in found or all(":" in each for each in private)
    else:
        with pytest.raises(ConfigError, match="no private IP address found to advertise"):
            private_address()
