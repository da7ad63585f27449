"""How this node finds others: at start, and ever after."""

import logging
import socket
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from serfd.agent import Agent
from serfd.config import Config
from serfd.effects import Address
from serfd.errors import CommandError, ConfigError
from serfd.net.interfaces import check_interface
from serfd.serf.events import Member, Status

if TYPE_CHECKING:
    from serfd.net.mdns import Mdns

SHORTEST_WAIT = 1.0
"""Seconds; a shorter retry_interval is raised to it, as Serf does."""
LOOK_INTERVAL = 300.0
"""Seconds between two looks whether those of start_join and retry_join are still members."""

_log = logging.getLogger("serfd.agent")
_mdns_log = logging.getLogger("serfd.agent.mdns")


class Joining:
    """Joins whom the configuration names, and those that mDNS finds."""

    def __init__(self, agent: Agent, config: Config, reactor: Any, *, rng: Random) -> None:
        """Raises ConfigError if the network interface for mDNS does not exist."""
        self._agent = agent
        self._config = config
        self._reactor = reactor
        self._rng = rng
        self._wait = max(config.retry_interval, SHORTEST_WAIT)
        self._targets: list[str] = []
        """Texts of joins that somebody has answered."""
        self._mdns: Mdns | None = None
        self._is_stopped = False
        # What runs in the background; kept, so that each is seen to have its failures handled.
        self._looking: Deferred[None] | None = None
        self._contacting: Deferred[None]
        self._mdns_interface = config.mdns.interface or config.interface
        if config.discover and self._mdns_interface:
            check_interface(self._mdns_interface)

    def listen(self) -> None:
        """With `discover`, answer others that ask by mDNS. Raises ConfigError if it cannot."""
        config = self._config
        if not config.discover:
            return
        from serfd.net.mdns import Mdns, Service

        me = self._me()
        families = {
            socket.AF_INET: config.mdns.disable_ipv4,
            socket.AF_INET6: config.mdns.disable_ipv6,
        }
        self._mdns = Mdns(
            self._reactor,
            Service(
                config.discover, node=me.name, host=socket.gethostname(), addr=me.addr, port=me.port
            ),
            families=[family for family, is_disabled in families.items() if not is_disabled],
            interface=self._mdns_interface,
            known=lambda: self._others() | {_address(self._me())},
            found=self._found,
            rng=self._rng,
        )
        self._mdns.listen()

    async def at_start(self) -> None:
        """Join start_join, and ask by mDNS. Raises JoinFailed if nobody of start_join answers."""
        if self._config.start_join:
            await self._join(self._config.start_join)
        if self._mdns is not None:
            self._mdns.poll()

    async def in_background(self) -> None:
        """Join retry_join, again and again until somebody answers.

        Raises ConfigError when retry_max_attempts are used up.
        """
        config = self._config
        attempts = 0
        while config.retry_join and not self._is_over():
            try:
                await self._join(config.retry_join)
                return
            except CommandError as error:
                attempts += 1
                if config.retry_max_attempts and attempts > config.retry_max_attempts:
                    _log.error("maximum retry join attempts made, exiting")
                    raise ConfigError(
                        f"no address of retry_join answered in {attempts} tries: {error}"
                    ) from None
                # The text has a line for each address.
                why = " ".join(str(error).split())
                _log.warning("Join failed: %s, retrying in %gs", why, self._wait)
            await deferLater(self._reactor, self._wait)

    def stop(self) -> None:
        """Look for nobody any more: the node leaves, or stops."""
        self._is_stopped = True
        if self._mdns is not None:
            self._mdns.stop()
            self._mdns = None

    # Steps.

    async def _join(self, texts: Sequence[str]) -> None:
        replay = self._config.replay_on_join
        _log.info("Joining cluster...(replay: %s)", str(replay).lower())
        answered = await self._agent.join(texts, replay=replay)
        _log.info("Join completed. Synced with %d initial agents", answered)
        self._targets += texts
        if self._looking is None:
            self._looking = Deferred.fromCoroutine(self._look_again()).addErrback(
                lambda failure: _log.error(
                    "Looking for members again failed", extra={"details": failure}
                )
            )

    async def _look_again(self) -> None:
        """Whoever was there may be forgotten and come back: nobody else would look for him."""
        due = self._reactor.seconds() + self._rng.uniform(0, LOOK_INTERVAL)
        while True:
            await deferLater(self._reactor, min(self._wait, LOOK_INTERVAL))
            if self._is_over():
                return
            if self._others() and self._reactor.seconds() < due:
                continue
            due = self._reactor.seconds() + LOOK_INTERVAL
            for text in self._targets:
                await self._look_for(text)

    async def _look_for(self, text: str) -> None:
        try:
            addresses = await self._agent.resolve(text)
        except ValueError as error:
            _log.debug("looking for %s again: %s", text, error)
            return
        others, mine = self._others(), _address(self._me())
        wanted = [address for address in addresses if address != mine]
        if not others.isdisjoint(wanted) or self._is_over():
            return
        try:
            joined = await self._agent.contact(wanted, replay=self._config.replay_on_join)
        except CommandError as error:
            _log.debug("looking for %s again: %s", text, error)
            return
        if new := len(self._others() - others):
            _log.info("found %d members again through %s", new, text)
        else:
            _log.debug("looking for %s again: %s", text, "; ".join(joined.failures) or "no news")

    def _found(self, addresses: list[Address]) -> None:
        self._contacting = Deferred.fromCoroutine(self._contact(addresses)).addErrback(
            lambda failure: _mdns_log.error("Failed to join: %s", failure.getErrorMessage())
        )

    async def _contact(self, addresses: list[Address]) -> None:
        if self._is_over():
            return
        joined = await self._agent.contact(addresses, replay=self._config.replay_on_join)
        if joined.contacted:
            _mdns_log.info("Joined %d hosts", joined.contacted)
        else:
            _mdns_log.error("Failed to join: %s", "; ".join(joined.failures))

    def _is_over(self) -> bool:
        """Whether the node leaves or stops; it may also do so without being stopped here."""
        return self._is_stopped or self._me().status is not Status.ALIVE

    def _me(self) -> Member:
        return next(member for member in self._agent.members() if member.name == self._agent.name)

    def _others(self) -> set[Address]:
        """Where living members are, but this node."""
        return {
            _address(member)
            for member in self._agent.members()
            if member.status is Status.ALIVE and member.name != self._agent.name
        }


def _address(member: Member) -> Address:
    return Address(member.ip, member.port)
