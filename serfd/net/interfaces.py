"""The host's own addresses: which one to tell others (gossip.md 13.1)."""

import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from serfd.errors import ConfigError

_ROUTE = Path("/proc/net/route")

# netlink(7), rtnetlink(7): the header of a message, and of an attribute.
_MESSAGE = struct.Struct("=LHHLL")
_ATTRIBUTE = struct.Struct("=HH")
_LINK = struct.Struct("=BxHiLL")
_ADDRESS = struct.Struct("=BBBBL")
_ERROR, _DONE = 2, 3
_GET_LINKS, _GET_ADDRESSES = 18, 22
_DUMP = 0x301
"""NLM_F_REQUEST and NLM_F_DUMP: all there are."""
_ANSWER_MAX = 1 << 16
"""Bytes; the kernel makes pieces of 32 KiB at most."""
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_IFF_UP = 1

IPAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
IPInterface: TypeAlias = ipaddress.IPv4Interface | ipaddress.IPv6Interface
IPNetwork: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

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
        "64:ff9b::/96",
        "100::/64",
        "2001::/16",
        "2002::/16",
        "fc00::/7",
    )
]
_NOT_FORWARDED = [ipaddress.ip_network(block) for block in ("2001:db8::/32", "2001:10::/28")]
"""Parts of them that lead nowhere."""


def addresses_of(interface: str) -> list[IPAddress]:
    """All its addresses, IPv4 first, whether it is up or down; none if there is no such interface.

    Raises ConfigError if the system does not tell.
    """
    indexes = [index for index, name in socket.if_nameindex() if name == interface]
    return [address.ip for index, address in _addresses() if index in indexes]


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
    """The address others can reach this host by: the first private one of interfaces that are up.

    That of the default route's interface comes first, then IPv4 before IPv6, then the larger
    network. Raises ConfigError.
    """
    up, first = _indexes_up(), _default_route_index()
    found = [
        (index != first, address.version, address.network.prefixlen, address.ip)
        for index, address in _addresses()
        if index in up and _is_private(address.network)
    ]
    if not found:
        raise ConfigError(
            "no private IP address found to advertise: set `advertise` (--advertise) or bind to an "
            "address of this host"
        )
    # Of equals the first: the system's order.
    return str(min(found, key=lambda candidate: candidate[:3])[3])


def _is_private(network: IPNetwork) -> bool:
    """As real agents have it, the whole network must be."""
    return _is_within(network, _PRIVATE) and not _is_within(network, _NOT_FORWARDED)


def _is_within(network: IPNetwork, blocks: list[IPNetwork]) -> bool:
    return any(
        network.version == block.version and network.subnet_of(block)  # type: ignore[arg-type]
        for block in blocks
    )


def _default_route_index() -> int:
    """The number of the interface by which the whole world is reached; 0 if there is none."""
    if not _ROUTE.exists():
        return 0
    rows = [line.split() for line in _ROUTE.read_text().splitlines()[1:]]
    defaults = [(int(row[6]), row[0]) for row in rows if row[1] == row[7] == "00000000"]
    _, name = min(defaults, default=(0, ""))
    return next((index for index, each in socket.if_nameindex() if each == name), 0)


# What the kernel tells.


def _indexes_up() -> set[int]:
    """The numbers of the interfaces that are up."""
    links = [_LINK.unpack_from(answer) for answer in _ask(_GET_LINKS)]
    return {index for _, _, index, flags, _ in links if flags & _IFF_UP}


def _addresses() -> list[tuple[int, IPInterface]]:
    """Every address of every interface, by the interface's number; IPv4 first."""
    found: list[tuple[int, IPInterface]] = []
    for answer in _ask(_GET_ADDRESSES):
        _, prefix, _, _, index = _ADDRESS.unpack_from(answer)
        values = _attributes(answer[_ADDRESS.size :])
        # Of a point-to-point link, the other one is the far end's.
        packed = values.get(_IFA_LOCAL) or values[_IFA_ADDRESS]
        found.append((index, ipaddress.ip_interface((packed, prefix))))
    return found


def _attributes(rest: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while rest:
        size, kind = _ATTRIBUTE.unpack_from(rest)
        found[kind] = rest[_ATTRIBUTE.size : size]
        rest = rest[_aligned(size) :]
    return found


def _ask(kind: int) -> Iterator[bytes]:
    """The answers to a request for all there are of a kind, without headers. Raises ConfigError."""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
            size = _MESSAGE.size + _LINK.size
            kernel.send(_MESSAGE.pack(size, kind, _DUMP, 0, 0) + bytes(_LINK.size))
            while True:
                rest = kernel.recv(_ANSWER_MAX)
                while rest:
                    size, what, *_ = _MESSAGE.unpack_from(rest)
                    body, rest = rest[_MESSAGE.size : size], rest[_aligned(size) :]
                    if what == _DONE:
                        return
                    if what == _ERROR:
                        (number,) = struct.unpack_from("=i", body)
                        raise OSError(-number, os.strerror(-number))
                    yield body
    except OSError as error:
        raise ConfigError(f"the system does not tell its addresses: {error.strerror}") from None


def _aligned(size: int) -> int:
    return size + 3 & ~3
