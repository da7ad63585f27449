"""Named deadlines inside a state machine.

A timer is a value, usually a frozen dataclass. Setting it again moves it, cancelling it forgets it.
"""

from collections.abc import Hashable
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

TimerT = TypeVar("TimerT", bound=Hashable)


class Timers(Generic[TimerT]):
    """A heap of deadlines in monotonic seconds. Timers of one deadline fire in the order set."""

    __slots__ = ("_deadlines", "_heap", "_order")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, TimerT]] = []
        self._deadlines: dict[TimerT, tuple[float, int]] = {}
        self._order = 0

    def __len__(self) -> int:
        """How many timers are set."""
        return len(self._deadlines)

    def __contains__(self, timer: TimerT) -> bool:
        """Whether this timer is set."""
        return timer in self._deadlines

    def set(self, timer: TimerT, deadline: float) -> None:
        """Let `timer` fire at `deadline`; a timer that is set already is moved there."""
        self._order += 1
        self._deadlines[timer] = (deadline, self._order)
        heappush(self._heap, (deadline, self._order, timer))
        # Moved and cancelled timers stay in the heap until they surface. Sweep when they prevail,
        # so that a timer moved for ever cannot grow the heap for ever.
        if len(self._heap) > 64 and len(self._heap) > 4 * len(self._deadlines):
            self._heap = [(d, o, t) for t, (d, o) in self._deadlines.items()]
            heapify(self._heap)

    def cancel(self, timer: TimerT) -> None:
        """Forget `timer`; not an error if it is not set."""
        self._deadlines.pop(timer, None)

    def deadline(self, timer: TimerT) -> float | None:
        """When `timer` will fire, or None if it is not set."""
        held = self._deadlines.get(timer)
        return held[0] if held else None

    def next_deadline(self) -> float | None:
        """When the earliest timer is due, or None if none is set."""
        heap, deadlines = self._heap, self._deadlines
        while heap:
            deadline, order, timer = heap[0]
            held = deadlines.get(timer)
            if held is not None and held[1] == order:
                return deadline
            heappop(heap)
        return None

    def pop_due(self, now: float) -> TimerT | None:
        """Take out and return the earliest timer with a deadline of at most `now`."""
        deadline = self.next_deadline()
        if deadline is None or deadline > now:
            return None
        timer = heappop(self._heap)[2]
        del self._deadlines[timer]
        return timer
