"""`StallWatch`: how long a step of a plugin held the process, and where it was when too long."""

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType

from serfd.config import Seconds

FRAMES_MAX = 8
"""Innermost calls that are told."""
_HOOKS = os.path.dirname(__file__) + os.sep


class StallWatch:
    """Measures steps, one inside the other or one after the other.

    Python's only way to look at a thread that does not come back from C code is a signal: SIGALRM,
    which is armed for the time of each outermost step. Where that is not possible (not the main
    thread, or somebody else has the signal), steps are measured without telling where.
    """

    def __init__(self, limit: Seconds, seconds: Callable[[], float] = time.monotonic) -> None:
        """`limit`: after so long in one step its place is noted; `seconds` is the clock."""
        self._limit = limit
        self._seconds = seconds
        self._depth = 0
        self._place = ""
        self._is_armed = False
        if threading.current_thread() is threading.main_thread() and signal.getsignal(
            signal.SIGALRM
        ) in (signal.SIG_DFL, StallWatch._rung):
            signal.signal(signal.SIGALRM, StallWatch._rung)
            self._is_armed = True

    def begin(self) -> float:
        """A step begins; gives what `end` wants."""
        self._depth += 1
        if self._depth == 1 and self._is_armed:
            StallWatch._watching = self
            self._place = ""
            signal.setitimer(signal.ITIMER_REAL, self._limit)
        return self._seconds()

    def end(self, began: float) -> tuple[float, str]:
        """The step is over: the seconds it took, and where it was after `limit`, if that is known.

        The place is a stack in Python's form.
        """
        took = self._seconds() - began
        self._depth -= 1
        if self._depth == 0 and self._is_armed:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return took, self._place

    _watching: "StallWatch | None" = None

    @staticmethod
    def _rung(number: int, frame: FrameType | None) -> None:
        watch = StallWatch._watching
        if watch is not None and watch._depth:
            watch._place = _place(frame)


def _place(frame: FrameType | None) -> str:
    """The innermost calls, without those of who called the plugin."""
    stack = traceback.extract_stack(frame)
    own = [n for n, call in enumerate(stack) if call.filename.startswith(_HOOKS)]
    return "".join(traceback.format_list(stack[own[-1] + 1 if own else 0 :][-FRAMES_MAX:]))
