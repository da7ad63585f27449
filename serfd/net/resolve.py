"""Names to addresses, without blocking the reactor."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.error import ConnectError, ConnectionClosed
from twisted.internet.interfaces import (
    IAddress,
    IHostResolution,
    IReactorPluggableNameResolver,
    IResolutionReceiver,
)
from zope.interface import implementer

from serfd.config import split_address
from serfd.effects import Address

ADDRESSES_MAX = 256
"""A text stands for so many addresses at most; more answers are left out."""
SRV_TARGETS_MAX = 32
"""Names that are looked up of one SRV answer; more are left out."""
SRV_WAITS = (1, 2, 4)
"""Seconds that each name server has to answer, before the next is asked; again after each round."""
SRV_TIMEOUT = 15.0
"""Seconds for the whole lookup of an SRV name, all name servers together."""

_log = logging.getLogger("serfd.agent")
_RESOLV_CONF = Path("/etc/resolv.conf")
_DNS_PORT = 53


async def resolve(
    reactor: Any, text: str, *, default_port: int, servers: Sequence[tuple[str, int]] = ()
) -> list[Address]:
    """All addresses of `host`, `host:port`, `[v6]:port`, each also as `NAME/address`.

    A host whose first label starts with `_`, like `_serf._tcp.example.org`, is looked up as DNS SRV
    (RFC 2782): the addresses of its targets with their ports, those of the best priority first.
    `reactor` is also `IReactorPluggableNameResolver`. `servers`, addresses and ports, are asked for
    SRV; without any, those of the system.

    Raises ValueError: what is wrong with the text, or that the name does not resolve
    (gossip.md 11.1).
    """
    name, slash, rest = text.partition("/")
    if slash and not name:
        raise ValueError("empty node name provided")
    where = rest if slash else text
    host, port = split_address(where, default_port=default_port, key="address")
    if not host:
        raise ValueError(f"address {text!r} has no host")
    if not host.startswith("_"):
        return [Address(found, port) for found in await _addresses_of(reactor, host)]
    if host != where:
        raise ValueError(f"address {text!r} has a port, but the answer to an SRV name has its own")
    found: dict[Address, None] = {}
    for target, port in await _targets_of(reactor, host, servers or _system_servers()):
        try:
            addresses = await _addresses_of(reactor, target)
        except ValueError as error:
            _log.debug("of the targets of %s: %s", host, error)
            continue
        found |= dict.fromkeys(Address(address, port) for address in addresses)
    if not found:
        raise ValueError(f"lookup {host}: none of its targets has an address")
    return list(found)[:ADDRESSES_MAX]


async def _addresses_of(reactor: IReactorPluggableNameResolver, host: str) -> list[str]:
    """What the system's resolver says, each address once. Raises ValueError if that is nothing."""
    receiver = _Receiver()
    try:
        host.encode("idna")
    except UnicodeError:
        # It can be nobody's name, and Twisted's resolver would never answer.
        receiver.resolutionComplete()
    else:
        reactor.nameResolver.resolveHostName(receiver, host)
    found = await receiver.done
    if not found:
        raise ValueError(f"lookup {host}: no such host")
    return found[:ADDRESSES_MAX]


async def _targets_of(
    reactor: Any, name: str, servers: Sequence[tuple[str, int]]
) -> list[tuple[str, int]]:
    """Names and ports an SRV name stands for, in order; at least one. Raises ValueError."""
    # Only here: who does not use it saves the memory.
    from twisted.names import dns
    from twisted.names.client import Resolver
    from twisted.names.error import DNSNameError, DomainError

    resolver = Resolver(servers=list(servers), timeout=SRV_WAITS, reactor=reactor)
    try:
        name.encode("idna")
        looking = resolver.lookupService(name).addTimeout(SRV_TIMEOUT, reactor)
        answers, _, _ = await looking
    except (UnicodeError, DNSNameError):
        answers = []
    except DomainError:
        raise ValueError(f"lookup {name}: server misbehaving") from None
    except TimeoutError:
        raise ValueError(f"lookup {name}: i/o timeout") from None
    except (OSError, ConnectError, ConnectionClosed) as error:
        raise ValueError(f"lookup {name}: {error}") from None
    finally:
        for connection in resolver.connections:
            connection.transport.loseConnection()
    records = [answer.payload for answer in answers if answer.type == dns.SRV]
    # Of one priority the heavier first: there is no load to be spread, all of them are joined.
    records.sort(key=lambda record: (record.priority, -record.weight))
    targets = [
        (record.target.name.decode("ascii", "replace"), record.port)
        for record in records
        if record.target.name and record.port
    ]
    if not targets:
        raise ValueError(f"lookup {name}: no such host")
    return targets[:SRV_TARGETS_MAX]


def _system_servers() -> list[tuple[str, int]]:
    """The name servers of resolv.conf(5); as there, without any it is this host."""
    try:
        lines = _RESOLV_CONF.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    words = [line.split() for line in lines]
    found = [(line[1], _DNS_PORT) for line in words if line[0:1] == ["nameserver"] and line[1:]]
    return found or [("127.0.0.1", _DNS_PORT)]


@implementer(IResolutionReceiver)
class _Receiver:
    def __init__(self) -> None:
        self.done: Deferred[list[str]] = Deferred()
        self._hosts: dict[str, None] = {}

    def resolutionBegan(self, resolutionInProgress: IHostResolution) -> None:
        """Part of Twisted's interface; there is nothing to do yet."""

    def addressResolved(self, address: IAddress) -> None:
        """One address was found."""
        found: Any = address
        self._hosts[found.host] = None

    def resolutionComplete(self) -> None:
        """All were found."""
        self.done.callback(list(self._hosts))
