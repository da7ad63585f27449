"""What must hold in every run.

Each check gives the first thing that is wrong as a sentence, or None. The bounds follow from the
configuration; they are what the protocol promises, not what is usual.
"""

import math
from collections.abc import Collection, Iterable, Sequence

from serfd.config import Config, GossipConfig
from serfd.errors import WireError
from serfd.gossip import memberlist
from serfd.gossip.lifeguard import suspicion_timeout_min
from serfd.gossip.member_table import socket_address
from serfd.serf import members, node, reconnecting
from serfd.serf.events import MemberEvent, MemberEventKind, Status
from serfd.sim.process import Asked, Happening, Process
from serfd.wire.envelope import Envelope
from serfd.wire.packet import PacketCodec
from serfd.wire.swim_messages import ENCRYPT

NAME_SIZE_MIN = 6
"""Shorter names are not searched for in sealed bytes: they occur there by chance."""
EXCHANGE_SLACK = 2.0
"""Seconds for round trips, retransmits and turns, which the bounds do not count one by one."""

_plain = PacketCodec(Envelope())


# How long things may take.


def detection_bound(gossip: GossipConfig, members: int, *, score: int) -> float:
    """Seconds from a crash until every live node has seen it as failed.

    It holds without any gossip, so with loss too: each node probes each member once a round. The
    worst is the whole of two rounds (first probed in one, last in the next) in a cluster in which
    `members` are listed; a round's wrap and self cost a turn each (gossip.md 6.1). One turn takes a
    probe interval, stretched by the worst health `score`. Then the suspicion runs its longest.
    """
    turns = 2 * (members + 2) + 1
    timeout = suspicion_timeout_min(members, gossip.probe_interval, gossip.suspicion_mult)
    return (
        turns * gossip.probe_interval * (score + 1)
        + timeout * gossip.suspicion_max_timeout_mult
        + EXCHANGE_SLACK
    )


def usual_detection_bound(gossip: GossipConfig, members: int) -> float:
    """The same, for a healthy cluster that loses no packets, and with near certainty.

    In each probe interval, every other node probes the crashed one with a chance of one in
    `members`: after 25 the chance that not enough of them did is under one in 10⁷. Their
    accusations bring the timeout down to its minimum, and gossip brings the verdict to all.
    """
    turns = min(25, 2 * (members + 2)) + 1
    timeout = suspicion_timeout_min(members, gossip.probe_interval, gossip.suspicion_mult)
    return turns * gossip.probe_interval + timeout + spreading_bound(gossip, members)


def spreading_bound(gossip: GossipConfig, members: int) -> float:
    """Seconds in which gossip reaches everybody, with near certainty: 2·log2 n + 4 rounds."""
    rounds = 2 * math.ceil(math.log2(members + 1)) + 4
    return rounds * gossip.gossip_interval + EXCHANGE_SLACK


def push_pull_interval(gossip: GossipConfig, members: int) -> float:
    """Seconds between a node's state exchanges (gossip.md 8.5)."""
    scale = 1 if members <= 32 else math.ceil(math.log2(members) - 5) + 1
    return gossip.push_pull_interval * scale


def convergence_bound(config: Config, members: int, *, score: int) -> float:
    """Seconds from the end of all faults until all live nodes agree.

    Suspicions that are under way end. Then nodes that lost each other meet again: the first
    reconnect makes both sides refute, the second brings that to those who believed the worst; a
    third, since a reconnect may choose a member that is really dead, and as many more as there are
    of those are drawn before in vain, at most. Then state exchanges spread what gossip missed, as
    an epidemic: a few more rounds than the logarithm of the members.
    """
    gossip = config.gossip
    exchanges = math.ceil(math.log2(members + 1)) + 4
    return (
        detection_bound(gossip, members, score=score)
        + config.retry_interval
        + config.reconnect_interval * (3 + members // 3)
        + exchanges * push_pull_interval(gossip, members)
        + gossip.tcp_timeout
        + spreading_bound(gossip, members)
    )


def command_bound(config: Config) -> float:
    """Seconds in which every command is finished: two broadcasts that nobody takes, or streams."""
    return 2 * config.broadcast_timeout + config.gossip.tcp_timeout + 1.0 + EXCHANGE_SLACK


# What must hold.


def accuracy(history: Iterable[Happening]) -> str | None:
    """Where nothing went wrong, nobody is ever suspected, and nobody fails."""
    for happening in history:
        if happening.what in ("suspects", MemberEventKind.FAILED.value):
            return (
                f"at {happening.time:.3f} s {happening.who} {happening.what} {happening.about}, "
                "though nothing was wrong"
            )
    return None


def completeness(running: Sequence[Process], crashed: Iterable[Process]) -> str | None:
    """Who crashed is alive for nobody. To be asked once the detection bound has passed."""
    for gone in crashed:
        for process in running:
            member = process.node.member(gone.name)
            if member is not None and member.status in (Status.ALIVE, Status.LEAVING):
                return (
                    f"{gone.key} crashed at {gone.ended_at:.3f} s, and for {process.key} it is "
                    f"still {member.status.text}"
                )
    return None


def convergence(running: Sequence[Process], ended: Iterable[Process]) -> str | None:
    """All that can find each other see the same: who is there, where, with which tags; who is not.

    Members that ended may be unknown to some: state exchanges do not bring the dead (gossip.md
    5.6).
    """
    if len({process.name for process in running}) < len(running):
        return None  # Twins: one name, two truths.
    for process in running:
        if process.is_joining:
            return f"{process.key} has not joined yet"
    gone = {process.name for process in ended}
    for island in _islands(running):
        fault = _agreement(island, gone)
        if fault is not None:
            return fault
    return None


def _islands(running: Sequence[Process]) -> list[list[Process]]:
    """Who can find each other: through others, one holds where the other is.

    Somebody's place is held while it is alive or failed: those that left are not tried again.
    """
    islands: list[list[Process]] = []
    at = {process.address: process for process in running}
    for process in running:
        found = [process]
        for member in process.node.members():
            other = at.get(socket_address(member.addr, member.port))
            if other is not None and other.name == member.name and member.status is not Status.LEFT:
                found.append(other)
        touched = [island for island in islands if any(one in island for one in found)]
        islands = [island for island in islands if island not in touched]
        joined = {one.number: one for island in [*touched, found] for one in island}
        islands.append([joined[number] for number in sorted(joined)])
    return islands


def _agreement(island: Sequence[Process], gone: Collection[str]) -> str | None:
    told: dict[str, tuple[str, Status]] = {}
    for process in island:
        view = {member.name: member for member in process.node.members()}
        for other in island:
            member = view.pop(other.name, None)
            if member is None:
                return f"{process.key} does not know {other.key}"
            if member.status is not Status.ALIVE:
                return f"for {process.key}, {other.key} is {member.status.text}, but it is alive"
            if (member.addr, member.port) != (other.addr, other.address.port):
                return (
                    f"for {process.key}, {other.key} is at {member.address}, but it is at "
                    f"{other.address}"
                )
            if dict(member.tags) != dict(other.node.tags):
                return (
                    f"for {process.key}, {other.key} has the tags {dict(member.tags)}, but they "
                    f"are {dict(other.node.tags)}"
                )
        for member in view.values():
            if member.name not in gone:
                continue  # It runs, on another island.
            if member.status in (Status.ALIVE, Status.LEAVING):
                return f"for {process.key}, {member.name} is {member.status.text}, but it is gone"
            first, status = told.setdefault(member.name, (process.key, member.status))
            if member.status is not status:
                return (
                    f"{member.name} is {member.status.text} for {process.key}, but {status.text} "
                    f"for {first}"
                )
    return None


def rest(running: Iterable[Process]) -> str | None:
    """When all is said, nothing is left over. To be asked once the convergence bound has passed."""
    for process in running:
        machine = process.machine
        if process.suspects:
            return f"{process.key} still suspects {process.suspects[0]}"
        stats = process.node.stats()
        for queue in ("gossip_queue", "intent_queue", "query_queue", "event_queue"):
            if stats[queue] != "0" and machine.table.anyone_else:
                return f"{process.key} has {stats[queue]} messages left in its {queue}"
        for coalescer in (process.node._coalescer, process.node._hearing._coalescer):
            if coalescer.pace.due is not None:
                return f"{process.key} holds events back, to hand them on together"
    return None


def bounds(process: Process) -> str | None:
    """No queue, table or buffer of this process is past its limit."""
    machine = process.machine
    serf = process.node
    limits = (
        ("broadcasts", len(machine.queue), memberlist.QUEUE_MAX),
        ("intents", len(serf._intents), node.QUEUE_MAX),
        ("queries", len(serf._queries), node.QUEUE_MAX),
        ("user events", len(serf._events), node.QUEUE_MAX),
        ("relayed pings", len(machine._relays), memberlist.RELAYS_MAX),
        ("accepted streams", machine._accepted, memberlist.STREAMS_ACCEPTED_MAX),
        ("streams", len(machine._streams), memberlist.STREAMS_ACCEPTED_MAX + 64),
        ("states to merge", len(machine._merges), memberlist.MERGES_MAX),
        ("claims", len(machine._claims), memberlist.PARTS_MAX),
        ("suspicions", len(machine._suspicions), len(machine.table)),
        ("lost members", serf._reconnecting.lost, reconnecting.LOST_MAX),
        ("remembered intents", len(serf._members._intents), members.INTENTS_MAX),
        # One per relay, suspicion and stream (two), and a few single ones.
        (
            "timers",
            len(machine._timers),
            len(machine._relays) + len(machine._suspicions) + 2 * len(machine._streams) + 64,
        ),
        # Moved and cancelled ones may be left in the heap, up to as many again.
        ("places in the timer heap", len(machine._timers._heap), 2 * len(machine._timers) + 128),
    )
    for what, size, limit in limits:
        if size > limit:
            return f"{process.key} holds {size} {what}, at most {limit} are allowed"
    return None


def packet_secrecy(data: bytes, names: Iterable[str]) -> str | None:
    """A sealed packet tells no name, neither as it is nor unpacked without a key."""
    try:
        # Sealed bytes can look like a message by chance, but then like one that says nothing.
        told = repr(_plain.open(data))
    except WireError:
        told = ""
    for name in names:
        if name in told:
            return f"a packet of {len(data)} bytes names {name!r} to who has no key"
    return _names_in(data, names)


def stream_secrecy(data: bytes, names: Iterable[str]) -> str | None:
    """What is written to a sealed stream tells no name, and is marked as sealed."""
    if data[0] != ENCRYPT:
        return f"a stream begins with a message of type {data[0]}, expected a sealed one"
    return _names_in(data, names)


def conservation(asked: Iterable[Asked], now: float, bound: float) -> str | None:
    """Every command is finished in time, unless its process ended."""
    for one in asked:
        if now - one.at > bound and one.process.end is None:
            return (
                f"{one.command} of {one.process.key}, asked at {one.at:.3f} s, is not finished "
                f"after {now - one.at:.1f} s"
            )
    return None


def once(process: Process) -> str | None:
    """No process delivers the same user event twice."""
    seen: set[tuple[int, str, bytes]] = set()
    for time, event in process.events:
        if isinstance(event, MemberEvent):
            continue
        item = (event.ltime, event.name, event.payload)
        if item in seen:
            return f"{process.key} delivered {event} a second time at {time:.3f} s"
        seen.add(item)
    return None


def _names_in(data: bytes, names: Iterable[str]) -> str | None:
    for name in names:
        if len(name) >= NAME_SIZE_MIN and name.encode() in data:
            return f"{name!r} stands in the clear in {len(data)} sealed bytes"
    return None
