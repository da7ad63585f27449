"""A node on virtual time for plugins that write files: its members, and the programs asked for.

What goes to a thread is done at once, or held back until the test lets it go.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

from twisted.internet.defer import Deferred, execute, succeed
from twisted.internet.task import Clock

from serfd.agent import Agent
from serfd.config import Seconds
from serfd.hooks.loader import bundled_dir
from serfd.hooks.plugin_agent import PluginAgent
from serfd.metrics import Metrics
from serfd.net.process import ProcessResult
from serfd.serf.events import Member, Status


def bundled(name: str) -> ModuleType:
    """The bundled plugin's file as a module."""
    spec = importlib.util.spec_from_file_location(
        f"{name}_under_test", bundled_dir() / f"{name}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def member(
    name: str,
    number: int = 7,
    tags: Mapping[str, str] | None = None,
    status: Status = Status.ALIVE,
) -> Member:
    """At 10.0.0.NUMBER, port 7946."""
    return Member(name, bytes((10, 0, 0, number)), 7946, tags or {}, status, bytes(6))


def ended(status: int = 0, output: bytes = b"", *, timed_out: bool = False) -> ProcessResult:
    return ProcessResult(status, output, b"", timed_out, Seconds(0.1))


@dataclass
class Started:
    """A program somebody asked for."""

    argv: list[str]
    timeout: float
    done: "Deferred[ProcessResult]"


class Node(Agent):
    """The core's side of a plugin's agent."""

    name = "me"
    tags: ClassVar[dict[str, str]] = {}
    metrics = Metrics()

    def __init__(self) -> None:
        self.reactor = Clock()
        self.known: dict[str, Member] = {}
        self.started: list[Started] = []
        self.held: list[tuple[Deferred[Any], Callable[[], Any]]] = []
        self.holds_threads = False
        self.answers_at_once: ProcessResult | None = None
        """How every program ends; None: the test says it for each."""
        self.put(member("me", 1))

    def members(self) -> list[Member]:
        return list(self.known.values())

    def member(self, name: str) -> Member | None:
        return self.known.get(name)

    def put(self, *members: Member) -> None:
        self.known.update((each.name, each) for each in members)

    def in_thread(self, function: Any, *args: Any, **kwargs: Any) -> "Deferred[Any]":
        if not self.holds_threads:
            return execute(function, *args, **kwargs)
        held: Deferred[Any] = Deferred()
        self.held.append((held, lambda: function(*args, **kwargs)))
        return held

    def run(self, argv: Any, *, stdin: Any, env: Any, timeout: Any, output_max: Any) -> Any:
        if self.answers_at_once is not None:
            return succeed(self.answers_at_once)
        done: Deferred[ProcessResult] = Deferred()
        self.started.append(Started(list(argv), timeout, done))
        return done

    def programs(self) -> list[Started]:
        """Those asked for since the last look."""
        seen, self.started = self.started, []
        return seen

    def program(self) -> Started:
        """The only one asked for since the last look."""
        (one,) = self.programs()
        return one

    def pass_time(self, seconds: float) -> None:
        """In small steps, so that what is due comes in its order."""
        end = self.reactor.seconds() + seconds
        while calls := [c for c in self.reactor.getDelayedCalls() if c.getTime() <= end]:
            self.reactor.advance(max(0.0, calls[0].getTime() - self.reactor.seconds()))
        self.reactor.advance(max(0.0, end - self.reactor.seconds()))


class Turns:
    """Calls a plugin's own functions, as its host does it."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def call(self, function: Callable[[], object]) -> "Deferred[object]":
        return succeed(function())


def agent_of(node: Node, plugin: str) -> PluginAgent:
    """What the plugin of this name sees of the node."""
    agent = PluginAgent(node, plugin, None)
    agent.serve(Turns(node.reactor))  # type: ignore[arg-type]
    return agent
