"""Logs: one line format, on the console and in a ring that RPC monitors read (agent.md 7)."""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import cache
from typing import Final, TextIO

from twisted.logger import ILogObserver, LogEvent, LogLevel, formatEvent, globalLogBeginner
from zope.interface import provider

from serfd.config import LOG_LEVELS

TRACE: Final = 5
"""Below DEBUG: single packets. `log.log(TRACE, ...)`."""

LEVELS: Final[Mapping[str, int]] = dict(
    zip(
        LOG_LEVELS,
        (TRACE, logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR),
        strict=True,
    )
)
"""Serf's level names, from the least to the most important, and logging's numbers."""

LINES_KEPT: Final = 512
"""Lines a new monitor gets from before it came."""

Listener = Callable[[str], None]

_ROOT: Final = "serfd"
_STAMP_SIZE: Final = len("YYYY/MM/DD HH:MM:SS ")
# sd-daemon(3): how important a line on stderr is to the journal.
_PRIORITIES: Final = ((logging.ERROR, "<3>"), (logging.WARNING, "<4>"), (logging.INFO, "<6>"))

logging.addLevelName(TRACE, "TRACE")


class LogRing(logging.Handler):
    """The last 512 lines of any level, and whoever wants to hear the next ones."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: deque[tuple[int, str]] = deque(maxlen=LINES_KEPT)
        self._listeners: dict[object, tuple[int, Listener]] = {}
        self._telling = False

    def attach(self, level: int, listener: Listener) -> Callable[[], None]:
        """Give `listener` the lines kept, oldest first, then each new one, from `level` upwards.

        It is called in the thread that logs. What it logs itself is kept, but told to nobody live:
        a monitor that hears of its own work would never come to an end. Call what is returned to
        end it.
        """
        key = object()
        self.acquire()  # so that no other thread's line comes between the old ones and the new
        try:
            for number, line in tuple(self._lines):
                if number >= level:
                    listener(line)
            self._listeners[key] = (level, listener)
        finally:
            self.release()
        return lambda: self._forget(key)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the record's line and tell the listeners."""
        number, line = record.levelno, line_of(record)
        self._lines.append((number, line))
        if self._telling or not self._listeners:
            return
        self._telling = True
        try:
            for level, listener in tuple(self._listeners.values()):
                if number >= level:
                    listener(line)
        finally:
            self._telling = False

    def _forget(self, key: object) -> None:
        self._listeners.pop(key, None)


class Console(logging.StreamHandler[TextIO]):
    """Lines for a person or, when the stream leads to the journal, for journald."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._to_journal = _leads_to_journal(stream)

    def format(self, record: logging.LogRecord) -> str:
        """The line; for the journal with its priority in front and without the time."""
        line = line_of(record)
        if not self._to_journal:
            return line
        priority = next((p for level, p in _PRIORITIES if record.levelno >= level), "<7>")
        # Every line of a traceback is an entry of its own there.
        return priority + line[_STAMP_SIZE:].replace("\n", "\n" + priority)


def set_up(level: str, stream: TextIO) -> LogRing:
    """Send all of serfd's and Twisted's logs to `stream`, from `level` upwards, and to a ring.

    The ring gets every level, as Serf's monitor does: with the switches below a line that nobody
    sees costs 4 µs. Raises ValueError if there is no such level.
    """
    console, ring = Console(stream), LogRing()
    console.setLevel(_number(level))
    root = logging.getLogger(_ROOT)
    root.handlers[:] = [console, ring]
    root.setLevel(TRACE)
    root.propagate = False
    # What no line of ours shows need not be found out (logging's documentation, "Optimization").
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    _route_twisted()
    return ring


def set_level(level: str) -> None:
    """Change what the console shows; any case. Raises ValueError with the levels there are."""
    number = _number(level)
    for handler in logging.getLogger(_ROOT).handlers:
        if isinstance(handler, Console):
            handler.setLevel(number)


def line_of(record: logging.LogRecord) -> str:
    """`2026/11/23 03:21:39 [INFO] agent: text`, in local time; made once for each record.

    A traceback follows on further lines; still one entry.
    """
    line: str | None = record.__dict__.get("serfd_line")
    if line is None:
        component = record.name.removeprefix("serfd.")
        level = _level_name(record.levelno)
        line = f"{_stamp(record.created)} [{level}] {component}: {_text(record)}"
        # Names from the network may hold bytes that are no UTF-8; neither the console nor an RPC
        # client could take them.
        if not line.isascii():
            line = line.encode("utf-8", "backslashreplace").decode()
        record.__dict__["serfd_line"] = line
    return line


@provider(ILogObserver)
def from_twisted(event: LogEvent) -> None:
    """Pass on what Twisted logs: warnings, errors and failures, these with their traceback."""
    failure = event.get("log_failure")
    level = event.get("log_level", LogLevel.info)
    if failure is None and level < LogLevel.warn:
        return
    parts = [formatEvent(event), failure.getTraceback() if failure is not None else ""]
    text = "\n".join(part.strip() for part in parts if part.strip())
    number = logging.WARNING if level is LogLevel.warn else logging.ERROR
    logging.getLogger("serfd.twisted").log(number, "%s", text)


@cache
def _route_twisted() -> None:
    # Once in a process. It also ends the buffer that Twisted fills until then.
    globalLogBeginner.beginLoggingTo([from_twisted], redirectStandardIO=False)


@cache
def _level_name(number: int) -> str:
    names = [name for name, least in LEVELS.items() if number >= least]
    return names[-1] if names else LOG_LEVELS[0]


_last_stamp = (0, "")


def _stamp(created: float) -> str:
    global _last_stamp
    second, text = _last_stamp
    if second != int(created):
        second = int(created)
        text = time.strftime("%Y/%m/%d %H:%M:%S", time.localtime(second))
        _last_stamp = (second, text)
    return text


def _text(record: logging.LogRecord) -> str:
    try:
        text = record.getMessage()
    except (TypeError, ValueError, KeyError, IndexError):
        # A wrong format is our mistake, but a log line must never end what it tells of.
        text = f"{record.msg!r} does not fit its arguments {record.args!r}"
    if record.exc_info:
        text += "\n" + logging.Formatter().formatException(record.exc_info)
    return text


def _number(level: str) -> int:
    number = LEVELS.get(level.upper())
    if number is None:
        raise ValueError(f"log level {level!r} is unknown, expected one of {', '.join(LEVELS)}")
    return number


def _leads_to_journal(stream: TextIO) -> bool:
    """Whether systemd connected the stream to the journal (systemd.exec(5), JOURNAL_STREAM)."""
    named = os.environ.get("JOURNAL_STREAM")
    if named is None:
        return False
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):  # not a file, or closed
        return False
    return named == f"{status.st_dev}:{status.st_ino}"
