"""Runs Serf's event scripts: programs for each event and query, as `event_handlers` says.

    [plugins.script]
    handlers_dir = "/etc/serfd/handlers.d"

runs those too that lie in its directories `member-failed`, `user:deploy`, `all` and so on.
"""

import itertools
import logging
import math
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from twisted.internet.defer import CancelledError, Deferred

from serfd.hooks import (
    Agent,
    CommandError,
    Member,
    Meta,
    Query,
    Seconds,
    Struct,
    UserEvent,
    hookimpl,
    inherited_environment,
    last_lines,
)

_FILTERS = (
    "*", "member-join", "member-leave", "member-failed", "member-update", "member-reap", "user",
    "query",
)  # fmt: skip
OUTPUT_MAX = 8192
"""Bytes kept of the end of what a script writes."""
SLOW = Seconds(1.0)

_SHELL = ("/bin/sh", "-c")
# What a query's script writes to stderr is part of the answer, and in its place there.
_SHELL_OF_QUERIES = ("/bin/sh", "-c", 'exec /bin/sh -c "$0" 2>&1')
_BACKUP = re.compile(r"\..*|.*~|#.*#|.*\.(bak|orig|rej|swp|dpkg-\w+|ucf-\w+|rpm\w+)")
_OPEN = "others may write to it"
_ESCAPES = str.maketrans({"\t": "\\t", "\n": "\\n"})

log = logging.getLogger("serfd.plugins.script")


class Handler(NamedTuple):
    """One entry of `event_handlers`."""

    filters: tuple[str, ...]
    script: str

    def times(self, event: str, name: str) -> int:
        """How often the script runs for an event: once for each filter that matches."""
        matching = ("*", event, f"{event}:", f"{event}:{name}")
        return sum(item in matching for item in self.filters)


class Run(NamedTuple):
    """A script that is to run."""

    handler: int | str
    """Its number among the handlers, or its directory in `handlers_dir`."""
    script: str
    event: str
    """Its kind in Serf's words: `member-join`, `user`, `query`."""
    what: Sequence[Member] | UserEvent | Query

    @property
    def argv(self) -> Sequence[str]:
        """The program to run."""
        if isinstance(self.handler, str):
            return [self.script]
        return [*(_SHELL_OF_QUERIES if self.event == "query" else _SHELL), self.script]

    @property
    def deadline(self) -> float:
        """When it is of no use any more, on the reactor's clock."""
        return self.what.deadline if isinstance(self.what, Query) else math.inf

    @property
    def input(self) -> bytes:
        """What the script reads. agent.md 6."""
        if not isinstance(self.what, UserEvent | Query):
            return member_lines(self.what)
        payload = self.what.payload
        return payload + b"\n" if payload and not payload.endswith(b"\n") else payload

    @property
    def variables(self) -> dict[str, str]:
        """What only a script for such an event has in its environment. agent.md 6."""
        match self.what:
            case UserEvent(ltime=ltime, name=name):
                return {"SERF_USER_EVENT": name, "SERF_USER_LTIME": str(ltime)}
            case Query(ltime=ltime, name=name):
                return {"SERF_QUERY_NAME": name, "SERF_QUERY_LTIME": str(ltime)}
            case _:
                return {}


class Line:
    """Those that wait for their turn to run the same script."""

    def __init__(self, length_max: int) -> None:
        self.running = 0
        self._length_max = length_max
        self._waiting: deque[tuple[int, Run]] = deque()
        self._dropped = 0
        """Since none waited the last time."""

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def since(self) -> int:
        """When the first in line came."""
        return self._waiting[0][0]

    def put(self, now: int, run: Run) -> None:
        """Let it wait; if too many do, the oldest is dropped."""
        if len(self._waiting) >= self._length_max:
            self._waiting.popleft()
            if not self._dropped:
                log.warning(
                    "Script '%s': %d runs wait for their turn, the oldest are dropped",
                    run.script, self._length_max,
                )  # fmt: skip
            self._dropped += 1
        self._waiting.append((now, run))

    def take(self, seconds: float) -> Run | None:
        """Take out the first that is of use still; it is so many `seconds` on the clock."""
        run: Run | None = None
        while self._waiting and run is None:
            _, first = self._waiting.popleft()
            if first.deadline > seconds:
                run = first
            else:
                self._dropped += 1
            if self._dropped and not self._waiting:
                log.warning(
                    "Script '%s': %d runs were dropped, none waits now",
                    first.script, self._dropped,
                )  # fmt: skip
                self._dropped = 0
        return run

    def clear(self) -> int:
        """Let nobody wait; gives how many did."""
        count = len(self._waiting)
        self._waiting.clear()
        return count


class Lines:
    """A line for each handler: what waits for one that hangs is not in the way of others."""

    def __init__(
        self,
        run: Callable[[Run], Coroutine[Any, Any, None]],
        *,
        seconds: Callable[[], float],
        of_one: int,
        together: float,
        queue: int,
    ) -> None:
        """`of_one` handler, so many run at once, of all `together`; `queue` wait for each.

        `seconds` is the clock of deadlines.
        """
        self._run = run
        self._seconds = seconds
        self._of_one = of_one
        self._together = together
        self._queue = queue
        self._lines: dict[int | str, Line] = {}
        self._workers: dict[Deferred[None], None] = {}
        """Each runs one script after the other until none is ready."""
        self._arrivals = itertools.count()
        self._all_done: Deferred[None] | None = None

    def put(self, run: Run) -> None:
        """Run it now, or when it is its turn: the oldest whose handler is free comes next."""
        line = self._lines.setdefault(run.handler, Line(self._queue))
        # Those that wait do so because their handler is busy, or all are: it overtakes none.
        if len(self._workers) >= self._together or line.running >= self._of_one:
            line.put(next(self._arrivals), run)
            return
        worker = Deferred.fromCoroutine(self._work(run))
        self._workers[worker] = None
        _ = worker.addErrback(
            lambda failure: log.error("Running scripts failed", extra={"details": failure})
        ).addCallback(lambda _: self._worker_ended(worker))

    async def all_done(self) -> None:
        """Return when none runs and none waits."""
        if self._workers:
            self._all_done = Deferred()
            await self._all_done

    def end(self) -> None:
        """End those that run, and do not begin those that wait."""
        if waiting := sum(line.clear() for line in self._lines.values()):
            log.warning("%d waiting scripts are not run, serfd stops", waiting)
        for worker in list(self._workers):
            worker.cancel()

    async def _work(self, first: Run) -> None:
        run: Run | None = first
        while run is not None:
            line = self._lines[run.handler]
            line.running += 1
            try:
                await self._run(run)
            finally:
                line.running -= 1
            run = self._next()

    def _next(self) -> Run | None:
        """Take out the oldest whose handler is free."""
        lines = self._lines.values()
        while ready := [line for line in lines if line and line.running < self._of_one]:
            if run := min(ready, key=lambda line: line.since).take(self._seconds()):
                return run
        return None

    def _worker_ended(self, worker: Deferred[None]) -> None:
        del self._workers[worker]
        if self._all_done is not None and not self._workers and not self._all_done.called:
            self._all_done.callback(None)


class DroppedIn:
    """The scripts in directories that are named after events, as they are at each event."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._told: dict[str, str] = {}
        """Why each path is left out, as the log has it."""

    def scripts(self, event: str, name: str) -> Iterator[tuple[str, str]]:
        """Directory and path of each, those of one directory in the order of their names."""
        # What is there is compared: a name from the network makes no path.
        there = self._look(self._root)
        for folder in ("all", event, f"{event}:{name}"):
            if folder in there:
                for script in self._look(os.path.join(self._root, folder)):
                    path = os.path.join(self._root, folder, script)
                    if self._is_fine(path, problem(path)):
                        yield folder, path

    def _look(self, folder: str) -> list[str]:
        """What is in it, in order; nothing if it cannot be used."""
        names: list[str] = []
        try:
            why = _OPEN if os.stat(folder).st_mode & stat.S_IWOTH else ""
            if not why:
                names = sorted(os.listdir(folder))
        except OSError as error:
            why = str(error.strerror)
        return names if self._is_fine(folder, why) else []

    def _is_fine(self, path: str, why: str) -> bool:
        """Whether there is no reason to leave it out; one is told once."""
        if not why:
            self._told.pop(path, None)
        elif self._told.get(path) != why:
            self._told[path] = why
            log.warning("%s is left out: %s", path, why)
        return not why


class Plugin:
    """Scripts of one handler run in the order of their events, those of several side by side.

    Those for queries run beside them: whoever asks has little time.
    """

    class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """The table [plugins.script]; `event_handlers` of the main table come first."""

        handlers: tuple[str, ...] = ()
        """Texts "FILTER=SCRIPT", as in `event_handlers`."""

        concurrency: Annotated[int, Meta(ge=1, le=64)] = 4
        """So many scripts run at once for events, and so many of each handler for queries."""

        timeout: Seconds = Seconds(60.0)
        """A script that runs longer, or past its query's deadline, is ended with all it started."""

        queue: Annotated[int, Meta(ge=1, le=100_000)] = 1024
        """So many runs of one handler may wait for their turn; then the oldest is dropped."""

        handlers_dir: str = ""
        """A directory with directories named after events; all scripts in those are run."""

        def __post_init__(self) -> None:
            """Check texts that have a form of their own."""
            for spec in self.handlers:
                parse_handler(spec)
            if self.timeout <= 0:
                raise ValueError("timeout must be longer than 0")
            if self.handlers_dir and not os.path.isabs(self.handlers_dir):
                raise ValueError(
                    f"handlers_dir is {self.handlers_dir!r}, expected a path that begins with '/'"
                )

    def __init__(self, agent: Agent, settings: Settings) -> None:
        self._agent = agent
        self._settings = settings
        self._handlers = [parse_handler(spec) for spec in settings.handlers]
        self._dropped_in = DroppedIn(settings.handlers_dir) if settings.handlers_dir else None
        at_once, queue = settings.concurrency, settings.queue
        self._events = Lines(
            self._invoke_for_event,
            seconds=self._seconds,
            of_one=1,
            together=at_once,
            queue=queue,
        )
        self._queries = Lines(
            self._invoke_for_query,
            seconds=self._seconds,
            of_one=at_once,
            together=math.inf,
            queue=queue,
        )

    @hookimpl
    def member_join(self, members: Sequence[Member]) -> None:
        """Run the scripts for `member-join`."""
        self._put(self._events, "member-join", "", members)

    @hookimpl
    def member_leave(self, members: Sequence[Member]) -> None:
        """Run the scripts for `member-leave`."""
        self._put(self._events, "member-leave", "", members)

    @hookimpl
    def member_failed(self, members: Sequence[Member]) -> None:
        """Run the scripts for `member-failed`."""
        self._put(self._events, "member-failed", "", members)

    @hookimpl
    def member_update(self, members: Sequence[Member]) -> None:
        """Run the scripts for `member-update`."""
        self._put(self._events, "member-update", "", members)

    @hookimpl
    def member_reap(self, members: Sequence[Member]) -> None:
        """Run the scripts for `member-reap`."""
        self._put(self._events, "member-reap", "", members)

    @hookimpl
    def user_event(self, event: UserEvent) -> None:
        """Run the scripts for `user`."""
        self._put(self._events, "user", event.name, event)

    # Scripts are told of every query, whoever answers it. They answer by themselves: the first
    # that has written something is heard, and no plugin waits for them.
    @hookimpl(tryfirst=True)
    def query(self, query: Query) -> None:
        """Run the scripts for `query`."""
        self._put(self._queries, "query", query.name, query)

    @hookimpl
    def events_lost(self, count: int) -> None:
        """Say so: no script hears of them."""
        log.warning("%d user events were dropped, no script is run for them", count)

    @hookimpl
    async def stop(self) -> None:
        """Let all that run and wait finish; end them when the time for that is up."""
        try:
            await self._events.all_done()
            await self._queries.all_done()
        except CancelledError:
            self._events.end()
            self._queries.end()
            raise

    def _put(
        self, lines: Lines, event: str, name: str, what: Sequence[Member] | UserEvent | Query
    ) -> None:
        for number, handler in enumerate(self._handlers):
            for _ in range(handler.times(event, name)):
                lines.put(Run(number, handler.script, event, what))
        if self._dropped_in is not None:
            for folder, script in self._dropped_in.scripts(event, name):
                lines.put(Run(folder, script, event, what))

    def _seconds(self) -> float:
        # Not before it runs: who only checks a configuration has no reactor.
        seconds: float = self._agent.reactor.seconds()
        return seconds

    async def _invoke_for_event(self, run: Run) -> None:
        await self._invoke(run, self._settings.timeout)

    async def _invoke_for_query(self, run: Run) -> None:
        """Run it, but not after the query's deadline; what it writes is the answer."""
        assert isinstance(run.what, Query)
        left = max(0.0, run.deadline - self._seconds())
        output = await self._invoke(run, Seconds(min(left, self._settings.timeout)))
        if output:
            try:
                await self._agent.respond(run.what, output)
            except CommandError as error:
                name = f"query: {run.what.name}"
                log.warning("Failed to respond to query %r: %s", name, error)

    async def _invoke(self, run: Run, timeout: Seconds) -> bytes:
        """Run the script; gives what it wrote, or nothing if it failed."""
        script = run.script
        try:
            result = await self._agent.run(
                run.argv,
                stdin=run.input,
                env=environment(run.event, self._agent.name, self._agent.tags) | run.variables,
                timeout=timeout,
                output_max=OUTPUT_MAX,
            )
        except (OSError, ValueError) as error:
            log.error("Error invoking script '%s': %s", script, error)
            return b""
        except CancelledError:
            log.error("Error invoking script '%s': ended because serfd stops", script)
            return b""
        self._agent.metrics.sample(f"invoke.{script}", result.seconds)
        log.debug("Event '%s' script output: %s", run.event, _text(result.stdout))
        if result.seconds > SLOW:
            log.warning("Script '%s' slow, execution exceeding 1s", script)
        ended_well = result.status == 0 and not result.timed_out
        lost_answer = result.stdout if run.event == "query" and not ended_well else b""
        for line in last_lines(lost_answer + result.stderr):
            log.log(logging.INFO if ended_well else logging.WARNING, "'%s': %s", script, line)
        if result.timed_out:
            log.error("Error invoking script '%s': ended after %gs", script, round(timeout, 1))
        elif not ended_well:
            log.error("Error invoking script '%s': %s", script, result.status_text)
        return result.stdout if ended_well else b""


def parse_handler(spec: str) -> Handler:
    """`FILTER=SCRIPT`, or `SCRIPT` for all events. Raises ValueError. agent.md 6."""
    before, equals, script = spec.partition("=")
    if not equals:
        return Handler(("*",), spec)
    filters = tuple((before or "*").split(","))
    for item in filters:
        if item not in _FILTERS and not item.startswith(("user:", "query:")):
            raise ValueError(f"Invalid event script: Event '{item}' invoking '{script}'")
    return Handler(filters, script)


def problem(path: str) -> str:
    """Why the file is not run; empty: it is."""
    if _BACKUP.fullmatch(os.path.basename(path)):
        return "it is hidden, or a backup"
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return str(error.strerror)
    if not stat.S_ISREG(mode):
        return "it is no file"
    if mode & stat.S_IWOTH:
        return _OPEN
    return "" if os.access(path, os.X_OK) else "it is not executable"


def environment(event: str, name: str, tags: Mapping[str, str]) -> dict[str, str]:
    """A script's environment: serfd's, and what Serf adds. agent.md 6."""
    return {
        **inherited_environment(),
        "SERF_EVENT": event,
        "SERF_SELF_NAME": name,
        "SERF_SELF_ROLE": tags.get("role", ""),
        **{f"SERF_TAG_{variable_name(tag)}": value for tag, value in tags.items()},
    }


def variable_name(tag: str) -> str:
    """`my-tag.x` → `MY_TAG_X`."""
    # One character at a time, as Go does it: an upper case of two letters is none.
    upper = "".join(c.upper() if len(c.upper()) == 1 else c for c in tag)
    return re.sub(r"[^A-Z0-9_]", "_", upper)


def member_lines(members: Sequence[Member]) -> bytes:
    """What a script reads: name, address, role and tags of each member, a line for each."""
    return "".join(map(_member_line, members)).encode("utf-8", "surrogateescape")


def _member_line(member: Member) -> str:
    tags = ",".join(f"{key}={value}" for key, value in member.tags.items())
    name, role, tags = (
        text.translate(_ESCAPES) for text in (member.name, member.tags.get("role", ""), tags)
    )
    return f"{name}\t{member.ip}\t{role}\t{tags}\n"


def _text(output: bytes) -> str:
    return output.decode("utf-8", "backslashreplace")
