"""A network of a test's own: what is said there reaches nobody else."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

HOST = "10.9.0.1"
INTERFACE = "v0"
_NEW_NETWORK = 0x40000000
"""CLONE_NEWNET, see unshare(2)."""


def ip(arguments: str) -> None:
    """Run ip(8) in the network."""
    subprocess.run(["ip", *arguments.split()], check=True, timeout=60)


def add_interface() -> None:
    """An Ethernet link to nowhere, with an IPv4 and an IPv6 address, and a route for multicast."""
    ip(f"link add {INTERFACE} type veth peer name v1")
    # An interface of less than 1280 bytes has no IPv6: the other end is not to be chosen.
    ip("link set v1 mtu 1279 up")
    ip(f"link set {INTERFACE} addrgenmode none up")
    ip(f"addr add {HOST}/24 dev {INTERFACE}")
    # Without the search for duplicates it can be used at once.
    ip(f"-6 addr add fe80::1/64 dev {INTERFACE} nodad")
    ip(f"route add 224.0.0.0/4 dev {INTERFACE}")


@pytest.fixture
def own_network() -> Iterator[None]:
    """The test's thread, and the processes that it starts, are in a network of their own."""
    if shutil.which("ip") is None:
        pytest.skip("needs ip(8): apt-get install iproute2")
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if libc.unshare(_NEW_NETWORK):
            pytest.skip(f"may not make a network: {os.strerror(ctypes.get_errno())}")
        try:
            ip("link set lo up")
            try:
                add_interface()
            except subprocess.CalledProcessError as error:
                pytest.skip(f"the kernel makes no such network: {error}")
            yield
        finally:
            assert libc.setns(home, _NEW_NETWORK) == 0, os.strerror(ctypes.get_errno())
    finally:
        os.close(home)
