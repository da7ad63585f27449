"""News to spread: what next, how often, and how much fits a packet.

A queue in which what was sent least goes first (gossip.md 8.1). Messages are kept in one sorted
list per number of transmits, so that a storm of news does not sort the whole queue per packet.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Hashable
from typing import NamedTuple, TypeAlias

from serfd.effects import Address

_Place: TypeAlias = tuple[int, int]


MULTIPLIER_MIN = 4
"""Serf's local profile has 2, with which a tenth of all news misses somebody."""
SMALL = 64
"""In a cluster of up to so many others it is kept whom each message was sent to."""


class Target(NamedTuple):
    """Who gets a packet, in a small cluster."""

    address: Address
    others: int
    """How many could get it."""


class Broadcast:
    """One message on its way to everybody."""

    __slots__ = ("message", "name", "place", "ticket", "told", "transmits")

    def __init__(
        self, message: bytes, place: _Place, name: str | None, ticket: Hashable | None
    ) -> None:
        self.message = message
        self.place = place
        self.name = name
        self.ticket = ticket
        self.transmits = 0
        self.told: set[Address] = set()
        """Who has got it, since all had it."""

    def is_for(self, target: Target) -> bool:
        """Whether it is this one's turn: nobody gets it again while others have not got it."""
        if len(self.told) >= target.others:
            self.told.clear()
        return target.address not in self.told


def retransmit_limit(multiplier: int, members: int) -> int:
    """How often one message is sent by one node: multiplier · (1 + ceil(log10(members + 1))).

    A real agent does without the 1 (gossip.md 8.1): then in a cluster of nine that hear a leave,
    in one of eight runs one of them misses it; and when forty join eighty, a few are missed.
    With nobody but one other to tell, once the multiplier is enough.
    """
    rounds = 1 + math.ceil(math.log10(members + 1)) if members > 2 else 1
    return max(MULTIPLIER_MIN, multiplier) * rounds


class BroadcastQueue:
    """Messages with how often each was sent: fewest first, then longest, then newest."""

    def __init__(self, *, size_max: int, message_max: int) -> None:
        """`size_max`: messages held at most; the most sent, shortest, oldest are dropped first.

        `message_max`: bytes that fit a packet; a longer message could never leave the queue.
        """
        self._size_max = size_max
        self._message_max = message_max
        # By transmits: sorted (-length, -age number) places, which find the broadcast.
        self._buckets: list[list[_Place]] = []
        self._broadcasts: dict[_Place, Broadcast] = {}
        self._named: dict[str, Broadcast] = {}
        self._count = 0
        self.finished: list[tuple[Hashable, bool]] = []
        """Tickets of messages that are done, and whether anybody was told: it was sent often
        enough, replaced, or dropped, if it had been sent before. The owner takes them out."""
        self.dropped = 0
        """Messages lost because the queue was full or they fit no packet."""

    def __len__(self) -> int:
        """How many messages wait."""
        return len(self._broadcasts)

    def has_news(self, transmits: int) -> bool:
        """Whether a message waits that was sent fewer than `transmits` times."""
        return any(self._buckets[:transmits])

    def add(
        self, message: bytes, *, name: str | None = None, ticket: Hashable | None = None
    ) -> None:
        """Queue a message. It replaces the one of the same `name`.

        `ticket` comes back in `finished`.
        """
        assert message, "an empty message kills a real agent (gossip.md 3.1)"
        if len(message) > self._message_max:
            self.dropped += 1
            if ticket is not None:
                self.finished.append((ticket, False))
            return
        if name is not None and (old := self._named.get(name)) is not None:
            self._remove(old, is_told=True)
        self._count += 1
        broadcast = Broadcast(message, (-len(message), -self._count), name, ticket)
        self._broadcasts[broadcast.place] = broadcast
        if name is not None:
            self._named[name] = broadcast
        self._put(broadcast)
        while len(self._broadcasts) > self._size_max:
            self.dropped += 1
            last = self._last()
            self._remove(last, is_told=last.transmits > 0)

    def take(
        self,
        limit: int,
        *,
        overhead: int,
        transmits_max: int,
        count: int,
        target: Target | None = None,
    ) -> list[bytes]:
        """The next messages for one packet; each counts as sent once.

        `limit`: bytes there are; `overhead`: bytes each costs beside its own; `count`: messages
        at most; `transmits_max`: after so many times a message is done. `target`: who gets it,
        given in small clusters: in a burst one would be missed by chance by all copies otherwise.
        """
        taken: list[Broadcast] = []
        for bucket in self._buckets:
            at = 0
            while len(taken) < count:
                # The first in order that still fits: no longer than what is left.
                at = bisect_left(bucket, (overhead - limit,), at)
                if at == len(bucket):
                    break
                broadcast = self._broadcasts[bucket[at]]
                if target is not None:
                    if not broadcast.is_for(target):
                        at += 1
                        continue
                    broadcast.told.add(target.address)
                del bucket[at]
                limit -= overhead + len(broadcast.message)
                taken.append(broadcast)
        for broadcast in taken:
            broadcast.transmits += 1
            if broadcast.transmits >= transmits_max:
                self._forget(broadcast, is_told=True)
            else:
                self._put(broadcast)
        return [broadcast.message for broadcast in taken]

    def _put(self, broadcast: Broadcast) -> None:
        while len(self._buckets) <= broadcast.transmits:
            self._buckets.append([])
        insort(self._buckets[broadcast.transmits], broadcast.place)

    def _remove(self, broadcast: Broadcast, *, is_told: bool) -> None:
        bucket = self._buckets[broadcast.transmits]
        at = bisect_left(bucket, broadcast.place)
        assert bucket[at] == broadcast.place
        del bucket[at]
        self._forget(broadcast, is_told=is_told)

    def _forget(self, broadcast: Broadcast, *, is_told: bool) -> None:
        del self._broadcasts[broadcast.place]
        if broadcast.name is not None and self._named.get(broadcast.name) is broadcast:
            del self._named[broadcast.name]
        if broadcast.ticket is not None:
            self.finished.append((broadcast.ticket, is_told))

    def _last(self) -> Broadcast:
        for bucket in reversed(self._buckets):
            if bucket:
                # Shortest length is last; of those the oldest has the greatest place.
                return self._broadcasts[bucket[-1]]
        raise AssertionError("an empty queue has no last message")
