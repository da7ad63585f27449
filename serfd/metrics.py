"""What one node counts and measures, as plain values (agent.md 10).

Names are Serf's, without its prefix `serf-agent.`. A `Metrics` belongs to the reactor's thread.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from math import inf, sqrt
from typing import Literal, NamedTuple, TypeAlias

PREFIX = "serf-agent."
"""What Serf puts before each name when it sends or shows it."""
NAMES_MAX = 1024
"""Names that are kept beside those in `METRICS`; plugins and event names bring them."""
STRANGERS_NAMES_MAX = 512
"""With so many of them, none that a stranger chose is added: the rest is for plugins."""
NAME_LENGTH_MAX = 200
"""Characters of a name."""
RAW_MAX = 4096
"""Single values of samples that wait to be sent; as many as in Serf."""

Kind: TypeAlias = Literal["counter", "gauge", "sample"]
Unit: TypeAlias = Literal["", "bytes", "milliseconds", "nanoseconds", "seconds"]

_SECONDS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
    10.0,
)  # fmt: skip
BOUNDS: Mapping[Unit, Sequence[float]] = {
    "": (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000),
    "bytes": (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 65536),
    "milliseconds": tuple(1e3 * bound for bound in _SECONDS),
    "nanoseconds": tuple(1e9 * bound for bound in _SECONDS),
    "seconds": _SECONDS,
}
"""Upper bounds of a histogram's buckets; a last bucket has no bound."""

_UNSAFE = re.compile("[\0-\x20:|\x7f-\xa0\ud800-\udfff]")


class Description(NamedTuple):
    """What a name stands for."""

    kind: Kind
    unit: Unit
    """Empty: a plain number."""
    text: str


METRICS: Mapping[str, Description] = {
    "serf.member.join": Description("counter", "", "Members that came, or came back."),
    "serf.member.left": Description("counter", "", "Members that left."),
    "serf.member.failed": Description("counter", "", "Members that failed."),
    "serf.member.update": Description("counter", "", "Changes of members' tags."),
    "serf.member.flap": Description("counter", "", "Members back within 60 s of their failure."),
    "serf.events": Description("counter", "", "User events heard, own ones included."),
    "serf.events.NAME": Description("counter", "", "User events heard, of one name."),
    "serf.queries": Description("counter", "", "Queries heard, own and internal ones included."),
    "serf.queries.NAME": Description("counter", "", "Queries heard, of one name."),
    "serf.query_acks": Description("counter", "", "Members that acknowledged own queries."),
    "serf.query_responses": Description("counter", "", "Members that answered own queries."),
    "serf.query_duplicate_acks": Description("counter", "", "Acknowledgements that came again."),
    "serf.query_duplicate_responses": Description("counter", "", "Answers that came again."),
    "serf.msgs.received": Description("sample", "bytes", "Serf's messages that came in."),
    "serf.msgs.sent": Description("sample", "bytes", "Serf's messages that were gossiped."),
    "serf.queue.Intent": Description("sample", "", "Joins and leaves that wait to be gossiped."),
    "serf.queue.Event": Description("sample", "", "User events that wait to be gossiped."),
    "serf.queue.Query": Description("sample", "", "Queries that wait to be gossiped."),
    "serf.queue.dropped": Description("counter", "", "Messages that were lost from the queues."),
    "serf.snapshot.appendLine": Description("sample", "seconds", "Time to write what is new."),
    "serf.snapshot.compact": Description("sample", "seconds", "Time to replace the snapshot."),
    "serf.coordinate.adjustment-ms": Description(
        "sample", "milliseconds", "How far a round trip moved this node's coordinate."
    ),
    "serf.coordinate.rejected": Description("counter", "", "Coordinates that were not believed."),
    "serf.coordinate.zero-rtt": Description("counter", "", "Round trips too short for the clock."),
    "memberlist.msg.alive": Description("counter", "", "News taken in: a member is there."),
    "memberlist.msg.suspect": Description("counter", "", "News taken in: a member is suspected."),
    "memberlist.msg.dead": Description("counter", "", "News taken in: a member failed or left."),
    "memberlist.udp.received": Description("counter", "bytes", "Packets that came in."),
    "memberlist.udp.sent": Description("counter", "bytes", "Packets that were sent."),
    "memberlist.tcp.accept": Description("counter", "", "Streams that peers opened."),
    "memberlist.tcp.connect": Description("counter", "", "Streams that this node opened."),
    "memberlist.tcp.sent": Description("counter", "bytes", "What was written to streams."),
    "memberlist.probeNode": Description("sample", "seconds", "Time from a probe to its verdict."),
    "memberlist.pushPullNode": Description(
        "sample", "seconds", "Time from opening a state exchange to its answer."
    ),
    "memberlist.node.instances.alive": Description("gauge", "", "Members that gossip sees alive."),
    "memberlist.node.instances.suspect": Description("gauge", "", "Members that are suspected."),
    "memberlist.node.instances.dead": Description("gauge", "", "Members that failed, remembered."),
    "memberlist.node.instances.left": Description("gauge", "", "Members that left, remembered."),
    "memberlist.size.local": Description(
        "gauge", "bytes", "The state that was sent last, unpacked."
    ),
    "memberlist.size.remote": Description("sample", "bytes", "Peers' states, as they came in."),
    "memberlist.degraded.probe": Description("counter", "", "Probes begun in bad health."),
    "memberlist.degraded.timeout": Description(
        "counter", "", "Members declared dead though too few others agreed."
    ),
    "memberlist.health.score": Description("gauge", "", "Own health: 0 is well, more is worse."),
    "memberlist.queue.broadcasts": Description(
        "sample", "", "News of members that waits to be gossiped."
    ),
    "agent.ipc.accept": Description("counter", "", "RPC clients that connected."),
    "agent.ipc.command": Description("counter", "", "Requests of RPC clients."),
    "plugin.calls.PLUGIN": Description("counter", "", "Calls of a plugin's hooks."),
    "plugin.errors.PLUGIN": Description("counter", "", "Hooks of a plugin that failed."),
    "plugin.lost.PLUGIN": Description("counter", "", "Events a plugin was too slow for."),
    "plugin.waiting.PLUGIN": Description("gauge", "", "Events that wait for a plugin."),
    "agent.metrics.refused": Description("counter", "", "Values of names that are too many."),
    "agent.metrics.dropped": Description("counter", "", "Values of samples that were not sent."),
    "agent.statsd.dropped": Description("counter", "", "Lines that did not go to statsd."),
    "agent.statsite.dropped": Description("counter", "", "Lines that did not go to statsite."),
    "runtime.num_goroutines": Description("gauge", "", "Threads."),
    "runtime.alloc_bytes": Description("gauge", "bytes", "Memory shared with nobody."),
    "runtime.sys_bytes": Description("gauge", "bytes", "Memory in use, shared included."),
    "runtime.heap_objects": Description("gauge", "", "Blocks that Python has allocated."),
    "runtime.total_gc_runs": Description("gauge", "", "Garbage collections since the start."),
    "runtime.total_gc_pause_ns": Description("gauge", "nanoseconds", "Time that collections took."),
    "runtime.gc_pause_ns": Description("sample", "nanoseconds", "Time of a garbage collection."),
}  # fmt: skip
"""Every name that serfd itself uses. NAME and PLUGIN stand for others."""


class Series:
    """All values of one sample, summed up."""

    __slots__ = ("bounds", "buckets", "count", "last", "max", "min", "squares", "sum", "unit")

    def __init__(self, unit: Unit, bounds: Sequence[float]) -> None:
        self.unit = unit
        self.bounds = bounds
        """Upper bounds of the buckets, ascending; a value that equals one is below it."""
        self.buckets = [0] * (len(bounds) + 1)
        """How many values are in each bucket alone; the last one has no bound."""
        self.count = 0
        self.sum = 0.0
        self.squares = 0.0
        """The sum of the values' squares."""
        self.min = inf
        self.max = -inf
        self.last = 0.0

    def add(self, value: float) -> None:
        """Take one more value in."""
        self.count += 1
        self.sum += value
        self.squares += value * value
        if value < self.min:
            self.min = value
        if value > self.max:
            self.max = value
        self.last = value
        self.buckets[bisect_left(self.bounds, value)] += 1

    @property
    def deviation(self) -> float:
        """The standard deviation; 0 of fewer than two values."""
        if self.count < 2:
            return 0.0
        # Rounding may leave less than nothing of values that are all the same.
        rest = max(0.0, self.count * self.squares - self.sum * self.sum)
        return sqrt(rest / (self.count * (self.count - 1)))


class Metrics:
    """Counters, gauges and samples by name. It holds totals since the start."""

    __slots__ = ("_names", "_raw", "counters", "gauges", "samples")

    def __init__(self) -> None:
        self.counters: dict[str, float] = {}
        """What only grows; read them, change them by `count`."""
        self.gauges: dict[str, float] = {}
        """What is so now."""
        self.samples: dict[str, Series] = {}
        self._names = 0
        """How many are kept that are not in `METRICS`."""
        self._raw: list[tuple[str, float]] | None = None

    def count(self, name: str, by: float = 1) -> None:
        """Add to a counter."""
        try:
            self.counters[name] += by
        except KeyError:
            if self._has_room(name):
                self.counters[name] = by

    def count_one_of(self, name: str, kind: str) -> None:
        """Count `name` and, as long as there is room for it, `name.kind`.

        `kind` may be a stranger's choice: when there are too many, only the total counts.
        """
        self.count(name)
        full = f"{name}.{kind}"
        if full in self.counters or self._names < STRANGERS_NAMES_MAX:
            self.count(full)
        else:
            self.count("agent.metrics.refused")

    def gauge(self, name: str, value: float) -> None:
        """Set what is so now."""
        if name in self.gauges or self._has_room(name):
            self.gauges[name] = value

    def sample(
        self, name: str, value: float, *, unit: Unit = "seconds", bounds: Sequence[float] = ()
    ) -> None:
        """Take in one measured value.

        `unit` is that of a name that is not in `METRICS`; `bounds` are those of its histogram's
        buckets, ascending, by default the unit's in `BOUNDS`. A name keeps its first ones.
        """
        series = self.samples.get(name)
        if series is None:
            if not self._has_room(name):
                return
            unit = METRICS[name].unit if name in METRICS else unit
            series = self.samples[name] = Series(unit, bounds or BOUNDS[unit])
        series.add(value)
        if self._raw is not None:
            if len(self._raw) < RAW_MAX:
                self._raw.append((name, value))
            else:
                self.count("agent.metrics.dropped")

    def keep_raw(self) -> None:
        """From now on keep the single values of samples for `take_raw`, which must be called."""
        self._raw = []

    def take_raw(self) -> list[tuple[str, float]]:
        """Names and values of samples since the last time, in order."""
        assert self._raw is not None, "keep_raw comes first"
        raw, self._raw = self._raw, []
        return raw

    def _has_room(self, name: str) -> bool:
        if name in METRICS:
            return True
        if self._names >= NAMES_MAX or len(name) > NAME_LENGTH_MAX:
            self.count("agent.metrics.refused")
            return False
        self._names += 1
        return True


def line_name(name: str, host: str = "") -> str:
    """A name as it is sent and shown: with prefix and host, and nothing that would end it."""
    full = f"{host}.{name}" if host else name
    return PREFIX + _UNSAFE.sub("_", full)


def factor(unit: Unit) -> float:
    """What values of a sample are multiplied with when they are sent or shown: Serf's are ms."""
    return 1000.0 if unit == "seconds" else 1.0


def report(metrics: Metrics, time: str) -> Iterator[str]:
    """Everything since the start, in the lines of a real agent's report (agent.md 10).

    `time` is put into brackets. How often bytes were added to a counter is not known.
    """
    for name, value in sorted(metrics.gauges.items()):
        yield f"[{time}][G] '{line_name(name)}': {value:.3f}"
    for name, value in sorted(metrics.counters.items()):
        is_bytes = name in METRICS and METRICS[name].unit == "bytes"
        count = "" if is_bytes else f"Count: {value:.0f} "
        yield f"[{time}][C] '{line_name(name)}': {count}Sum: {value:.3f}"
    for name, series in sorted(metrics.samples.items()):
        by = factor(series.unit)
        text = f"Count: {series.count}"
        if series.deviation:
            text += (
                f" Min: {by * series.min:.3f} Mean: {by * series.sum / series.count:.3f}"
                f" Max: {by * series.max:.3f} Stddev: {by * series.deviation:.3f}"
            )
        yield f"[{time}][S] '{line_name(name)}': {text} Sum: {by * series.sum:.3f}"
