"""Failed members are tried again; forgotten ones too, for ever (serf.md 6.5)."""

from dataclasses import dataclass
from typing import Any

from serfd.effects import Address
from serfd.serf.common import Common
from serfd.serf.members import Record
from serfd.timers import Timers

LOST_MAX = 1024
"""Failed members remembered after they are forgotten; of more, the oldest are given up."""
LOST_INTERVAL = 300.0
"""Seconds, in the mean, between two tries of a forgotten member while others are alive."""


@dataclass(frozen=True, slots=True)
class ReconnectDue:
    """Time to try a failed member."""


class Reconnecting:
    """Whom to try: the members that failed, and those forgotten since.

    A real agent never tries again whom it has forgotten: of a partition longer than its
    reconnect_timeout two clusters remain.
    """

    def __init__(self, common: Common, timers: Timers[Any]) -> None:
        self._common = common
        self._timers = timers
        self._lost: dict[str, Address] = {}
        timers.set(ReconnectDue(), common.now + common.config.reconnect_interval)

    @property
    def sought(self) -> int:
        """How many members are tried."""
        return len(self._common.members.failed) + len(self._lost)

    @property
    def lost(self) -> int:
        """How many of them are forgotten as members."""
        return len(self._lost)

    def forgotten(self, record: Record) -> None:
        """A member failed so long ago that it is none any more."""
        self._lost.pop(record.peer.name, None)
        self._lost[record.peer.name] = record.peer.address
        if len(self._lost) > LOST_MAX:
            del self._lost[next(iter(self._lost))]

    def settled(self, name: str) -> None:
        """A member of that name is alive, or was told to leave: it is not sought any more."""
        self._lost.pop(name, None)

    def due(self) -> None:
        """Try one failed member, the more often the more have failed; if alone, at every turn."""
        common = self._common
        interval = common.config.reconnect_interval
        self._timers.set(ReconnectDue(), common.now + interval)
        failed = common.members.failed
        places = [(record.peer.name, record.peer.address) for record in failed.values()]
        if not common.memberlist.table.anyone_else:
            places += self._lost.items()
        elif self._lost and common.rng.random() < interval / LOST_INTERVAL:
            places = list(self._lost.items())
        elif places:
            others = len(common.members) - len(failed) - len(common.members.left)
            if common.rng.random() > len(failed) / max(1, others):
                common.log.debug("forgoing reconnect for random throttling")
                return
        if not places:
            return
        name, address = common.rng.choice(places)
        if name in self._lost and self._is_taken(address):
            self.settled(name)
            return
        common.log.info("attempting reconnect to %s %s", name, address)
        common.memberlist.join(common.now, (address,), ticket=None)

    def _is_taken(self, address: Address) -> bool:
        """Whether somebody lives there now, under another name."""
        table = self._common.memberlist.table
        return any(peer.is_present and peer.address == address for peer in table)
