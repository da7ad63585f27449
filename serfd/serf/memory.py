"""What a node remembers across a restart: whom it knew, how far its clocks were (serf.md 15)."""

from collections.abc import Sequence
from random import Random

from serfd.effects import Address, Effect, Remember
from serfd.serf.common import Common
from serfd.serf.members import Record
from serfd.serf.snapshot import Remembered, Snapshot, replay


class Memory:
    """Turns what happens into lines for the snapshot file, and brings the node back by them."""

    def __init__(self, common: Common, lines: Sequence[str]) -> None:
        """`lines`: what the file holds from earlier lives."""
        rejoin = common.config.rejoin_after_leave
        self.past: Remembered = replay(lines, rejoin_after_leave=rejoin)
        self._common = common
        self._snapshot = Snapshot(self.past, rejoin_after_leave=rejoin)
        self._lines: list[str] = []
        self._clocks = (0, 0, 0, 0)
        if self.past.leave_ignored:
            common.log.info("Ignoring previous leave in snapshot")
        for warning in self.past.warnings:
            common.log.warning("%s", warning)

    def places_to_rejoin(self, rng: Random) -> list[tuple[str, Address]]:
        """Members that were alive, in random order, without this node itself."""
        places = []
        for name, text in self.past.nodes.items():
            host, _, port = text.rpartition(":")
            if name != self._common.name and port.isdecimal() and int(port) <= 65535:
                places.append((name, Address(host.strip("[]"), int(port))))
        rng.shuffle(places)
        return places

    def joined(self, record: Record) -> None:
        """A member is alive."""
        self._lines += self._snapshot.member_joined(record.peer.name, str(record.peer.address))

    def gone(self, record: Record) -> None:
        """A member left, failed or was reaped."""
        self._lines += self._snapshot.member_gone(record.peer.name)

    def left(self) -> None:
        """This node leaves."""
        self._lines += self._snapshot.left()
        self._common.effects.append(Remember(self._take(), sync=True))

    def note(self, member: int, event: int, query: int, incarnation: int) -> Effect | None:
        """What is to be written before anything else is done; the clocks as they stand."""
        clocks = (member, event, query, incarnation)
        if clocks != self._clocks:
            self._clocks = clocks
            self._lines += self._snapshot.clocks(
                member=member - 1, event=event - 1, query=query - 1
            )
            self._lines += self._snapshot.incarnation(incarnation)
        if not self._lines:
            return None
        lines = self._take()
        if self._snapshot.is_compaction_due:
            return Remember(tuple(self._snapshot.compacted()), replace=True)
        return Remember(lines)

    def _take(self) -> tuple[str, ...]:
        lines = tuple(self._lines)
        self._lines.clear()
        return lines
