"""The daemon of one simulated node, on virtual time: what `serfd.service` is on real time.

Agent, plugin host and loader are the daemon's own. Of Twisted's reactor there is the clock, which
is the simulator's; threads and programs are done at once, while virtual time stands still.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from time import monotonic
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.base import DelayedCall
from twisted.internet.defer import Deferred, execute, fail
from twisted.internet.interfaces import IDelayedCall, IReactorTime, IResolutionReceiver
from twisted.internet.process import reapAllProcesses
from zope.interface import implementer

from serfd.agent import Agent
from serfd.config import GOSSIP_PORT, Config, Seconds
from serfd.effects import Command
from serfd.errors import CommandError
from serfd.hooks.host import PluginHost
from serfd.hooks.journal import FILE, SqliteJournal
from serfd.hooks.loader import LoadedPlugin, load
from serfd.net.process import ProcessResult, run_process
from serfd.net.reactor import MonotonicReactor
from serfd.serf.events import Event
from serfd.sim.cluster import Cluster
from serfd.sim.process import Asked, Process

P = ParamSpec("P")
T = TypeVar("T")

TURN = 0.01
"""Real seconds between two looks at a program that runs."""


@implementer(IReactorTime)
class VirtualReactor:
    """The clock of a simulated node as Twisted's reactor; all else of that is refused."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._calls: dict[DelayedCall, None] = {}
        self._held: list[DelayedCall] | None = None

    def seconds(self) -> float:
        """Virtual seconds since the cluster's begin."""
        return self._cluster.now

    def callLater(
        self, delay: float, callable: Callable[..., object], *args: object, **kwargs: object
    ) -> IDelayedCall:
        """Call in so many virtual seconds."""
        due = self.seconds() + max(0.0, delay)
        call = DelayedCall(due, callable, args, kwargs, self._forget, self._plan, self.seconds)
        self._calls[call] = None
        self._plan(call)
        return call

    def getDelayedCalls(self) -> Sequence[IDelayedCall]:
        """All that are to come."""
        return tuple(self._calls)

    @property
    def nameResolver(self) -> "VirtualReactor":
        """The nodes' names are known, and no others."""
        return self

    def resolveHostName(self, receiver: IResolutionReceiver, host: str) -> None:
        """Tell the node's address; an address is its own."""
        process = self._cluster.processes.get(host)
        address = process.address.host if process is not None else host
        if ":" in address:
            receiver.addressResolved(IPv6Address("TCP", address, 0))
        elif address.replace(".", "").isdecimal():
            receiver.addressResolved(IPv4Address("TCP", address, 0))
        receiver.resolutionComplete()

    def hold(self) -> None:
        """Let what is due wait until `release`."""
        assert self._held is None, "held already"
        self._held = []

    def release(self) -> None:
        """Call what became due meanwhile, in order."""
        held, self._held = self._held, None
        for call in held or ():
            self._call(call)

    @property
    def is_held(self) -> bool:
        """Whether what is due waits."""
        return self._held is not None

    def end(self) -> None:
        """The daemon is gone: nothing is called any more."""
        for call in list(self._calls):
            call.cancel()

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"agent.reactor.{name} is not there in a simulated cluster: its reactor has a "
            "clock and nothing else. For work that blocks there is agent.in_thread, for programs "
            "agent.run"
        )

    def _plan(self, call: DelayedCall) -> None:
        self._cluster.after(call.getTime() - self.seconds(), self._call, call)

    def _forget(self, call: DelayedCall) -> None:
        self._calls.pop(call, None)

    def _call(self, call: DelayedCall) -> None:
        if not call.active():
            return
        if call.getTime() > self.seconds():
            self._plan(call)  # it was put off meanwhile
        elif self._held is not None:
            self._held.append(call)
        else:
            self._forget(call)
            call.called = 1
            call.func(*call.args, **call.kw)


class VirtualDriver:
    """Between an agent and its simulated node; in the place of `serfd.net.driver.Driver`."""

    internal_errors = 0
    """Always: in the simulator they are raised."""
    send_errors = 0

    def __init__(
        self,
        cluster: Cluster,
        process: Process,
        node: object,
        reactor: object,
        publish: Callable[[Event], None],
        **of_the_real_one: object,
    ) -> None:
        self._cluster = cluster
        self._process = process
        self._publish = publish
        self._waiting: dict[Asked, Deferred[Any]] = {}

    def start(self) -> None:
        """Tell what happened to the node before, and from now on."""
        for _, event in list(self._process.events):
            self._publish(event)
        self._process.listeners.append(self._publish)

    def stop(self) -> None:
        """The node is gone. Waiting commands fail."""
        if self._publish in self._process.listeners:
            self._process.listeners.remove(self._publish)
        waiting, self._waiting = self._waiting, {}
        for deferred in waiting.values():
            deferred.errback(_gone())

    def run(
        self, ask: Callable[Concatenate[float, P], Command[T]], *args: P.args, **kwargs: P.kwargs
    ) -> "Deferred[T]":
        """Ask the node something; fires with the result, or with a CommandError."""
        return self.ask(ask, lambda answer: None, *args, **kwargs)

    def ask(
        self,
        ask: Callable[Concatenate[float, P], Command[T]],
        answered: Callable[[Any], None],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> "Deferred[T]":
        """As `run`; `answered` gets what comes in for the command until then."""
        if not self._process.is_running:
            return fail(_gone())
        asked = self._cluster.ask(self._process, ask(self._cluster.now, *args, **kwargs))
        deferred: Deferred[T] = Deferred()
        self._waiting[asked] = deferred
        asked.heard.append(answered)
        asked.then.append(self._finished)
        return deferred

    def _finished(self, asked: Asked) -> None:
        deferred = self._waiting.pop(asked)
        if isinstance(asked.result, CommandError):
            deferred.errback(asked.result)
        else:
            deferred.callback(asked.result)


class VirtualAgent(Agent):
    """An agent for which virtual time stands still while it waits for the real world."""

    driver: Any
    """A `VirtualDriver`."""

    def __init__(self, cluster: Cluster, process: Process, config: Config) -> None:
        super().__init__(
            config,
            process.node,
            VirtualReactor(cluster),
            port=GOSSIP_PORT,
            shut_down=lambda: None,
            driver=partial(VirtualDriver, cluster, process),
        )
        self._away = 0.0

    def own_seconds(self) -> float:
        """Real seconds, without those that threads and programs took."""
        return monotonic() - self._away

    def in_thread(
        self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> "Deferred[T]":
        """Run it now, in this thread; gives its result."""
        began = monotonic()
        result = execute(function, *args, **kwargs)
        self._away += monotonic() - began
        return result

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        env: Mapping[str, str],
        timeout: Seconds,
        output_max: int,
    ) -> "Deferred[ProcessResult]":
        """Run a real program to its end; `timeout` is in real seconds."""
        began = monotonic()
        reactor = _real_reactor()
        result = run_process(
            reactor, argv, stdin=stdin, env=env, timeout=timeout, output_max=output_max
        )
        while not result.called:
            reactor.iterate(TURN)
            reapAllProcesses()
        self._away += monotonic() - began
        return result


class VirtualDaemon:
    """One daemon from its start to its end."""

    def __init__(self, cluster: Cluster, process: Process, config: Config) -> None:
        """Build it, plugins included; raises ConfigError. From now on their events are kept."""
        self._journals: list[SqliteJournal] = []
        self.agent = VirtualAgent(cluster, process, config)
        self.reactor: VirtualReactor = self.agent.reactor
        self.host = PluginHost(
            self.agent,
            self.reactor,
            hook_timeout=config.hook_timeout,
            seconds=self.agent.own_seconds,
            journal=self._journal,
        )
        self.agent.plugins = self.host.stats
        self.plugins: list[LoadedPlugin] = load(config, self.agent)
        self.host.attach(self.plugins)
        self.agent.driver.start()

    def reload(self, config: Config) -> "Deferred[None]":
        """Take the plugins of this configuration, or raise ConfigError and change nothing."""
        self.plugins = load(config, self.agent, held=self.host.kept())
        return self.host.reload(self.plugins)

    def end(self) -> None:
        """It is gone, with or without a word."""
        self.reactor.end()
        self.agent.driver.stop()
        for journal in self._journals:
            journal.close()
        for plugin in self.plugins:
            plugin.forget()

    def _journal(self, plugin: LoadedPlugin) -> SqliteJournal:
        journal = SqliteJournal(plugin.agent.state_dir / FILE)
        self._journals.append(journal)
        return journal


def _gone() -> CommandError:
    return CommandError("the agent is shutting down")


@cache
def _real_reactor() -> MonotonicReactor:
    """What runs programs; it is installed nowhere."""
    return MonotonicReactor()
