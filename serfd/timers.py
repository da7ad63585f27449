"""Named deadlines inside a state machine.

A timer is a value, usually a frozen dataclass. Setting it again moves it, cancelling it forgets it.
"""

from collections.abc import Hashable
from heapq import heapify, heappop, heappush
from typing import Any, Generic, TypeVar

TimerT = TypeVar("TimerT", bound=Hashable)


class Timers(Generic[TimerT]):
    """A heap of deadlines in monotonic seconds. Timers of one deadline fire in the order set."""

    __slots__ = ("_entries", "_heap", "_order")

    def __init__(self) -> None:
        # [deadline, order, timer]; lists, since a timer that was moved or cancelled is blanked in
        # its place, and waits there as None until it surfaces.
        self._heap: list[list[Any]] = []
        self._entries: dict[TimerT, list[Any]] = {}
        self._order = 0

    def __len__(self) -> int:
        """How many timers are set."""
        return len(self._entries)

    def __contains__(self, timer: TimerT) -> bool:
        """Whether this timer is set."""
        return timer in self._entries

    def set(self, timer: TimerT, deadline: float) -> None:
        """Let `timer` fire at `deadline`; a timer that is set already is moved there."""
        held = self._entries.get(timer)
        if held is not None:
            held[2] = None
        self._order += 1
        entry = self._entries[timer] = [deadline, self._order, timer]
        heap = self._heap
        heappush(heap, entry)
        # Swept when the blank ones prevail, so that a timer moved for ever cannot grow the heap.
        if len(heap) > 64 and len(heap) > 4 * len(self._entries):
            heap[:] = self._entries.values()
            heapify(heap)

    def cancel(self, timer: TimerT) -> None:
        """Forget `timer`; not an error if it is not set."""
        held = self._entries.pop(timer, None)
        if held is not None:
            held[2] = None

    def deadline(self, timer: TimerT) -> float | None:
        """When `timer` will fire, or None if it is not set."""
        held = self._entries.get(timer)
        return held[0] if held else None

    def next_deadline(self) -> float | None:
        """When the earliest timer is due, or None if none is set."""
        heap = self._heap
        while heap:
            entry = heap[0]
            if entry[2] is not None:
                deadline: float = entry[0]
                return deadline
            heappop(heap)
        return None

    def pop_due(self, now: float) -> TimerT | None:
        """Take out and return the earliest timer with a deadline of at most `now`."""
        deadline = self.next_deadline()
        if deadline is None or deadline > now:
            return None
        timer: TimerT = heappop(self._heap)[2]
        del self._entries[timer]
        return timer
