"""Loss, latency, partitions, crashes, slow nodes: the network, and what may go wrong in a run."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from random import Random

RETRANSMIT = 0.2
"""Seconds after which TCP sends a lost segment again; doubled with every further try."""
GIVE_UP = 900.0
"""A wait so long is the last one, as with Linux; every exchange has ended by then."""


class Network:
    """How long things take from process to process, and what gets lost. Places go by their keys."""

    def __init__(self, rng: Random, *, latency: float, jitter: float, loss: float) -> None:
        """`latency`: seconds one way; `jitter`: up to so many more, evenly drawn.

        `loss`: the share of packets that vanish, and of TCP segments that are sent again.
        """
        self._rng = rng
        self._latency = latency
        self._jitter = jitter
        self._losses = [loss]
        self.loss = loss
        """The share that is lost now."""
        self._cuts: list[tuple[frozenset[str], frozenset[str]]] = []
        self._lags: dict[str, float] = {}

    @property
    def is_disturbed(self) -> bool:
        """Whether more is lost or slower than the network was made to be."""
        return bool(self._cuts or self._lags or len(self._losses) > 1)

    def passes(self, source: str, target: str) -> bool:
        """Whether what `source` sends can reach `target`; loss aside."""
        return not any(source in froms and target in tos for froms, tos in self._cuts)

    def loses(self) -> bool:
        """Whether the next packet is lost."""
        return self.loss > 0 and self._rng.random() < self.loss

    def delay(self, source: str, target: str) -> float:
        """Seconds that the next packet takes."""
        delay = self._latency + self._jitter * self._rng.random()
        if self._lags:
            delay += self._lags.get(source, 0.0) + self._lags.get(target, 0.0)
        return delay

    def segment_delay(self, source: str, target: str) -> float:
        """Seconds that a piece of a stream takes, lost ones sent again."""
        delay = self.delay(source, target)
        again = RETRANSMIT
        while again < GIVE_UP and self.loses():
            delay += again
            again *= 2
        return delay

    @contextmanager
    def cut(self, sources: Collection[str], targets: Collection[str]) -> Iterator[None]:
        """Nothing gets from `sources` to `targets`; the other way it does."""
        cut = (frozenset(sources), frozenset(targets))
        self._cuts.append(cut)
        try:
            yield
        finally:
            self._cuts.remove(cut)

    @contextmanager
    def lossy(self, share: float) -> Iterator[None]:
        """At least so many packets are lost, drawn one by one."""
        self._losses.append(share)
        self.loss = max(self._losses)
        try:
            yield
        finally:
            self._losses.remove(share)
            self.loss = max(self._losses)

    @contextmanager
    def slow(self, key: str, lag: float) -> Iterator[None]:
        """Everything to and from this place takes `lag` seconds longer."""
        self._lags[key] = lag
        try:
            yield
        finally:
            del self._lags[key]


class Kind(Enum):
    """What can go wrong, or be asked, in a random run."""

    CRASH = "crashes"
    BOUNCE = "crashes and comes back"
    MOVE = "crashes and comes back with a new address"
    PAUSE = "is paused"
    SLOW = "is slow"
    DEAF = "hears nobody"
    MUTE = "is heard by nobody"
    PARTITION = "are cut off"
    LOSS = "packets are lost"
    LEAVE = "leaves"
    RETURN = "leaves and comes back"
    TAG = "changes a tag"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong."""

    at: float
    """Seconds after the run's begin."""
    kind: Kind
    who: tuple[str, ...]
    """The places it befalls; nobody in particular for loss."""
    lasts: float
    """Seconds."""
    much: float = 0.0
    """How much loss, as a share, or lag, in seconds."""

    @property
    def extent(self) -> str:
        """How much, and for how long."""
        much = f"({self.much:.3g}) " if self.much else ""
        return f"{much}for {self.lasts:.1f} s"


# How often each happens, and how long it may last: from, to, in seconds.
_KINDS: dict[Kind, tuple[int, float, float]] = {
    Kind.CRASH: (3, 0.0, 0.0),
    Kind.BOUNCE: (4, 0.1, 60.0),
    Kind.MOVE: (3, 0.1, 60.0),
    Kind.PAUSE: (4, 0.2, 20.0),
    Kind.SLOW: (2, 5.0, 40.0),
    Kind.DEAF: (2, 2.0, 60.0),
    Kind.MUTE: (2, 2.0, 60.0),
    Kind.PARTITION: (3, 2.0, 90.0),
    Kind.LOSS: (2, 5.0, 40.0),
    Kind.LEAVE: (2, 0.0, 0.0),
    Kind.RETURN: (2, 0.5, 60.0),
    Kind.TAG: (3, 0.0, 0.0),
}
_FOR_GOOD = {Kind.CRASH, Kind.LEAVE}


def draw_faults(rng: Random, keys: Sequence[str], *, seconds: float, every: float) -> list[Fault]:
    """What goes wrong within `seconds`, one thing about every `every` seconds; in order of time.

    A place has one fault at a time, so that each is as it says; at most a third goes for good.
    """
    free_at = dict.fromkeys(keys, 0.0)
    faults: list[Fault] = []
    gone_max = len(keys) // 3
    gone = 0
    at = 0.0
    while (at := at + rng.expovariate(1 / every)) < seconds:
        kinds = [kind for kind in _KINDS if gone < gone_max or kind not in _FOR_GOOD]
        kind = rng.choices(kinds, [_KINDS[kind][0] for kind in kinds])[0]
        free = [key for key in keys if free_at[key] <= at]
        shortest, longest = _KINDS[kind][1:]
        lasts = round(min(rng.uniform(shortest, longest), max(shortest, seconds - at)), 1)
        count, much = 1, 0.0
        match kind:
            case Kind.LOSS:
                count, much = 0, rng.uniform(0.01, 0.2)
            case Kind.SLOW:
                much = rng.uniform(0.05, 0.6)
            case Kind.PARTITION:
                count = rng.randint(1, max(1, len(keys) // 2))
            case _:
                pass
        if len(free) < count + 1:
            continue
        who = tuple(rng.sample(free, count))
        for key in who:
            free_at[key] = float("inf") if kind in _FOR_GOOD else at + lasts + 1.0
        gone += kind in _FOR_GOOD
        faults.append(Fault(at, kind, who, lasts, much))
    return faults
