"""Logs: on the console, to the local syslog, and in a ring that RPC monitors read (agent.md 7)."""

import json
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Final, TextIO

from twisted.logger import ILogObserver, LogEvent, LogLevel, formatEvent, globalLogBeginner
from twisted.python.failure import Failure
from zope.interface import provider

from serfd.config import LOG_LEVELS, SYSLOG_FACILITIES, SYSLOG_PATHS
from serfd.errors import ConfigError
from serfd.plain import lines, plain

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

SYSLOG_SIZE_MAX: Final = 8192
"""Bytes of a line to syslog; what is longer is cut, as many a syslog would do itself."""

Listener = Callable[[str], None]

_ROOT: Final = "serfd"
_STAMP_SIZE: Final = len("YYYY/MM/DD HH:MM:SS ")
# sd-daemon(3): how important a line on stderr is to the journal.
_PRIORITIES: Final = ((logging.ERROR, "<3>"), (logging.WARNING, "<4>"), (logging.INFO, "<6>"))
# syslog(3); INFO is notice, as in Serf.
_SEVERITIES: Final = {"TRACE": 7, "DEBUG": 6, "INFO": 5, "WARN": 4, "ERR": 3}
_MONTHS: Final = (
    "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
)  # fmt: skip

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

    def __init__(self, stream: TextIO, *, as_json: bool = False, held: bool = False) -> None:
        """With `held`, nothing is written until `show_held`."""
        super().__init__(stream)
        self._as_json = as_json
        self._to_journal = _leads_to_journal(stream)
        self._held: list[logging.LogRecord] | None = [] if held else None

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record's line, or keep it until `show_held`."""
        if self._held is None:
            super().emit(record)
        else:
            self._held.append(record)

    def show_held(self) -> None:
        """Write what was kept, and from now on all that comes."""
        self.acquire()  # so that no other thread's line comes between the old ones
        try:
            held, self._held = self._held or [], None
            for record in held:
                self.emit(record)
        finally:
            self.release()

    def format(self, record: logging.LogRecord) -> str:
        """The line; for the journal with its priority in front and without the time."""
        line = json_of(record) if self._as_json else line_of(record)
        if not self._to_journal:
            return line
        priority = next((p for level, p in _PRIORITIES if record.levelno >= level), "<7>")
        if self._as_json:
            return priority + line
        # Every line of the details is an entry of its own there.
        return priority + line[_STAMP_SIZE:].replace("\n", "\n" + priority)


class Syslog(logging.Handler):
    """The local syslog. It is never waited for: a line that it does not take at once is lost."""

    def __init__(self, facility: str, paths: Sequence[str] = SYSLOG_PATHS) -> None:
        """`facility`: one of `SYSLOG_FACILITIES`, in any case; `paths`: where it may listen.

        Raises ConfigError if it does not.
        """
        super().__init__()
        self._facility = SYSLOG_FACILITIES[facility.upper()]
        self._paths = paths
        self._socket: socket.socket | None = None
        self.dropped = 0
        """Lines that were lost."""
        self._untold = 0
        if not self._connect():
            raise ConfigError(
                f"Syslog setup failed: nobody listens at {', '.join(paths)}; start a syslog "
                "service, or set enable_syslog = false"
            )

    def emit(self, record: logging.LogRecord) -> None:
        """Send the record's line; over a new connection, if the syslog was started anew."""
        data = self._message(record)
        for _ in range(2):
            if self._socket is None and not self._connect():
                break
            assert self._socket is not None
            try:
                # A line is so short that a stream, too, takes it whole or not at all.
                self._socket.send(data)
            except BlockingIOError:
                break
            except OSError:
                self._disconnect()
            else:
                self._tell_of_lost()
                return
        self.dropped += 1
        self._untold += 1

    def close(self) -> None:
        """There will be no more lines."""
        self._disconnect()
        super().close()

    def _message(self, record: logging.LogRecord) -> bytes:
        line = line_of(record)
        number = self._facility * 8 + _SEVERITIES[_level_name(record.levelno)]
        when = f"{_MONTHS[int(line[5:7]) - 1]} {int(line[8:10]):2d} {line[11:19]}"
        text = line.partition("] ")[2]
        data = f"<{number}>{when} serfd[{os.getpid()}]: {text}".encode()
        return data[: SYSLOG_SIZE_MAX - 1] + b"\n"

    def _tell_of_lost(self) -> None:
        if self._untold:
            untold, self._untold = self._untold, 0
            logging.getLogger("serfd.agent").warning("syslog did not take %d lines", untold)

    def _connect(self) -> bool:
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
            for path in self._paths:
                tried = socket.socket(socket.AF_UNIX, kind)
                tried.settimeout(0)
                try:
                    tried.connect(path)
                except OSError:
                    tried.close()
                else:
                    self._socket = tried
                    return True
        return False

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class Foreign(logging.Handler):
    """What other libraries log, and plugins under names of their own: warnings and errors."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        """Pass it on to where serfd's lines go."""
        logging.getLogger(_ROOT).handle(record)


def set_up(
    level: str,
    stream: TextIO,
    *,
    as_json: bool = False,
    syslog: Syslog | None = None,
    held: bool = False,
) -> LogRing:
    """Send all logs to `stream` and `syslog`, from `level` upwards, and to a ring.

    All are serfd's own, Twisted's, and the warnings and errors of others. With `as_json` the stream
    gets objects; with `held` it gets its lines when `show_held` is called. The ring gets every
    level, as Serf's monitor does: with the switches below a line that nobody sees costs 4 µs.
    Raises ValueError if there is no such level.
    """
    console, ring = Console(stream, as_json=as_json, held=held), LogRing()
    root = logging.getLogger(_ROOT)
    root.handlers[:] = [console, ring] if syslog is None else [console, ring, syslog]
    set_level(level)
    root.setLevel(TRACE)
    root.propagate = False
    others = logging.getLogger()
    others.handlers[:] = [h for h in others.handlers if not isinstance(h, Foreign)] + [Foreign()]
    # What no line of ours shows need not be found out (logging's documentation, "Optimization").
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    _route_twisted()
    return ring


def set_level(level: str) -> None:
    """Change what console and syslog get; any case. Raises ValueError with the levels there are."""
    number = _number(level)
    for handler in logging.getLogger(_ROOT).handlers:
        if isinstance(handler, (Console, Syslog)):
            handler.setLevel(number)


def show_held() -> None:
    """Let the console show what was held back, and from now on all that comes."""
    for handler in logging.getLogger(_ROOT).handlers:
        if isinstance(handler, Console):
            handler.show_held()


def line_of(record: logging.LogRecord) -> str:
    """`2026/11/23 03:21:39 [INFO] agent: text`, in local time; made once for each record.

    Whatever names are in the text, it is one line. A traceback follows on lines that begin with
    blanks, and so do details: `log.error("...", extra={"details": text or Failure})`.
    """
    line: str | None = record.__dict__.get("serfd_line")
    if line is None:
        component = record.name.removeprefix("serfd.")
        level = _level_name(record.levelno)
        line = f"{_stamp(record.created)} [{level}] {plain(f'{component}: {_message(record)}')}"
        if details := details_of(record):
            line += f"\n{lines(details)}".replace("\n", "\n    ")
        record.__dict__["serfd_line"] = line
    return line


def json_of(record: logging.LogRecord) -> str:
    """`{"time": "2026-11-23T03:21:39.123456Z", "level": "INFO", "component": …, "message": …}`.

    With `traceback`, if there is one, or details. Time is UTC; everything is ASCII.
    """
    second, fraction = divmod(round(record.created * 1e6), 1_000_000)
    fields = {
        "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(second))}.{fraction:06d}Z",
        "level": _level_name(record.levelno),
        "component": record.name.removeprefix("serfd."),
        "message": _utf8(_message(record)),
    }
    if details := details_of(record):
        fields["traceback"] = _utf8(details)
    return json.dumps(fields)


def details_of(record: logging.LogRecord) -> str:
    """The lines below a record's text: its traceback, or the details that were given."""
    if record.exc_info:
        return logging.Formatter().formatException(record.exc_info)
    details = record.__dict__.get("details", "")
    text = details.getTraceback() if isinstance(details, Failure) else str(details)
    return text.rstrip("\n")


@provider(ILogObserver)
def from_twisted(event: LogEvent) -> None:
    """Pass on what Twisted logs: warnings, errors and failures, these with their traceback."""
    failure = event.get("log_failure")
    level = event.get("log_level", LogLevel.info)
    if failure is None and level < LogLevel.warn:
        return
    text = formatEvent(event).strip() or (failure.getErrorMessage() if failure is not None else "")
    number = logging.WARNING if level is LogLevel.warn else logging.ERROR
    details = {} if failure is None else {"details": failure}
    logging.getLogger("serfd.twisted").log(number, "%s", text, extra=details)


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


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError, KeyError, IndexError):
        # A wrong format is our mistake, but a log line must never end what it tells of.
        return f"{record.msg!r} does not fit its arguments {record.args!r}"


def _utf8(text: str) -> str:
    # Names from the network may hold bytes that are no UTF-8; no reader of JSON takes them.
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


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
