"""Runs a program in a process group of its own: its input, its last output, its end in time."""

import errno
import logging
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Protocol

from twisted.internet.defer import Deferred, fail
from twisted.internet.interfaces import IDelayedCall, IProcessTransport
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

from serfd.config import Seconds

KILL_AFTER = Seconds(5.0)
"""A group that SIGTERM has not ended is killed after this long."""

OUTPUT_GRACE = Seconds(0.5)
"""After the program's own end, wait this long for the rest of its output. What it left running in
the background may hold the output open for ever."""

OUTPUT_LINES_MAX = 20
"""So many of a program's last lines are logged."""

_GROUP_POLL = Seconds(0.1)
_OUTPUTS = (1, 2)
# What systemd tells serfd is not for its programs: one of them could keep the watchdog quiet.
_NOT_PASSED_ON = re.compile(r"NOTIFY_SOCKET|WATCHDOG_.*|LISTEN_.*")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProcessResult:
    """How a program ended."""

    status: int
    """Its exit status, or minus the number of the signal that ended it."""
    stdout: bytes
    """The last bytes it wrote, `output_max` at most; `stderr` likewise."""
    stderr: bytes
    timed_out: bool
    seconds: Seconds
    """How long it ran."""

    @property
    def status_text(self) -> str:
        """`exit status 3`, `signal: killed`."""
        if self.status >= 0:
            return f"exit status {self.status}"
        return f"signal: {(signal.strsignal(-self.status) or str(-self.status)).lower()}"


class ProcessReactor(Protocol):
    """What of a reactor is used here: parts of IReactorProcess and IReactorTime."""

    def seconds(self) -> float:
        """Time in seconds."""

    def callLater(self, delay: float, callable: Callable[..., object]) -> IDelayedCall:
        """Call after `delay` seconds."""

    def spawnProcess(
        self,
        processProtocol: ProcessProtocol,
        executable: bytes,
        args: Sequence[bytes],
        env: Mapping[bytes, bytes],
        *,
        childFDs: Mapping[int, str | int],
    ) -> object:
        """Start a program."""


def run_process(
    reactor: ProcessReactor,
    argv: Sequence[str],
    *,
    stdin: bytes = b"",
    env: Mapping[str, str],
    timeout: Seconds,
    output_max: int,
) -> Deferred[ProcessResult]:
    """Run `argv` with exactly the environment `env`; gives how it ended.

    After `timeout` seconds its whole process group gets SIGTERM, and SIGKILL 5 s later; so it does
    when the Deferred is cancelled. `output_max` is in bytes, for stdout and stderr each.

    Fails with OSError if it cannot be started: FileNotFoundError or PermissionError, which name it,
    for one that is not there, in `env`'s PATH, or not executable. Fails with ValueError for a NUL
    byte in an argument or in the environment. A script whose interpreter is missing ends with
    status 127, as in a shell.
    """
    assert output_max > 0
    run = _Run(reactor, timeout=timeout, output_max=output_max)
    try:
        _find(argv, env.get("PATH", os.defpath))
        # A file and not a pipe: nothing has to be written later, and a program that does not read
        # its input holds nothing up.
        source = os.memfd_create("stdin")
        try:
            os.write(source, stdin)
            os.lseek(source, 0, os.SEEK_SET)
            # setsid gives it a group to be signalled as a whole. It needs no fork: a process just
            # spawned leads no group, so setsid turns into the program under the same number.
            reactor.spawnProcess(
                run,
                b"setsid",
                [b"setsid", *map(os.fsencode, argv)],
                {os.fsencode(name): os.fsencode(value) for name, value in env.items()},
                childFDs={0: source, **dict.fromkeys(_OUTPUTS, "r")},
            )
        finally:
            os.close(source)
    except (OSError, ValueError):
        return fail()
    return run.result


def _find(argv: Sequence[str], path: str) -> None:
    """Raises OSError if there is no such program: setsid could only write that to stderr."""
    program = argv[0] if argv else ""
    if shutil.which(program, path=path) is None:
        is_there = shutil.which(program, os.F_OK, path) or os.path.isdir(program)
        number = errno.EACCES if is_there else errno.ENOENT
        raise OSError(number, os.strerror(number), program)


def inherited_environment() -> dict[str, str]:
    """The environment of serfd, as far as it is for the programs it runs."""
    return {key: value for key, value in os.environ.items() if not _NOT_PASSED_ON.fullmatch(key)}


def last_lines(output: bytes) -> Iterator[str]:
    """The end of what a program wrote, line by line as a log can take it; and what is left out."""
    lines = output.decode("utf-8", "backslashreplace").splitlines()
    if len(lines) > OUTPUT_LINES_MAX:
        yield f"({len(lines) - OUTPUT_LINES_MAX} lines are left out)"
    for line in lines[-OUTPUT_LINES_MAX:]:
        yield "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


class _State(Enum):
    RUNNING = auto()
    ENDING = auto()  # its group was sent SIGTERM
    KILLED = auto()  # and SIGKILL
    OVER = auto()


class _Run(ProcessProtocol):
    """One program from its start to its result."""

    def __init__(self, reactor: ProcessReactor, *, timeout: Seconds, output_max: int) -> None:
        self.result: Deferred[ProcessResult] = Deferred(lambda _: self._end())
        self._reactor = reactor
        self._timeout = timeout
        self._output_max = output_max
        self._output = {fd: bytearray() for fd in _OUTPUTS}
        self._began = reactor.seconds()
        self._timers: list[IDelayedCall] = []
        self._status: int | None = None
        self._state = _State.RUNNING
        self._timed_out = False

    def connectionMade(self) -> None:
        """The program was started."""
        self._group: int = self._process.pid
        self._later(self._timeout, self._time_is_up)

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        """It wrote something."""
        kept = self._output[childFD]
        kept += data
        # Cut only now and then, so that a flood is not copied once per read.
        if len(kept) > 2 * self._output_max:
            del kept[: -self._output_max]

    def processExited(self, reason: Failure) -> None:
        """It has ended; whoever it started may still run."""
        ended: Any = reason.value
        self._status = -ended.signal if ended.signal else ended.exitCode
        self._later(OUTPUT_GRACE, self._close_outputs)

    def processEnded(self, reason: Failure) -> None:
        """It has ended and its output is complete, or was closed by us."""
        self._settle()

    @property
    def _process(self) -> Any:
        """The transport; its `pid` is in no interface."""
        transport: IProcessTransport | None = self.transport
        assert transport is not None  # set before connectionMade
        return transport

    def _later(self, delay: float, step: Callable[[], None]) -> None:
        self._timers.append(self._reactor.callLater(delay, step))

    def _time_is_up(self) -> None:
        self._timed_out = True
        self._end()

    def _end(self) -> None:
        if self._state is not _State.RUNNING:
            return
        self._state = _State.ENDING
        self._signal(signal.SIGTERM)
        self._later(KILL_AFTER, self._kill)

    def _kill(self) -> None:
        self._state = _State.KILLED
        self._signal(signal.SIGKILL)
        self._later(OUTPUT_GRACE, self._give_up)

    def _give_up(self) -> None:
        # Only a process stuck in the kernel or running as somebody else gets here.
        if self._status is None:
            log.warning("process %d could not be killed and is left behind", self._group)
            self._status = -signal.SIGKILL
        self._close_outputs()
        self._finish()

    def _signal(self, number: int) -> None:
        """Signal the whole group."""
        try:
            os.killpg(self._group, number)
        except ProcessLookupError:
            # Between its spawn and setsid there is no such group yet. Until it is reaped, the
            # number is certainly its own.
            if self._status is None:
                os.kill(self._group, number)
        except PermissionError as error:
            log.warning("cannot send signal %d to process group %d: %s", number, self._group, error)

    def _group_lives(self) -> bool:
        try:
            os.killpg(self._group, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    def _close_outputs(self) -> None:
        for fd in _OUTPUTS:
            self._process.closeChildFD(fd)

    def _settle(self) -> None:
        """Finish, but if the group is being ended, only when all of it is gone."""
        if self._state is _State.ENDING and self._group_lives():
            self._later(_GROUP_POLL, self._settle)
        else:
            self._finish()

    def _finish(self) -> None:
        if self._state is _State.OVER:
            return
        self._state = _State.OVER
        for timer in self._timers:
            if timer.active():
                timer.cancel()
        if self.result.called:  # cancelled by who asked for it
            return
        assert self._status is not None
        stdout, stderr = (bytes(self._output[fd][-self._output_max :]) for fd in _OUTPUTS)
        self.result.callback(
            ProcessResult(
                status=self._status,
                stdout=stdout,
                stderr=stderr,
                timed_out=self._timed_out,
                seconds=Seconds(self._reactor.seconds() - self._began),
            )
        )
