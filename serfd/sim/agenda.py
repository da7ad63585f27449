"""Virtual time: one queue of what happens next."""

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, TypeAlias

Step: TypeAlias = Callable[..., object]


class Agenda:
    """A heap of `(time, order, step, arguments)`. Steps of one instant come in the order pushed."""

    __slots__ = ("_order", "_queue", "now")

    def __init__(self) -> None:
        self.now = 0.0
        """Virtual seconds since the run's begin."""
        self._queue: list[tuple[float, int, Step, tuple[Any, ...]]] = []
        self._order = 0

    def push(self, due: float, step: Step, *args: Any) -> None:
        """Call `step` at `due`, which has not passed."""
        self._order += 1
        heappush(self._queue, (due, self._order, step, args))

    def after(self, seconds: float, step: Step, *args: Any) -> None:
        """Call `step` in so many seconds."""
        self.push(self.now + seconds, step, *args)

    def run_to(self, end: float) -> None:
        """Take all steps that are due up to `end`; then that is the time."""
        queue = self._queue
        while queue and queue[0][0] <= end:
            self.now, _, step, args = heappop(queue)
            step(*args)
        self.now = end
