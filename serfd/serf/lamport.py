"""Lamport clocks, and the buffer that keeps an event from arriving twice."""

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

from serfd.errors import WireError

RING_SIZE = 512
"""How far back in Lamport time a message may come and still be new (serf.md 8, 11)."""
PER_TIME_MAX = 256
"""Different messages of one Lamport time that are told apart; more are dropped."""
KEPT_SIZE_MAX = 8 << 20
"""Bytes of messages that a ring keeps. A state exchange carries them all; a peer takes 40 MB."""

LEAP_MAX = 2**63 - 1
"""Whatever a peer says, a clock leaps no further; no cluster gets there by itself."""
STEP_MAX = 4096
"""Beyond that a peer moves it so far at a time: of 2⁶⁴ there is always room left."""

ItemT = TypeVar("ItemT", bound=Hashable)


class LamportClock:
    """A counter that every message stamped by a peer pushes forward. Lamport 1978; serf.md 5."""

    __slots__ = ("_time",)

    def __init__(self) -> None:
        self._time = 1

    @property
    def time(self) -> int:
        """The time the next own message gets."""
        return self._time

    def increment(self) -> int:
        """Step forward and return the new time."""
        self._time += 1
        return self._time

    def witness(self, seen: int) -> None:
        """Note a time that was used: the clock goes past it, and never back.

        Raises WireError, when it has gone as far as it may, for a time that is further ahead. A
        real agent goes wherever it is sent, and its clock wraps to 0.
        """
        here = self._time
        reach = max(LEAP_MAX, here + STEP_MAX)
        self._time = max(here, min(seen, reach) + 1)
        if seen > reach:
            raise WireError(f"LTime {seen} is out of reach of the clock, at {here}")


class RecentRing(Generic[ItemT]):
    """What was seen at the last 512 Lamport times, one slot for each (serf.md 8).

    Of long messages it is less than 512 times: the oldest are forgotten first.
    """

    __slots__ = ("_forgotten", "_size", "_slots")

    def __init__(self) -> None:
        self._slots: list[tuple[int, dict[ItemT, int]] | None] = [None] * RING_SIZE
        """By time: what was seen, and of how many bytes it is."""
        self._size = 0
        self._forgotten = -1

    def is_new(self, ltime: int, item: ItemT, clock: int, *, size: int = 0) -> bool:
        """Whether `item` of time `ltime` was not seen, nor is too old at time `clock`; notes it.

        `size`: the bytes it takes.
        """
        # What was forgotten is too old as well: taken for new it would go round for ever.
        if (clock > RING_SIZE and ltime < clock - RING_SIZE) or ltime <= self._forgotten:
            return False
        slot = self._slots[ltime % RING_SIZE]
        if slot is None or slot[0] != ltime:
            self._clear(ltime % RING_SIZE)
            slot = self._slots[ltime % RING_SIZE] = (ltime, {})
        seen = slot[1]
        if item in seen or len(seen) >= PER_TIME_MAX:
            return False
        seen[item] = size
        self._size += size
        while self._size > KEPT_SIZE_MAX:
            self._forgotten = min(slot[0] for slot in self._slots if slot is not None)
            self._clear(self._forgotten % RING_SIZE)
        return True

    def __iter__(self) -> Iterator[tuple[int, list[ItemT]]]:
        """The used slots: time and items in the order seen."""
        for slot in self._slots:
            if slot is not None:
                yield slot[0], list(slot[1])

    def _clear(self, place: int) -> None:
        slot = self._slots[place]
        if slot is not None:
            self._size -= sum(slot[1].values())
            self._slots[place] = None
