"""Which rumour about a member wins.

The rules of SWIM's dissemination with incarnations (SWIM §4.2) as memberlist has them
(gossip.md 5). The table decides and changes its entries; it sends nothing.
"""

from collections.abc import Callable, Iterator
from enum import IntEnum
from functools import lru_cache
from ipaddress import IPv6Address
from random import Random
from typing import NamedTuple, TypeAlias

from serfd.effects import Address
from serfd.wire.swim_messages import Alive, Dead, NodeState, Suspect

MEMBERS_MAX = 100_000
"""Entries held at most; what a stranger announces beyond is ignored."""

META_SIZE_MAX = 512
"""Bytes of metadata that a member may have (gossip.md 2; serf.md 3); no agent announces more."""
VERSIONS_SIZE = 6
PROTOCOL_MIN, PROTOCOL_MAX, PROTOCOL = 1, 5, 2
"""memberlist's protocol: understood from, to, and spoken (gossip.md 5.10)."""


class State(IntEnum):
    """What gossip says of a member; the numbers are those on the wire."""

    ALIVE = 0
    SUSPECT = 1
    DEAD = 2
    LEFT = 3


_PRESENT = (State.ALIVE, State.SUSPECT)


class Peer:
    """One entry of the table. Only the table changes it."""

    __slots__ = ("addr", "changed_at", "incarnation", "meta", "name", "port", "state", "versions")

    def __init__(self, name: str, addr: bytes, port: int, meta: bytes, versions: bytes) -> None:
        self.name = name
        self.addr = addr
        """4 or 16 bytes, kept exactly as received (gossip.md 13.2)."""
        self.port = port
        self.meta = meta
        self.versions = versions
        self.incarnation = 0
        self.state = State.DEAD
        self.changed_at = 0.0
        """When the state last changed; monotonic seconds."""

    @property
    def address(self) -> Address:
        """Where its socket is."""
        return socket_address(self.addr, self.port)

    @property
    def protocol_max(self) -> int:
        """The newest memberlist protocol it understands: what may be used with it."""
        return self.versions[1]

    @property
    def is_present(self) -> bool:
        """Whether it is believed to run: alive or suspect."""
        return self.state <= State.SUSPECT


@lru_cache(maxsize=8192)
def socket_address(addr: bytes, port: int) -> Address:
    """Address bytes as a socket wants them: IPv4 unmapped, as text."""
    if len(addr) == 16 and addr.startswith(b"\0\0\0\0\0\0\0\0\0\0\xff\xff"):
        addr = addr[12:]
    if len(addr) == 4:
        return Address(".".join(map(str, addr)), port)
    return Address(str(IPv6Address(addr)), port)


@lru_cache(maxsize=64)
def _one_port(port: int) -> int:
    """The one copy of a number that most members have in common: 32 bytes for each of them."""
    return port


class Ignored(NamedTuple):
    """The rumour changes nothing."""

    why: str


class Refused(NamedTuple):
    """Nobody may be as the rumour says, or there is no room for him."""

    why: str


class Refute(NamedTuple):
    """The rumour is about this node and wrong: go past this incarnation and say so."""

    incarnation: int


class Conflict(NamedTuple):
    """Another address claims the name of a member that is present."""

    held: Peer
    rumour: Alive


class Revived(NamedTuple):
    """The member is alive by this rumour; spread it."""

    peer: Peer
    joined: bool
    """It was unknown, dead or left before."""
    updated: bool
    """It was known as present, and its metadata changed."""


class Suspected(NamedTuple):
    """The member is suspect from now on; spread it."""

    peer: Peer


class Accused(NamedTuple):
    """The member is suspect already; the accusation may be a confirmation."""

    peer: Peer


class Gone(NamedTuple):
    """The member is dead or has left by this rumour; spread it."""

    peer: Peer


AliveDecision: TypeAlias = Ignored | Refused | Refute | Conflict | Revived
SuspectDecision: TypeAlias = Ignored | Refute | Accused | Suspected
DeadDecision: TypeAlias = Ignored | Refute | Gone

_STALE = Ignored("nothing new")
_UNKNOWN = Ignored("the member is not known")


class MemberTable:
    """Everybody gossip knows of, and the order in which they are probed."""

    def __init__(self, local: Peer, *, reclaim_time: float) -> None:
        """`reclaim_time`: seconds after which a dead member's name may have another address."""
        self._local = local
        self._reclaim_time = reclaim_time
        self._peers: dict[str, Peer] = {local.name: local}
        self._order: list[Peer] = [local]
        self._probe_index = 0
        self._gossip_index = 0
        self._present = 0
        self.leaving = False
        """This node has said goodbye: rumours that it is alive are ignored from now on."""
        self.upgrades = 0
        """How often a present member came with other versions; Serf hears of no such change."""

    # What it knows.

    def __len__(self) -> int:
        """All entries: alive, suspect, and dead or left ones not forgotten yet."""
        return len(self._order)

    def __iter__(self) -> Iterator[Peer]:
        """All entries; the order is arbitrary but the same for the same inputs."""
        return iter(self._order)

    def get(self, name: str) -> Peer | None:
        """The entry of that name."""
        return self._peers.get(name)

    @property
    def present(self) -> int:
        """How many members are alive or suspect, this node included."""
        return self._present

    @property
    def anyone_else(self) -> bool:
        """Whether another member is alive or suspect."""
        return self._present > (1 if self._local.is_present else 0)

    # Rumours.

    def start(self, now: float) -> Alive:
        """This node's first word about itself, at incarnation 1."""
        self._enter(self._local, State.ALIVE, now)
        return self.update_self(self._local.meta)

    def update_self(self, meta: bytes) -> Alive:
        """New metadata of this node, at its next incarnation."""
        self._local.meta = meta
        self._local.incarnation += 1
        return self._own_alive()

    def refute(self, incarnation: int) -> Alive:
        """This node's answer to a rumour at `incarnation`: one past both (SWIM §4.2)."""
        self._local.incarnation = max(self._local.incarnation, incarnation) + 1
        return self._own_alive()

    def alive(self, rumour: Alive, now: float, rng: Random) -> AliveDecision:
        """Somebody says that a member is alive (gossip.md 5.3)."""
        local = self._local
        is_self = rumour.node == local.name
        if is_self and self.leaving:
            return Ignored("this node is leaving")
        peer = self._peers.get(rumour.node)
        is_elsewhere = peer is not None and (rumour.port != peer.port or rumour.addr != peer.addr)
        is_new = peer is None or not peer.is_present or is_elsewhere
        # Of those present only what is new about them is looked at, further down.
        if is_new and (fault := self._misfit(rumour)) is not None:
            return Refused(fault)
        if peer is None:
            if len(self._order) >= MEMBERS_MAX:
                return Refused(f"there are {MEMBERS_MAX} members already")
            peer = Peer(rumour.node, rumour.addr, rumour.port, rumour.meta, rumour.vsn)
            self._insert(peer, rng)
        elif is_elsewhere:
            if not self._may_replace(peer, now):
                return Conflict(peer, rumour)
            # The name has a new owner, whose incarnations start anew.
            peer.incarnation = 0
        if is_self:
            if rumour.incarnation < peer.incarnation:
                return _STALE
            if (
                rumour.incarnation == peer.incarnation
                and rumour.meta == peer.meta
                and rumour.vsn == peer.versions
            ):
                return _STALE
            return Refute(rumour.incarnation)
        if rumour.incarnation <= peer.incarnation:
            return _STALE
        is_changed = rumour.vsn != peer.versions or rumour.meta != peer.meta
        if is_changed and (fault := self._misfit(rumour)) is not None:
            return Refused(fault)
        joined = not peer.is_present
        updated = not joined and rumour.meta != peer.meta
        peer.incarnation = rumour.incarnation
        peer.addr = rumour.addr
        peer.port = _one_port(rumour.port)
        peer.meta = rumour.meta
        if rumour.vsn != peer.versions:
            peer.versions = rumour.vsn
            self.upgrades += 1
        if peer.state is not State.ALIVE:
            self._enter(peer, State.ALIVE, now)
        return Revived(peer, joined, updated)

    def suspect(self, rumour: Suspect, now: float) -> SuspectDecision:
        """Somebody could not reach a member (gossip.md 5.4)."""
        peer = self._peers.get(rumour.node)
        if peer is None:
            return _UNKNOWN
        if rumour.incarnation < peer.incarnation:
            return _STALE
        if peer.state is State.SUSPECT:
            return Accused(peer)
        if peer.state is not State.ALIVE:
            return _STALE
        if peer is self._local:
            return Refute(rumour.incarnation)
        peer.incarnation = rumour.incarnation
        self._enter(peer, State.SUSPECT, now)
        return Suspected(peer)

    def dead(self, rumour: Dead, now: float) -> DeadDecision:
        """Somebody declares a member dead; itself: it leaves (gossip.md 5.5)."""
        peer = self._peers.get(rumour.node)
        if peer is None:
            return _UNKNOWN
        if rumour.incarnation < peer.incarnation or not peer.is_present:
            return _STALE
        if peer is self._local and not self.leaving:
            return Refute(rumour.incarnation)
        peer.incarnation = rumour.incarnation
        self._enter(peer, State.LEFT if rumour.node == rumour.accuser else State.DEAD, now)
        return Gone(peer)

    # Choosing.

    def next_probed(self, now: float, rng: Random, *, forget_after: float) -> Peer | None:
        """Whom to probe now: each in turn, in an order shuffled anew every round (SWIM §4.3).

        At the end of a round, members dead or gone for longer than `forget_after` seconds are
        dropped. None: there is nobody to probe in this turn (gossip.md 6.1).
        """
        checked = 0
        while checked < len(self._order):
            if self._probe_index >= len(self._order):
                self._forget(now - forget_after)
                rng.shuffle(self._order)
                self._probe_index = 0
                checked += 1
                continue
            peer = self._order[self._probe_index]
            self._probe_index += 1
            if peer is not self._local and peer.is_present:
                return peer
            checked += 1
        return None

    def choose_alive(self, k: int, rng: Random, *, but: Peer | None = None) -> list[Peer]:
        """Up to `k` random members that are alive, not this node nor `but`."""

        def suits(peer: Peer) -> bool:
            return peer.state is State.ALIVE and peer is not self._local and peer is not but

        return self._choose(k, rng, suits)

    def next_to_gossip(self, k: int, *, died_after: float) -> list[Peer]:
        """The next `k` members to tell news: present ones, and those that died after then.

        The recently dead are told too, so that they can refute; never those that left
        (gossip.md 8.4). It is each one's turn in the random order of the probes: chosen anew by
        chance, as real agents do, one in a small cluster would be missed by all copies of a
        message now and then.
        """
        chosen: list[Peer] = []
        order = self._order
        for _ in range(len(order)):
            if len(chosen) == k:
                break
            self._gossip_index = (self._gossip_index + 1) % len(order)
            peer = order[self._gossip_index]
            if peer.state <= State.SUSPECT:
                if peer is not self._local:
                    chosen.append(peer)
            elif peer.state is State.DEAD and peer.changed_at >= died_after:
                chosen.append(peer)
        return chosen

    def states(self) -> Iterator[NodeState]:
        """Every entry as a push/pull carries it."""
        for p in self._order:
            yield NodeState(p.name, p.addr, p.port, p.meta, p.incarnation, p.state, p.versions)

    # Steps.

    def _own_alive(self) -> Alive:
        p = self._local
        return Alive(p.incarnation, p.name, p.addr, p.port, p.meta, p.versions)

    def _enter(self, peer: Peer, state: State, now: float) -> None:
        self._present += (state in _PRESENT) - peer.is_present
        peer.state = state
        peer.changed_at = now

    def _insert(self, peer: Peer, rng: Random) -> None:
        """At a random place of the order, so that newcomers are not probed in a row by all."""
        self._peers[peer.name] = peer
        order = self._order
        order.append(peer)
        place = int(rng.random() * len(order))
        order[place], order[-1] = order[-1], order[place]

    def _may_replace(self, peer: Peer, now: float) -> bool:
        """Whether the name may get another address: its owner has left, or is long enough dead."""
        if peer is self._local:
            return False
        if peer.state is State.LEFT:
            return True
        return peer.state is State.DEAD and now - peer.changed_at >= self._reclaim_time

    def _misfit(self, rumour: Alive) -> str | None:
        """Why this member cannot be spoken with, or None.

        A real agent fails every state exchange in which one such entry occurs (gossip.md 4.4), so
        they are kept out of the table and are never passed on.
        """
        if rumour.incarnation < 1:
            return "incarnation 0 never takes effect"
        if len(rumour.addr) not in (4, 16):
            return f"its address has {len(rumour.addr)} bytes, expected 4 or 16"
        if len(rumour.meta) > META_SIZE_MAX:
            return f"its tags have {len(rumour.meta)} bytes, at most {META_SIZE_MAX} are possible"
        return versions_misfit(rumour.vsn, self._local.versions)

    def _forget(self, changed_before: float) -> None:
        def is_kept(peer: Peer) -> bool:
            return peer.is_present or peer is self._local or peer.changed_at >= changed_before

        kept = [peer for peer in self._order if is_kept(peer)]
        if len(kept) < len(self._order):
            self._order = kept
            self._peers = {peer.name: peer for peer in kept}

    def _choose(self, k: int, rng: Random, suits: Callable[[Peer], bool]) -> list[Peer]:
        order = self._order
        size = len(order)
        if size <= 3 * k + 1:
            pool = [peer for peer in order if suits(peer)]
            return pool if len(pool) <= k else rng.sample(pool, k)
        # In a large table, drawing beats scanning; 3n draws find k with near certainty.
        chosen: list[Peer] = []
        for _ in range(3 * size):
            peer = order[int(rng.random() * size)]
            if suits(peer) and peer not in chosen:
                chosen.append(peer)
                if len(chosen) == k:
                    break
        return chosen


def versions_misfit(theirs: bytes, ours: bytes) -> str | None:
    """Why two nodes with these version bytes do not understand each other, or None.

    `theirs` and `ours`: protocol min, max, current; delegate min, max, current (gossip.md 4.4).
    """
    if len(theirs) != VERSIONS_SIZE:
        return f"it gives {len(theirs)} version numbers, expected {VERSIONS_SIZE}"
    for kind, at in (("protocol", 0), ("delegate protocol", 3)):
        low, high, speaks = theirs[at : at + 3]
        our_low, our_high, we_speak = ours[at : at + 3]
        if not our_low <= speaks <= our_high or not low <= we_speak <= high or low == 0:
            return (
                f"{kind} version ({speaks}) is incompatible: it understands [{low}, {high}], "
                f"we speak {we_speak} and understand [{our_low}, {our_high}]"
            )
    return None
