"""Names to addresses, without blocking the reactor."""

from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import (
    IAddress,
    IHostResolution,
    IReactorPluggableNameResolver,
    IResolutionReceiver,
)
from zope.interface import implementer

from serfd.config import split_address
from serfd.effects import Address


async def resolve(
    reactor: IReactorPluggableNameResolver, text: str, *, default_port: int
) -> list[Address]:
    """All addresses of `host`, `host:port`, `[v6]:port`, each also as `NAME/address`.

    Raises ValueError: what is wrong with the text, or that the name does not resolve
    (gossip.md 11.1).
    """
    name, slash, rest = text.partition("/")
    if slash and not name:
        raise ValueError("empty node name provided")
    host, port = split_address(rest if slash else text, default_port=default_port, key="address")
    if not host:
        raise ValueError(f"address {text!r} has no host")
    receiver = _Receiver()
    reactor.nameResolver.resolveHostName(receiver, host)
    hosts = await receiver.done
    if not hosts:
        raise ValueError(f"lookup {host}: no such host")
    return [Address(found, port) for found in hosts]


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
