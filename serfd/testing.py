"""Test a plugin in a whole simulated cluster, in milliseconds (docs/testing-plugins.md)."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike, fspath
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, TypeVar

import msgspec
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from serfd import config
from serfd.agent import PluginStats
from serfd.errors import CommandError
from serfd.logs import details_of
from serfd.metrics import Metrics
from serfd.serf.events import Event, Member, Query, Status, UserEvent
from serfd.serf.node import Stage
from serfd.serf.queries import QueryParams
from serfd.sim.cluster import Cluster
from serfd.sim.process import Asked, Process
from serfd.testing_daemon import VirtualDaemon

__all__ = ["SerfCluster", "HookFailed"]

HOST = "n1"
"""The node that has the plugins."""
LOOK = 0.05
"""Virtual seconds between two looks at whether what is waited for has come."""
PATIENCE = 60.0
"""Virtual seconds, beside what the protocol and `hook_timeout` allow, until waiting is given up."""

NOTES_MAX = 5
"""Further failures that are told with the first."""

CLASSES: dict[str, type] = {}
"""Plugins that were given as classes: the files that stand for them look here."""

T = TypeVar("T")


class HookFailed(AssertionError):
    """A hook raised, or was not done in time; its exception is the cause."""


class SerfCluster:
    """Real nodes `n1`, `n2` … on virtual time, of which `n1` has plugins in a real plugin host.

    Each method lets time go on until what it did is known everywhere and the plugins' hooks are
    done. A hook that fails meanwhile fails the method with HookFailed. What does not come in the
    time the protocol allows is an AssertionError, a name or value that cannot be a ValueError.
    """

    def __init__(
        self, size: int = 3, *, seed: int = 1, folder: Path | None = None, **settings: Any
    ) -> None:
        """Start the nodes and let them meet.

        Args:
            size: how many nodes.
            seed: of all chance; the same seed gives the same run.
            folder: where `load` looks for files; by default the working directory.
            settings: serfd's configuration for all nodes, as in TOML.
        """
        if size < 1:
            raise ValueError(f"a cluster of {size} nodes, expected 1 or more")
        with ExitStack() as closing:
            own = Path(closing.enter_context(TemporaryDirectory(prefix="serfd-")))
            self._shims = own / "plugins"
            self._shims.mkdir()
            given = {"enable_compression": False, "state_dir": str(own / "state")}
            self._config = config.load([], flags={**given, **_toml(settings)})
            self._tables: Mapping[str, Mapping[str, Any]] = self._config.plugins
            self._folder = folder or Path()
            self._folders = [*self._config.plugin_dirs, str(self._shims)]
            self._answers: dict[tuple[str, str], bytes] = {}
            self._log = closing.enter_context(_Log().kept())
            self._errors_allowed: list[HookFailed] | None = None
            self._daemon: VirtualDaemon | None = None
            self.simulation = Cluster(size, seed, config=self._config, first=1)
            """The simulator, for what is not here: a lossy or slow network, the history."""
            self.simulation.replay = f"SerfCluster({size}, seed={seed})"
            for process in self.simulation.running:
                self._listen_to(process)
            self._start_daemon(self.simulation.processes[HOST])
            self._closing = closing.pop_all()

    def __enter__(self) -> "SerfCluster":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the plugins and forget the cluster. Raises HookFailed, as all methods do."""
        with self._closing:
            if self._daemon is not None:
                self.stop()

    # Plugins.

    def load(self, plugin: str | PathLike[str] | type, name: str = "", /, **settings: Any) -> Any:
        """Switch a plugin on at `n1`, as `[plugins.NAME]` and a reload do; gives the instance.

        Its `start` is done when this returns. Raises ConfigError, as the daemon does.

        Args:
            plugin: its file, or a class, or the name of one that is installed or comes with serfd.
            name: the table's; by default the file's or the class's, in lower case.
            settings: the table's keys.
        """
        file = self._find(plugin)
        name = name or file
        if name in self._tables:
            raise ValueError(f"[plugins.{name}] is there already: reload it, or give another name")
        table = _toml(settings) if name == file else {"plugin": file, **_toml(settings)}
        self._reload({**self._tables, name: table})
        return self.plugin(name)

    def reload(self, name: str = "", /, **settings: Any) -> Any:
        """Let these be the plugin's settings, as a changed file and SIGHUP do; gives the instance.

        Without settings they stay as they are: only the plugin's file is read again. Raises
        ConfigError; then nothing has changed.
        """
        name = self._name(name)
        table = self._tables.get(name, {})
        if settings:
            file = {"plugin": table["plugin"]} if "plugin" in table else {}
            table = {**file, **_toml(settings)}
        self._reload({**self._tables, name: table})
        return self.plugin(name)

    def unload(self, name: str = "", /) -> None:
        """Switch the plugin off: its table is gone."""
        name = self._name(name)
        self._reload({other: table for other, table in self._tables.items() if other != name})

    def plugin(self, name: str = "", /) -> Any:
        """The instance that serves now; `name` may be left out if there is one only."""
        name = self._name(name)
        return next(each.plugin for each in self._running.plugins if each.name == name)

    def stats(self, name: str = "", /) -> PluginStats:
        """The plugin's numbers: calls, errors, lost, waiting …"""
        name = self._name(name)
        return next(each for each in self._running.host.stats() if each.name == name)

    @property
    def metrics(self) -> Metrics:
        """What `n1` and its plugins count and measure."""
        return self._running.agent.metrics

    @property
    def log(self) -> str:
        """What the plugins and their host have logged, from DEBUG on, a line each."""
        return "\n".join(self._log.lines)

    @contextmanager
    def errors_allowed(self) -> Iterator[list[HookFailed]]:
        """Hooks that fail in this block fail nothing; they are in the list."""
        outside, self._errors_allowed = self._errors_allowed, []
        try:
            yield self._errors_allowed
        finally:
            self._errors_allowed = outside

    @contextmanager
    def hold(self) -> Iterator[None]:
        """In this block no hook is called, as if another held the daemon: events wait."""
        reactor = self._running.reactor
        reactor.hold()
        try:
            yield
        finally:
            reactor.release()
        self.settle()

    # What happens to nodes.

    def join(self, name: str, *, tags: Mapping[str, str] = {}) -> None:
        """One more node, with these tags, joins."""
        if name in self.simulation.processes:
            raise ValueError(f"there is a node {name!r} already: restart it, or take another name")
        process = self.simulation.start(name)
        self._listen_to(process)
        if tags:
            self.simulation.update_tags(name, tags)
        self._meet(process)

    def leave(self, name: str) -> None:
        """A node leaves on purpose and stops; `n1` stops its plugins."""
        process = self._process(name)
        if name == HOST:
            self._wait(self._running.agent.leave())
            self.stop()
        else:
            self._done(self.simulation.leave(name))
        self._until(lambda: self._all_see(process, Status.LEFT), f"everybody sees that {name} left")
        self.settle()

    def fail(self, name: str) -> None:
        """A node crashes, and all others notice. A crash of `n1` does not stop its plugins."""
        process = self._process(name)
        self.simulation.kill(name)
        if name == HOST:
            self._end_daemon()
        self._until(
            lambda: self._all_see(process, Status.FAILED), f"everybody sees that {name} failed"
        )
        self.settle()

    def restart(self, name: str) -> None:
        """A node starts again, and joins; one that runs is stopped first, without leaving.

        On `n1` this is a restart of the whole daemon, with new instances of its plugins.
        """
        if name not in self.simulation.processes:
            raise ValueError(f"there is no node {name!r} to restart, {self._nodes}")
        if name == HOST and self._daemon is not None:
            self.stop()
        process = self.simulation.restart(name, rejoin=False)
        if name == HOST:
            self._start_daemon(process)
        else:
            self._listen_to(process)
        self._meet(process)

    def forget(self, name: str) -> None:
        """A node that left or failed is pruned: `member_reap` is called."""
        process = self.simulation.processes.get(name)
        if process is not None and process.is_running:
            raise ValueError(f"{name} runs: only one that left or failed is forgotten")
        first = self._in_cluster()[0]
        self._done(self.simulation.force_leave(first.key, name, prune=True))
        self._until(
            lambda: all(each.node.member(name) is None for each in self._in_cluster()),
            f"everybody has forgotten {name}",
        )
        self.settle()

    def stop(self) -> None:
        """The daemon of `n1` stops, without leaving: waiting events are told, then `stop` is."""
        try:
            self._wait(self._running.host.stop())
        finally:
            self.simulation.kill(HOST)
            self._end_daemon()

    def update_tags(self, name: str, /, **tags: str | None) -> None:
        """Set tags of a node; those that are None are deleted."""
        process = self._process(name)
        node = process.node
        changed = {tag: value for tag, value in tags.items() if value is not None}
        deleted = [tag for tag, value in tags.items() if value is None]
        command = node.update_tags(self.now, changed, delete=deleted)
        self._done(self.simulation.ask(process, command))
        self._until(
            lambda: all(
                (seen := other.node.member(name)) is not None and seen.tags == node.tags
                for other in self._peers(process)
            ),
            f"everybody sees the tags of {name}",
        )
        self.settle()

    @contextmanager
    def partition(self, *names: str) -> Iterator[None]:
        """In this block these nodes and all others do not reach each other, and have noticed.

        At its end all have met again.
        """
        island = {self._process(name).key for name in names}
        with self.simulation.partition(island):
            here, there = self._sides(island)
            self._until(
                lambda: all(
                    self._sees(one, other, Status.FAILED) and self._sees(other, one, Status.FAILED)
                    for one in here
                    for other in there
                ),
                f"both sides see that {', '.join(names)} and the others are parted",
            )
            self.settle()
            yield
        whole = self._in_cluster()
        self._until(
            lambda: all(self._all_see(process, Status.ALIVE) for process in whole),
            f"{', '.join(names)} and the others have met again",
        )
        self.settle()

    # Events and queries.

    def user_event(
        self,
        name: str,
        payload: bytes | str = b"",
        *,
        source: str = "",
        times: int = 1,
        coalesce: bool = False,
    ) -> None:
        """A node, by default the first beside `n1`, tells all others something, so many times."""
        sender = self._other(source)
        told = [
            self.simulation.user_event(sender.key, name, _bytes(payload), coalesce=coalesce)
            for _ in range(times)
        ]
        for asked in told:
            self._done(asked)
        self.settle()

    def query(
        self,
        name: str,
        payload: bytes | str = b"",
        *,
        source: str = "",
        nodes: Sequence[str] = (),
        tags: Mapping[str, str] = {},
        timeout: float = 0.0,
    ) -> dict[str, bytes]:
        """A node, by default the first beside `n1`, asks all, or those meant; gives the answers.

        They are by the names of those who answered. Its end is when all have answered, or after
        `timeout` seconds (0: by the cluster's size).
        """
        params = QueryParams(nodes=nodes, tags=tags, timeout=timeout)
        asker = self._other(source)
        asked = self.simulation.query(asker.key, name, _bytes(payload), params)
        self._done(asked, limit=timeout + PATIENCE)
        self.settle()
        return {each.sender: each.payload for each in asked.answers if not each.is_ack}

    def answer(self, query: str, answers: Mapping[str, bytes | str]) -> None:
        """From now on these nodes answer a query of this name so: `{"n2": "0.5"}`."""
        if HOST in answers:
            raise ValueError(f"{HOST} answers with its plugins")
        self._answers |= {(node, query): _bytes(payload) for node, payload in answers.items()}

    def heard(self, name: str) -> list[Event]:
        """What a node has been told since its start: member events, user events and queries."""
        return [event for _, event in self._process(name).events]

    def user_events(self, name: str) -> list[UserEvent]:
        """The user events among them."""
        return [event for event in self.heard(name) if isinstance(event, UserEvent)]

    def member(self, name: str, *, seen_by: str = HOST) -> Member | None:
        """A member as a node sees it, by default `n1`."""
        return self._process(seen_by).node.member(name)

    # Time.

    @property
    def now(self) -> float:
        """Virtual seconds since the cluster's begin; plugins see them in `agent.reactor`."""
        return self.simulation.now

    def run(self, seconds: float) -> None:
        """Let so much virtual time pass."""
        self.simulation.pass_time(seconds)
        self._fail_if_a_hook_did()

    def settle(self) -> None:
        """Let time pass until nothing is under way: no command, no message, no hook."""
        limit = self._hook_timeout + PATIENCE
        self._until(lambda: self._unrest() is None, "nothing is under way", limit=limit)

    # Steps.

    @property
    def _running(self) -> VirtualDaemon:
        if self._daemon is None:
            raise ValueError(f"{HOST} does not run: restart it first")
        return self._daemon

    @property
    def _hook_timeout(self) -> float:
        """The longest of any plugin."""
        plugins = self._daemon.plugins if self._daemon is not None else ()
        return max([self._config.hook_timeout, *(each.agent.hook_timeout for each in plugins)])

    def _start_daemon(self, process: Process) -> None:
        """In the order of a real start: plugins keep what happens, the node joins, they start."""
        self._daemon = daemon = VirtualDaemon(self.simulation, process, self._present(self._tables))
        self._wait(daemon.agent.join([other.key for other in self._peers(process)[:1]]))
        self._wait(daemon.host.start())
        self.settle()

    def _end_daemon(self) -> None:
        self._running.end()
        self._daemon = None

    def _present(self, tables: Mapping[str, Mapping[str, Any]]) -> config.Config:
        return msgspec.structs.replace(
            self._config,
            plugin_dirs=self._folders,
            plugins={name: dict(table) for name, table in tables.items()},
        )

    def _reload(self, tables: Mapping[str, Mapping[str, Any]]) -> None:
        done = self._running.reload(self._present(tables))
        self._tables = tables
        self._wait(done)
        self.settle()

    def _find(self, plugin: str | PathLike[str] | type) -> str:
        """Its name in the configuration, once it can be found there."""
        if isinstance(plugin, type):
            return self._write_shim(plugin)
        text = fspath(plugin)
        if not text.endswith(".py"):
            return text
        path = (self._folder / text).absolute()
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        if str(path.parent) not in self._folders:
            self._folders.append(str(path.parent))
        return path.stem

    def _write_shim(self, plugin: type) -> str:
        """A file whose plugin is this class: the loader knows files only."""
        own = plugin.__name__.lower()
        name = own if own != "plugin" else plugin.__module__.rpartition(".")[2]
        key = f"{name} {id(plugin)}"
        CLASSES[key] = plugin
        self._closing.callback(CLASSES.pop, key, None)
        text = f"from {__name__} import CLASSES\n\nPlugin = CLASSES[{key!r}]\n"
        (self._shims / f"{name}.py").write_text(text)
        return name

    def _name(self, name: str) -> str:
        """That of the only plugin, if none is given."""
        names = [each.name for each in self._running.plugins]
        if not name and len(names) == 1:
            return names[0]
        if name not in names:
            there = ", ".join(names) or "none"
            what = f"no plugin {name!r}" if name else "no name, and not one plugin only"
            raise ValueError(f"{what}; the plugins are: {there}")
        return name

    def _process(self, name: str) -> Process:
        process = self.simulation.processes.get(name)
        if process is None:
            raise ValueError(f"there is no node {name!r}, {self._nodes}")
        if not process.is_running:
            raise ValueError(f"{name} does not run: restart it first")
        return process

    @property
    def _nodes(self) -> str:
        return f"the nodes are {', '.join(self.simulation.processes)}"

    def _other(self, name: str) -> Process:
        """The node of that name, or the first beside `n1`."""
        if name:
            return self._process(name)
        inside = self._in_cluster()
        return next((process for process in inside if process.key != HOST), inside[0])

    def _in_cluster(self) -> list[Process]:
        """Those that run and have not left."""
        return [process for process in self.simulation.running if process.node.stage is Stage.ALIVE]

    def _peers(self, process: Process) -> list[Process]:
        """Who else is in the cluster, and can hear of it."""
        passes = self.simulation.network.passes
        return [
            other
            for other in self._in_cluster()
            if other is not process and passes(process.key, other.key)
        ]

    def _sides(self, island: Collection[str]) -> tuple[list[Process], list[Process]]:
        inside = self._in_cluster()
        return (
            [process for process in inside if process.key in island],
            [process for process in inside if process.key not in island],
        )

    def _all_see(self, process: Process, status: Status) -> bool:
        return all(self._sees(other, process, status) for other in self._peers(process))

    def _sees(self, one: Process, other: Process, status: Status) -> bool:
        seen = one.node.member(other.name)
        return seen is not None and seen.status is status

    def _listen_to(self, process: Process) -> None:
        """Let it give the answers that `answer` has set; those of `n1` are its plugins'."""

        def heard(event: Event) -> None:
            if isinstance(event, Query):
                payload = self._answers.get((process.key, event.name))
                if payload is not None:
                    self.simulation.respond(process.key, event, payload)

        if process.key != HOST:
            process.listeners.append(heard)

    def _meet(self, process: Process) -> None:
        """Let it join through another, if it has not yet, and wait until all know each other."""
        peers = self._peers(process)
        if peers and process.key != HOST:
            self._done(self.simulation.join(process.key, peers[0].key))
        self._until(
            lambda: (
                all(self._sees(process, other, Status.ALIVE) for other in peers)
                and self._all_see(process, Status.ALIVE)
            ),
            f"{process.key} and all others have met",
        )
        self.settle()

    def _done(self, asked: Asked, *, limit: float = PATIENCE) -> None:
        """Wait for what was asked of a node. Raises the CommandError that it gave."""
        self._until(
            lambda: asked.finished_at is not None or not asked.process.is_running,
            f"{asked.process.key} has done: {asked.command}",
            limit=limit,
        )
        if isinstance(asked.result, CommandError):
            raise asked.result

    def _wait(self, deferred: "Deferred[T]") -> T:
        """Wait for it; gives its result, or raises what it failed with."""
        results: list[T | Failure] = []
        _ = deferred.addBoth(results.append)
        limit = 2 * self._hook_timeout + PATIENCE
        self._until(lambda: results, f"{HOST} is ready", limit=limit)
        (result,) = results
        if isinstance(result, Failure):
            result.raiseException()
        return result

    def _until(self, condition: Callable[[], object], what: str, *, limit: float = 0.0) -> None:
        """Let time pass until it is so; fails at once if a hook does."""
        simulation = self.simulation
        give_up = self.now + (limit or simulation.convergence_bound + PATIENCE)
        simulation.pass_time(0)
        while not condition():
            self._fail_if_a_hook_did()
            if self.now > give_up:
                why = self._unrest() or "nothing is under way"
                raise AssertionError(
                    f"waited in vain until {what}: {why}; at {self.now:.1f} s of {simulation}"
                )
            simulation.pass_time(LOOK)
        self._fail_if_a_hook_did()

    def _unrest(self) -> str | None:
        """The first thing that is under way."""
        for asked in self.simulation.asked:
            return f"{asked.process.key} has not done: {asked.command}"
        daemon = self._daemon
        if daemon is not None and not daemon.reactor.is_held:
            for busy in daemon.host.busy():
                return f"{busy} is at work"
        return self.simulation.unrest

    def _fail_if_a_hook_did(self) -> None:
        failures = self._log.take_failures()
        if self._errors_allowed is not None:
            self._errors_allowed += failures
        elif failures:
            first, *others = failures
            for other in others[:NOTES_MAX]:
                first.add_note(f"then: {other}")
            raise first


class _Log(logging.Handler):
    """Keeps what plugins and their host log, and what of it means that a hook has failed."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._failures: list[HookFailed] = []

    @contextmanager
    def kept(self) -> Iterator["_Log"]:
        """Take part in logging meanwhile."""
        loggers = [logging.getLogger(name) for name in ("serfd.hooks", "serfd.plugins")]
        before = {logger: logger.level for logger in loggers}
        for logger in loggers:
            logger.addHandler(self)
            logger.setLevel(logging.DEBUG)
        try:
            yield self
        finally:
            for logger, level in before.items():
                logger.removeHandler(self)
                logger.setLevel(level)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.lines.append(f"{record.levelname} {record.name}: {record.getMessage()}")
        if details := details_of(record):
            self.lines.append(details)
        if record.levelno >= logging.ERROR and record.name.startswith("serfd.hooks"):
            error = record.exc_info[1] if record.exc_info else None
            why = f": {type(error).__name__}: {error}" if error is not None else ""
            failure = HookFailed(record.getMessage() + why)
            failure.__cause__ = error
            self._failures.append(failure)

    def take_failures(self) -> list[HookFailed]:
        """Those since the last time."""
        failures, self._failures = self._failures, []
        return failures


def _toml(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As a file has them: paths are texts."""
    return {
        key: fspath(value) if isinstance(value, PathLike) else value
        for key, value in settings.items()
    }


def _bytes(payload: bytes | str) -> bytes:
    return payload.encode() if isinstance(payload, str) else payload
