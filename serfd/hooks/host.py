"""Runs hooks, each plugin on its own.

What one plugin does or fails to do never reaches another plugin, nor the node: every hook is called
in a turn of its own, in time limits, and all it raises ends here. Events wait in a mailbox for each
plugin. Queries do not wait: whoever asks has little time.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from functools import partial
from typing import Any, NamedTuple

from twisted.internet.defer import Deferred, DeferredLock, gatherResults, succeed
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.task import deferLater
from twisted.python.failure import Failure

from serfd.agent import Agent, PluginStats
from serfd.config import Seconds
from serfd.errors import CommandError, ConfigError
from serfd.hooks.loader import LoadedPlugin, implementations
from serfd.hooks.mailbox import MAILBOX_SIZE, Journal, Letter, Lost, Mailbox
from serfd.hooks.stall import StallWatch
from serfd.serf.events import Event, Member, MemberEvent, Query, UserEvent

QUERIES_MAX = 64
"""So many queries are put to plugins at once; more are left unanswered."""

BLOCKING_MAX = Seconds(0.1)
"""A hook that holds the reactor longer than this is named in the log."""

SLICE = Seconds(0.005)
"""For so long a plugin gets one waiting event after the other before others have their turn."""

FAILURES_MAX = 3
"""After so many calls in a row that went wrong, a plugin rests before the next."""
REST_MIN, REST_MAX = Seconds(1.0), Seconds(60.0)
"""It rests the longer the more went wrong, from and up to."""
ERROR_MAX = 200
"""Characters of an error that are shown."""

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
    PluginState.FAILED: {PluginState.STARTING, PluginState.STOPPED},
    PluginState.STOPPING: {PluginState.STOPPED},
    PluginState.STOPPED: set(),
}


class PluginHost:
    """The plugins of one daemon, from start to stop."""

    def __init__(
        self,
        agent: Agent,
        clock: IReactorTime,
        *,
        hook_timeout: Seconds,
        seconds: Callable[[], float] = time.monotonic,
        journal: Callable[[LoadedPlugin], Journal] | None = None,
    ) -> None:
        """`seconds` is what blocking hooks are measured with.

        `journal` opens what keeps the mailbox of a durable plugin; it raises ConfigError.
        """
        self._agent = agent
        self._clock = clock
        self._hook_timeout = hook_timeout
        self._watch = StallWatch(BLOCKING_MAX, seconds)
        self._journal = journal
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

        A plugin whose start fails or takes longer than `hook_timeout` is started again later; its
        events wait for it. Never fails.
        """
        return self.reload([hosted.loaded for hosted in self._hosted.values()])

    def reload(self, loaded: Sequence[LoadedPlugin]) -> Deferred[None]:
        """Let these be the plugins; fires when all changes are done. Never fails.

        Those that run already, as the same objects, are left alone, or told of their new settings.
        Of the others the old ones stop, then the new ones start. One that takes the place of
        another of its name also takes over the events that wait for it.
        """
        return self._changing.run(lambda: Deferred.fromCoroutine(self._replace(loaded)))

    def stop(self) -> Deferred[None]:
        """No more events; stop the plugins in reverse order. Fires within `hook_timeout`.

        Events that wait are still delivered, for half of that time at most. Never fails.
        """
        return Deferred.fromCoroutine(self._stop())

    def kept(self) -> list[LoadedPlugin]:
        """Those that a reload may leave as they are: all but the failed, which get a new try."""
        return [hosted.loaded for hosted in self._hosted.values() if not hosted.has_failed]

    def stats(self) -> list[PluginStats]:
        """Each plugin's numbers, in the order of the configuration."""
        return [hosted.stats() for hosted in self._hosted.values()]

    def busy(self) -> list[str]:
        """Whose hooks are under way or will be called next: with an empty list, nothing is due."""
        busy = [name for name, hosted in self._hosted.items() if hosted.is_at_work]
        return busy or ["a query"] * bool(self._asking)

    def _event_happened(self, event: Event) -> None:
        if isinstance(event, Query):
            self._query_heard(event)
            return
        for hosted in self._hosted.values():
            hosted.put(event)

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
            lambda failure: log.error("Asking plugins failed", extra={"details": failure})
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

    def _host(self, plugin: LoadedPlugin, old: "_Hosted | None" = None) -> "_Hosted":
        if old is not None and old.loaded.durable == plugin.durable:
            mailbox = old.hand_over()
        else:
            kept = self._journal(plugin) if plugin.durable and self._journal is not None else None
            mailbox = Mailbox(kept)
            for letter in old.empty_mailbox() if old is not None else ():
                mailbox.put(letter)
        return _Hosted(plugin, mailbox, self._agent, self._clock, self._hook_timeout, self._watch)

    async def _replace(self, loaded: Sequence[LoadedPlugin]) -> None:
        if self._stopped:
            return
        before = self._hosted
        running = {id(hosted.loaded.plugin): hosted for hosted in before.values()}
        after: dict[str, _Hosted] = {}
        changed: list[Deferred[None]] = []
        for plugin in loaded:
            hosted = running.get(id(plugin.plugin))
            if hosted is None:
                old = before.get(plugin.name)
                try:
                    hosted = self._host(plugin, old)
                except ConfigError as error:
                    log.error("plugin %s: its events do not outlive serfd: %s", plugin.name, error)
                    hosted = self._host(replace(plugin, durable=False), old)
            elif hosted.loaded is not plugin:
                changed.append(hosted.take_settings(plugin))
            after[plugin.name] = hosted
        self._let_be(after)
        leaving = [old for name, old in before.items() if after.get(name) is not old]
        await self._close(leaving)
        in_use = {id(hosted.loaded.module) for hosted in after.values()}
        for old in leaving:
            if id(old.loaded.module) not in in_use:
                old.loaded.forget()
        # A stop() that came meanwhile has left none of them.
        fresh = [new for new in self._hosted.values() if new.state is PluginState.LOADED]
        await _all([*changed, *(new.start() for new in _ordered(fresh, "start"))])

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


def _hook(event: MemberEvent | UserEvent) -> str:
    return event.name.replace("-", "_") if isinstance(event, MemberEvent) else "user_event"


def _occasion(event: Letter | Query) -> _Occasion:
    match event:
        case MemberEvent():
            return _Occasion(_hook(event), {"members": event.members}, _names(event.members))
        case UserEvent():
            return _Occasion(_hook(event), {"event": event}, f"({event.name!r})")
        case Lost(count):
            return _Occasion("events_lost", {"count": count}, f"({count})")
        case Query():
            return _Occasion("query", {"query": event}, f"({event.name!r} of {event.source!r})")


class _Ended(NamedTuple):
    """How a hook ended."""

    well: bool
    answer: bytes | None = None
    """What `query` gave."""
    in_time: bool = True


class _Streak:
    """Calls that went wrong, one after the other."""

    def __init__(self, free: int) -> None:
        """After `free` of them there is a rest before the next."""
        self._free = free
        self.length = 0

    @property
    def rest(self) -> float:
        """Seconds until the next call may come."""
        over = self.length - self._free
        return min(REST_MIN * 2.0 ** min(over, 10), REST_MAX) if over >= 0 else 0.0


class _Hosted:
    """One plugin: its mailbox, one event at a time, queries beside them, its numbers."""

    def __init__(
        self,
        loaded: LoadedPlugin,
        mailbox: Mailbox,
        agent: Agent,
        clock: IReactorTime,
        hook_timeout: Seconds,
        watch: StallWatch,
    ) -> None:
        self.loaded = loaded
        self.mailbox = mailbox
        self.state = PluginState.LOADED
        self.clock = clock
        self._metrics = agent.metrics
        self._calls_name = f"plugin.calls.{loaded.name}"
        self._waiting_name = f"plugin.waiting.{loaded.name}"
        self._hook_timeout = loaded.hook_timeout or hook_timeout
        loaded.agent.hook_timeout = self._hook_timeout
        self._watch = watch
        self._turn: IDelayedCall | None = None
        self._is_busy = False
        """Whether `start` or an event's hook is under way: the next event waits for its end."""
        self._reload: tuple[LoadedPlugin, Deferred[None]] | None = None
        """New settings, to be told before the next event."""
        self._reload_failed = False
        """Whether it may have other settings than it should, or some of both."""
        self._under_way: dict[Deferred[_Ended], Callable[[], None]] = {}
        """What ends each hook under way, those for queries included."""
        self._is_leaving = False
        self._gives_away = False
        """Whether what waits is another's already."""
        self._drained: Deferred[None] | None = None
        self._starts = _Streak(1)
        self._events = _Streak(FAILURES_MAX)
        self._queries = _Streak(FAILURES_MAX)
        self._asked_again_at = 0.0
        self._told_lost = 0
        self._calls = self._errors = self._timeouts = self._dropped = 0
        self._busy_time = 0.0
        self._last_error = ""

    def put(self, event: MemberEvent | UserEvent) -> None:
        """An event for the mailbox; it is delivered in a later turn."""
        if _hook(event) not in self.loaded.hooks:
            return
        lost = self.mailbox.lost
        self.mailbox.put(event)
        if self.mailbox.lost > lost:
            self._metrics.count(f"plugin.lost.{self.loaded.name}")
            if not self._told_lost:
                log.warning(
                    "plugin %s: %d events are waiting for it, the oldest are dropped",
                    self.loaded.name, MAILBOX_SIZE,
                )  # fmt: skip
            self._told_lost += 1
        self._count_waiting()
        self._schedule()

    def ask(self, occasion: _Occasion, limit: float) -> Deferred[bytes | None]:
        """Put a query to it, now, beside all else; gives its answer, `limit` seconds later at most.

        One that does not run, is about to stop, or rests after failures has none.
        """
        if (
            self.state is not PluginState.RUNNING
            or self._is_leaving
            or self.clock.seconds() < self._asked_again_at
        ):
            return succeed(None)

        def answered(ended: _Ended) -> bytes | None:
            # A deadline that is near is nobody's fault.
            if ended.well or ended.in_time:
                self._note(self._queries, ended)
                self._asked_again_at = self.clock.seconds() + self._queries.rest
            self._check_drained()
            return ended.answer

        return self._call(occasion, limit).addCallback(answered)

    def call(self, function: Callable[[], object]) -> "Deferred[object]":
        """Call a function of the plugin's beside its hooks, with all that they have."""
        name = getattr(function, "__name__", repr(function))
        called = self._call(_Occasion(name, about="()"), self._hook_timeout, function)

        def done(ended: _Ended) -> None:
            self._check_drained()

        return called.addCallback(done)

    def take_settings(self, loaded: LoadedPlugin) -> Deferred[None]:
        """Tell it of its new settings before its next event; fires when that is done."""
        done: Deferred[None] = Deferred()
        self.loaded = loaded
        self._reload = (loaded, done)
        self._schedule()
        return done

    def start(self) -> Deferred[None]:
        """Call `start`; events are delivered once it is done."""
        self._enter(PluginState.STARTING)
        self._is_busy = True
        return self._call(_START, self._hook_timeout).addCallback(self._started)

    def hand_over(self) -> Mailbox:
        """Deliver no more; gives the mailbox, for the one that takes this one's place."""
        self._gives_away = True
        self._end_turn()
        return self.mailbox

    def empty_mailbox(self) -> list[Letter]:
        """Take out all that wait."""
        self._end_turn()
        return self.mailbox.empty()

    def drain(self, limit: float) -> Deferred[None]:
        """Finish the hooks under way and deliver what waits; after `limit` seconds, give it up."""
        self._is_leaving = True
        self.loaded.agent.serve(None)
        if self.state not in (PluginState.STARTING, PluginState.RUNNING):
            self._end_turn()
            if self.state is not PluginState.STOPPED:
                self._enter(PluginState.STOPPED)
            self._give_up()
            return succeed(None)
        drained: Deferred[None] = Deferred()
        self._drained = drained
        timer = self.clock.callLater(limit, self._give_up)
        self._schedule()
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
            self._close_mailbox()
            return succeed(None)

        def stopped(ended: _Ended) -> None:
            self._enter(PluginState.STOPPED)
            self._close_mailbox()

        self._enter(PluginState.STOPPING)
        return self._call(_STOP, limit).addCallback(stopped)

    @property
    def is_at_work(self) -> bool:
        """Whether a hook is under way, or an event comes next."""
        is_due = self._turn is not None and self.state is PluginState.RUNNING
        return is_due or bool(self._under_way)

    @property
    def has_failed(self) -> bool:
        """Whether it could not start, or not take its settings: only a new one can help."""
        return self.state is PluginState.FAILED or self._reload_failed

    def stats(self) -> PluginStats:
        """Its numbers now."""
        failing = max(self._events.length, self._queries.length) >= FAILURES_MAX
        failing |= self.has_failed
        return PluginStats(
            name=self.loaded.name,
            state="failing" if failing else self.state.value,
            source=self.loaded.source,
            durable=self.loaded.durable,
            calls=self._calls,
            errors=self._errors,
            timeouts=self._timeouts,
            merged=self.mailbox.merged,
            lost=self.mailbox.lost + self._dropped,
            waiting=len(self.mailbox),
            seconds=self._busy_time,
            last_error=self._last_error,
        )

    def _count_waiting(self) -> None:
        self._metrics.gauge(self._waiting_name, len(self.mailbox))

    def _close_mailbox(self) -> None:
        if not self._gives_away:
            self._count_waiting()
            self.mailbox.close()

    def _enter(self, state: PluginState) -> None:
        assert state in _NEXT[self.state], f"{self.state} → {state}"
        self.state = state

    def _started(self, ended: _Ended) -> None:
        self._is_busy = False
        if self._is_leaving:
            # A start that was given up is not tried again.
            self._enter(PluginState.RUNNING if ended.well else PluginState.FAILED)
        elif ended.well:
            self._enter(PluginState.RUNNING)
            self._note(self._starts, ended)
            self.loaded.agent.serve(self)
            self._schedule()
        else:
            self._enter(PluginState.FAILED)
            self._starts.length += 1
            rest = self._starts.rest
            log.error("plugin %s: not started, tried again in %g s", self.loaded.name, rest)
            self._turn = self.clock.callLater(rest, self._start_again)
        self._check_drained()

    def _start_again(self) -> None:
        self._turn = None
        _ = self.start()

    def _note(self, streak: _Streak, ended: _Ended) -> None:
        """Keep count of how many went wrong in a row."""
        if not ended.well:
            streak.length += 1
            if streak.rest:
                log.warning(
                    "plugin %s: failing, %d calls in a row went wrong; the next comes in %g s",
                    self.loaded.name, streak.length, streak.rest,
                )  # fmt: skip
        elif streak.length:
            if streak.rest:
                log.info("plugin %s: works again", self.loaded.name)
            streak.length = 0

    def _schedule(self) -> None:
        idle = self._turn is None and not self._is_busy and self.state is PluginState.RUNNING
        if idle and (self._reload is not None or (self.mailbox and not self._gives_away)):
            # Who is about to stop does not rest.
            rest = 0.0 if self._is_leaving or self._reload is not None else self._events.rest
            self._turn = self.clock.callLater(rest, self._deliver)

    def _end_turn(self) -> None:
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None

    def _deliver(self) -> None:
        self._turn = None
        self._is_busy = True
        if self._reload is not None:
            (loaded, done), self._reload = self._reload, None
            occasion = _Occasion("reload", {"settings": loaded.settings})
            reloaded = self._call(occasion, self._hook_timeout).addCallback(self._reloaded)
            _ = reloaded.addCallback(done.callback)
            return
        until = self.clock.seconds() + SLICE
        while self._is_busy:
            letter = self.mailbox.take()
            self._count_waiting()
            ended = self._begin(_occasion(letter), self._hook_timeout)
            if not self.mailbox:
                self._told_lost = 0
            if isinstance(ended, Deferred):
                _ = ended.addCallback(self._delivered)
                return
            self._handled(ended)
            # Others get their turn, but not after each of a thousand events.
            self._is_busy = (
                len(self.mailbox) > 0
                and not self._events.rest
                and not self._gives_away
                and self.clock.seconds() < until
            )
        self._schedule()
        self._check_drained()

    def _reloaded(self, ended: _Ended) -> None:
        if ended.well:
            log.info("plugin %s: has taken its new settings", self.loaded.name)
        else:
            self._reload_failed = True
            log.error(
                "plugin %s: did not take its new settings, it may use the old ones; the next "
                "reload builds it anew",
                self.loaded.name,
            )
        self._is_busy = False
        self._schedule()
        self._check_drained()

    def _delivered(self, ended: _Ended) -> None:
        self._is_busy = False
        self._handled(ended)
        self._schedule()
        self._check_drained()

    def _handled(self, ended: _Ended) -> None:
        self.mailbox.handled()
        self._note(self._events, ended)

    def _check_drained(self) -> None:
        has_all = self._gives_away or not self.mailbox
        if self._drained is not None and not self._under_way and has_all:
            drained = self._drained
            self._drained = None
            drained.callback(None)

    def _give_up(self) -> None:
        """Drop what is not delivered yet, and end the hooks under way."""
        drained, self._drained = self._drained, None
        self._end_turn()
        if self.loaded.durable:
            self.mailbox.put_back()
        waiting = 0 if self._gives_away else len(self.mailbox)
        if waiting and self.loaded.durable:
            log.info("plugin %s: stops, %d waiting events are kept", self.loaded.name, waiting)
        elif waiting:
            self.mailbox.empty()
            self._dropped += waiting
            log.warning(
                "plugin %s: stops, %d waiting events are dropped", self.loaded.name, waiting
            )
        while self._under_way:  # each takes itself out, and the end of one may be that of another
            next(iter(self._under_way.values()))()
        # Only now, so that a plugin is not told to stop before its hooks are cancelled.
        if drained is not None:
            drained.callback(None)

    def _call(
        self, occasion: _Occasion, limit: float, function: Callable[[], object] | None = None
    ) -> Deferred[_Ended]:
        """Call one hook, or this function; gives how it ended, after `limit` seconds at most."""
        ended = self._begin(occasion, limit, function)
        return ended if isinstance(ended, Deferred) else succeed(ended)

    def _begin(
        self, occasion: _Occasion, limit: float, function: Callable[[], object] | None = None
    ) -> _Ended | Deferred[_Ended]:
        """As `_call`, but what has ended by now is given at once."""
        if function is None:
            implementation = self.loaded.hooks.get(occasion.hook)
            if implementation is None:
                return _Ended(well=True)
            passed = {name: occasion.passed[name] for name in implementation.arguments}
            function = partial(implementation.function, **passed)
        self._calls += 1
        self._metrics.count(self._calls_name)
        began = self._watch.begin()
        try:
            result = function()
            if not isinstance(result, Awaitable):
                return _ended(occasion, result)
        # SystemExit: a plugin that calls sys.exit() would take its own mailbox with it.
        except (Exception, SystemExit) as error:
            log.exception("plugin %s: %s failed", self.loaded.name, occasion)
            return self._raised(occasion, error)
        finally:
            self._measure(began, occasion)
        return self._wait_for(result, occasion, limit)

    def _wait_for(
        self, result: Awaitable[object], occasion: _Occasion, limit: float
    ) -> Deferred[_Ended]:
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
            self._failed(f"{occasion} was not done in time")
            log.error(
                "plugin %s: %s was not done in time and is cancelled", self.loaded.name, occasion
            )
            # First the end, then the cancelling: a hook that resists it holds up nothing.
            finish(_Ended(well=False, in_time=False))
            running.cancel()

        def not_cancelled(failure: Failure) -> None:
            log.error(
                "plugin %s: cancelling %s failed",
                self.loaded.name, occasion, extra={"details": failure},
            )  # fmt: skip

        self._under_way[over] = end_call
        timer = self.clock.callLater(limit, end_call)
        running = Deferred.fromCoroutine(
            self._timed(self._rest_of(result, occasion, over), occasion)
        )
        _ = running.addCallbacks(finish, not_cancelled)
        return over

    async def _rest_of(
        self, result: Awaitable[object], occasion: _Occasion, over: Deferred[_Ended]
    ) -> _Ended:
        """Wait for it. What it raises after it was given up is no error any more."""
        try:
            return _ended(occasion, await result)
        except (Exception, SystemExit) as error:
            if over.called:
                log.debug("plugin %s: %s has ended", self.loaded.name, occasion, exc_info=True)
                return _Ended(well=False)
            log.exception("plugin %s: %s failed", self.loaded.name, occasion)
            return self._raised(occasion, error)

    def _raised(self, occasion: _Occasion, error: BaseException) -> _Ended:
        self._errors += 1
        self._failed(f"{occasion}: {type(error).__name__}: {error}")
        return _Ended(well=False)

    def _measure(self, began: float, occasion: _Occasion) -> None:
        """A step is over: count its time, and tell if it blocked the reactor."""
        took, place = self._watch.end(began)
        self._busy_time += took
        if took > BLOCKING_MAX:
            log.warning(
                "plugin %s: %s blocked the daemon for %d ms; blocking work belongs in "
                "agent.in_thread()%s",
                self.loaded.name, occasion, took * 1000, place and ". It was here:",
                extra={"details": place},
            )  # fmt: skip

    def _failed(self, why: str) -> None:
        self._last_error = " ".join(why.split())[:ERROR_MAX]
        self._metrics.count(f"plugin.errors.{self.loaded.name}")

    def _timed(
        self, steps: Coroutine[Any, Any, _Ended], occasion: _Occasion
    ) -> Generator[Any, Any, _Ended]:
        """Pass everything on to `steps` and back; tell of a step that blocks the reactor."""
        value: Any = None
        error: BaseException | None = None
        while True:
            began = self._watch.begin()
            try:
                awaited = steps.send(value) if error is None else steps.throw(error)
            except StopIteration as ended:
                how: _Ended = ended.value
                return how
            finally:
                self._measure(began, occasion)
            try:
                value, error = (yield awaited), None
            except GeneratorExit:  # a call that was given up and forgotten
                steps.close()
                raise
            except BaseException as raised:  # noqa: BLE001
                error = raised


def _ended(occasion: _Occasion, result: object) -> _Ended:
    return _Ended(well=True, answer=_answer(result) if occasion.hook == "query" else None)


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
