"""`Node`: the whole protocol of one node behind a few inputs.

It has no clock, socket or chance of its own: what happened comes in with the time, what it wants
done goes out as effects (see `serfd.effects`). Serf's layer is here (serf.md); gossip is below.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from random import Random
from typing import Any, NamedTuple, TypeAlias, TypeVar

from serfd.config import Config, parse_networks
from serfd.effects import Address, Command, Effect, Emit, NonceSource, Stop, StreamId
from serfd.errors import CommandError, WireError
from serfd.gossip.allow_list import AllowList
from serfd.gossip.broadcasts import BroadcastQueue, Target, retransmit_limit
from serfd.gossip.exchange import JoinRun
from serfd.gossip.member_table import (
    META_SIZE_MAX,
    PROTOCOL,
    PROTOCOL_MAX,
    PROTOCOL_MIN,
    Peer,
)
from serfd.gossip.memberlist import Memberlist
from serfd.metrics import Metrics
from serfd.serf import names
from serfd.serf.asking import HeardOver, Queries, QueryOver, UserAsker
from serfd.serf.coalesce import MemberCoalescer
from serfd.serf.common import Common
from serfd.serf.coordinates import Coordinate, CoordinateClient, distance
from serfd.serf.coordinates import decode as decode_coordinate
from serfd.serf.coordinates import encode as encode_coordinate
from serfd.serf.events import (
    Event,
    Member,
    MemberEvent,
    MemberEventKind,
    Query,
    Status,
    UserEvent,
    ip_text,
)
from serfd.serf.isolation import Isolation, StillIsolated
from serfd.serf.keyrings import Keyrings
from serfd.serf.keys import KEY_QUERIES, KeyResult
from serfd.serf.lamport import LamportClock
from serfd.serf.members import Record
from serfd.serf.memory import Memory
from serfd.serf.queries import PING, HeardQuery, QueryDone, QueryParams, check_name
from serfd.serf.reconnecting import ReconnectDue, Reconnecting
from serfd.serf.user_events import EventsDue, Hearing, MissingOverdue, Telling
from serfd.timers import Timers
from serfd.wire.envelope import Envelope
from serfd.wire.sealing import Keyring
from serfd.wire.serf_messages import (
    NO_BROADCAST,
    JoinIntent,
    LeaveIntent,
    PushPullState,
    QueryMessage,
    QueryResponse,
    Relay,
    SerfMessage,
    UserEventMessage,
    decode,
    encode,
    encode_tags,
)
from serfd.wire.swim_messages import Alive

T = TypeVar("T")

SERF_PROTOCOL_MIN, SERF_PROTOCOL_MAX = 2, 5
"""Serf's protocol versions that are understood (serf.md 4)."""
REAP_INTERVAL = 15.0
FLAP_TIME = 60.0
"""Seconds in which a failed member that comes back is called unsteady (serf.md 6)."""
BROADCAST_TIMEOUT_MIN = 1.0
"""Seconds; a shorter broadcast_timeout is raised to it, as Serf does."""
LEAVE_PROPAGATE_DELAY = 0.5
"""Seconds that a node which said goodbye still answers, while others pass its goodbye on."""
TRACE = 5
"""The log level below DEBUG."""
QUEUE_MAX = 4096
"""Messages waiting in each of Serf's queues at most (serf.md 16)."""
QUEUE_DEPTH_WARNING = 128
"""So many messages waiting in a queue are worth a warning."""


@dataclass(frozen=True, slots=True)
class ReapDue:
    """Time to forget members that are gone for long."""


@dataclass(frozen=True, slots=True)
class FarewellDue:
    """Everybody had time to hear that this node leaves: now it may go."""


@dataclass(frozen=True, slots=True)
class LeaveDone:
    """Others had time to pass the goodbye on."""


@dataclass(frozen=True, slots=True)
class PruneDue:
    """A member that was to be pruned had time to refute."""

    name: str
    ltime: int


@dataclass(frozen=True, slots=True)
class RejoinDue:
    """Time to look for those who were there before the restart."""


@dataclass(frozen=True, slots=True)
class MembersDue:
    """Collected changes of members are to be told."""


Timer: TypeAlias = (
    ReapDue
    | ReconnectDue
    | FarewellDue
    | LeaveDone
    | PruneDue
    | RejoinDue
    | MembersDue
    | EventsDue
    | MissingOverdue
    | QueryOver
    | HeardOver
    | StillIsolated
)


class Stage(Enum):
    """This node's own life in the cluster."""

    ALIVE = auto()
    LEAVING = auto()
    LEFT = auto()


class Goodbye(Enum):
    """The two messages of a leave, as tickets of their broadcasts."""

    INTENT = auto()
    """Serf's: says that what follows is meant."""
    FAREWELL = auto()
    """Gossip's: the node is gone."""


class Joined(NamedTuple):
    """What came of a join."""

    contacted: int
    failures: tuple[str, ...]
    """One text for each address that did not answer."""


class JoinAsked(NamedTuple):
    """The ticket of a join that the owner asked for; reconnects have none."""

    command: Command[Joined]
    replay: bool


class Rejoining(NamedTuple):
    """The ticket of a join by which the node comes back after a restart."""

    name: str
    address: Address


class Node:
    """One Serf node: the whole protocol, with no clock, socket or chance of its own."""

    def __init__(
        self,
        config: Config,
        *,
        name: str,
        addr: bytes,
        port: int,
        keyring: Keyring,
        now: float,
        rng: Random,
        nonce: NonceSource,
        tags: Mapping[str, str] | None = None,
        remembered: Sequence[str] | None = None,
        metrics: Metrics | None = None,
        log_suffix: str = "",
    ) -> None:
        """`addr`, `port`: the advertised address, 4 or 16 bytes.

        `tags`: its tags if not those of the config. `remembered`: the lines of the snapshot file,
        None if there is none. Raises CommandError if the tags are too long to announce.
        """
        log = logging.getLogger("serfd.serf" + log_suffix)
        self.metrics = Metrics() if metrics is None else metrics
        """What is counted and measured; given, or its own."""
        self._common = Common(config, name, now=now, rng=rng, metrics=self.metrics, log=log)
        self._effects = self._common.effects
        self._members = self._common.members
        self._log = log
        self._config = config
        self._rng = rng
        self._keyring = keyring
        if tags is not None:
            self._common.tags = dict(tags)
        self._meta = self._encode_tags(self._common.tags)
        self._stage = Stage.ALIVE
        self._leaving: Command[None] | None = None
        self._clock = LamportClock()
        self._joins_without_replay = 0
        self._coalescer = MemberCoalescer(config.coalesce_period, config.quiescent_period)
        self._coordinates = None if config.disable_coordinates else CoordinateClient(name, rng)
        self._memory = None if remembered is None else Memory(self._common, remembered)
        self._to_rejoin: list[tuple[str, Address]] = []
        self._timers: Timers[Timer] = Timers()
        self._hearing = Hearing(self._common, self._timers, self._event_missing)
        self._telling = Telling(
            self._common, self._hearing, lambda message: self._queue(self._events, message)
        )
        self._asking = Queries(
            self._common,
            self._timers,
            spread=lambda message: self._queue(self._queries, message),
            answer_internal=self._answer_internal,
        )
        self._keyrings = Keyrings(self._common, keyring, self._asking)
        self._isolation = Isolation(self._common, self._timers)
        self._reconnecting = Reconnecting(self._common, self._timers)
        self._is_voting = False
        self._commands: dict[Hashable, str] = {}
        """Commands that wait for a broadcast, with the error if it takes too long."""
        self._conflict_told_at: dict[str, float] = {}
        envelope = Envelope(
            label=config.cluster_label.encode("utf-8", "surrogateescape"),
            keyring=keyring,
            compress=config.enable_compression,
            verify_incoming=config.encrypt_verify_incoming,
            verify_outgoing=config.encrypt_verify_outgoing,
        )
        allow_list = AllowList(parse_networks(config.cidrs_allowed, key="cidrs_allowed"))
        refusal = allow_list.refusal(addr)
        if refusal is not None:
            log.warning("This node's address %s: who has that list leaves it out", refusal)
        self._broadcast_timeout = max(config.broadcast_timeout, BROADCAST_TIMEOUT_MIN)
        protocol = (PROTOCOL_MIN, PROTOCOL_MAX, PROTOCOL)
        serf_protocol = (SERF_PROTOCOL_MIN, SERF_PROTOCOL_MAX, config.protocol)
        self._memberlist = self._common.memberlist = Memberlist(
            config.gossip,
            name=name,
            addr=addr,
            port=port,
            versions=bytes((*protocol, *serf_protocol)),
            envelope=envelope,
            allow_list=allow_list,
            broadcast_timeout=self._broadcast_timeout,
            delegate=self,
            effects=self._effects,
            now=now,
            rng=rng,
            nonce=nonce,
            metrics=self.metrics,
            log=logging.getLogger("serfd.memberlist" + log_suffix),
        )
        message_max = self._memberlist.message_max
        self._intents = BroadcastQueue(size_max=QUEUE_MAX, message_max=message_max)
        self._queries = BroadcastQueue(size_max=QUEUE_MAX, message_max=message_max)
        self._events = BroadcastQueue(size_max=QUEUE_MAX, message_max=message_max)
        # The first of them is the last to get room in the next packet (`broadcasts`).
        self._queues = (self._intents, self._queries, self._events)
        self._losses_told: Counter[str] = Counter()
        """By queue, how many of the messages that it dropped the log has told of."""
        if self._memory is not None:
            self._go_on_after(self._memory)
        self._memberlist.start(now)
        self._timers.set(ReapDue(), now + REAP_INTERVAL)

    # What happens to it. `now` is monotonic seconds.

    def packet_received(self, now: float, data: bytes, source: Address) -> None:
        """A datagram came in. Whatever a peer sends, this does not raise."""
        self._common.now = now
        self._memberlist.packet_received(now, data, source)

    def packet_unsent(self, now: float, to: Address) -> None:
        """The system refused to send a datagram there."""
        self._common.now = now
        self._memberlist.packet_unsent(now, to)

    def stream_opened(self, now: float, peer: Address) -> StreamId:
        """A peer connected; the number by which the stream goes from now on."""
        self._common.now = now
        return self._memberlist.stream_opened(now, peer)

    def stream_received(self, now: float, stream: StreamId, data: bytes) -> None:
        """Bytes came in on a stream."""
        self._common.now = now
        self._memberlist.stream_received(now, stream, data)

    def stream_closed(self, now: float, stream: StreamId, error: str | None) -> None:
        """A stream ended or could not be opened; `error` says why."""
        self._common.now = now
        self._memberlist.stream_closed(now, stream, error)

    def wake(self, now: float) -> None:
        """Time passed."""
        self._common.now = now
        self._memberlist.wake(now)
        while (timer := self._timers.pop_due(now)) is not None:
            match timer:
                case ReapDue():
                    self._reap()
                case ReconnectDue():
                    if self._stage is Stage.ALIVE:
                        self._reconnecting.due()
                case FarewellDue():
                    self._say_farewell()
                case LeaveDone():
                    self._left()
                case PruneDue(name, ltime):
                    self._prune_later(name, ltime)
                case RejoinDue():
                    self._rejoin_next()
                case MembersDue():
                    self._emit_all(self._coalescer.flush())
                case EventsDue():
                    self._hearing.events_due()
                case MissingOverdue():
                    self._hearing.missing_overdue()
                case QueryOver(ltime):
                    self._asking.over(ltime)
                case HeardOver(ltime, number):
                    self._asking.heard_over(ltime, number)
                case StillIsolated():
                    self._look_around()

    # What its owner may ask. A command returns a ticket; `Finish` brings the result.

    def join(
        self, now: float, addresses: Sequence[Address], *, replay: bool = False
    ) -> Command[Joined]:
        """Exchange state with each address. With `replay`, recent user events are delivered."""
        self._common.now = now
        command: Command[Joined] = Command(f"join {', '.join(map(str, addresses))}")
        if self._stage is not Stage.ALIVE:
            self._common.finish(command, CommandError("Serf can't Join after Leave or Shutdown"))
            return command
        self._joins_without_replay += not replay
        self._memberlist.join(now, addresses, ticket=JoinAsked(command, replay))
        return command

    def leave(self, now: float) -> Command[None]:
        """Leave the cluster: tell everybody, and give them time to pass it on (serf.md 6.3)."""
        self._common.now = now
        command: Command[None] = Command("leave")
        if self._stage is Stage.LEFT:
            self._common.finish(command, None)
        elif self._stage is Stage.LEAVING:
            self._common.finish(command, CommandError("Leave already in progress"))
        else:
            self._stage = Stage.LEAVING
            self._leaving = command
            self._to_rejoin.clear()
            if self._memory is not None:
                self._memory.left()
            self._memberlist.hurry()
            self._send_leave_intent(self._common.name, prune=False, ticket=Goodbye.INTENT)
        return command

    def force_leave(self, now: float, name: str, *, prune: bool = False) -> Command[None]:
        """Declare a member as left, so that nobody waits for it; with `prune` forget it."""
        self._common.now = now
        command: Command[None] = Command(f"force-leave {name}")
        self._commands[command] = "timed out broadcasting node removal"
        self._send_leave_intent(name, prune=prune, ticket=command)
        return command

    def update_tags(
        self, now: float, tags: Mapping[str, str], *, delete: Sequence[str] = ()
    ) -> Command[None]:
        """Delete tags, then set others, and tell everybody."""
        self._common.now = now
        command: Command[None] = Command("tags")
        try:
            changed = self.tags_after(tags, delete=delete)
        except CommandError as error:
            self._common.finish(command, error)
            return command
        self._common.tags, self._meta = changed, self._encode_tags(changed)
        self._commands[command] = "timeout waiting for update broadcast"
        self._memberlist.update_meta(now, command)
        return command

    def user_event(
        self, now: float, name: str, payload: bytes, *, coalesce: bool = True
    ) -> Command[None]:
        """Tell everybody something; done when it is on its way, which a burst has to wait for.

        One that may `coalesce` may be replaced by a later one of its name before it is heard.
        """
        self._common.now = now
        command = self._telling.tell(name, payload, coalesce=coalesce)
        self._telling.go_on(len(self._events))
        return command

    def query(
        self, now: float, name: str, payload: bytes, params: QueryParams
    ) -> Command[QueryDone]:
        """Ask everybody something. `Answer` brings each answer, `Finish` the end."""
        self._common.now = now
        command: Command[QueryDone] = Command(f"query {name}")
        try:
            check_name(name, payload)
            self._asking.ask(name, payload, params, UserAsker(self._common, command))
        except CommandError as error:
            self._common.finish(command, error)
        return command

    def forget(self, now: float, command: Command[Any]) -> None:
        """Nobody waits for this command any more: a query ends, all else goes on to its end."""
        self._common.now = now
        self._asking.forget(command)

    def respond(self, now: float, query: Query, payload: bytes) -> Command[None]:
        """Answer a query; once, and before its deadline."""
        self._common.now = now
        command: Command[None] = Command(f"respond to {query.name}")
        try:
            self._asking.respond(query, payload)
        except CommandError as error:
            # Serf's own words, a misnomer that its clients know (serf.md 11.5).
            text = f"failed to respond to key query: {error}"
            self._common.finish(command, CommandError(text))
        else:
            self._common.finish(command, None)
        return command

    def change_keys(self, now: float, query: str, key: str = "") -> Command[KeyResult]:
        """Ask all members to install, use, remove or list keys; `query` is one of `KEY_QUERIES`.

        `key` is base64. Changes are made one after the other.
        """
        self._common.now = now
        return self._keyrings.change(query, key)

    def keyring_saved(self, now: float, error: str | None) -> None:
        """What came of the oldest `SaveKeyring`."""
        self._common.now = now
        self._keyrings.saved(error)

    # What it wants.

    def take_effects(self) -> list[Effect]:
        """What is to be done now, in order."""
        effects = self._effects[:]
        self._effects.clear()
        if self._memory is not None:
            note = self._memory.note(
                self._clock.time,
                self._hearing.clock.time,
                self._asking.clock.time,
                self._memberlist.local.incarnation,
            )
            # First of all: an event that is handed on must not come again after a restart.
            if note is not None:
                effects.insert(0, note)
        return effects

    def next_wakeup(self) -> float | None:
        """When `wake` is next wanted; monotonic seconds."""
        gossip, own = self._memberlist.next_wakeup(), self._timers.next_deadline()
        if gossip is None or own is None:
            return own if gossip is None else gossip
        return min(gossip, own)

    # What it knows.

    @property
    def name(self) -> str:
        """This node's name."""
        return self._common.name

    @property
    def tags(self) -> Mapping[str, str]:
        """This node's tags."""
        return self._common.tags

    @property
    def stage(self) -> Stage:
        """Whether this node is in the cluster, leaving it, or has left."""
        return self._stage

    def tags_after(self, tags: Mapping[str, str], *, delete: Sequence[str] = ()) -> dict[str, str]:
        """What `tags` would be after such an `update_tags`; CommandError if that is too long."""
        changed = {k: v for k, v in self._common.tags.items() if k not in delete} | dict(tags)
        self._encode_tags(changed)
        return changed

    def members(self) -> list[Member]:
        """Everybody known, this node included."""
        return [record.snapshot() for record in self._members]

    def status_counts(self) -> Counter[Status]:
        """How many members are in each status."""
        return Counter(record.status for record in self._members)

    @property
    def members_version(self) -> int:
        """As long as this number stays the same, `members` does too."""
        return self._members.version + self._memberlist.table.upgrades

    def member(self, name: str) -> Member | None:
        """The member of that name."""
        record = self._members.get(name)
        return record.snapshot() if record is not None else None

    def coordinate(self, name: str) -> Coordinate | None:
        """Where a member is in the network, if that is known (serf.md 14)."""
        return None if self._coordinates is None else self._coordinates.get(name)

    @property
    def member_count(self) -> int:
        """How many members are known, in any status."""
        return len(self._members)

    @property
    def memberlist(self) -> Memberlist:
        """The gossip below; for the simulator's checks."""
        return self._memberlist

    def stats(self) -> dict[str, str]:
        """Figures as Serf names them (serf.md 17), and a few of our own."""
        stats = {
            "members": str(len(self._members)),
            "failed": str(len(self._members.failed)),
            "left": str(len(self._members.left)),
            "health_score": str(self._memberlist.awareness.score),
            "member_time": str(self._clock.time),
            "event_time": str(self._hearing.clock.time),
            "query_time": str(self._asking.clock.time),
            "intent_queue": str(len(self._intents)),
            "event_queue": str(len(self._events)),
            "query_queue": str(len(self._queries)),
            "gossip_queue": str(len(self._memberlist.queue)),
            "dropped_broadcasts": str(
                self._memberlist.queue.dropped + sum(queue.dropped for queue in self._queues)
            ),
            "dropped_input": str(self._memberlist.dropped),
            "encrypted": "true" if self._keyring.keys else "false",
            "isolated": "true" if self._is_isolated else "false",
        }
        if self._coordinates is not None:
            stats["coordinate_resets"] = str(self._coordinates.resets)
        return stats

    # What gossip asks and tells (`serfd.gossip.memberlist.Delegate`).

    def node_meta(self) -> bytes:
        """This node's tags, encoded."""
        return self._meta

    def broadcasts_waiting(self) -> int:
        """How many messages the queues hold."""
        return len(self._intents) + len(self._queries) + len(self._events)

    def has_news(self, transmits: int) -> bool:
        """Whether a queue holds a message that was sent fewer than `transmits` times."""
        return any(queue.has_news(transmits) for queue in self._queues)

    def broadcasts(
        self, *, overhead: int, limit: int, count: int, target: Target | None
    ) -> list[bytes]:
        """Messages for one packet: of each queue first by turns, so that none starves."""
        taken: list[bytes] = []
        members = len(self._members)
        transmits_max = retransmit_limit(self._config.gossip.retransmit_mult, members)
        self._queues = (*self._queues[1:], self._queues[0])
        for queue in self._queues:
            if len(queue):
                some = queue.take(
                    limit,
                    overhead=overhead,
                    transmits_max=transmits_max,
                    count=count - len(taken),
                    target=target,
                )
                limit -= sum(map(len, some)) + overhead * len(some)
                for message in some:
                    self.metrics.sample("serf.msgs.sent", len(message))
                taken += some
        self._settle()
        self._telling.go_on(len(self._events))
        return taken

    def message_received(self, payload: bytes, source: Address) -> None:
        """A Serf message arrived."""
        self.metrics.sample("serf.msgs.received", len(payload))
        try:
            self._take_in(decode(payload), payload, source)
        except WireError as error:
            self._memberlist.drop("message", source, error)

    def local_state(self) -> bytes:
        """What a push/pull tells of Serf's layer (serf.md 7)."""
        return encode(
            PushPullState(
                self._clock.time,
                {record.peer.name: record.status_ltime for record in self._members},
                list(self._members.left),
                self._hearing.clock.time,
                list(self._hearing.seen),
                self._asking.clock.time,
            )
        )

    def merge_remote_state(self, state: bytes, source: Address, *, join: bool) -> None:
        """Take in a peer's push/pull (serf.md 7)."""
        try:
            remote = decode(state)
        except WireError as error:
            self._log.error("Failed to decode remote state of %s: %s", source, error)
            return
        if not isinstance(remote, PushPullState):
            self._log.error("Remote state of %s is a %s", source, type(remote).__name__)
            return

        def take(step: Callable[[T], object], part: T) -> None:
            try:
                step(part)
            except WireError as error:
                self._memberlist.drop("part of a state", source, error)

        for clock, time in (
            (self._clock, remote.ltime),
            (self._hearing.clock, remote.event_ltime),
            (self._asking.clock, remote.query_ltime),
        ):
            if time > 0:
                take(clock.witness, time - 1)
        gone = set(remote.left_members)
        for name in remote.left_members:
            # Who is present came back since, which the peer may not know yet; nothing would ever
            # correct it. Of strangers and of those who left already there is nothing to learn.
            if name in self._members.failed:
                ltime = remote.status_ltimes.get(name, 0) + 1
                take(self._leave_intent, LeaveIntent(ltime, name, prune=False))
        for name, ltime in remote.status_ltimes.items():
            if name not in gone:
                take(self._join_intent, JoinIntent(ltime, name))
        if join and self._joins_without_replay:
            # No later than the clock: what it does not reach will not come.
            self._hearing.ignore_before(min(remote.event_ltime, self._hearing.clock.time))
        for ltime, events in remote.events:
            for name, payload in events:
                take(self._user_event, UserEventMessage(ltime, name, payload, coalesce=False))

    def member_joined(self, peer: Peer) -> None:
        """Gossip found a member alive."""
        self._count_join(peer)
        record = self._members.joined(peer)
        if self._memory is not None:
            self._memory.joined(record)
        self._reconnecting.settled(peer.name)
        self._log.info("EventMemberJoin: %s %s", peer.name, ip_text(record.peer.addr))
        self._emit_member(MemberEventKind.JOIN, record)
        if peer is not self._memberlist.local:
            self._look_around()

    def member_updated(self, peer: Peer) -> None:
        """A member's tags changed."""
        record = self._members.get(peer.name)
        if record is not None:
            self._members.updated()
            self.metrics.count("serf.member.update")
            self._log.info("EventMemberUpdate: %s", peer.name)
            self._emit_member(MemberEventKind.UPDATE, record)

    def member_left(self, peer: Peer) -> None:
        """Gossip lost a member."""
        change = self._members.gone(peer, self._common.now)
        if change is not None:
            record, kind = change
            if self._memory is not None:
                self._memory.gone(record)
            if kind is MemberEventKind.LEAVE:
                what, metric = "EventMemberLeave", "serf.member.left"
            else:
                what, metric = "EventMemberFailed", "serf.member.failed"
            self.metrics.count(metric)
            self._log.info("%s: %s %s", what, peer.name, ip_text(record.peer.addr))
            self._emit_member(kind, record)
            self._asking.member_gone(peer.name)
            self._look_around()

    def name_conflict(self, held: Peer, rumour: Alive) -> None:
        """Two addresses claim one name."""
        told = self._conflict_told_at
        if self._common.now - told.get(held.name, float("-inf")) < REAP_INTERVAL:
            return
        if len(told) >= QUEUE_MAX:
            told.clear()
        told[held.name] = self._common.now
        claimant = Member(rumour.node, rumour.addr, rumour.port, {}, Status.NONE, rumour.vsn)
        if held.name == self._common.name:
            self._log.error(
                "Node name conflicts with another node at %s. Names must be unique!",
                claimant.address,
            )
        else:
            self._log.warning(
                "Name conflict for %r: both %s and %s are claiming it",
                held.name,
                held.address,
                claimant.address,
            )

    def name_contested(self, claim: Alive) -> None:
        """Somebody else answers to this node's name: let the cluster decide."""
        if self._config.disable_name_resolution or self._is_voting:
            return
        whose = self._common.name.encode("utf-8", "surrogateescape")
        vote = names.NameVote(self._common, self._vote_over)
        try:
            self._asking.ask(names.QUERY, whose, QueryParams(wait_all=True), vote)
            self._is_voting = True
        except CommandError as error:
            self._log.error("cannot ask who bears this node's name: %s", error)

    def _vote_over(self, *, lost: bool) -> None:
        self._is_voting = False
        if lost:
            self._effects.append(Stop("another node bears this node's name"))

    def ack_payload(self) -> bytes:
        """This node's coordinate, for who pings it."""
        return b"" if self._coordinates is None else encode_coordinate(self._coordinates.own)

    def ping_completed(self, peer: Peer, rtt: float, payload: bytes) -> None:
        """A probe tells how far away a member is (serf.md 14)."""
        if self._coordinates is None:
            return
        try:
            other = decode_coordinate(payload)
        except WireError as error:
            self._log.error("coordinate of %s: %s", peer.name, error)
            return
        before = self._coordinates.own
        why = self._coordinates.update(peer.name, other, rtt) if other is not None else None
        if why is not None:
            self.metrics.count("serf.coordinate.rejected")
            self._log.log(TRACE, "Rejected coordinate from %s: %s", peer.name, why)
        elif other is not None:
            moved = 1e3 * distance(before, self._coordinates.own)
            self.metrics.sample("serf.coordinate.adjustment-ms", moved)
            if rtt == 0:
                self.metrics.count("serf.coordinate.zero-rtt")

    def other_key_understood(self, key: bytes) -> None:
        """This node was let in with a key that is not its primary."""
        self._keyrings.prefer(key)

    def join_over(self, join: JoinRun) -> None:
        """All addresses of a join were tried."""
        asked = join.ticket
        if isinstance(asked, Rejoining):
            if join.contacted:
                self._log.info("Re-joined to previously known node: %s: %s", *asked)
                self._to_rejoin.clear()
            else:
                self._rejoin_next()
        elif isinstance(asked, JoinAsked):
            self._joins_without_replay -= not asked.replay
            if join.contacted and self._stage is Stage.ALIVE:
                self._send_join_intent()
            self._common.finish(asked.command, Joined(join.contacted, join.failures))

    def broadcast_over(self, ticket: Hashable, *, in_time: bool) -> None:
        """A broadcast was sent often enough, or took too long, or there was no room for it."""
        match ticket:
            case Goodbye.INTENT:
                if not in_time and self._memberlist.table.anyone_else:
                    self._log.warning("timeout while waiting for graceful leave")
                if FarewellDue() not in self._timers:
                    self._say_farewell()
            case Goodbye.FAREWELL:
                delay = LEAVE_PROPAGATE_DELAY if self._memberlist.table.anyone_else else 0.0
                self._timers.set(LeaveDone(), self._common.now + delay)
            case _:
                assert isinstance(ticket, Command)
                error = self._commands.pop(ticket)
                # With nobody there to tell, the wait is over at once and nothing was missed.
                lost = not in_time and self._memberlist.table.anyone_else
                self._common.finish(ticket, CommandError(error) if lost else None)

    # Steps.

    def _take_in(self, message: SerfMessage, payload: bytes, source: Address) -> None:
        match message:
            case LeaveIntent():
                if self._leave_intent(message):
                    self._queue(self._intents, payload)
            case JoinIntent():
                if self._join_intent(message):
                    self._queue(self._intents, payload)
            case UserEventMessage():
                if self._user_event(message):
                    self._queue(self._events, payload)
            case QueryMessage():
                if self._asking.heard(message) and not message.flags & NO_BROADCAST:
                    self._queue(self._queries, payload)
            case QueryResponse():
                self._asking.response(message)
            case Relay():
                self._asking.relay(message, source)
            case _:
                self._log.debug("%s from %s is not for us", type(message).__name__, source)

    def _leave_intent(self, intent: LeaveIntent) -> bool:
        """Whether it is news."""
        self._clock.witness(intent.ltime)
        decision = self._members.leave_intent(
            intent.node, intent.ltime, self._common.now, own_leave=self._stage is not Stage.ALIVE
        )
        if decision.refute:
            self._log.debug("Refuting an older leave intent")
            self._send_join_intent()
        record = self._members.get(intent.node)
        if record is None and decision.spread:
            self._reconnecting.settled(intent.node)
        if record is not None:
            if decision.event is not None:
                ip = ip_text(record.peer.addr)
                self._log.info("EventMemberLeave (forced): %s %s", intent.node, ip)
                self._emit_member(decision.event, record)
            if decision.spread and intent.prune:
                self._prune(record, intent.ltime)
        return decision.spread

    def _join_intent(self, intent: JoinIntent) -> bool:
        """Whether it is news."""
        self._clock.witness(intent.ltime)
        return self._members.join_intent(intent.node, intent.ltime, self._common.now).spread

    def _user_event(self, event: UserEventMessage) -> bool:
        """Whether it is news."""
        return self._hearing.heard(
            UserEvent(event.ltime, event.name, event.payload, event.coalesce)
        )

    def _event_missing(self) -> None:
        # Events travel in state exchanges too.
        self._memberlist.exchange_soon()

    def _answer_internal(self, heard: HeardQuery) -> None:
        name, payload = heard.message.name, heard.message.payload
        if name in KEY_QUERIES:
            self._keyrings.asked(heard)
        elif name == names.QUERY:
            whose = payload.decode("utf-8", "surrogateescape")
            if whose != self._common.name:
                self._tell_whois(heard, whose)
        elif name != PING:
            self._log.warning("Unhandled internal query %r", name)

    def _tell_whois(self, heard: HeardQuery, whose: str) -> None:
        try:
            self._asking.answer(heard, encode(names.whois(self._members.get(whose))))
        except CommandError as error:
            self._log.error("failed to respond to conflict query: %s", error)

    def _send_join_intent(self) -> None:
        intent = JoinIntent(self._clock.time, self._common.name)
        self._join_intent(intent)
        self._queue(self._intents, encode(intent))

    def _send_leave_intent(self, name: str, *, prune: bool, ticket: Hashable) -> None:
        intent = LeaveIntent(self._clock.time, name, prune=prune)
        self._clock.increment()
        others = self._memberlist.table.anyone_else
        self._leave_intent(intent)
        if ticket is Goodbye.INTENT and others:
            # A real agent passes news on at its next gossip round only. Who hears the farewell
            # before the intent takes this node for failed; the larger the cluster, the more
            # rounds it takes.
            rounds = max(1.0, math.log10(len(self._members)))
            self._timers.set(
                FarewellDue(), self._common.now + rounds * self._config.gossip.gossip_interval
            )
        self._memberlist.await_broadcast(ticket)
        if others:
            self._queue(self._intents, encode(intent), ticket)

    def _say_farewell(self) -> None:
        if self._stage is Stage.LEAVING and not self._memberlist.table.leaving:
            self._memberlist.leave(self._common.now, Goodbye.FAREWELL)

    def _left(self) -> None:
        self._stage = Stage.LEFT
        assert self._leaving is not None
        self._common.finish(self._leaving, None)

    def _prune(self, record: Record, ltime: int) -> None:
        """Forget a member for good; one that still seems alive may refute first (serf.md 6.4)."""
        if record.status is Status.LEAVING:
            wait = self._broadcast_timeout + LEAVE_PROPAGATE_DELAY
            self._timers.set(PruneDue(record.peer.name, ltime), self._common.now + wait)
        else:
            self._erase(record, "EventMemberReap (forced)")

    def _prune_later(self, name: str, ltime: int) -> None:
        record = self._members.get(name)
        if record is not None and record.status_ltime == ltime:
            self._erase(record, "EventMemberReap (forced)")

    def _reap(self) -> None:
        self._timers.set(ReapDue(), self._common.now + REAP_INTERVAL)
        self._measure()
        for record in self._members.reap(
            self._common.now,
            failed_after=self._config.reconnect_timeout,
            left_after=self._config.tombstone_timeout,
        ):
            self._forget(record)
            self._tell_reaped(record, "EventMemberReap")
            if record.status is Status.FAILED:
                self._reconnecting.forgotten(record)

    def _measure(self) -> None:
        """Look how much waits and was lost in the queues (serf.md 16), and how many are there."""
        for kind, name, queue in (
            ("Intent", "serf.queue.Intent", self._intents),
            ("Event", "serf.queue.Event", self._events),
            ("Query", "serf.queue.Query", self._queries),
            ("Membership", "memberlist.queue.broadcasts", self._memberlist.queue),
        ):
            self.metrics.sample(name, len(queue))
            # With nobody there to tell, all that waits goes on waiting.
            if len(queue) >= QUEUE_DEPTH_WARNING and self._memberlist.table.anyone_else:
                self._log.warning("%s queue depth: %d", kind, len(queue))
            lost = queue.dropped - self._losses_told[kind]
            if lost:
                self._losses_told[kind] += lost
                self.metrics.count("serf.queue.dropped", lost)
                self._log.warning(
                    "%s queue dropped %d messages: too many waited, or they were too long for a "
                    "packet",
                    kind,
                    lost,
                )
        self._memberlist.measure()

    def _count_join(self, peer: Peer) -> None:
        self.metrics.count("serf.member.join")
        failed = self._members.failed.get(peer.name)
        if failed is not None and self._common.now - failed.left_at < FLAP_TIME:
            self.metrics.count("serf.member.flap")

    def _erase(self, record: Record, what: str) -> None:
        self._members.erase(record)
        self._forget(record)
        self._tell_reaped(record, what)

    def _go_on_after(self, memory: Memory) -> None:
        """Start where an earlier life ended: later than all it saw, and with whom it knew."""
        past = memory.past
        self._clock.witness(past.clock)
        self._hearing.clock.witness(past.event_clock)
        self._asking.clock.witness(past.query_clock)
        if past.event_clock:
            self._hearing.ignore_before(past.event_clock + 1)
        if past.query_clock:
            self._asking.ignore_before(past.query_clock + 1)
        self._memberlist.local.incarnation = past.incarnation
        self._to_rejoin = memory.places_to_rejoin(self._rng)
        if self._to_rejoin:
            self._isolation.knows_others = True
            self._timers.set(RejoinDue(), self._common.now)

    def _rejoin_next(self) -> None:
        """Try the next of those who were alive, until one answers."""
        if not self._to_rejoin:
            self._log.warning("Failed to re-join any previously known node")
            self._look_around()
            return
        name, address = self._to_rejoin.pop()
        self._log.info("Attempting re-join to previously known node: %s: %s", name, address)
        self._memberlist.join(self._common.now, (address,), ticket=Rejoining(name, address))

    def _forget(self, record: Record) -> None:
        if self._coordinates is not None:
            self._coordinates.forget(record.peer.name)

    def _tell_reaped(self, record: Record, what: str) -> None:
        self._log.info("%s: %s", what, record.peer.name)
        self._emit_member(MemberEventKind.REAP, record)

    @property
    def _is_isolated(self) -> bool:
        return self._stage is Stage.ALIVE and self._isolation.is_isolated

    def _look_around(self) -> None:
        # Who leaves is not isolated, it wants to be alone.
        if self._stage is Stage.ALIVE:
            self._isolation.look(sought=self._reconnecting.sought)

    def _queue(self, queue: BroadcastQueue, message: bytes, ticket: Hashable | None = None) -> None:
        queue.add(message, ticket=ticket)
        self._settle()
        self._memberlist.news()

    def _settle(self) -> None:
        for queue in self._queues:
            if queue.finished:
                finished, queue.finished = queue.finished, []
                for ticket, is_told in finished:
                    self._memberlist.broadcast_finished(ticket, is_told=is_told)

    def _emit_member(self, kind: MemberEventKind, record: Record) -> None:
        """Tell of a member; what happens to many in one moment is told as one event."""
        member = record.snapshot()
        if self._coalescer.take(kind, member, self._common.now):
            due = self._coalescer.pace.due
            assert due is not None
            self._timers.set(MembersDue(), due)
            return
        members: tuple[Member, ...] = (member,)
        last = self._effects[-1] if self._effects else None
        if isinstance(last, Emit):
            event = last.event
            if isinstance(event, MemberEvent) and event.kind is kind:
                members = (*event.members, *members)
                self._effects.pop()
        self._effects.append(Emit(MemberEvent(kind, members)))

    def _emit_all(self, events: list[Event]) -> None:
        self._effects += [Emit(event) for event in events]

    def _encode_tags(self, tags: Mapping[str, str]) -> bytes:
        meta = encode_tags(tags, protocol=self._config.protocol)
        if len(meta) > META_SIZE_MAX:
            raise CommandError(f"Encoded length of tags exceeds limit of {META_SIZE_MAX} bytes")
        return meta
