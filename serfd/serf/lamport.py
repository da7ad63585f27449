"""Lamport clocks, and the buffer that keeps an event from arriving twice."""

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

from serfd.wire.serf_messages import LTIME_MAX

RING_SIZE = 512
"""How far back in Lamport time a message may come and still be new (serf.md 8, 11)."""
PER_TIME_MAX = 256
"""Different messages of one Lamport time that are told apart; more are dropped."""

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
        """Note a time a peer used: the clock goes past it; never back, never over the limit."""
        if self._time <= seen <= LTIME_MAX:
            self._time = seen + 1


class RecentRing(Generic[ItemT]):
    """What was seen at the last 512 Lamport times, one slot for each (serf.md 8)."""

    __slots__ = ("_slots",)

    def __init__(self) -> None:
        self._slots: list[tuple[int, dict[ItemT, None]] | None] = [None] * RING_SIZE

    def is_new(self, ltime: int, item: ItemT, clock: int) -> bool:
        """Whether `item` of time `ltime` was not seen, nor is too old at time `clock`; notes it."""
        if clock > RING_SIZE and ltime < clock - RING_SIZE:
            return False
        slot = self._slots[ltime % RING_SIZE]
        if slot is None or slot[0] != ltime:
            slot = self._slots[ltime % RING_SIZE] = (ltime, {})
        seen = slot[1]
        if item in seen or len(seen) >= PER_TIME_MAX:
            return False
        seen[item] = None
        return True

    def __iter__(self) -> Iterator[tuple[int, list[ItemT]]]:
        """The used slots: time and items in the order seen."""
        for slot in self._slots:
            if slot is not None:
                yield slot[0], list(slot[1])
