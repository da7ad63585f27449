"""What is said over one stream: a full state exchange, a join, or a ping that UDP lost.

One connection carries one request and at most one answer (gossip.md 1, 4).
"""

from collections.abc import Hashable, Sequence
from typing import TypeAlias

from serfd.effects import Address, StreamId
from serfd.gossip.probe import Probe
from serfd.wire.stream import StreamReader
from serfd.wire.swim_messages import NodeState, PushPullHead

JOINS_AT_ONCE = 8
"""Addresses of one join that are tried at the same time."""


class JoinRun:
    """One join of several addresses: who is still to be asked, who answered, who did not."""

    __slots__ = ("_active", "_failures", "_waiting", "contacted", "ticket")

    def __init__(self, addresses: Sequence[Address], ticket: Hashable) -> None:
        self._waiting = list(addresses)[::-1]
        self._active = 0
        self._failures: dict[int, str] = {}
        self.contacted = 0
        self.ticket = ticket

    @property
    def is_over(self) -> bool:
        """Every address has answered or failed."""
        return not self._waiting and not self._active

    @property
    def failures(self) -> tuple[str, ...]:
        """One text for each address that did not answer."""
        return tuple(self._failures.values())

    def next_addresses(self) -> list[Address]:
        """The addresses to ask now."""
        due: list[Address] = []
        while self._waiting and self._active < JOINS_AT_ONCE:
            due.append(self._waiting.pop())
            self._active += 1
        return due

    def answered(self) -> None:
        """An address answered, and its answer was taken in."""
        self._active -= 1
        self.contacted += 1

    def failed(self, text: str) -> None:
        """An address did not answer."""
        self._active -= 1
        self._failures[len(self._failures)] = text


class Answering:
    """A peer connected; its request decides what it gets."""

    __slots__ = ()


class Asking:
    """This node exchanges its state with a peer's; for a join or in its regular turn."""

    __slots__ = ("join", "tried")

    def __init__(self, join: JoinRun | None, tried: tuple[bytes, ...] = ()) -> None:
        """`tried`: the keys that this join has tried at this address, the last one now."""
        self.join = join
        self.tried = tried

    @property
    def other_key(self) -> bytes | None:
        """The key that seals, if the peer could not open what the primary sealed."""
        return self.tried[-1] if len(self.tried) > 1 else None


class PingingByStream:
    """This node pings over TCP, since the packet was not answered (gossip.md 6.2)."""

    __slots__ = ("probe",)

    def __init__(self, probe: Probe) -> None:
        self.probe = probe


Purpose: TypeAlias = Answering | Asking | PingingByStream


class Exchange:
    """One open stream: why it is open, and what has been read of it."""

    __slots__ = (
        "arrived", "end", "head", "opened_at", "peer", "purpose", "reader", "states", "stream"
    )  # fmt: skip

    def __init__(
        self,
        stream: StreamId,
        peer: Address,
        reader: StreamReader,
        purpose: Purpose,
        opened_at: float,
    ) -> None:
        self.stream = stream
        self.opened_at = opened_at
        self.peer = peer
        self.reader = reader
        self.purpose = purpose
        self.arrived = 0
        """Bytes that came in."""
        self.end: str | None = None
        """Why the stream has ended, while what it brought is still being read."""
        self.head: PushPullHead | None = None
        self.states: list[NodeState] = []


class Merge:
    """A peer's full state on its way into this node's, a slice at a time."""

    __slots__ = (
        "_states", "join", "news", "other_key", "peer", "present", "user_state", "with_join",
    )  # fmt: skip

    def __init__(self, exchange: Exchange, user_state: bytes, *, news: bool, present: int) -> None:
        """`news`: somebody other than the peer may not know of these members yet.

        `present`: members there were before.
        """
        self.present = present
        assert exchange.head is not None
        purpose = exchange.purpose
        self.peer = exchange.peer
        self.join = purpose.join if isinstance(purpose, Asking) else None
        self.other_key = purpose.other_key if isinstance(purpose, Asking) else None
        self.with_join = exchange.head.join
        # In reverse, so that what is taken is freed.
        self._states = exchange.states[::-1]
        self.user_state = user_state
        self.news = news

    @property
    def is_over(self) -> bool:
        """Every state was taken."""
        return not self._states

    def take(self, count: int) -> list[NodeState]:
        """The next states, at most `count`."""
        taken = self._states[: -count - 1 : -1]
        del self._states[-count:]
        return taken
