"""`PluginAgent`: the node as one plugin sees it."""

import logging
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.python.failure import Failure

from serfd import __version__
from serfd.agent import Agent, PluginStats
from serfd.config import Seconds
from serfd.errors import ConfigError
from serfd.metrics import Metrics, Unit
from serfd.net.process import ProcessResult, inherited_environment
from serfd.net.statsd import measure_process
from serfd.serf.coordinates import Coordinate, distance
from serfd.serf.events import Member, Query, Status
from serfd.serf.patterns import matcher
from serfd.serf.queries import QueryAnswer, QueryDone, QueryParams

P = ParamSpec("P")
T = TypeVar("T")

OUTPUT_MAX = 65_536
"""Bytes kept of the end of what a program writes, if the plugin does not say."""


class Caller(Protocol):
    """Who calls a plugin's own functions, with all that a hook has: limits, log, numbers."""

    clock: IReactorTime

    def call(self, function: Callable[[], object]) -> "Deferred[object]":
        """Call it now, beside hooks; fires when it is done, well or not. Never fails."""


class _Calls:
    """A function that is to be called, once or again and again."""

    def __init__(self, delay: float, function: Callable[[], object], *, is_repeated: bool) -> None:
        self._delay = delay
        self._function = function
        self._is_repeated = is_repeated
        self._caller: Caller | None = None
        self._timer: IDelayedCall | None = None
        self.is_over = False

    def begin(self, caller: Caller) -> None:
        """Count the delay from now."""
        if not self.is_over:
            self._caller = caller
            self._timer = caller.clock.callLater(self._delay, self._due)

    def end(self) -> None:
        """Do not call it any more. What is under way goes on."""
        self.is_over = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _due(self) -> None:
        assert self._caller is not None
        self._timer = None
        self.is_over = not self._is_repeated
        caller = self._caller
        _ = caller.call(self._function).addCallback(lambda _: self.begin(caller))


class PluginAgent:
    """The node, as one plugin sees it; `serfd.hooks.Agent`.

    All results are plain values or Deferreds, which a coroutine awaits. What the cluster refuses
    fails with CommandError, a value that cannot be, at once, with ValueError.
    """

    def __init__(self, agent: Agent, plugin: str, state_root: Path | None) -> None:
        """`plugin`: its name in the configuration; `state_root`: what `state_dir` stands in."""
        self._agent = agent
        self._state_root = state_root
        self._caller: Caller | None = None
        self._calls: list[_Calls] = []
        self.plugin = plugin
        """The plugin's name in the configuration: `notebook` for `[plugins.notebook]`."""
        self.logger = logging.getLogger(f"serfd.plugins.{plugin}")
        """Its lines have the plugin's name, and go where serfd's own go."""
        self.metrics = PluginMetrics(agent.metrics, plugin)
        """Figures of the plugin's own, in the daemon's metrics."""
        self.hook_timeout = Seconds(0.0)
        """How long a hook may take until it is cancelled; known from `start` on."""

    # The cluster.

    @property
    def name(self) -> str:
        """This node's name."""
        return self._agent.name

    @property
    def tags(self) -> Mapping[str, str]:
        """This node's tags as they are now."""
        return self._agent.tags

    @property
    def me(self) -> Member:
        """This node as a member."""
        me = self._agent.member(self.name)
        assert me is not None
        return me

    def members(
        self, *, status: Status | Collection[Status] | None = None, tags: Mapping[str, str] = {}
    ) -> list[Member]:
        """Everybody known, by name; of these statuses, and whose `tags` match these patterns.

        A pattern is a regular expression for the whole value (Go's dialect), a tag that a member
        does not have is empty. Raises ValueError if it is none.
        """
        found = self._agent.members()
        if status is not None:
            wanted = {status} if isinstance(status, Status) else set(status)
            found = [member for member in found if member.status in wanted]
        for tag, pattern in tags.items():
            matches = matcher(pattern, whole=True)
            found = [member for member in found if matches(member.tags.get(tag, ""))]
        return sorted(found, key=lambda member: member.name)

    def member(self, name: str) -> Member | None:
        """The member of that name, if there is one."""
        return self._agent.member(name)

    def status_counts(self) -> Mapping[Status, int]:
        """How many members are in each status, 0 where there are none; of thousands, cheaper."""
        return self._agent.status_counts()

    @property
    def members_version(self) -> int:
        """As long as this number stays the same, `members` does too."""
        return self._agent.members_version

    def join(self, addresses: Sequence[str], *, replay: bool = False) -> "Deferred[int]":
        """Join a cluster through any of `addresses`; gives the number that answered."""
        return self._agent.join(addresses, replay=replay)

    def leave(self) -> "Deferred[None]":
        """Leave the cluster gracefully; the daemon goes on."""
        return self._agent.leave()

    def force_leave(self, name: str, *, prune: bool = False) -> "Deferred[None]":
        """Declare a failed member as left; with `prune` forget it altogether."""
        return self._agent.force_leave(name, prune=prune)

    def update_tags(
        self, tags: Mapping[str, str], *, delete: Sequence[str] = ()
    ) -> "Deferred[None]":
        """Delete tags of this node, then set others."""
        return self._agent.update_tags(tags, delete=delete)

    def user_event(
        self, name: str, payload: bytes = b"", *, coalesce: bool = True
    ) -> "Deferred[None]":
        """Tell everybody something; fires when it is on its way.

        One that may `coalesce` may be replaced by a later one of its name before it is heard.
        """
        return self._agent.user_event(name, payload, coalesce=coalesce)

    def query(
        self,
        name: str,
        payload: bytes = b"",
        *,
        nodes: Sequence[str] = (),
        tags: Mapping[str, str] = {},
        timeout: float = 0.0,
        relay_factor: int = 0,
    ) -> "Answers":
        """Ask everybody something, or these nodes, or those whose tags match these patterns.

        `async for answer in agent.query("load"):` gives each answer as it comes and ends when all
        have answered, or after `timeout` seconds (0: by the cluster's size).
        """
        params = QueryParams(nodes=nodes, tags=tags, timeout=timeout, relay_factor=relay_factor)
        answers = Answers()
        asked = self._agent.query(name, payload, answered=answers.heard, params=params)
        _ = asked.addCallbacks(answers.over, answers.failed)
        return answers

    def respond(self, query: Query, payload: bytes) -> "Deferred[None]":
        """Answer a query, once and before its deadline; a `query` hook may just return it."""
        return self._agent.respond(query, payload)

    def coordinate(self, name: str = "") -> Coordinate | None:
        """Where a member, or this node, is in the network, if that is known."""
        return self._agent.coordinate(name or self.name)

    def rtt(self, name: str, other: str = "") -> Seconds | None:
        """The estimated round trip between two members, or from this node; None: not known."""
        a, b = self.coordinate(name), self.coordinate(other)
        return None if a is None or b is None else Seconds(distance(a, b))

    # The daemon.

    @property
    def version(self) -> str:
        """That of serfd."""
        return __version__

    def stats(self) -> dict[str, dict[str, str]]:
        """Sections of figures as texts, which `serfctl info` shows: `serf`, `runtime` …"""
        return self._agent.stats()

    def plugins(self) -> Sequence[PluginStats]:
        """The numbers of all plugins, which `serfctl plugins` shows."""
        return self._agent.plugins()

    # Work that takes time.

    def in_thread(
        self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> "Deferred[T]":
        """Run blocking code in a thread; gives its result."""
        return self._agent.in_thread(function, *args, **kwargs)

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        timeout: float = 60.0,
        output_max: int = OUTPUT_MAX,
    ) -> "Deferred[ProcessResult]":
        """Run a program in a process group of its own; gives how it ended, whatever its status.

        `env`: its environment; None: the daemon's, without what systemd tells that one. After
        `timeout` seconds the whole group gets SIGTERM, and SIGKILL 5 s later. `output_max` is
        in bytes, for the end of stdout and of stderr each. Fails with OSError if it cannot be
        started: FileNotFoundError if it is not there, PermissionError if it is not executable.
        """
        return self._agent.run(
            argv,
            stdin=stdin,
            env=inherited_environment() if env is None else env,
            timeout=Seconds(timeout),
            output_max=output_max,
        )

    def later(self, delay: float, function: Callable[[], object]) -> Callable[[], None]:
        """Call `function` once, in `delay` seconds; call what is returned to have it not called.

        It is called like a hook: a plain function, a coroutine or one that gives a Deferred, within
        `hook_timeout`; what it raises is logged and counted. Before the plugin is started and
        after it has stopped nothing is called.
        """
        return self._begin(_Calls(delay, function, is_repeated=False))

    def every(self, interval: float, function: Callable[[], object]) -> Callable[[], None]:
        """Call `function` again and again, as `later` does, from `interval` seconds on.

        The next call comes `interval` seconds after the end of the one before. Raises ValueError if
        it is not longer than 0.
        """
        if interval <= 0:
            raise ValueError(f"an interval of {interval:g} s, more than 0 expected")
        return self._begin(_Calls(interval, function, is_repeated=True))

    # Things of its own.

    @property
    def state_dir(self) -> Path:
        """A directory of the plugin's own, made at the first use, for what outlives a restart.

        Raises ConfigError if the daemon has none: `state_dir` is not set.
        """
        if self._state_root is None:
            raise ConfigError(
                f"plugin {self.plugin!r} keeps files: set state_dir in serfd's configuration"
            )
        own = self._state_root / self.plugin
        try:
            own.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"state_dir: cannot make {own}: {error.strerror}") from None
        return own

    @property
    def reactor(self) -> Any:
        """Twisted's reactor, for plugins that listen or connect."""
        return self._agent.reactor

    # For who hosts the plugin.

    def serve(self, caller: Caller | None) -> None:
        """From now on `caller` calls what was asked for; with None, nothing is called any more."""
        self._caller = caller
        for calls in self._calls:
            if caller is None:
                calls.end()
            else:
                calls.begin(caller)
        self._calls = [calls for calls in self._calls if not calls.is_over]

    def _begin(self, calls: _Calls) -> Callable[[], None]:
        self._calls = [calls, *(held for held in self._calls if not held.is_over)]
        if self._caller is not None:
            calls.begin(self._caller)
        return calls.end


class PluginMetrics:
    """A plugin's own figures; their names begin with `plugins.NAME.` in the daemon's metrics."""

    def __init__(self, metrics: Metrics, plugin: str) -> None:
        self._metrics = metrics
        self._prefix = f"plugins.{plugin}."

    def count(self, name: str, by: float = 1) -> None:
        """So much more of it happened."""
        self._metrics.count(self._prefix + name, by)

    def gauge(self, name: str, value: float) -> None:
        """It is so much now."""
        self._metrics.gauge(self._prefix + name, value)

    def sample(
        self, name: str, value: float, *, unit: Unit = "seconds", bounds: Sequence[float] = ()
    ) -> None:
        """It was so much this time. Makes a histogram.

        `unit`: `seconds`, `bytes` or, for a plain number, empty; `bounds`: those of its buckets,
        ascending, by default the unit's. A name keeps its first ones.
        """
        self._metrics.sample(self._prefix + name, value, unit=unit, bounds=bounds)

    def all(self) -> Metrics:
        """Those of the daemon and of all plugins, to be read; `METRICS` describes them.

        What the process uses, `runtime.`, is measured now.
        """
        measure_process(self._metrics)
        return self._metrics


class Answers:
    """What comes in for a query: `async for` gives each answer, a `QueryAnswer`, as it comes.

    Raises CommandError if the query could not be asked.
    """

    def __init__(self) -> None:
        self._heard: deque[QueryAnswer] = deque()
        self._next: Deferred[None] | None = None
        self._is_over = False
        self.done = QueryDone(0, 0, 0)
        """How many answered; known when the query is over."""
        self._error: Exception | None = None

    def __aiter__(self) -> "Answers":
        return self

    async def __anext__(self) -> QueryAnswer:
        while not self._heard:
            if self._error is not None:
                raise self._error
            if self._is_over:
                raise StopAsyncIteration
            self._next = Deferred()
            await self._next
        return self._heard.popleft()

    def heard(self, answer: QueryAnswer) -> None:
        """An answer came in."""
        if not answer.is_ack:
            self._heard.append(answer)
            self._go_on()

    def over(self, result: QueryDone) -> None:
        """The query is over."""
        self.done = result
        self._is_over = True
        self._go_on()

    def failed(self, failure: Failure) -> None:
        """It could not be asked."""
        assert isinstance(failure.value, Exception)
        self._error = failure.value
        self._go_on()

    def _go_on(self) -> None:
        waiting, self._next = self._next, None
        if waiting is not None:
            waiting.callback(None)
