"""Local health, and how long a suspect may take to refute.

Lifeguard (Dadgar, Phillips, Currey 2017): a node that is slow itself should blame itself first.
"""

import math


class Awareness:
    """This node's own health: 0 is well; higher is worse (Lifeguard §IV.A; gossip.md 7.1)."""

    __slots__ = ("_max", "score")

    def __init__(self, multiplier_max: int) -> None:
        self._max = multiplier_max - 1
        self.score = 0

    def apply(self, change: int) -> None:
        """Get worse (positive) or better; kept within 0 and the maximum."""
        self.score = min(max(self.score + change, 0), self._max)

    def scale(self, interval: float) -> float:
        """The interval, stretched by bad health."""
        return interval * (self.score + 1)


def suspicion_timeout_min(members: int, interval: float, multiplier: int) -> float:
    """How long a suspect may take to refute, once enough members agree that it is silent. Seconds.

    multiplier · max(1, log10(members)) · interval. SWIM §4.2; gossip.md 7.2.
    """
    scale = math.floor(1000 * max(1.0, math.log10(max(1, members)))) / 1000
    return multiplier * scale * interval


class Suspicion:
    """One member under suspicion: a timeout that shrinks as others confirm (Lifeguard §IV.B)."""

    __slots__ = (
        "_accusers",
        "_confirmations",
        "_needed",
        "_timeout_max",
        "_timeout_min",
        "started",
    )

    def __init__(
        self, accuser: str, now: float, *, needed: int, timeout_min: float, timeout_max: float
    ) -> None:
        """`needed`: confirmations that bring the timeout down to its minimum."""
        self._accusers = {accuser}
        self._confirmations = 0
        self._needed = max(0, needed)
        self._timeout_min = timeout_min
        self._timeout_max = timeout_max
        self.started = now

    @property
    def confirmations(self) -> int:
        """How many others accused it too; at most as many as were needed."""
        return self._confirmations

    @property
    def is_confirmed(self) -> bool:
        """Whether as many others accused it as were needed."""
        return self._confirmations >= self._needed

    @property
    def deadline(self) -> float:
        """When it is declared dead unless it refutes."""
        if self._needed == 0:
            return self.started + self._timeout_min
        spread = self._timeout_max - self._timeout_min
        share = math.log(self._confirmations + 1) / math.log(self._needed + 1)
        timeout = math.floor(1000 * (self._timeout_max - spread * share)) / 1000
        return self.started + max(self._timeout_min, timeout)

    def confirm(self, accuser: str) -> bool:
        """Note one more accuser. True if it counts: someone new, and not enough yet (7.3)."""
        if self.is_confirmed or accuser in self._accusers:
            return False
        self._accusers.add(accuser)
        self._confirmations += 1
        return True
