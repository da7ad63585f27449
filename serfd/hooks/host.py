"""Runs hooks, each plugin on its own.

What one plugin does or fails to do never reaches another plugin, nor the node: every hook is called
in a turn of its own, in time limits, and all it raises ends here.
"""

import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from twisted.internet.defer import Deferred, DeferredLock, gatherResults, succeed
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from serfd.agent import Agent
from serfd.config import Seconds
from serfd.hooks.loader import LoadedPlugin, implementations
from serfd.serf.events import Event, Member, MemberEvent, UserEvent

MAILBOX_SIZE = 1024
"""So many events may wait for a plugin; then the oldest is dropped."""

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
        self._changing = DeferredLock()
        self._unsubscribe: Callable[[], None] | None = None
        self._stopped = False

    def attach(self, loaded: Sequence[LoadedPlugin]) -> None:
        """Take these plugins. Events from now on are kept for each until its start is done."""
        assert self._unsubscribe is None, "attached twice"
        self._unsubscribe = self._agent.subscribe(self._event_happened)
        self._hosted = {plugin.name: self._host(plugin) for plugin in loaded}

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
        match event:
            case MemberEvent():
                hook = event.name.replace("-", "_")
                for hosted in self._hosted.values():
                    hosted.put(hook, event.members)
            case UserEvent():
                return  # no hook takes them yet

    def _host(self, plugin: LoadedPlugin) -> "_Hosted":
        return _Hosted(plugin, self._clock, self._hook_timeout, self._seconds)

    async def _replace(self, loaded: Sequence[LoadedPlugin]) -> None:
        if self._stopped:
            return
        before = self._hosted
        running = {id(hosted.loaded): hosted for hosted in before.values()}
        self._hosted = {
            plugin.name: running.get(id(plugin)) or self._host(plugin) for plugin in loaded
        }
        leaving = [old for name, old in before.items() if self._hosted.get(name) is not old]
        for old in leaving:
            if old.loaded.name in self._hosted:
                for hook, members in old.empty_mailbox():
                    self._hosted[old.loaded.name].put(hook, members)
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


class _Hosted:
    """One plugin: its mailbox, one hook at a time, its numbers."""

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
        self._mailbox: deque[tuple[str, Sequence[Member]]] = deque()
        self._overflowing = False
        self._turn: IDelayedCall | None = None
        self._end_call: Callable[[], None] | None = None
        """Ends the hook under way, if there is one."""
        self._drained: Deferred[None] | None = None
        self._calls = self._errors = self._timeouts = self._dropped = 0

    def put(self, hook: str, members: Sequence[Member]) -> None:
        """An event for the mailbox; it is delivered in a later turn."""
        if hook not in self.loaded.hooks or self.state is PluginState.FAILED:
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
        self._mailbox.append((hook, members))
        self._schedule()

    def empty_mailbox(self) -> list[tuple[str, Sequence[Member]]]:
        """Take out the events that wait: each a hook and its members."""
        waiting = list(self._mailbox)
        self._mailbox.clear()
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        return waiting

    def start(self) -> Deferred[None]:
        """Call `start`; events are delivered once it is done."""
        self._enter(PluginState.STARTING)
        return self._call("start", self._hook_timeout).addCallback(self._started)

    def drain(self, limit: float) -> Deferred[None]:
        """Finish the hook under way and deliver what waits; after `limit` seconds, drop it."""
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
        return self._call("stop", limit).addCallback(lambda _: self._enter(PluginState.STOPPED))

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

    def _started(self, well: bool) -> None:  # noqa: FBT001
        if well:
            self._enter(PluginState.RUNNING)
            self._schedule()
        else:
            self._enter(PluginState.FAILED)
            self._dropped += len(self.empty_mailbox())
            log.error("plugin %s: not started, it gets no events", self.loaded.name)
        self._check_drained()

    def _schedule(self) -> None:
        idle = self._turn is None and self._end_call is None
        if idle and self._mailbox and self.state is PluginState.RUNNING:
            self._turn = self._clock.callLater(0, self._deliver)

    def _deliver(self) -> None:
        self._turn = None
        hook, members = self._mailbox.popleft()
        if not self._mailbox:
            self._overflowing = False
        _ = self._call(hook, self._hook_timeout, members).addCallback(self._delivered)

    def _delivered(self, well: bool) -> None:  # noqa: FBT001
        self._schedule()
        self._check_drained()

    def _check_drained(self) -> None:
        if self._drained is not None and self._end_call is None and not self._mailbox:
            drained = self._drained
            self._drained = None
            drained.callback(None)

    def _give_up(self) -> None:
        """Drop what is not delivered yet, and end the hook under way."""
        if waiting := self.empty_mailbox():
            self._dropped += len(waiting)
            log.warning(
                "plugin %s: stops, %d waiting events are dropped", self.loaded.name, len(waiting)
            )
        if self._end_call is not None:
            self._end_call()
        self._check_drained()

    def _call(self, hook: str, limit: float, members: Sequence[Member] = ()) -> Deferred[bool]:
        """Call one hook; gives whether it ended well, after `limit` seconds at the latest."""
        over: Deferred[bool] = Deferred()

        def finish(*, well: bool) -> None:
            if over.called:
                return
            self._end_call = None
            if timer.active():
                timer.cancel()
            over.callback(well)

        def end_call() -> None:
            self._timeouts += 1
            log.error(
                "plugin %s: %s%s was not done in time and is cancelled",
                self.loaded.name, hook, _names(members),
            )  # fmt: skip
            # First the end, then the cancelling: a hook that resists it holds up nothing.
            finish(well=False)
            try:
                running.cancel()
            except Exception:
                log.exception("plugin %s: cancelling %s failed", self.loaded.name, hook)

        self._end_call = end_call
        timer = self._clock.callLater(limit, end_call)
        running = Deferred.fromCoroutine(self._timed(self._run(hook, members, over), hook, members))
        _ = running.addCallback(lambda well: finish(well=well))
        return over

    async def _run(self, hook: str, members: Sequence[Member], over: Deferred[bool]) -> bool:
        """The call itself. What it raises after it was given up is no error any more."""
        implementation = self.loaded.hooks.get(hook)
        if implementation is None:
            return True
        self._calls += 1
        passed = {"members": members}
        arguments = {name: passed[name] for name in implementation.arguments}
        try:
            result = implementation.function(**arguments)
            if isinstance(result, Awaitable):
                await result
        # SystemExit: a plugin that calls sys.exit() would take its own mailbox with it.
        except (Exception, SystemExit):
            if over.called:
                log.debug("plugin %s: %s has ended", self.loaded.name, hook, exc_info=True)
            else:
                self._errors += 1
                log.exception("plugin %s: %s%s failed", self.loaded.name, hook, _names(members))
            return False
        return True

    def _timed(
        self, steps: Coroutine[Any, Any, bool], hook: str, members: Sequence[Member]
    ) -> Generator[Any, Any, bool]:
        """Pass everything on to `steps` and back; tell of a step that blocks the reactor."""
        value: Any = None
        error: BaseException | None = None
        while True:
            began = self._seconds()
            try:
                awaited = steps.send(value) if error is None else steps.throw(error)
            except StopIteration as ended:
                well: bool = ended.value
                return well
            finally:
                took = self._seconds() - began
                if took > BLOCKING_MAX:
                    log.warning(
                        "plugin %s: %s%s blocked the daemon for %d ms; blocking work belongs in "
                        "agent.in_thread()",
                        self.loaded.name, hook, _names(members), took * 1000,
                    )  # fmt: skip
            try:
                value, error = (yield awaited), None
            except GeneratorExit:  # a call that was given up and forgotten
                steps.close()
                raise
            except BaseException as raised:  # noqa: BLE001
                error = raised


def _names(members: Sequence[Member]) -> str:
    """`('n1', 'n2', 'n3' and 7 more)`, or nothing if there are none."""
    if not members:
        return ""
    names = ", ".join(repr(member.name) for member in members[:_MEMBERS_NAMED])
    more = len(members) - _MEMBERS_NAMED
    return f"({names} and {more} more)" if more > 0 else f"({names})"
