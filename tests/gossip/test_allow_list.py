"""Which addresses are in the networks of members."""

from ipaddress import ip_address

import pytest

from serfd.config import parse_networks
from serfd.gossip.allow_list import AllowList

LIST = AllowList(parse_networks(["10.0.0.0/8", "fd00::/8"], key="cidrs_allowed"))


@pytest.mark.parametrize(
    ("address", "refusal"),
    [
        ("10.255.0.1", None),
        ("::ffff:10.0.0.1", None),
        ("fd12::1", None),
        ("11.0.0.1", "11.0.0.1 is in none of cidrs_allowed"),
        ("::ffff:11.0.0.1", "11.0.0.1 is in none of cidrs_allowed"),
        ("fe80::1%eth0", "fe80::1%eth0 is in none of cidrs_allowed"),
    ],
)
def test_an_address_is_let_in_as_text_and_as_bytes(address: str, refusal: str | None) -> None:
    assert LIST.refusal(address) == refusal
    if "%" not in address:
        assert LIST.refusal(ip_address(address).packed) == refusal


@pytest.mark.parametrize("address", [b"", b"abc", "", "somewhere"])
def test_what_is_no_address_is_not_let_in(address: bytes | str) -> None:
    assert LIST.refusal(address) == f"{address!r} is no address"


@pytest.mark.parametrize("address", ["11.0.0.1", "fe80::1", b"abc"])
def test_without_networks_everybody_is_let_in(address: bytes | str) -> None:
    assert AllowList().refusal(address) is None
