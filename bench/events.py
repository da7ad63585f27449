"""User events and queries in clusters of ten. All events are sent with `coalesce` false."""

import math
import random
import statistics
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from itertools import islice
from typing import NamedTuple

from cluster import BIN, KINDS, LIMIT, Agent, Streams, Told, agents, in_turn, row, until

from serfd.rpc.client import Client

SIZE = 10
BURST = 1000
PAYLOAD_SIZE = 100
BURST_LIMIT = 30.0
"""Seconds from the last request; what comes later, by an exchange of states, is not counted."""
SINGLES = 20
"""Events or queries of one run."""
SINGLE_LIMIT = 10.0
"""Seconds after which a single event is taken for lost."""


class Heard(NamedTuple):
    """What one node heard of a burst."""

    kind: str
    share: float
    """Percent of the events."""
    whole: bool
    """Each of them once, in the order of their Lamport times."""
    last: float
    """Seconds from the first request to the last delivery."""
    cpu: float
    """Seconds, until no agent has anything to tell any more, or `BURST_LIMIT` is over."""


def events(quick: bool) -> None:
    """1,000 user events through one connection into 10 agents: who hears them, CPU."""
    what = f"{BURST:,} events into {SIZE}"
    runs = in_turn(_burst, 1 if quick else 5, what, kinds=(*KINDS, "mixed"))
    _burst_rows(what, runs["serf"], runs["serfd"])
    _burst_rows(
        f"{BURST:,} into a serfd of {SIZE // 2} and {SIZE // 2}",
        *([[node for node in run if node.kind == kind] for run in runs["mixed"]] for kind in KINDS),
    )


def _burst(kind: str) -> list[Heard]:
    with agents(kind, SIZE) as made, Streams(made, "user") as streams:
        before = [agent.cpu() for agent in made]
        start = time.monotonic()
        for i in range(BURST):
            payload = b"%04d" % i
            made[0].client.event("burst", payload.ljust(PAYLOAD_SIZE, b"."), coalesce=False)
        with suppress(TimeoutError):
            until(
                lambda: not any(agent.count("event_queue") for agent in made),
                "no event waits to be told", every=0.25, limit=BURST_LIMIT,
            )  # fmt: skip
        used = [agent.cpu() - cpu for agent, cpu in zip(made, before, strict=True)]
        return [
            _heard(agent, told, start, cpu)
            for agent, told, cpu in zip(made, streams.told, used, strict=True)
        ]


def _heard(agent: Agent, told: Sequence[Told], start: float, cpu: float) -> Heard:
    numbers = [int(record.body["Payload"][:4]) for record in told]
    ltimes = [record.body["LTime"] for record in told]
    whole = numbers == list(range(BURST)) and ltimes == sorted(set(ltimes))
    last = told[-1].at - start if told else math.inf
    return Heard(agent.kind, 100 * len(set(numbers)) / BURST, whole, last, cpu)


def _burst_rows(what: str, *by_kind: Sequence[Sequence[Heard]]) -> None:
    """Of serf's nodes and of serfd's: for each run, what they heard."""
    nodes = [[node for run in runs for node in run] for runs in by_kind]
    shares = [[node.share for node in each] for each in nodes]
    whole = [statistics.mean(100 * node.whole for node in each) for each in nodes]
    last = [statistics.median(max(node.last for node in run) for run in runs) for runs in by_kind]
    cpu = [statistics.mean(node.cpu for node in each) for each in nodes]
    for which, (serf, serfd), unit, goal in (
        ("delivered, mean", map(statistics.mean, shares), "%", ""),
        ("delivered, worst node", map(min, shares), "%", "≥ 100 %"),
        ("nodes that hear each once, in order", whole, "%", "≥ 100 %"),
        ("until the last is heard", last, "s", ""),
        ("CPU of an agent", cpu, "s", ""),
    ):
        row(f"{what}: {which}", serf, serfd, unit, goal)


def event(quick: bool) -> None:
    """A single user event, until each of 9 others hears it."""
    runs = in_turn(_event_times, 1 if quick else 5, "single events")
    serf, serfd = (sorted(ms for run in runs[kind] for ms in run) for kind in KINDS)
    what = f"event to each of {SIZE - 1} others"
    row(f"{what}, median", statistics.median(serf), statistics.median(serfd), "ms", "≤ 0.25")
    row(f"{what}, p90", serf[len(serf) * 9 // 10], serfd[len(serfd) * 9 // 10], "ms", "")
    row(f"{what}, max", serf[-1], serfd[-1], "ms", "")


def _event_times(kind: str) -> list[float]:
    """Milliseconds, of each event to each of the others."""
    took: list[float] = []
    with agents(kind, SIZE) as made, Streams(made[1:], "user") as streams:
        for i in range(SINGLES):
            _pause()
            name = f"single-{i}"
            start = time.monotonic()
            made[0].client.event(name, b"." * PAYLOAD_SIZE, coalesce=False)
            with suppress(TimeoutError):
                until(
                    lambda name=name: max(streams.heard(name)) < math.inf, f"all hear {name}",
                    every=0.02, limit=SINGLE_LIMIT,
                )  # fmt: skip
            took += [1000 * (at - start) for at in streams.heard(name)]
    return took


def query(quick: bool) -> None:
    """A query that a client at each of 10 agents answers: last answer, end of the command."""
    runs = in_turn(_query_times, 1 if quick else 5, "queries")
    serf, serfd = (sorted(ms for run in runs[kind] for ms in run) for kind in KINDS)
    what = f"query, last of {SIZE} answers"
    row(f"{what}, median", statistics.median(serf), statistics.median(serfd), "ms", "≤ 0.5")
    row(f"{what}, p90", serf[len(serf) * 9 // 10], serfd[len(serfd) * 9 // 10], "ms", "")
    ends = in_turn(_query_command, 1 if quick else 3, "query commands")
    row("query, until the command returns", *map(statistics.median, ends.values()), "s", "≤ 0.5 s")


def _query_times(kind: str) -> list[float]:
    """Milliseconds to the last answer, of each query."""
    took: list[float] = []
    with agents(kind, SIZE) as made, Streams(made, "query", answer=b"yes"), ExitStack() as stack:
        for _ in range(SINGLES):
            # Its end, which a real agent puts off, is not waited for.
            client = stack.enter_context(Client(made[0].rpc))
            client.stats()
            _pause()
            start = time.monotonic()
            answers = len(list(islice(_responses(client), SIZE)))
            took.append(1000 * (time.monotonic() - start) if answers == SIZE else math.inf)
    return took


def _responses(client: Client):
    return (answer for answer in client.query("benchmark") if answer["Type"] == "response")


def _query_command(kind: str) -> float:
    """Seconds that the command line tool takes."""
    tool = [str(BIN / "serfctl")] if kind == "serfd" else ["serf"]
    with agents(kind, SIZE) as made, Streams(made, "query", answer=b"yes"):
        start = time.monotonic()
        command = [*tool, "query", f"-rpc-addr={made[0].rpc}", "benchmark"]
        done = subprocess.run(command, capture_output=True, check=True, timeout=LIMIT)
        took = time.monotonic() - start
    heard = done.stdout.count(b"Response from")
    assert heard == SIZE, f"{heard} of {SIZE} answers: {done.stdout!r}"
    return took


def _pause() -> None:
    """So that it is not always sent at the same moment of a gossip interval."""
    time.sleep(random.uniform(0.2, 0.6))
