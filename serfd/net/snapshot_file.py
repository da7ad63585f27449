"""The snapshot on disk: read once, then appended to, and at times replaced as a whole (serf.md 15).

At any moment a crash leaves either the old file or the new one, whole but for its last line. A disk
that takes nothing costs no more than the memory for what it should have taken.
"""

import logging
import os
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Protocol, TypeAlias

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.python.failure import Failure

from serfd.errors import ConfigError
from serfd.metrics import Metrics
from serfd.wire.gomsgpack import as_bytes

FLUSH_WITHIN = 0.1
"""Seconds until a line is in the file."""
RETRY_AFTER = 30.0
"""Seconds between two tries when the disk takes nothing."""
SIZE_MAX = 1 << 28
"""Bytes; a longer file is not a snapshot: those of 100,000 nodes have some 25 MB at most."""
MODE = 0o644

_READ_SIZE = 1 << 20

_log = logging.getLogger("serfd.serf")

DeferToThread: TypeAlias = Callable[[Callable[[], Any]], "Deferred[Any]"]
"""Calls a function in another thread and gives its result in this one."""


class Reactor(Protocol):
    """What of a reactor is used here: a part of `IReactorTime`."""

    def seconds(self) -> float:
        """Monotonic seconds."""

    def callLater(self, delay: float, callable: Callable[..., object]) -> IDelayedCall:
        """Call after `delay` seconds."""


class SnapshotFile:
    """A file of lines. Once open nothing raises: errors are counted, told once, and retried."""

    def __init__(
        self, path: str, reactor: Reactor, defer_to_thread: DeferToThread, metrics: Metrics
    ) -> None:
        """Open or create the file; a last line that was not finished is cut off.

        `metrics` hears how long the disk takes. Raises ConfigError if the file cannot be used.
        """
        self._path = os.path.abspath(path)
        self._reactor = reactor
        self._defer_to_thread = defer_to_thread
        self._metrics = metrics
        self._unwritten = bytearray()
        """What is not in the file yet."""
        self._replacement: bytearray | None = None
        """What the file should hold instead of all it holds; what was appended since included."""
        self._is_behind = False
        """Lines are missing in the file that only its replacement has."""
        self._is_replacing = False
        self._job: Deferred[Any] | None = None
        """The last replacement that was begun; kept, so that its failure is seen to."""
        self._flush_call: IDelayedCall | None = None
        self._replace_call: IDelayedCall | None = None
        self._is_stuck = False
        """The last try to add to the file failed."""
        self._is_failing = False
        """Something failed, and was told, and not everything is made good."""
        self._is_closed = False
        self.errors = 0
        """How often the disk did not do what it should."""
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, MODE)
        except OSError as error:
            raise _cannot_open(f"open {path}: {_reason(error)}") from None
        try:
            self._mend()
        except OSError as error:
            os.close(self._fd)
            raise _cannot_open(f"mend {path}: {_reason(error)}") from None
        except ConfigError:
            os.close(self._fd)
            raise

    def lines(self) -> list[str]:
        """The lines in the file, for `serfd.serf.snapshot.replay`; ConfigError if it is unreadable.

        Bytes that are not UTF-8 become surrogates.
        """
        # Not splitlines(): it would cut at more than what ends a line here.
        return self._content().decode("utf-8", "surrogateescape").split("\n")[:-1]

    def append(self, lines: Iterable[str]) -> None:
        """Add lines, given without their ends; they are in the file after `FLUSH_WITHIN`."""
        data = _joined(lines)
        if not data or self._is_closed:
            return
        if self._replacement is not None:
            self._replacement += data
        if not self._is_behind:
            self._unwritten += data
            self._flush_later(FLUSH_WITHIN)

    def flush(self, *, sync: bool = False) -> None:
        """Write now what waits. With `sync` it outlives a power failure too; this may take long."""
        if self._is_closed:
            return
        if self._flush_call is not None:
            self._flush_call.cancel()
            self._flush_call = None
        began = self._reactor.seconds()
        try:
            _write(self._fd, self._unwritten)
            if sync:
                os.fsync(self._fd)
        except OSError as error:
            self._is_stuck = True
            self._failed(error)
            self._flush_later(RETRY_AFTER)
        else:
            self._is_stuck = False
            self._took("serf.snapshot.appendLine", began)
            self._succeeded()

    def replace(self, lines: Iterable[str]) -> None:
        """Let lines that say as much take the place of all lines so far, as soon as may be."""
        if self._is_closed:
            return
        self._replacement = bytearray(_joined(lines))
        if self._is_stuck:
            # What waits is in the replacement too; to hold both would take ever more memory.
            self._unwritten.clear()
            self._is_behind = True
        if not self._is_replacing and self._replace_call is None:
            self._start_to_replace()

    def close(self) -> None:
        """Write everything, to the disk itself, and close the file."""
        if self._is_closed:
            return
        if self._is_behind:
            self._replace_at_once()
        self.flush(sync=True)
        self._is_closed = True
        for call in (self._flush_call, self._replace_call):
            if call is not None:
                call.cancel()
        os.close(self._fd)

    # Appending.

    def _mend(self) -> None:
        """Cut off what was not finished: added to, it would become a line that nobody wrote."""
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise _cannot_open(f"{self._path} is not a regular file")
        if status.st_size > SIZE_MAX:
            raise _cannot_open(
                f"{self._path} has {status.st_size} bytes, at most {SIZE_MAX} expected"
            )
        whole = self._content().rfind(b"\n") + 1
        if whole < status.st_size:
            _log.warning("Dropped an unfinished line at the end of snapshot %s", self._path)
            os.ftruncate(self._fd, whole)

    def _content(self) -> bytes:
        pieces: list[bytes] = []
        at = 0
        try:
            while piece := os.pread(self._fd, _READ_SIZE, at):
                pieces.append(piece)
                at += len(piece)
        except OSError as error:
            raise _cannot_open(f"read {self._path}: {_reason(error)}") from None
        return b"".join(pieces)

    def _flush_later(self, delay: float) -> None:
        if self._flush_call is None:
            self._flush_call = self._reactor.callLater(delay, self._flush_due)

    def _flush_due(self) -> None:
        self._flush_call = None
        self.flush()

    # Replacing: the new content is written elsewhere, by another thread, while the old file is
    # still added to. What was appended meanwhile is added at the end, and the new file takes over.

    def _start_to_replace(self) -> None:
        self._replace_call = None
        self._is_replacing = True
        began = self._reactor.seconds()
        replacement = self._replacement
        assert replacement is not None
        copied = bytes(replacement)
        mode = stat.S_IMODE(os.fstat(self._fd).st_mode)
        self._job = (
            self._defer_to_thread(lambda: _write_copy(self._copy_path, copied, mode))
            .addCallback(self._take_over, replacement, len(copied), began)
            .addErrback(self._not_replaced)
            .addErrback(_tell_of_mistake)
        )

    @property
    def _copy_path(self) -> str:
        return f"{self._path}.compact"

    def _take_over(
        self, copy: int, replacement: bytearray, copied: int, began: float
    ) -> "Deferred[Any] | None":
        """Let the copy, whose first bytes are written, be the file."""
        self._is_replacing = False
        if self._is_closed:
            os.close(copy)
            with suppress(FileNotFoundError):
                os.unlink(self._copy_path)
            return None
        if replacement is not self._replacement:
            os.close(copy)
            self._start_to_replace()
            return None
        try:
            _write(copy, replacement[copied:])
            os.rename(self._copy_path, self._path)
        except OSError:
            os.close(copy)
            with suppress(OSError):
                os.unlink(self._copy_path)
            raise
        os.close(self._fd)
        self._fd = copy
        self._replacement = None
        self._unwritten.clear()
        self._is_behind = False
        self._took("serf.snapshot.compact", began)
        self._succeeded()
        return self._defer_to_thread(lambda: _sync_folder(self._path))

    def _not_replaced(self, failure: Failure) -> None:
        self._is_replacing = False
        failure.trap(OSError)
        assert isinstance(failure.value, OSError)
        if self._is_closed:
            return
        self._failed(failure.value)
        if self._replacement is not None and self._replace_call is None:
            self._replace_call = self._reactor.callLater(RETRY_AFTER, self._start_to_replace)

    def _replace_at_once(self) -> None:
        """Without a thread: there is no later."""
        assert self._replacement is not None
        mode = stat.S_IMODE(os.fstat(self._fd).st_mode)
        try:
            copy = _write_copy(self._copy_path, bytes(self._replacement), mode)
            os.close(copy)
            os.rename(self._copy_path, self._path)
            _sync_folder(self._path)
        except OSError as error:
            self._failed(error)

    def _took(self, what: str, began: float) -> None:
        self._metrics.sample(what, self._reactor.seconds() - began)

    # Errors.

    def _failed(self, error: OSError) -> None:
        self.errors += 1
        if not self._is_failing:
            self._is_failing = True
            _log.error(
                "Failed to write snapshot %s, trying again every %g s: %s",
                self._path,
                RETRY_AFTER,
                _reason(error),
            )

    def _succeeded(self) -> None:
        if self._is_failing and not self._unwritten and self._replacement is None:
            self._is_failing = False
            _log.info("Snapshot %s is written again", self._path)


def _write(fd: int, data: bytearray) -> None:
    """Write all of `data`. What is written is taken out of it, even if OSError is raised."""
    while data:
        written = os.write(fd, data)
        del data[:written]


def _write_copy(path: str, content: bytes, mode: int) -> int:
    """Write a file that is safe on the disk; gives its descriptor. Raises OSError."""
    with suppress(FileNotFoundError):
        os.unlink(path)
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL, mode)
    try:
        os.fchmod(fd, mode)
        _write(fd, bytearray(content))
        os.fsync(fd)
    except OSError:
        os.close(fd)
        with suppress(OSError):
            os.unlink(path)
        raise
    return fd


def _sync_folder(path: str) -> None:
    """Make a rename outlive a power failure. Raises OSError."""
    fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _joined(lines: Iterable[str]) -> bytes:
    data = bytearray()
    for line in lines:
        assert "\n" not in line
        data += as_bytes(line) + b"\n"
    return bytes(data)


def _cannot_open(why: str) -> ConfigError:
    return ConfigError(f"failed to open snapshot: {why}")


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _tell_of_mistake(failure: Failure) -> None:
    _log.error("A snapshot was not replaced", extra={"details": failure})
