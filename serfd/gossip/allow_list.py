"""Which addresses members may have (gossip.md 5.8)."""

from collections.abc import Sequence
from ipaddress import IPv6Address, ip_address

from serfd.config import Network


class AllowList:
    """The networks of those who are let in. Without any, everybody is."""

    def __init__(self, networks: Sequence[Network] = ()) -> None:
        """`networks`: IPv4 ones in IPv4 form."""
        self._networks = tuple(networks)

    def refusal(self, address: bytes | str) -> str | None:
        """Why who has this address is not let in, or None. 4 or 16 bytes, or a socket's text."""
        if not self._networks:
            return None
        try:
            ip = ip_address(address)
        except ValueError:
            return f"{address!r} is no address"
        if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        if any(ip in network for network in self._networks):
            return None
        return f"{ip} is in none of cidrs_allowed"
