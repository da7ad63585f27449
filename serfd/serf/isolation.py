"""Whether a node that knows of others sees nobody; if so, the log says it."""

from dataclasses import dataclass
from typing import Any

from serfd.serf.common import Common
from serfd.timers import Timers

TOLD_INTERVAL = 600.0
"""Seconds until the log says again that a node is isolated."""


@dataclass(frozen=True, slots=True)
class StillIsolated:
    """Time to say again that nobody else is alive."""


class Isolation:
    """Notices when the last other member is gone, and when one is back."""

    def __init__(self, common: Common, timers: Timers[Any]) -> None:
        self._common = common
        self._timers = timers
        self._since: float | None = None
        self.knows_others = False
        """There were others once, in this life or an earlier one."""

    @property
    def is_isolated(self) -> bool:
        """Whether there were others once, and now nobody else is alive."""
        return self.knows_others and not self._common.memberlist.table.anyone_else

    def look(self, *, sought: int) -> None:
        """Somebody came or went, or time passed; `sought`: failed members that are tried again."""
        common = self._common
        if self.is_isolated:
            if self._since is None:
                self._since = common.now
            if StillIsolated() not in self._timers:
                common.log.warning(
                    "Isolated: no other member is alive; %d that failed are tried again", sought
                )
                self._timers.set(StillIsolated(), common.now + TOLD_INTERVAL)
        elif common.memberlist.table.anyone_else:
            self.knows_others = True
            if self._since is not None:
                common.log.info("No longer isolated, after %.0f s", common.now - self._since)
                self._since = None
                self._timers.cancel(StillIsolated())
