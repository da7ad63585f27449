"""Plugins beside Serf's event scripts: how many events a second, and how soon one is told."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster import Agent, agents, row, say, until

BACKLOG = 500
"""Events that wait; fewer than either kind would drop."""

COUNTER = '''
"""Waits until all events are there; then notes when it was told of the first and the last."""
import json, time
from serfd.hooks import hookimpl, Struct
from twisted.internet.defer import Deferred

class Plugin:
    class Settings(Struct):
        file: str

    def __init__(self, agent, settings):
        self._file, self._first, self._count, self._gate = settings.file, 0.0, 0, Deferred()

    @hookimpl
    def query(self, query):
        self._gate.callback(None)
        return "go"

    @hookimpl
    def user_event(self, event):
        if event.name == "wait":
            return self._gate
        if event.name == "last":
            took = time.monotonic() - self._first
            with open(self._file, "w") as file:
                json.dump([self._count, took], file)
            return None
        self._first = self._first or time.monotonic()
        self._count += 1
'''

STAMPS = '''
"""Notes how long after it was sent each event was told."""
import time
from serfd.hooks import hookimpl, Struct

class Plugin:
    class Settings(Struct):
        file: str

    def __init__(self, agent, settings):
        self._file = open(settings.file, "a", buffering=1)

    @hookimpl
    def user_event(self, event):
        self._file.write(f"{time.monotonic() - float(event.payload)}\\n")
'''

SLOW = '''
"""Is busy with each event for ten seconds."""
from serfd.hooks import Agent, hookimpl
from twisted.internet.task import deferLater

class Plugin:
    def __init__(self, agent):
        self._agent = agent

    @hookimpl
    def user_event(self):
        return deferLater(self._agent.reactor, 10, lambda: None)
'''


def plugins(quick: bool) -> None:
    """Events a second into a plugin and into a script, and how a slow plugin beside it matters."""
    rounds = 2 if quick else 5
    scripts, told = [], []
    for _ in range(rounds):
        scripts.append(_scripts_rate())
        told.append(_plugin_rate())
        say(f"  events a second: script {scripts[-1]:.0f}, plugin {told[-1]:.0f}")
    serf, serfd = statistics.median(scripts), statistics.median(told)
    row("events a second into a handler", serf, serfd, "1/s", "≥ 50")
    alone, beside = [], []
    for _ in range(rounds):
        alone += _latencies(slow=False)
        beside += _latencies(slow=True)
    for name, share in (("median", 0.5), ("p99", 0.99)):
        before, after = (_quantile(taken, share) * 1000 for taken in (alone, beside))
        row(f"event to plugin, {name}, alone", None, before, "ms", "")
        row(f"event to plugin, {name}, beside a slow one", None, after, "ms", "")


def _scripts_rate() -> float:
    """A real agent: `true` for each event, run one by one as it does."""
    with tempfile.TemporaryDirectory() as folder:
        first, last = Path(folder, "first"), Path(folder, "last")
        handlers = [
            # All wait behind the first one, until every event is queued.
            "user:wait=while [ ! -e go ]; do sleep 0.01; done".replace("go", f"{folder}/go"),
            "user:first=touch " + str(first),
            "user:count=true",
            "user:last=touch " + str(last),
        ]
        with agents("serf", 1, *(f"-event-handler={each}" for each in handlers)) as (agent,):
            _send(agent)
            Path(folder, "go").touch()
            until(last.exists, "the last script ran")
            return BACKLOG / ((last.stat().st_mtime_ns - first.stat().st_mtime_ns) / 1e9)


def _plugin_rate() -> float:
    with _daemon(counter=COUNTER) as (agent, files):
        _send(agent)
        assert [a["Payload"] for a in agent.client.query("go") if a["Type"] == "response"]
        found = until(lambda: _read(files["counter"]), "the plugin was told of the last")
        count, took = json.loads(found)
        assert count == BACKLOG + 1, count
        return count / took


def _latencies(*, slow: bool) -> list[float]:
    """Seconds from before the RPC request to the plugin's hook, of events one by one."""
    with _daemon(stamps=STAMPS, **({"slow": SLOW} if slow else {})) as (agent, files):
        for number in range(200):
            agent.client.event("tick", repr(time.monotonic()).encode(), coalesce=False)
            until(lambda n=number: _read(files["stamps"]).count("\n") == n + 1, "it was told")
        return [float(line) for line in _read(files["stamps"]).splitlines()]


def _send(agent: Agent) -> None:
    for name in ("wait", "first", *["count"] * BACKLOG, "last"):
        agent.client.event(name, coalesce=False)


@contextmanager
def _daemon(**sources: str) -> Iterator[tuple[Agent, dict[str, Path]]]:
    """A daemon with these plugins; each may write into its file."""
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, f"{name}.txt") for name in sources}
        config = Path(folder, "serfd.toml")
        lines = [f'plugin_dirs = ["{folder}"]']
        for name, source in sources.items():
            Path(folder, f"{name}.py").write_text(source)
            lines.append(f"[plugins.{name}]")
            if "Settings" in source:
                lines.append(f'file = "{files[name]}"')
        config.write_text(os.linesep.join(lines))
        with agents("serfd", 1, f"-config-file={config}") as (agent,):
            yield agent, files


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]
