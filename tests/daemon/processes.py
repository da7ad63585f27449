"""Real agents as child processes: start, ask, kill, and read what they said."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import pytest

from serfd.rpc.client import CannotConnect, Client, ConnectionClosed, RpcError, address_text

T = TypeVar("T")
Kind = Literal["serf", "serfd"]

LIMIT = 60.0
"""Seconds any condition may take; it is only waited for in full when something is wrong."""
POLL = 0.05
PORTS = range(10_000, 32_000)
"""Below the ports that the system gives to outgoing connections."""
LOCAL = "-profile=local"
"""The option for short timeouts. It tells each news twice only: of more than three members one may
then hear of it as late as by its next exchange of states."""
LOG_LINES_SHOWN = 150
BIN = Path(sys.executable).parent
SERFD, SERFCTL = str(BIN / "serfd"), str(BIN / "serfctl")

_choice = random.SystemRandom()


def until(what: str, condition: Callable[[], T | None], *, limit: float = LIMIT) -> T:
    """Ask again and again until `condition` gives something true; that is returned.

    An agent that does not answer yet counts as no. Raises AssertionError with the last answer.
    """
    deadline = time.monotonic() + limit
    while True:
        last: object
        try:
            last = condition()
            if last:
                return last
        except (RpcError, CannotConnect) as error:
            last = error
        if time.monotonic() > deadline:
            raise AssertionError(f"after {limit:g} s still not so: {what}; last: {last!r}")
        # Between two looks at another process there is nothing to wait on.
        time.sleep(POLL)


def until_is(what: str, look: Callable[[], T], wanted: T) -> None:
    """Wait until `look` gives exactly `wanted`."""
    last: list[object] = []

    def looks_so() -> bool:
        last[:] = [look()]
        return last[0] == wanted

    try:
        until(f"{what} is {wanted!r}", looks_so)
    except AssertionError as error:
        raise AssertionError(f"{error}; it is {last!r}") from None


def free_port(host: str = "127.0.0.1") -> int:
    """A port that was free for TCP and UDP a moment ago."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    while True:
        port = _choice.choice(PORTS)
        with (
            socket.socket(family, socket.SOCK_STREAM) as tcp,
            socket.socket(family, socket.SOCK_DGRAM) as udp,
        ):
            try:
                tcp.bind((host.strip("[]"), port))
                udp.bind((host.strip("[]"), port))
            except OSError:
                continue
            return port


class Seen(NamedTuple):
    """A member as some agent sees it."""

    status: str
    address: str
    tags: Mapping[str, str]


class AgentProcess:
    """One agent, real or ours, and how to start it again."""

    def __init__(
        self,
        kind: Kind,
        name: str,
        command: Sequence[str],
        options: Sequence[str],
        *,
        folder: Path,
        env: Mapping[str, str],
    ) -> None:
        self.kind = kind
        self.name = name
        self.bind = ""
        self.rpc_addr = ""
        self.folder = folder
        self._command = command
        self._options = options
        self._env = {**os.environ, **env}
        self._log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None, f"{self.name} was never started"
        return self._process

    @property
    def port(self) -> int:
        return int(self.bind.rpartition(":")[2])

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        """Everything it wrote to stdout and stderr, over all its starts."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def launch(self, bind: str, rpc_addr: str) -> None:
        """Start the process; it may take a while until it answers."""
        assert not self.is_running
        self.bind, self.rpc_addr = bind, rpc_addr
        argv = [
            *self._command, f"-node={self.name}", f"-bind={bind}", f"-rpc-addr={rpc_addr}",
            *self._options,
        ]  # fmt: skip
        self.spawn(argv)

    def spawn(self, argv: Sequence[str]) -> None:
        """Run this as the agent's process; its output is its log."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._env,
                cwd=self.folder,
            )  # fmt: skip

    def answers(self) -> bool:
        """Whether it can be asked. Raises AssertionError if it has ended instead."""
        code = self.process.poll()
        assert code is None, f"{self.name} ended with {code} at its start:\n{self.log()}"
        return bool(self.stats())

    def restart(self, bind: str = "") -> None:
        """Start it again after its end, at its old addresses or at a new one."""
        self.launch(bind or self.bind, self.rpc_addr)
        until(f"{self.name} answers again", self.answers)

    # What it says.

    def client(self, *, timeout: float = LIMIT) -> Client:
        return Client(self.rpc_addr, timeout=timeout)

    def members(self) -> dict[str, Seen]:
        with self.client() as client:
            return {
                member["Name"]: Seen(
                    member["Status"], address_text(member), dict(member["Tags"] or {})
                )
                for member in client.members()
            }

    def statuses(self) -> dict[str, str]:
        return {name: member.status for name, member in self.members().items()}

    def stats(self) -> dict[str, dict[str, str]]:
        with self.client() as client:
            return client.stats()

    def rss(self) -> int:
        """Bytes of memory it holds now."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError(f"{self.name} has no memory: it has ended")

    # What is done to it.

    def join(self, other: "AgentProcess") -> int:
        """How many answered; raises RpcError if nobody did."""
        with self.client() as client:
            return client.join([other.bind])

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """End it without a word, and see it gone."""
        self.process.kill()
        self.process.wait(LIMIT)

    def exit_code(self) -> int:
        """How it ended; waits for that."""
        try:
            return self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} does not end:\n{self.log()}") from None


class Agents:
    """All agents of one test."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.all: list[AgentProcess] = []

    def start(
        self,
        kind: Kind,
        name: str,
        *options: str,
        config: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        host: str = "127.0.0.1",
    ) -> AgentProcess:
        """Start one on free ports and wait until it answers.

        `options` are in Serf's spelling; `config` becomes a JSON or a TOML file.
        """
        agent = self.prepare(kind, name, *options, config=config, env=env)
        self.launch(agent, host)
        return agent

    def launch(self, agent: AgentProcess, host: str = "127.0.0.1") -> None:
        """Start a prepared one on free ports, and wait until it answers."""
        while True:
            ends = len(agent.log())
            agent.launch(f"{host}:{free_port(host)}", f"127.0.0.1:{free_port()}")
            try:
                until(f"{agent.name} answers", agent.answers)
                return
            except AssertionError:
                # Between looking and binding somebody else took the port: take another.
                if "address already in use" not in agent.log()[ends:].lower():
                    raise

    def prepare(
        self,
        kind: Kind,
        name: str,
        *options: str,
        config: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> AgentProcess:
        """One that is not started yet."""
        folder = self._folder
        command = ["serf", "agent"] if kind == "serf" else [SERFD]
        more = list(options)
        if config is not None:
            path = folder / f"{name}.{'json' if kind == 'serf' else 'toml'}"
            path.write_text(json.dumps(config) if kind == "serf" else toml(config))
            more.append(f"-config-file={path}")
        agent = AgentProcess(kind, name, command, more, folder=folder, env=env or {})
        self.all.append(agent)
        return agent

    def cluster(
        self,
        kinds: Mapping[str, Kind],
        *options: str,
        configs: Mapping[Kind, Mapping[str, Any]] | None = None,
        own: Mapping[str, Sequence[str]] | None = None,
    ) -> dict[str, AgentProcess]:
        """Agents by name, joined through the first one; `own` are options of single ones."""
        found: dict[str, AgentProcess] = {}
        for name, kind in kinds.items():
            mine = (own or {}).get(name, ())
            config = (configs or {}).get(kind)
            found[name] = self.start(kind, name, *options, *mine, config=config)
        first, *others = found.values()
        for agent in others:
            agent.join(first)
        everyone_sees(found.values(), dict.fromkeys(found, "alive"))
        return found

    def end(self) -> None:
        """Kill all that still run, and print what they wrote: pytest shows it on a failure."""
        for agent in self.all:
            if agent.is_running:
                agent.kill()
        for agent in self.all:
            lines = agent.log().splitlines()
            print(f"--- {agent.kind} {agent.name}, the last of {len(lines)} lines:")
            print("\n".join(lines[-LOG_LINES_SHOWN:]))


class Records:
    """Everything one agent sends on a stream of events, from now on."""

    def __init__(self, agent: AgentProcess, wanted: str = "*") -> None:
        client = agent.client()
        self.got: list[dict[str, Any]] = []
        client.start("stream", {"Type": wanted})
        # It ends with its agent.
        threading.Thread(target=self._read, args=(client,), daemon=True).start()

    def _read(self, client: Client) -> None:
        with client, suppress(ConnectionClosed):
            for _, record in client.records():
                self.got.append(record)

    def wait(self, what: str, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first record that is as wanted."""
        return until(what, lambda: next(filter(wanted, self.got), None))


def everyone_sees(agents: Iterable[AgentProcess], statuses: Mapping[str, str]) -> None:
    """Wait until each of `agents` sees exactly these members in these statuses."""
    for agent in agents:
        until_is(f"members as {agent.name} sees them", agent.statuses, dict(statuses))


def all_see(agents: Iterable[AgentProcess], **statuses: str) -> None:
    """Wait until each of `agents` sees these members so, whatever it sees of others."""
    for agent in agents:
        until_is(
            f"members as {agent.name} sees them",
            lambda agent=agent: {
                name: status for name, status in agent.statuses().items() if name in statuses
            },
            statuses,
        )


def toml(table: Mapping[str, Any], section: str = "") -> str:
    """Flat values as TOML, tables after them; texts, numbers and lists look as in JSON."""
    lines = [f"[{section}]"] if section else []
    tables = {k: v for k, v in table.items() if isinstance(v, Mapping)}
    lines += [f"{k} = {json.dumps(v)}" for k, v in table.items() if k not in tables]
    text = "\n".join(lines) + "\n"
    for key, value in tables.items():
        text += toml(value, f"{section}.{key}" if section else key)
    return text


def run(*argv: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Any:
    """Run a program to its end; gives its CompletedProcess, with text."""
    return subprocess.run(
        argv, capture_output=True, text=True, timeout=LIMIT, env={**os.environ, **(env or {})},
        cwd=cwd, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[Agents]:
    """Starts agents; all are ended after the test, and their logs are shown if it failed."""
    running = Agents(tmp_path)
    yield running
    running.end()
