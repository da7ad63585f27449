"""Runs Serf's event scripts: a program for each membership event, as `event_handlers` says."""

import logging
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, NamedTuple

from twisted.internet.defer import CancelledError, Deferred

from serfd.hooks import Agent, Member, Meta, ProcessResult, Seconds, Struct, hookimpl

MEMBER_EVENTS = ("member-join", "member-leave", "member-failed", "member-update", "member-reap")
OUTPUT_MAX = 8192
"""Bytes kept of the end of what a script writes."""
SLOW = Seconds(1.0)
STDERR_LINES_MAX = 20

_ESCAPES = str.maketrans({"\t": "\\t", "\n": "\\n"})
# What systemd tells serfd is not for the scripts: one of them could keep the watchdog quiet.
_NOT_PASSED_ON = re.compile(r"NOTIFY_SOCKET|WATCHDOG_.*|LISTEN_.*")

log = logging.getLogger("serfd.plugins.script")


class Handler(NamedTuple):
    """One entry of `event_handlers`."""

    filters: tuple[str, ...]
    script: str

    def times(self, event: str) -> int:
        """How often the script runs for a member event: once for each filter that matches."""
        return sum(item in ("*", event) for item in self.filters)


class Run(NamedTuple):
    """A script that is to run."""

    handler: int
    event: str
    members: Sequence[Member]


class Plugin:
    """Scripts of one handler run in the order of their events, those of several side by side."""

    class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """The table [plugins.script]; `event_handlers` of the main table come first."""

        handlers: tuple[str, ...] = ()
        """Texts "FILTER=SCRIPT", as in `event_handlers`."""

        concurrency: Annotated[int, Meta(ge=1, le=64)] = 4
        """So many scripts run at once."""

        timeout: Seconds = Seconds(60.0)
        """A script that runs longer is ended, with all it has started."""

        queue: Annotated[int, Meta(ge=1, le=100_000)] = 1024
        """So many scripts may wait for their turn; then the oldest is dropped."""

        def __post_init__(self) -> None:
            """Check texts that have a form of their own."""
            for spec in self.handlers:
                parse_handler(spec)
            if self.timeout <= 0:
                raise ValueError("timeout must be longer than 0")

    def __init__(self, agent: Agent, settings: Settings) -> None:
        self._agent = agent
        self._settings = settings
        self._handlers = [parse_handler(spec) for spec in settings.handlers]
        self._waiting: deque[Run] = deque()
        self._running: dict[int, Deferred[ProcessResult]] = {}
        """Each handler's script that runs now."""
        self._dropped = 0
        """Since none waited the last time."""
        self._all_done: Deferred[None] | None = None
        later = [h.script for h in self._handlers for item in h.filters if _is_later(item)]
        if later:
            log.warning(
                "user events and queries do not run scripts yet: %s",
                ", ".join(repr(script) for script in dict.fromkeys(later)),
            )

    @hookimpl
    def member_join(self, members: Sequence[Member]) -> None:
        """Run the scripts for `member-join`."""
        self._add("member-join", members)

    @hookimpl
    def member_leave(self, members: Sequence[Member]) -> None:
        """Run the scripts for `member-leave`."""
        self._add("member-leave", members)

    @hookimpl
    def member_failed(self, members: Sequence[Member]) -> None:
        """Run the scripts for `member-failed`."""
        self._add("member-failed", members)

    @hookimpl
    def member_update(self, members: Sequence[Member]) -> None:
        """Run the scripts for `member-update`."""
        self._add("member-update", members)

    @hookimpl
    def member_reap(self, members: Sequence[Member]) -> None:
        """Run the scripts for `member-reap`."""
        self._add("member-reap", members)

    @hookimpl
    async def stop(self) -> None:
        """Let all that run and wait finish; end them when the time for that is up."""
        if not self._running:
            return
        self._all_done = Deferred()
        try:
            await self._all_done
        except CancelledError:
            if self._waiting:
                log.warning("%d waiting scripts are not run, serfd stops", len(self._waiting))
                self._waiting.clear()
            for running in list(self._running.values()):
                running.cancel()
            raise

    def _add(self, event: str, members: Sequence[Member]) -> None:
        for number, handler in enumerate(self._handlers):
            for _ in range(handler.times(event)):
                self._wait(Run(number, event, members))
        while len(self._running) < self._settings.concurrency and (run := self._next()):
            _ = Deferred.fromCoroutine(self._work(run)).addErrback(
                lambda failure: log.error("scripts: %s", failure.getTraceback())
            )

    def _wait(self, run: Run) -> None:
        if len(self._waiting) >= self._settings.queue:
            self._waiting.popleft()
            if not self._dropped:
                log.warning(
                    "%d scripts wait for their turn, the oldest are dropped", self._settings.queue
                )
            self._dropped += 1
        self._waiting.append(run)

    def _next(self) -> Run | None:
        """Take out the oldest whose handler does not run just now."""
        for place, run in enumerate(self._waiting):
            if run.handler not in self._running:
                del self._waiting[place]
                if self._dropped and not self._waiting:
                    log.warning("%d scripts were dropped, none waits now", self._dropped)
                    self._dropped = 0
                return run
        return None

    async def _work(self, first: Run) -> None:
        """Run one after the other until none is ready."""
        run: Run | None = first
        while run is not None:
            await self._invoke(run)
            run = self._next()
        if self._all_done is not None and not self._running and not self._all_done.called:
            self._all_done.callback(None)

    async def _invoke(self, run: Run) -> None:
        script = self._handlers[run.handler].script
        try:
            running = self._agent.run(
                ["/bin/sh", "-c", script],
                stdin=member_lines(run.members),
                env=environment(run.event, self._agent.name, self._agent.tags),
                timeout=self._settings.timeout,
                output_max=OUTPUT_MAX,
            )
            self._running[run.handler] = running
            result = await running
        except (OSError, ValueError) as error:
            log.error("Error invoking script '%s': %s", script, error)
            return
        except CancelledError:
            log.error("Error invoking script '%s': ended because serfd stops", script)
            return
        finally:
            self._running.pop(run.handler, None)
        log.debug("Event '%s' script output: %s", run.event, _text(result.stdout))
        if result.seconds > SLOW:
            log.warning("Script '%s' slow, execution exceeding 1s", script)
        ended_well = result.status == 0 and not result.timed_out
        for line in _last_lines(_text(result.stderr)):
            log.log(logging.INFO if ended_well else logging.WARNING, "'%s': %s", script, line)
        if result.timed_out:
            log.error("Error invoking script '%s': ended after %gs", script, self._settings.timeout)
        elif not ended_well:
            log.error("Error invoking script '%s': %s", script, result.status_text)


def parse_handler(spec: str) -> Handler:
    """`FILTER=SCRIPT`, or `SCRIPT` for all events. Raises ValueError. agent.md 6."""
    before, equals, script = spec.partition("=")
    if not equals:
        return Handler(("*",), spec)
    filters = tuple((before or "*").split(","))
    for item in filters:
        if item not in ("*", *MEMBER_EVENTS) and not _is_later(item):
            raise ValueError(f"Invalid event script: Event '{item}' invoking '{script}'")
    return Handler(filters, script)


def environment(event: str, name: str, tags: Mapping[str, str]) -> dict[str, str]:
    """A script's environment: serfd's, and what Serf adds. agent.md 6."""
    passed_on = {
        key: value for key, value in os.environ.items() if not _NOT_PASSED_ON.fullmatch(key)
    }
    return {
        **passed_on,
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


def _is_later(item: str) -> bool:
    return item in ("user", "query") or item.startswith(("user:", "query:"))


def _text(output: bytes) -> str:
    return output.decode("utf-8", "backslashreplace")


def _last_lines(text: str) -> Iterator[str]:
    lines = text.splitlines()
    if len(lines) > STDERR_LINES_MAX:
        yield f"({len(lines) - STDERR_LINES_MAX} lines are left out)"
    for line in lines[-STDERR_LINES_MAX:]:
        yield "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
