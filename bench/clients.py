"""What RPC clients and script handlers cost one agent, and each other."""

import math
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from cluster import (
    KINDS,
    Agent,
    Streams,
    Told,
    agents,
    announce,
    both,
    in_turn,
    row,
    until,
    within,
)

from serfd.errors import SerfdError
from serfd.rpc.client import Client

SUBSCRIBERS = 100
REQUESTS = 20
"""`members` requests beside a handler."""
BACKLOG = 20
"""Events that a handler is given before the others are measured."""
FLOOD = 5000
"""Events sent to an agent whose handler hangs."""
PATIENCE = 10.0
"""Seconds after which something does not happen any more."""
STUCK = 3.0
"""Seconds without any answer after which a connection gets none any more."""


def members_rpc(quick: bool) -> None:
    """CPU of an agent for a `members` request, with 50, 1,000 and 5,000 members."""
    for size in (50, 1000, 5000):
        requests = (200_000 if quick else 1_000_000) // (size + 200)

        def once(kind: str, size: int = size, requests: int = requests) -> float:
            with agents(kind, 1) as made:
                announce(made[0], size - 1)
                client = made[0].client
                client.members()
                before = made[0].cpu()
                for _ in range(requests):
                    client.members()
                return 1e6 * (made[0].cpu() - before) / requests

        what = f"`members` of {size:,}, CPU of the agent"
        serf, serfd, _ = both(once, 3 if quick else 5, what)
        row(what, serf, serfd, "µs", "≤ 1")


class Fanout(NamedTuple):
    """How an agent told its subscribers of some events."""

    lost: int
    """Records."""
    cpu: float
    """Microseconds a record."""


def subscribers(quick: bool) -> None:
    """100 streams of everything from one agent: records lost, and CPU a record."""
    for pace, interval, count in (
        ("one after the other", 0.0, 200 if quick else 1000),
        ("every 50 ms", 0.05, 50 if quick else 200),
    ):

        def once(kind: str, count: int = count, interval: float = interval) -> Fanout:
            return _fan_out(kind, count, interval)

        what = f"events to {SUBSCRIBERS} streams, {pace}"
        runs = in_turn(once, 3 if quick else 5, what)
        serf, serfd = (statistics.median(run.cpu for run in runs[kind]) for kind in KINDS)
        row(f"{what}: CPU a record", serf, serfd, "µs", "≤ 2")
        serf, serfd = (max(run.lost for run in runs[kind]) for kind in KINDS)
        of = count * SUBSCRIBERS
        row(f"{what}: lost of {of:,}, worst run", serf, serfd, "records", "≤ 0 records")


def _fan_out(kind: str, count: int, interval: float) -> Fanout:
    with agents(kind, 1) as made, Streams(made * SUBSCRIBERS, "*") as streams:
        before = made[0].cpu()
        for i in range(count):
            made[0].client.event("news", b"%04d" % i * 25, coalesce=False)
            time.sleep(interval)
        with suppress(TimeoutError):
            until(
                lambda: all(_user_events(told) == count for told in streams.told),
                "all hear all", every=0.2, limit=PATIENCE,
            )  # fmt: skip
        used = made[0].cpu() - before
        heard = sum(map(_user_events, streams.told))
    return Fanout(count * SUBSCRIBERS - heard, 1e6 * used / heard)


def _user_events(told: Sequence[Told]) -> int:
    return sum(record.body["Event"] == "user" for record in told)


class Beside(NamedTuple):
    """What an agent still does beside a script handler, in milliseconds."""

    members: float
    """The answer to `members`."""
    join: float
    """Until it lists one that joined another."""
    event: float
    """Until a stream tells of an event."""


def slow_handler(quick: bool) -> None:
    """An agent whose script handler fails, sleeps or hangs: what it still does."""
    with _hanging() as hang:
        for handler, script in (
            ("no handler", ""),
            ("handler fails", "exit 1"),
            ("handler sleeps", "sleep 0.2"),
            ("handler hangs", hang),
        ):

            def once(kind: str, script: str = script) -> Beside:
                return _beside(kind, script)

            runs = in_turn(once, 1 if quick else 5, handler)
            medians = {kind: Beside(*map(statistics.median, zip(*runs[kind], strict=True)))
                       for kind in KINDS}  # fmt: skip
            for what, goal, serf, serfd in zip(
                ("`members`", "join seen", "event to a stream"),
                ("≤ 10 ms", "≤ 0.5", "≤ 10 ms"),
                *medians.values(), strict=True,
            ):  # fmt: skip
                row(f"{handler}: {what}", serf, serfd, "ms", goal)
        taken = in_turn(lambda kind: _flood(kind, hang), 1 if quick else 3, "flood")
    serf, serfd = (statistics.median(taken[kind]) for kind in KINDS)
    row(f"handler hangs: events taken, of {FLOOD:,}", serf, serfd, "events", f"≥ {FLOOD:,} events")


@contextmanager
def _hanging() -> Iterator[str]:
    """A script that ends when the benchmark does, however that ends."""
    with tempfile.TemporaryDirectory() as folder:
        pipe = Path(folder) / "never"
        os.mkfifo(pipe)
        writer = os.open(pipe, os.O_RDWR)
        try:
            yield f"exec cat {pipe}"
        finally:
            os.close(writer)


def _handled(script: str) -> list[str]:
    return [f"-event-handler=user={script}"] if script else []


def _beside(kind: str, script: str) -> Beside:
    with (
        Agent(kind, "slow", *_handled(script)) as slow,
        Agent(kind, "other") as other,
        Agent(kind, "late") as late,
        Streams([slow], "user") as streams,
    ):
        other.join(slow)
        until(lambda: slow.count() == 2, "slow lists other")
        for _ in range(BACKLOG):
            slow.client.event("load", coalesce=False)
        members = [within(PATIENCE, lambda: _members(slow))]
        while len(members) < REQUESTS and members[-1] < math.inf:
            members.append(within(PATIENCE, lambda: _members(slow)))

        def join() -> None:
            late.join(other)
            until(lambda: slow.count() == 3, "slow lists late")

        joined = within(PATIENCE, join)
        start = time.monotonic()
        slow.client.event("probe", coalesce=False)
        with suppress(TimeoutError):
            until(lambda: streams.heard("probe")[0] < math.inf, "probe is heard", limit=PATIENCE)
        heard = streams.heard("probe")[0] - start
    return Beside(*(1000 * took for took in (statistics.median(members), joined, heard)))


def _members(agent: Agent) -> None:
    with Client(agent.rpc) as client:
        client.members()


def _flood(kind: str, hang: str) -> int:
    """How many events an agent takes whose handler hangs at the first."""
    taken = 0
    with Agent(kind, "slow", *_handled(hang)) as slow:

        def send() -> None:
            nonlocal taken
            with suppress(SerfdError):  # the agent ends first
                for _ in range(FLOOD):
                    slow.client.event("load", coalesce=False)
                    taken += 1

        sending = threading.Thread(target=send, daemon=True)
        sending.start()
        before = -1
        while sending.is_alive() and taken > before:
            before = taken
            sending.join(STUCK)
    return taken
