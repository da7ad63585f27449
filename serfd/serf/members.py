"""Alive, leaving, left, failed: what Serf makes of gossip and intents (serf.md 6)."""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

from serfd.gossip.member_table import Peer, State
from serfd.serf.events import Member, MemberEventKind, Status
from serfd.wire.serf_messages import decode_tags

INTENT_TIMEOUT = 300.0
"""Seconds that an intent about an unknown member is remembered."""
INTENTS_MAX = 8192
"""Intents about unknown members remembered at most; more are ignored."""


@lru_cache(maxsize=4096)
def tags_of(meta: bytes) -> Mapping[str, str]:
    """The tags in a member's metadata; equal metadata shares one read-only mapping."""
    return MappingProxyType(decode_tags(meta))


class Record:
    """What Serf knows of one member."""

    __slots__ = ("left_at", "peer", "status", "status_ltime")

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.status = Status.ALIVE
        self.status_ltime = 0
        """Lamport time of the last intent about it."""
        self.left_at = 0.0
        """When it left or failed; monotonic seconds, 0 while it is there."""

    def snapshot(self) -> Member:
        """The member as it is now."""
        peer = self.peer
        return Member(
            peer.name, peer.addr, peer.port, tags_of(peer.meta), self.status, peer.versions
        )


class Intent(NamedTuple):
    """Somebody said that an unknown member joins or leaves."""

    leaves: bool
    ltime: int
    at: float


class IntentDecision(NamedTuple):
    """What an intent comes to."""

    spread: bool
    """It is news: pass it on."""
    event: MemberEventKind | None = None
    refute: bool = False
    """It says that this node leaves, and it does not."""


_OLD = IntentDecision(spread=False)


class Members:
    """Every member by name, with Serf's own status beside gossip's. Decides, sends nothing."""

    def __init__(self, own_name: str) -> None:
        self._own_name = own_name
        self._records: dict[str, Record] = {}
        self.failed: dict[str, Record] = {}
        """The members with status failed."""
        self.left: dict[str, Record] = {}
        """The members with status left."""
        self._intents: dict[str, Intent] = {}
        self.version = 0
        """Grows with every change that a snapshot shows: who is there, in which status, as what."""

    def __len__(self) -> int:
        """All members, in any status."""
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        """All members, in the order they came."""
        return iter(self._records.values())

    def get(self, name: str) -> Record | None:
        """The member of that name."""
        return self._records.get(name)

    # What gossip says.

    def joined(self, peer: Peer) -> Record:
        """Gossip found the member alive."""
        record = self._records.get(peer.name)
        self.version += 1
        if record is None:
            record = self._records[peer.name] = Record(peer)
            intent = self._intents.get(peer.name)
            if intent is not None:
                record.status_ltime = intent.ltime
                if intent.leaves:
                    record.status = Status.LEAVING
        else:
            record.peer = peer
            self._enter(record, Status.ALIVE)
            record.left_at = 0.0
        return record

    def gone(self, peer: Peer, now: float) -> tuple[Record, MemberEventKind] | None:
        """Gossip lost the member: it left if it said so, in its intent or its farewell.

        A real agent goes by the intent only, and takes who leaves for failed where that was missed.
        """
        record = self._records.get(peer.name)
        if record is None:
            return None
        said_so = record.status is Status.LEAVING or peer.state is State.LEFT
        if said_so and record.status in (Status.ALIVE, Status.LEAVING):
            self._enter(record, Status.LEFT)
            record.left_at = now
            return record, MemberEventKind.LEAVE
        if record.status is Status.ALIVE:
            self._enter(record, Status.FAILED)
            record.left_at = now
            return record, MemberEventKind.FAILED
        return None

    def updated(self) -> None:
        """Gossip has other tags of a member, in its peer."""
        self.version += 1

    # What members say.

    def leave_intent(self, name: str, ltime: int, now: float, *, own_leave: bool) -> IntentDecision:
        """Somebody says that the member leaves. `own_leave`: this node really is leaving."""
        record = self._records.get(name)
        if record is None:
            return self._remember(name, Intent(leaves=True, ltime=ltime, at=now))
        if ltime <= record.status_ltime:
            return _OLD
        if name == self._own_name and record.status is Status.ALIVE and not own_leave:
            return IntentDecision(spread=False, refute=True)
        record.status_ltime = ltime
        if record.status is Status.ALIVE:
            self._enter(record, Status.LEAVING)
        elif record.status is Status.FAILED:
            self._enter(record, Status.LEFT)
            return IntentDecision(spread=True, event=MemberEventKind.LEAVE)
        return IntentDecision(spread=True)

    def join_intent(self, name: str, ltime: int, now: float) -> IntentDecision:
        """Somebody says that the member joins."""
        record = self._records.get(name)
        if record is None:
            return self._remember(name, Intent(leaves=False, ltime=ltime, at=now))
        if ltime <= record.status_ltime:
            return _OLD
        record.status_ltime = ltime
        if record.status is Status.LEAVING:
            self._enter(record, Status.ALIVE)
        return IntentDecision(spread=True)

    # What time does.

    def reap(self, now: float, *, failed_after: float, left_after: float) -> list[Record]:
        """Erase and return members that failed or left longer ago than these seconds."""
        old = [r for r in self.failed.values() if now - r.left_at > failed_after]
        old += [r for r in self.left.values() if now - r.left_at > left_after]
        for record in old:
            self.erase(record)
        for name, intent in list(self._intents.items()):
            if now - intent.at > INTENT_TIMEOUT:
                del self._intents[name]
        return old

    def erase(self, record: Record) -> None:
        """Forget the member."""
        name = record.peer.name
        self.version += 1
        del self._records[name]
        self.failed.pop(name, None)
        self.left.pop(name, None)

    def _remember(self, name: str, intent: Intent) -> IntentDecision:
        held = self._intents.get(name)
        if held is not None and intent.ltime <= held.ltime:
            return _OLD
        if held is None and len(self._intents) >= INTENTS_MAX:
            return _OLD
        self._intents[name] = intent
        return IntentDecision(spread=True)

    def _enter(self, record: Record, status: Status) -> None:
        name = record.peer.name
        self.version += 1
        self.failed.pop(name, None)
        self.left.pop(name, None)
        record.status = status
        if status is Status.FAILED:
            self.failed[name] = record
        elif status is Status.LEFT:
            self.left[name] = record
