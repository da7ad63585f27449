"""Runs hooks, each plugin on its own.

What one plugin does or fails to do never reaches another plugin, nor the node: every hook is called
in a turn of its own, in time limits, and all it raises ends here. Events wait in a mailbox for each
plugin. Queries do not wait: whoever asks has little time.
"""

import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from twisted.internet.defer import Deferred, DeferredLock, gatherResults, succeed
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.task import deferLater

from serfd.agent import Agent
from serfd.config import Seconds
from serfd.errors import CommandError
from serfd.hooks.loader import LoadedPlugin, implementations
from serfd.serf.events import Event, Member, MemberEvent, Query, UserEvent

MAILBOX_SIZE = 1024
"""So many events may wait for a plugin; then the oldest is dropped."""

QUERIES_MAX = 64
"""So many queries are put to plugins at once; more are left unanswered."""

BLOCKING_MAX = Seconds(0.1)
"""A hook that holds the reactor longer than this is named in the log."""

_MEMBERS_NAMED = 3

log = logging.getLogger(__name__)


class PluginState(Enum):
    """Where a plugin is in its life."""

    LOADED = "loaded"
    STARTING = "starting"
    RUNNING = "running"
    FAILED = "failed"
    STOPPING = "stopping"
    STOPPED = "stopped"


_NEXT = {
    PluginState.LOADED: {PluginState.STARTING, PluginState.STOPPED},
    PluginState.STARTING: {PluginState.RUNNING, PluginState.FAILED},
    PluginState.RUNNING: {PluginState.STOPPING},
    PluginState.FAILED: {PluginState.STOPPED},
    PluginState.STOPPING: {PluginState.STOPPED},
    PluginState.STOPPED: set(),
}


@dataclass(frozen=True, slots=True)
class PluginStats:
    """One plugin's numbers since it was built."""

    state: str
    source: str
    calls: int
    """Hooks called, `start` and `stop` included."""
    errors: int
    """Of them, those that raised."""
    timeouts: int
    """Of them, those that were cancelled because their time was up."""
    dropped: int
    """Events never delivered: the mailbox was full, the plugin had to stop or did not start."""
    waiting: int
    """Events in the mailbox now."""


class PluginHost:
    """The plugins of one daemon, from start to stop."""

    def __init__(
        self,
        agent: Agent,
        clock: IReactorTime,
        *,
        hook_timeout: Seconds,
        seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        """`seconds` is what blocking hooks are measured with."""
        self._agent = agent
        self._clock = clock
        self._hook_timeout = hook_timeout
        self._seconds = seconds
        self._hosted: dict[str, _Hosted] = {}
        self._answerers: Sequence[_Hosted] = ()
        """Those that answer queries, in the order to ask them."""
        self._asking = 0
        self._overflowing = False
        self.unanswered = 0
        """Queries that no plugin was asked, because too many were under way."""
        self._changing = DeferredLock()
        self._unsubscribe: Callable[[], None] | None = None
        self._stopped = False

    def attach(self, loaded: Sequence[LoadedPlugin]) -> None:
        """Take these plugins. Events from now on are kept for each until its start is done."""
        assert self._unsubscribe is None, "attached twice"
        self._unsubscribe = self._agent.subscribe(self._event_happened)
        self._let_be({plugin.name: self._host(plugin) for plugin in loaded})

    def start(self) -> Deferred[None]:
        """Start them in their order, each without waiting for those before; fires when all have.

        A plugin whose start fails or takes longer than `hook_timeout` is logged and stays without
        events. Never fails.
        """
        return self.reload([hosted.loaded for hosted in self._hosted.values()])

    def reload(self, loaded: Sequence[LoadedPlugin]) -> Deferred[None]:
        """Let these be the plugins; fires when all changes are done. Never fails.

        Those that run already, as the same objects, are left alone. Of the others the old ones
        stop, then the new ones start. One that takes the place of another of its name also takes
        over the events that wait for it.
        """
        return self._changing.run(lambda: Deferred.fromCoroutine(self._replace(loaded)))

    def stop(self) -> Deferred[None]:
        """No more events; stop the plugins in reverse order. Fires within `hook_timeout`.

        Events that wait are still delivered, for half of that time at most. Never fails.
        """
        return Deferred.fromCoroutine(self._stop())

    def kept(self) -> list[LoadedPlugin]:
        """Those that a reload may leave as they are: all but the failed, which get a new try."""
        return [
            hosted.loaded
            for hosted in self._hosted.values()
            if hosted.state is not PluginState.FAILED
        ]

    def stats(self) -> dict[str, PluginStats]:
        """Each plugin's numbers, by its name."""
        return {name: hosted.stats() for name, hosted in self._hosted.items()}

    def _event_happened(self, event: Event) -> None:
        if isinstance(event, Query):
            self._query_heard(event)
            return
        occasion = _occasion(event)
        for hosted in self._hosted.values():
            hosted.put(occasion)

    def _query_heard(self, query: Query) -> None:
        if not self._answerers:
            return
        if self._asking >= QUERIES_MAX:
            self.unanswered += 1
            if not self._overflowing:
                self._overflowing = True
                log.warning("%d queries are with plugins, more are left unanswered", QUERIES_MAX)
            return
        self._asking += 1
        _ = Deferred.fromCoroutine(self._ask(query)).addErrback(
            lambda failure: log.error("queries: %s", failure.getTraceback())
        )

    async def _ask(self, query: Query) -> None:
        """Put it to one plugin after the other, until one has an answer or its time is up."""
        try:
            await deferLater(self._clock, 0)  # a hook is never called inside the listener
            occasion = _occasion(query)
            for hosted in self._answerers:
                left = query.deadline - self._clock.seconds()
                if left <= 0:
                    return
                answer = await hosted.ask(occasion, left)
                if answer is not None:
                    await self._respond(hosted, query, answer)
                    return
        finally:
            self._asking -= 1
            if not self._asking:
                self._overflowing = False

    async def _respond(self, hosted: "_Hosted", query: Query, answer: bytes) -> None:
        try:
            await self._agent.respond(query, answer)
        except CommandError as error:
            log.warning(
                "plugin %s: Failed to respond to query %r: %s",
                hosted.loaded.name, f"query: {query.name}", error,
            )  # fmt: skip

    def _let_be(self, hosted: dict[str, "_Hosted"]) -> None:
        """Let these be the plugins from now on."""
        self._hosted = hosted
        answering = implementations([each.loaded for each in hosted.values()], "query")
        self._answerers = [hosted[plugin.name] for plugin in answering]

    def _host(self, plugin: LoadedPlugin) -> "_Hosted":
        return _Hosted(plugin, self._clock, self._hook_timeout, self._seconds)

    async def _replace(self, loaded: Sequence[LoadedPlugin]) -> None:
        if self._stopped:
            return
        before = self._hosted
        running = {id(hosted.loaded): hosted for hosted in before.values()}
        self._let_be(
            {plugin.name: running.get(id(plugin)) or self._host(plugin) for plugin in loaded}
        )
        leaving = [old for name, old in before.items() if self._hosted.get(name) is not old]
        for old in leaving:
            if old.loaded.name in self._hosted:
                for occasion in old.empty_mailbox():
                    self._hosted[old.loaded.name].put(occasion)
        await self._close(leaving)
        for old in leaving:
            old.loaded.forget()
        # A stop() that came meanwhile has left none of them.
        fresh = [new for new in self._hosted.values() if new.state is PluginState.LOADED]
        await _all(new.start() for new in _ordered(fresh, "start"))

    async def _stop(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        if self._unsubscribe is not None:
            self._unsubscribe()
        await self._close(list(self._hosted.values()))
        # A reload that was under way has stopped its old plugins by now, or is about to.
        await self._changing.run(lambda: None)

    async def _close(self, leaving: Sequence["_Hosted"]) -> None:
        """Within `hook_timeout`: half of it to finish what was begun, the rest to stop."""
        deadline = self._clock.seconds() + self._hook_timeout
        await _all(hosted.drain(self._hook_timeout / 2) for hosted in leaving)
        left = max(0.0, deadline - self._clock.seconds())
        await _all(hosted.stop(left) for hosted in _ordered(leaving[::-1], "stop"))


def _ordered(plugins: Sequence["_Hosted"], hook: str) -> list["_Hosted"]:
    """In the order to call `hook` in; those without it come last."""
    by_name = {hosted.loaded.name: hosted for hosted in plugins}
    first = implementations([hosted.loaded for hosted in plugins], hook)
    return [by_name.pop(plugin.name) for plugin in first] + list(by_name.values())


async def _all(steps: Iterable[Deferred[None]]) -> None:
    await gatherResults(list(steps))


class _Occasion(NamedTuple):
    """Why a hook is called."""

    hook: str
    passed: Mapping[str, object] = {}
    """Arguments by name; each implementation takes those it wants."""
    about: str = ""

    def __str__(self) -> str:
        """`member_join('n1', 'n2')`, for logs."""
        return self.hook + self.about


_START, _STOP = _Occasion("start"), _Occasion("stop")


def _occasion(event: Event) -> _Occasion:
    match event:
        case MemberEvent():
            hook = event.name.replace("-", "_")
            return _Occasion(hook, {"members": event.members}, _names(event.members))
        case UserEvent():
            return _Occasion("user_event", {"event": event}, f"({event.name!r})")
        case Query():
            return _Occasion("query", {"query": event}, f"({event.name!r} of {event.source!r})")


class _Ended(NamedTuple):
    """How a hook ended."""

    well: bool
    answer: bytes | None = None
    """What `query` gave."""


class _Hosted:
    """One plugin: its mailbox, one event at a time, queries beside them, its numbers."""

    def __init__(
        self,
        loaded: LoadedPlugin,
        clock: IReactorTime,
        hook_timeout: Seconds,
        seconds: Callable[[], float],
    ) -> None:
        self.loaded = loaded
        self.state = PluginState.LOADED
        self._clock = clock
        self._hook_timeout = hook_timeout
        self._seconds = seconds
        self._mailbox: deque[_Occasion] = deque()
        self._overflowing = False
        self._turn: IDelayedCall | None = None
        self._is_busy = False
        """Whether `start` or an event's hook is under way: the next event waits for its end."""
        self._under_way: dict[Deferred[_Ended], Callable[[], None]] = {}
        """What ends each hook under way, those for queries included."""
        self._is_leaving = False
        self._drained: Deferred[None] | None = None
        self._calls = self._errors = self._timeouts = self._dropped = 0

    def put(self, occasion: _Occasion) -> None:
        """An event for the mailbox; it is delivered in a later turn."""
        if occasion.hook not in self.loaded.hooks or self.state is PluginState.FAILED:
            return
        if len(self._mailbox) >= MAILBOX_SIZE:
            self._mailbox.popleft()
            self._dropped += 1
            if not self._overflowing:
                self._overflowing = True
                log.warning(
                    "plugin %s: %d events are waiting for it, the oldest are dropped",
                    self.loaded.name, MAILBOX_SIZE,
                )  # fmt: skip
        self._mailbox.append(occasion)
        self._schedule()

    def ask(self, occasion: _Occasion, limit: float) -> Deferred[bytes | None]:
        """Put a query to it, now, beside all else; gives its answer, `limit` seconds later at most.

        One that does not run, or is about to stop, has none.
        """
        if self.state is not PluginState.RUNNING or self._is_leaving:
            return succeed(None)

        def answered(ended: _Ended) -> bytes | None:
            self._check_drained()
            return ended.answer

        return self._call(occasion, limit).addCallback(answered)

    def empty_mailbox(self) -> list[_Occasion]:
        """Take out the events that wait."""
        waiting = list(self._mailbox)
        self._mailbox.clear()
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        return waiting

    def start(self) -> Deferred[None]:
        """Call `start`; events are delivered once it is done."""
        self._enter(PluginState.STARTING)
        self._is_busy = True
        return self._call(_START, self._hook_timeout).addCallback(self._started)

    def drain(self, limit: float) -> Deferred[None]:
        """Finish the hooks under way and deliver what waits; after `limit` seconds, drop it."""
        self._is_leaving = True
        if self.state is PluginState.LOADED:
            self._enter(PluginState.STOPPED)
            self._give_up()
        if self.state not in (PluginState.STARTING, PluginState.RUNNING):
            return succeed(None)
        drained: Deferred[None] = Deferred()
        self._drained = drained
        timer = self._clock.callLater(limit, self._give_up)
        self._check_drained()

        def done(result: None) -> None:
            if timer.active():
                timer.cancel()

        return drained.addCallback(done)

    def stop(self, limit: float) -> Deferred[None]:
        """Call `stop`, but only on a plugin whose start went well."""
        if self.state is not PluginState.RUNNING:
            if self.state is not PluginState.STOPPED:
                self._enter(PluginState.STOPPED)
            return succeed(None)
        self._enter(PluginState.STOPPING)
        return self._call(_STOP, limit).addCallback(lambda _: self._enter(PluginState.STOPPED))

    def stats(self) -> PluginStats:
        """Its numbers now."""
        return PluginStats(
            state=self.state.value,
            source=self.loaded.source,
            calls=self._calls,
            errors=self._errors,
            timeouts=self._timeouts,
            dropped=self._dropped,
            waiting=len(self._mailbox),
        )

    def _enter(self, state: PluginState) -> None:
        assert state in _NEXT[self.state], f"{self.state} → {state}"
        self.state = state

    def _started(self, ended: _Ended) -> None:
        self._is_busy = False
        if ended.well:
            self._enter(PluginState.RUNNING)
            self._schedule()
        else:
            self._enter(PluginState.FAILED)
            self._dropped += len(self.empty_mailbox())
            log.error("plugin %s: not started, it gets no events", self.loaded.name)
        self._check_drained()

    def _schedule(self) -> None:
        idle = self._turn is None and not self._is_busy
        if idle and self._mailbox and self.state is PluginState.RUNNING:
            self._turn = self._clock.callLater(0, self._deliver)

    def _deliver(self) -> None:
        self._turn = None
        occasion = self._mailbox.popleft()
        if not self._mailbox:
            self._overflowing = False
        self._is_busy = True
        _ = self._call(occasion, self._hook_timeout).addCallback(self._delivered)

    def _delivered(self, ended: _Ended) -> None:
        self._is_busy = False
        self._schedule()
        self._check_drained()

    def _check_drained(self) -> None:
        if self._drained is not None and not self._under_way and not self._mailbox:
            drained = self._drained
            self._drained = None
            drained.callback(None)

    def _give_up(self) -> None:
        """Drop what is not delivered yet, and end the hooks under way."""
        drained, self._drained = self._drained, None
        if waiting := self.empty_mailbox():
            self._dropped += len(waiting)
            log.warning(
                "plugin %s: stops, %d waiting events are dropped", self.loaded.name, len(waiting)
            )
        while self._under_way:  # each takes itself out, and the end of one may be that of another
            next(iter(self._under_way.values()))()
        # Only now, so that a plugin is not told to stop before its hooks are cancelled.
        if drained is not None:
            drained.callback(None)

    def _call(self, occasion: _Occasion, limit: float) -> Deferred[_Ended]:
        """Call one hook; gives how it ended, after `limit` seconds at the latest."""
        over: Deferred[_Ended] = Deferred()

        def finish(ended: _Ended) -> None:
            if over.called:
                return
            del self._under_way[over]
            if timer.active():
                timer.cancel()
            over.callback(ended)

        def end_call() -> None:
            self._timeouts += 1
            log.error(
                "plugin %s: %s was not done in time and is cancelled", self.loaded.name, occasion
            )
            # First the end, then the cancelling: a hook that resists it holds up nothing.
            finish(_Ended(well=False))
            try:
                running.cancel()
            except Exception:
                log.exception("plugin %s: cancelling %s failed", self.loaded.name, occasion)

        self._under_way[over] = end_call
        timer = self._clock.callLater(limit, end_call)
        running = Deferred.fromCoroutine(self._timed(self._run(occasion, over), occasion))
        _ = running.addCallback(finish)
        return over

    async def _run(self, occasion: _Occasion, over: Deferred[_Ended]) -> _Ended:
        """The call itself. What it raises after it was given up is no error any more."""
        implementation = self.loaded.hooks.get(occasion.hook)
        if implementation is None:
            return _Ended(well=True)
        self._calls += 1
        arguments = {name: occasion.passed[name] for name in implementation.arguments}
        try:
            result = implementation.function(**arguments)
            if isinstance(result, Awaitable):
                result = await result
            return _Ended(well=True, answer=_answer(result) if occasion.hook == "query" else None)
        # SystemExit: a plugin that calls sys.exit() would take its own mailbox with it.
        except (Exception, SystemExit):
            if over.called:
                log.debug("plugin %s: %s has ended", self.loaded.name, occasion, exc_info=True)
            else:
                self._errors += 1
                log.exception("plugin %s: %s failed", self.loaded.name, occasion)
            return _Ended(well=False)

    def _timed(
        self, steps: Coroutine[Any, Any, _Ended], occasion: _Occasion
    ) -> Generator[Any, Any, _Ended]:
        """Pass everything on to `steps` and back; tell of a step that blocks the reactor."""
        value: Any = None
        error: BaseException | None = None
        while True:
            began = self._seconds()
            try:
                awaited = steps.send(value) if error is None else steps.throw(error)
            except StopIteration as ended:
                how: _Ended = ended.value
                return how
            finally:
                took = self._seconds() - began
                if took > BLOCKING_MAX:
                    log.warning(
                        "plugin %s: %s blocked the daemon for %d ms; blocking work belongs in "
                        "agent.in_thread()",
                        self.loaded.name, occasion, took * 1000,
                    )  # fmt: skip
            try:
                value, error = (yield awaited), None
            except GeneratorExit:  # a call that was given up and forgotten
                steps.close()
                raise
            except BaseException as raised:  # noqa: BLE001
                error = raised


def _answer(result: object) -> bytes | None:
    """What `query` gave, as it is sent. Raises TypeError, and ValueError for no Unicode text."""
    match result:
        case None | bytes():
            return result
        case str():
            # The way texts from the network come in.
            return result.encode("utf-8", "surrogateescape")
        case _:
            kind = type(result).__name__
            raise TypeError(f"query gave a {kind}, expected bytes, str or None")


def _names(members: Sequence[Member]) -> str:
    """`('n1', 'n2', 'n3' and 7 more)`."""
    names = ", ".join(repr(member.name) for member in members[:_MEMBERS_NAMED])
    more = len(members) - _MEMBERS_NAMED
    return f"({names} and {more} more)" if more > 0 else f"({names})"
