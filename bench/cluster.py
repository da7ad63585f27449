"""What the benchmarks share: agents of both kinds, what they tell, and rows of the table."""

import math
import operator
import os
import selectors
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgpack

from serfd.errors import SerfdError
from serfd.rpc.client import Client

T = TypeVar("T")

BIN = Path(sys.executable).parent
KINDS = ("serf", "serfd")
LIMIT = 120.0
"""Seconds until a condition that does not come true ends the run."""
COMPARE = {"≤": operator.le, "<": operator.lt, "≥": operator.ge}


class Agent:
    """One agent of either kind, as a child process that does not outlive this one."""

    def __init__(self, kind: str, name: str, *options: str, profile: str = "lan") -> None:
        self.kind = kind
        self.name = name
        self.addr = f"127.0.0.1:{free_port()}"
        self.rpc = f"127.0.0.1:{free_port()}"
        program = ["serf", "agent"] if kind == "serf" else [str(BIN / "serfd")]
        self.command = [
            *program, f"-node={name}", f"-bind={self.addr}", f"-rpc-addr={self.rpc}",
            f"-profile={profile}", *options,
        ]  # fmt: skip
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig=KILL", *self.command],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            self.client = until(self._connect, f"{name} answers RPC")
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> "Agent":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def _connect(self) -> Client | None:
        assert self.process.poll() is None, f"it has exited: {shlex.join(self.command)}"
        try:
            client = Client(self.rpc)
            client.call("stats", None)
        except (OSError, SerfdError):  # not up yet; `until` limits it
            return None
        return client

    def count(self, key: str = "members") -> int:
        return int(self.client.call("stats", None)["serf"][key])

    def join(self, other: "Agent") -> None:
        self.client.call("join", {"Existing": [other.addr], "Replay": False})

    def cpu(self) -> float:
        """CPU seconds so far, all threads, to the nanosecond."""
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    def rss(self) -> float:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
        raise AssertionError

    def end(self) -> None:
        """Kill it, and what a real agent runs: its scripts are in its process group."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextmanager
def agents(
    kind: str, size: int, *options: str, profile: str = "lan", joined: bool = True
) -> Iterator[list[Agent]]:
    """`size` agents; joined to one cluster and settled, unless told otherwise.

    Of the kind `mixed`: serfd and serf in turn, serfd first.
    """
    made: list[Agent] = []
    try:
        for i in range(size):
            its_kind = kind if kind in KINDS else KINDS[1 - i % 2]
            made.append(Agent(its_kind, f"n{i}", *options, profile=profile))
        if joined:
            for agent in made[1:]:
                agent.join(made[0])
            for agent in made:
                until(lambda agent=agent: agent.count() == size, f"{agent.name} lists {size}")
        yield made
    finally:
        for agent in made:
            agent.end()


class Told(NamedTuple):
    """A record of a stream."""

    at: float
    """Monotonic seconds."""
    body: dict[str, Any]


class Streams:
    """A stream of events from each of some agents, all read by one thread."""

    def __init__(
        self, agents: Sequence[Agent], wanted: str, *, answer: bytes | None = None
    ) -> None:
        """Open them. `wanted` as in rpc.md 6; `answer`: respond with that to every query."""
        self._connections = [_Connection(agent, wanted, answer) for agent in agents]
        self.told = [connection.told for connection in self._connections]
        """What each was told since."""
        self._closed = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def __enter__(self) -> "Streams":
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._thread.join()
        for connection in self._connections:
            connection.socket.close()

    def heard(self, name: str) -> list[float]:
        """When each was told of the user event `name`, in monotonic seconds; infinite: never."""
        return [
            next((record.at for record in told if record.body["Name"] == name), math.inf)
            for told in self.told
        ]

    def _read(self) -> None:
        with selectors.DefaultSelector() as selector:
            for connection in self._connections:
                selector.register(connection.socket, selectors.EVENT_READ, connection)
            while not self._closed:
                for key, _ in selector.select(timeout=0.1):
                    if not key.data.read():
                        selector.unregister(key.fileobj)


class _Connection:
    """One client with one stream."""

    _STREAM, _STOP = 1, 2

    def __init__(self, agent: Agent, wanted: str, answer: bytes | None) -> None:
        self.told: list[Told] = []
        self._answer = answer
        self._unpacker = msgpack.Unpacker(raw=False, unicode_errors="surrogateescape")
        self._answered: set[int] = set()
        self._record_follows = False
        host, _, port = agent.rpc.partition(":")
        self.socket = socket.create_connection((host, int(port)))
        self._ask("handshake", 0, {"Version": 1})
        self._ask("stream", self._STREAM, {"Type": wanted})
        # A real agent begins a stream after its reply. Requests are served in order: when this one,
        # which stops nothing, is answered, it has begun.
        self._ask("stop", self._STOP, {"Stop": 99})
        while self._STOP not in self._answered:
            assert self.read(), f"{agent.name} hangs up"

    def read(self) -> bool:
        """Take what there is, at least one byte; false if the agent hung up."""
        data = self.socket.recv(1 << 16)
        now = time.monotonic()
        self._unpacker.feed(data)
        for value in self._unpacker:
            if self._record_follows:
                self._record_follows = False
                self.told.append(Told(now, value))
                if self._answer is not None:
                    self._ask("respond", 3, {"ID": value["ID"], "Payload": self._answer})
            elif value["Seq"] == self._STREAM and self._STREAM in self._answered:
                self._record_follows = True
            else:
                assert not value["Error"], value
                self._answered.add(value["Seq"])
        return bool(data)

    def _ask(self, command: str, seq: int, body: dict[str, Any]) -> None:
        header = {"Command": command, "Seq": seq}
        self.socket.sendall(msgpack.packb(header) + msgpack.packb(body))


def until(
    condition: Callable[[], object], what: str, *, every: float = 0.005, limit: float = LIMIT
):
    deadline = time.monotonic() + limit
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {limit:.0f} s: {what}")
        time.sleep(every)


def within(seconds: float, call: Callable[[], object]) -> float:
    """How many seconds it takes; infinite if more than that. Then it goes on in its thread."""
    took = math.inf
    start = time.monotonic()

    def run() -> None:
        nonlocal took
        with suppress(SerfdError):  # the agent ends first
            call()
            took = time.monotonic() - start

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return took


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def announcement(size: int, *, packed: bool) -> bytes:
    """A push/pull request that announces `size` members with repeating tags."""
    from serfd.wire.envelope import Envelope
    from serfd.wire.serf_messages import PushPullState, encode, encode_tags
    from serfd.wire.stream import seal_stream
    from serfd.wire.swim_messages import NodeState, encode_push_pull

    metas = [
        encode_tags({"role": role, "dc": dc, "version": "1.4.2"}, protocol=5)
        for role in ("web", "db", "cache") for dc in ("east", "west")
    ]  # fmt: skip
    states = [
        NodeState(f"node-{i:05}", bytes((127, 9, i >> 8, i & 255)), 7946, metas[i % 6], 1, 0,
                  bytes((1, 5, 2, 2, 5, 5)))
        for i in range(size)
    ]  # fmt: skip
    names = {state.name: 1 for state in states}
    user = encode(PushPullState(5, names, [], 1, [], 1))
    body = encode_push_pull(states, user, join=True)
    if packed:
        from serfd.wire.envelope import compressed

        return compressed(body)
    return seal_stream(body, Envelope(compress=False), calling=True, nonce=bytes)


def announce(agent: Agent, size: int) -> None:
    """Tell a running agent of `size` members that do not exist."""
    host, _, port = agent.addr.partition(":")
    with socket.create_connection((host, int(port))) as s:
        s.sendall(announcement(size, packed=False))
        while s.recv(65536):
            pass
    until(lambda: agent.count() >= size, f"{agent.name} has taken in {size} members")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def row(what: str, serf: float | None, serfd: float, unit: str, goal: str) -> None:
    """Print one. A goal like `≤ 0.5` is of the ratio, one with a unit of serfd's value."""
    ratio = serfd / serf if serf else None
    cells = [what, "–" if serf is None else _value(serf, unit), _value(serfd, unit)]
    cells.append("–" if ratio is None else f"{ratio:.2f}")
    if goal:
        sign, bound, *of = goal.split()
        measured = serfd if of or ratio is None else ratio
        met = COMPARE[sign](measured, float(bound.replace(",", "")))
        goal += ", met" if met else ", missed"
    print(f"| {' | '.join(cells)} | {goal} |", flush=True)


def _value(number: float, unit: str) -> str:
    if number == math.inf:
        return "never"
    return f"{f'{number:,.0f}' if number >= 1000 else f'{number:.3g}'} {unit}".rstrip()


def in_turn(
    measure: Callable[[str], T], runs: int, what: str, *, kinds: Sequence[str] = KINDS
) -> dict[str, list[T]]:
    """What `measure` gives for each kind, run after run."""
    taken: dict[str, list[T]] = {kind: [] for kind in kinds}
    for run in range(runs):
        for kind in kinds:
            taken[kind].append(measure(kind))
            found = taken[kind][-1]
            shown = f"{found:.3f}" if isinstance(found, float) else _brief(found)
            say(f"  {what}, run {run + 1}/{runs}, {kind}: {shown}")
    return taken


def _brief(found: object) -> str:
    return f"{len(found)} taken" if isinstance(found, list) else str(found)


def both(measure: Callable[[str], float], runs: int, what: str) -> tuple[float, float, float]:
    """Medians of serf and serfd, measured in turn; and serfd's worst."""
    taken = in_turn(measure, runs, what)
    return (*(statistics.median(taken[kind]) for kind in KINDS), max(taken["serfd"]))
