"""serfd beside Debian's `serf`, in one run: `python bench/compare.py [NAME ...] > table.md`.

Each benchmark starts its own agents on loopback, first of one kind and then of the other, in turn,
and prints rows: what serf took, what serfd took, the ratio, whether the goal is met. Run it on a
quiet machine. `--quick` makes fewer and shorter runs; `--list` says what there is.
"""

import argparse
import gc
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from clients import members_rpc, slow_handler, subscribers
from cluster import BIN, KINDS, LIMIT, Agent, agents, announce, announcement, both, row, say, until
from events import event, events, query
from handlers import plugins


def idle(quick: bool) -> None:
    """CPU of one idle agent among 5 and 20, and the memory of a bare one."""
    seconds = 20 if quick else 60
    for size in (5, 20):
        taken = {}
        for kind in KINDS:
            with agents(kind, size) as made:
                time.sleep(5)  # not a condition: the joins' last retransmits are not to be counted
                before = [a.cpu() for a in made]
                time.sleep(seconds)
                taken[kind] = statistics.mean(
                    (a.cpu() - b) * 60 / seconds for a, b in zip(made, before, strict=True)
                )
                say(f"  idle among {size}, {kind}: {taken[kind]:.3f} CPU s a minute")
        row(f"idle agent among {size}, CPU a minute", taken["serf"], taken["serfd"], "s", "≤ 0.5")
    rss = {}
    for kind in KINDS:
        with agents(kind, 1) as made:
            rss[kind] = made[0].rss()
    row("bare agent, resident memory", rss["serf"], rss["serfd"], "MB", "≤ 36 MB")


def ctl(quick: bool) -> None:
    """`serfctl members` against `serf members`, whole process."""
    tools = {"serf": ["serf", "members"], "serfd": [str(BIN / "serfctl"), "members"]}
    runs = 10 if quick else 30
    with agents("serfd", 3) as made:
        row(*_time_tools(tools, made[0], runs, "`members` of 3, whole process"), "≤ 3")
    with agents("serfd", 1) as made:
        announce(made[0], 5000)
        row(*_time_tools(tools, made[0], runs, "`members` of 5,000, whole process"), "≤ 1")


def _time_tools(tools, agent: Agent, runs: int, what: str):
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(runs):
        for kind, command in tools.items():
            start = time.perf_counter()
            subprocess.run(
                [*command, f"-rpc-addr={agent.rpc}"], stdout=subprocess.DEVNULL, check=True
            )
            taken[kind].append(1000 * (time.perf_counter() - start))
    return what, statistics.median(taken["serf"]), statistics.median(taken["serfd"]), "ms"


def join(quick: bool) -> None:
    """One more agent joins 9 and 29 others: until all list it."""
    for size in (10, 30):

        def once(kind: str, size: int = size) -> float:
            with agents(kind, size - 1) as made, Agent(kind, "late") as newcomer:
                start = time.monotonic()
                newcomer.join(made[0])
                for agent in (*made, newcomer):
                    until(lambda a=agent: a.count() == size, f"{agent.name} lists {size}")
                return time.monotonic() - start

        serf, serfd, _ = both(once, 3 if quick else 7, f"join seen by all of {size}")
        row(f"join seen by all of {size}", serf, serfd, "s", "≤ 0.5")


def storm(quick: bool) -> None:
    """30 agents join one seed at the same moment: until all list all."""

    def once(kind: str) -> float:
        with agents(kind, 30, joined=False) as made:
            start = time.monotonic()
            with ThreadPoolExecutor(30) as pool:
                list(pool.map(lambda agent: agent.join(made[0]), made[1:]))
            for agent in made:
                until(lambda a=agent: a.count() == 30, f"{agent.name} lists 30")
            return time.monotonic() - start

    taken = [once("serfd") for _ in range(3 if quick else 10)]
    row("30 join one seed at once: all list all, median", None, statistics.median(taken), "s", "")
    row("30 join one seed at once: all list all, worst", None, max(taken), "s", "≤ 2 s")


def kill(quick: bool) -> None:
    """One of 10 is killed: until all others say failed."""
    for profile in ("local", "lan"):

        def once(kind: str, profile: str = profile) -> float:
            with agents(kind, 10, profile=profile) as made:
                start = time.monotonic()
                made[5].end()
                for agent in made[:5] + made[6:]:
                    until(lambda a=agent: a.count("failed") == 1, f"{agent.name} sees it")
                return time.monotonic() - start

        serf, serfd, _ = both(once, 3 if quick else 7, f"kill seen by all of 10, {profile}")
        row(f"kill to failed on all of 10, {profile}", serf, serfd, "s", "≤ 1")


def leave(quick: bool) -> None:
    """One of 10 leaves: until all others say left, and until the command returns."""
    returned: dict[str, list[float]] = {kind: [] for kind in KINDS}

    def once(kind: str) -> float:
        with agents(kind, 10) as made:
            tool = [str(BIN / "serfctl"), "leave"] if kind == "serfd" else ["serf", "leave"]
            start = time.monotonic()
            command = subprocess.Popen(
                [*tool, f"-rpc-addr={made[5].rpc}"], stdout=subprocess.DEVNULL
            )
            for agent in made[:5] + made[6:]:
                until(lambda a=agent: a.count("left") == 1, f"{agent.name} sees it")
            seen = time.monotonic() - start
            assert command.wait(LIMIT) == 0
            returned[kind].append(time.monotonic() - start)
            return seen

    serf, serfd, _ = both(once, 3 if quick else 7, "leave seen by all of 10")
    row("leave seen by all of 10", serf, serfd, "s", "≤ 0.5")
    serf, serfd = (statistics.median(returned[kind]) for kind in KINDS)
    row("leave, until the command returns", serf, serfd, "s", "≤ 1 s")


def exchange(quick: bool) -> None:
    """A push/pull of 1,000 and 10,000 members: CPU, longest stall, memory a member."""
    for size in (1000, 10_000):
        for packed in (False, True):
            took = [_take_in(size, packed=packed) for _ in range(3 if quick else 7)]
            form = "packed" if packed else "plain"
            cpu = statistics.median(cpu for cpu, _ in took)
            stall = statistics.median(stall for _, stall in took)
            goal = "< 25 ms" if size == 1000 else ""
            row(f"push/pull of {size:,} taken in, {form}, CPU", None, cpu, "ms", goal)
            goal = "≤ 50 ms" if size == 10_000 else ""
            row(f"push/pull of {size:,}, {form}, longest stall", None, stall, "ms", goal)
    before = _memory_of(0)
    row("memory a known member, of 10,000", None, (_memory_of(10_000) - before) / 10_000,
        "B", "< 600 B")  # fmt: skip


def _node():
    from random import Random

    from serfd.config import Config
    from serfd.serf.node import Node
    from serfd.wire.sealing import Keyring

    return Node(
        Config(), name="bench", addr=bytes((127, 0, 0, 1)), port=7946, keyring=Keyring(),
        now=0.0, rng=Random(1), nonce=lambda: bytes(12),
    )  # fmt: skip


def _join_inputs(node, size: int, answer: BinaryIO) -> Iterator[Callable[[], None]]:
    """The inputs of a join that is answered with `size` members, in pieces as TCP brings them."""
    from serfd.effects import Address, Connect

    node.join(0.0, [Address("127.0.0.1", 1)])
    stream = next(e.stream for e in node.take_effects() if isinstance(e, Connect))
    while piece := answer.read(65536):
        yield lambda piece=piece: node.stream_received(0.0, stream, piece)
    now = 0.0
    while node.member_count < size + 1:
        now += 0.001
        assert now < 1
        yield lambda now=now: node.wake(now)


def _take_in(size: int, *, packed: bool) -> tuple[float, float]:
    """CPU ms of a join's whole answer, and of the longest input."""
    node = _node()
    took: list[float] = []
    gc.collect()
    for happened in _join_inputs(node, size, BytesIO(announcement(size, packed=packed))):
        start = time.process_time()
        happened()
        node.take_effects()
        took.append(1000 * (time.process_time() - start))
    return sum(took), max(took)


def _memory_of(size: int) -> float:
    """Bytes resident in a fresh process that joined a cluster of `size`."""
    code = f"import sys, compare; print(compare._resident_after({size}, sys.stdin.buffer))"
    with tempfile.TemporaryFile() as answer:
        answer.write(announcement(10, packed=False).ljust(65536, b"\0"))
        answer.write(announcement(size, packed=False))
        answer.seek(0)
        here = Path(__file__).resolve().parent
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, cwd=here, stdin=answer, capture_output=True, text=True, check=True
        )
    return float(done.stdout)


def _resident_after(size: int, answer: BinaryIO) -> float:
    # A small cluster first, which warms allocators and caches up.
    warm, node = _node(), _node()
    for held, count, source in ((warm, 10, BytesIO(answer.read(65536))), (node, size, answer)):
        for happened in _join_inputs(held, count, source):
            happened()
            held.take_effects()
    gc.collect()
    return resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[1])


def simulator(quick: bool) -> None:
    """Virtual node-seconds a CPU second, 50 idle nodes."""
    from serfd.config import Config
    from serfd.sim.cluster import Cluster

    for form, config, goal in (
        ("no coordinates", Config(enable_compression=False, disable_coordinates=True), "≥ 20,000"),
        ("plain", Config(enable_compression=False), ""),
        ("packed", Config(), ""),
    ):
        cluster = Cluster(size=50, seed=7, config=config)
        cluster.run(10)
        seconds = 60 if quick else 300
        start = time.process_time()
        cluster.run(seconds)
        speed = 50 * seconds / (time.process_time() - start)
        row(f"simulator, 50 idle nodes, {form}, node-seconds a CPU second", None, speed, "", goal)


BENCHMARKS = {
    function.__name__.replace("_", "-"): function
    for function in (
        idle, ctl, join, storm, kill, leave, exchange, simulator,
        events, event, query, members_rpc, subscribers, slow_handler,
        plugins,
    )
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="benchmarks to run; none: all")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs")
    parser.add_argument("--list", action="store_true", help="what there is")
    given = parser.parse_args()
    if given.list:
        for name, function in BENCHMARKS.items():
            print(f"{name:12} {function.__doc__}")
        return 0
    unknown = [name for name in given.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    if shutil.which("serf") is None:
        parser.error("the real `serf` is not installed: apt-get install serf")
    # As Ctrl-C does it: agents are ended and files removed on the way out.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    os.chdir(tempfile.gettempdir())
    print("| what | serf | serfd | ratio | goal |\n|---|---:|---:|---:|---|", flush=True)
    for name in given.names or BENCHMARKS:
        say(f"{name}: {BENCHMARKS[name].__doc__}")
        BENCHMARKS[name](given.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
