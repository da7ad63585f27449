"""The host's own addresses: which one to tell others (gossip.md 13.1)."""

import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

from serfd.errors import ConfigError

_SIOCGIFADDR = 0x8915
_IF_INET6 = Path("/proc/net/if_inet6")
_ROUTE = Path("/proc/net/route")

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

# The blocks of RFC 6890 that a private network may use, as real agents take them.
_PRIVATE = [
    ipaddress.ip_network(block)
    for block in (
        "10.0.0.0/8",
        "100.64.0.0/10",
        "172.16.0.0/12",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "fc00::/7",
        "64:ff9b::/96",
        "2002::/16",
    )
]


def addresses_of(interface: str) -> list[IPAddress]:
    """Its IPv4 address and its IPv6 addresses; an interface without any gives none."""
    found: list[IPAddress] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", interface.encode()[:15])
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
        except OSError:
            answer = b""  # the interface has no IPv4 address
        if answer:
            found.append(ipaddress.IPv4Address(answer[20:24]))
    if _IF_INET6.exists():
        for line in _IF_INET6.read_text().splitlines():
            digits, *_, name = line.split()
            if name == interface:
                found.append(ipaddress.IPv6Address(bytes.fromhex(digits)))
    return found


def check_interface(interface: str) -> None:
    """Raises ConfigError if there is none of this name."""
    names = [name for _, name in socket.if_nameindex()]
    if interface not in names:
        raise ConfigError(f"interface {interface!r} does not exist; there are {', '.join(names)}")


def interface_address(interface: str) -> str:
    """The first address of an interface that is not link-local. Raises ConfigError."""
    check_interface(interface)
    for address in addresses_of(interface):
        if not address.is_link_local:
            return str(address)
    raise ConfigError(f"interface {interface!r} has no usable address")


def private_address() -> str:
    """The address others can reach this host by: the first private one.

    That of the default route's interface comes first, IPv4 before IPv6. Raises ConfigError.
    """
    first = _default_route_interfaces()
    names = sorted((name for _, name in socket.if_nameindex()), key=lambda name: name not in first)
    candidates = [address for name in names for address in addresses_of(name)]
    for version in (4, 6):
        for address in candidates:
            if address.version == version and any(address in block for block in _PRIVATE):
                return str(address)
    raise ConfigError(
        "no private IP address found to advertise: set `advertise` (--advertise) or bind to an "
        "address of this host"
    )


def _default_route_interfaces() -> set[str]:
    if not _ROUTE.exists():
        return set()
    rows = [line.split() for line in _ROUTE.read_text().splitlines()[1:]]
    return {name for name, destination, *_ in rows if int(destination, 16) == 0}
