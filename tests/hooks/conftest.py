"""A stand-in agent, and plugins written to files and loaded as the daemon does it."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock

from serfd.agent import Agent
from serfd.config import Config, Seconds
from serfd.errors import CommandError
from serfd.hooks.host import PluginHost
from serfd.hooks.loader import LoadedPlugin, load
from serfd.metrics import Metrics
from serfd.serf.events import (
    Event,
    Member,
    MemberEvent,
    MemberEventKind,
    Query,
    Status,
    UserEvent,
)

HEADER = """
from collections.abc import Sequence
from twisted.internet.defer import CancelledError, Deferred, succeed
from serfd.hooks import Agent, Member, Meta, Seconds, Struct, hookimpl
"""


RESPONSE_MAX = 100


class StandInAgent(Agent):
    """An agent without a node; what plugins note down in `seen` is what tests look at."""

    name = "n1"
    tags: ClassVar[dict[str, str]] = {}

    metrics = Metrics()

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.gates: dict[str, Deferred[Any]] = {}
        self.time = 0.0
        self.queries: list[Query] = []
        self.responses: list[tuple[Query, bytes]] = []
        self._listeners: list[Callable[[Event], None]] = []

    def subscribe(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def gate(self, name: str) -> "Deferred[Any]":
        """A Deferred that a plugin waits for and the test fires."""
        return self.gates.setdefault(name, Deferred())

    def block(self, seconds: float) -> None:
        """Let the time pass that a hook would block the reactor for."""
        self.time += seconds

    def happen(self, *names: str, kind: MemberEventKind = MemberEventKind.JOIN) -> None:
        members = tuple(
            Member(name, b"\x0a\0\0\x01", 7946, {}, Status.ALIVE, bytes(6)) for name in names
        )
        for listener in list(self._listeners):
            listener(MemberEvent(kind, members))

    def user_event_happens(self, name: str = "deploy", payload: bytes = b"") -> None:
        for listener in list(self._listeners):
            listener(UserEvent(1, name, payload, coalesce=False))

    def query_happens(self, name: str = "load", *, deadline: float = 10.0) -> Query:
        query = Query(1, len(self.queries), name, b"", "n2", deadline)
        self.queries.append(query)
        for listener in list(self._listeners):
            listener(query)
        return query

    def respond(self, query: Query, payload: bytes) -> "Deferred[None]":
        if len(payload) > RESPONSE_MAX:
            return fail(CommandError("response exceeds limit"))
        self.responses.append((query, payload))
        return succeed(None)

    @property
    def is_listened_to(self) -> bool:
        return bool(self._listeners)


class Plugins:
    """A directory of plugins, and the configuration that switches them on."""

    def __init__(self, folder: Path, agent: StandInAgent) -> None:
        self.folder = folder
        self._agent = agent
        self.bundled = folder / "bundled"
        self.own = folder / "own"
        self.bundled.mkdir()
        self.own.mkdir()

    def write(self, name: str, body: str, *, to: Path | None = None) -> Path:
        """Write a file; `body` is the text of `class Plugin:`, or a whole file if it has one."""
        body = textwrap.dedent(body)
        if "class Plugin" not in body:
            body = (
                "class Plugin:\n"
                "    def __init__(self, agent): self.agent = agent._agent\n"
                + textwrap.indent(body, "    ")
            )
        path = (to or self.own) / f"{name}.py"
        path.write_text(HEADER + body)
        return path

    def load(
        self,
        *names: str,
        held: Sequence[LoadedPlugin] = (),
        handlers: Sequence[str] = (),
        **tables: dict[str, Any],
    ) -> list[LoadedPlugin]:
        config = Config(
            plugin_dirs=[str(self.own)],
            plugins={**{name: {} for name in names}, **tables},
            event_handlers=list(handlers),
        )
        return load(config, self._agent, held=held, bundled=self.bundled)


@pytest.fixture
def agent() -> StandInAgent:
    return StandInAgent()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def plugins(tmp_path: Path, agent: StandInAgent) -> Plugins:
    return Plugins(tmp_path, agent)


@pytest.fixture
def host(agent: StandInAgent, clock: Clock) -> PluginHost:
    return PluginHost(agent, clock, hook_timeout=Seconds(30), seconds=lambda: agent.time)
