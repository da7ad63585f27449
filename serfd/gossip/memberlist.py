"""`Memberlist`: routes every input to its step.

The SWIM machine: who is alive, and how news spreads (gossip.md). It knows nothing of Serf and asks
its `Delegate` instead. Leaves decide (`member_table`, `lifeguard`, `broadcasts`, `probe`,
`exchange`), this file acts.
"""

import logging
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol, TypeAlias

from serfd.config import GossipConfig
from serfd.effects import Address, Close, Connect, Effect, NonceSource, SendPacket, StreamId, Write
from serfd.errors import WireError
from serfd.gossip.allow_list import AllowList
from serfd.gossip.broadcasts import SMALL, BroadcastQueue, Target, retransmit_limit
from serfd.gossip.exchange import (
    Answering,
    Asking,
    Exchange,
    JoinRun,
    Merge,
    PingingByStream,
)
from serfd.gossip.lifeguard import Awareness, Suspicion, suspicion_timeout_min
from serfd.gossip.member_table import (
    Accused,
    Conflict,
    Gone,
    Ignored,
    MemberTable,
    Peer,
    Refused,
    Refute,
    Revived,
    State,
    Suspected,
    socket_address,
    versions_misfit,
)
from serfd.gossip.probe import Probe, RelayedPing
from serfd.metrics import Metrics
from serfd.timers import Timers
from serfd.wire.envelope import Envelope
from serfd.wire.packet import PacketCodec
from serfd.wire.stream import EnvelopeError, StreamReader, UserState, UserStream, seal_stream
from serfd.wire.swim_messages import (
    Ack,
    Alive,
    Dead,
    IndirectPing,
    Message,
    Nack,
    NodeState,
    Ping,
    PushPullHead,
    StreamError,
    Suspect,
    User,
    encode,
    encode_push_pull,
)

PARTS_MAX = 127
"""Messages in one packet: real agents mis-read more (gossip.md 3.1)."""
BURST_GAP = 0.005
"""Seconds between two rounds of gossip while there is news that was never sent."""
URGENT_ROUNDS = 2
"""Rounds of gossip in which what is new goes out at once. Everybody who hears it does the same, so
two reach all but one in a thousand; what is left for later makes up for lost packets."""
BACKLOG = 48
"""With more messages waiting than about one round carries, the next round does not wait for the
gossip interval."""
LEAVING_GOSSIP_INTERVAL = 0.05
"""Seconds between two rounds of gossip while this node says goodbye and somebody waits for it."""
NOTES_DELAY = 1.0
"""Within so many seconds after a join this node exchanges state once more, with whoever else came
in the same moment: their news had too few transmits while the cluster still looked small."""
MANY = 3
"""Members learned of in one exchange after which it does so too: two clusters have met."""
MERGE_SLICE = 500
"""Member states taken in at a time, so that a large cluster does not stall the reactor."""
TURN = 0.001
"""Seconds after which a slice of work is followed by the next: one turn of the reactor."""
STREAMS_ACCEPTED_MAX = 512
"""Streams of peers open at once; more are closed without an answer. Real agents take 127, too few
for a few hundred that start at the same moment with the same seed."""
STREAM_LARGE = 1 << 20
"""Bytes a stream may bring, unpacked, whatever the others do."""
STREAMS_HELD_MAX = 256 << 20
"""Bytes that all streams may bring together; the one that passes it is closed."""
MERGES_MAX = 64
"""States waiting to be merged; more are dropped, the next exchange brings them again."""
NAME_TOLD_MAX = 128
"""Characters of a refused member's name that the log shows."""
CLAIMS_MAX = 128
"""Names of members that have a second claimant, remembered at once."""
RELAYS_MAX = 1024
"""Pings on behalf of others that are open at once."""
QUEUE_MAX = 32_768
"""Membership news waiting to be sent; far more than a cluster of 5,000 makes at once."""
KEY_UNKNOWN = "o installed keys could decrypt the message"
"""A peer's word for a stream that none of its keys opens; old agents begin it with a capital."""
UNDERSTOOD_TURNS = 10
"""Probe intervals without an ack after which nobody seems to understand this node."""
DROP_LOG_INTERVAL = 1.0
"""Seconds between two log lines about dropped input; a flood must not flood the log."""


@dataclass(frozen=True, slots=True)
class ProbeDue:
    """The next member's turn to be probed."""


@dataclass(frozen=True, slots=True)
class AckOverdue:
    """The direct ping of this probe was not answered in time."""

    seq: int


@dataclass(frozen=True, slots=True)
class ProbeOverdue:
    """Nobody reached the member in this whole probe round."""

    seq: int


@dataclass(frozen=True, slots=True)
class RelayOverdue:
    """A ping on another node's behalf was not answered in time."""

    seq: int


@dataclass(frozen=True, slots=True)
class SuspicionExpired:
    """The suspect did not refute in time."""

    name: str


@dataclass(frozen=True, slots=True)
class GossipDue:
    """News waits to be sent."""


@dataclass(frozen=True, slots=True)
class PushPullDue:
    """The turn for a full state exchange with somebody."""


@dataclass(frozen=True, slots=True)
class StreamOverdue:
    """The exchange on this stream took too long."""

    stream: StreamId


@dataclass(frozen=True, slots=True)
class StreamReadable:
    """More of what this stream brought can be read."""

    stream: StreamId


@dataclass(frozen=True, slots=True)
class MergeDue:
    """More of a peer's state can be taken in."""


@dataclass(frozen=True, slots=True)
class BroadcastOverdue:
    """The broadcast with this ticket was not sent often enough in time."""

    ticket: Hashable


Timer: TypeAlias = (
    ProbeDue
    | AckOverdue
    | ProbeOverdue
    | RelayOverdue
    | SuspicionExpired
    | GossipDue
    | PushPullDue
    | StreamOverdue
    | StreamReadable
    | MergeDue
    | BroadcastOverdue
)


class Delegate(Protocol):
    """What the layer above is asked and told. Plain calls within one input."""

    def node_meta(self) -> bytes:
        """The metadata this node announces; at most 512 bytes."""

    def message_received(self, payload: bytes, source: Address) -> None:
        """A user message arrived."""

    def broadcasts_waiting(self) -> int:
        """How many messages the layer above has to spread."""

    def has_news(self, transmits: int) -> bool:
        """Whether one of them was sent fewer than `transmits` times."""

    def broadcasts(
        self, *, overhead: int, limit: int, count: int, target: Target | None
    ) -> list[bytes]:
        """Messages for one packet: `limit` bytes, each costs its length and `overhead`."""

    def local_state(self) -> bytes:
        """What a push/pull carries of the layer above."""

    def merge_remote_state(self, state: bytes, source: Address, *, join: bool) -> None:
        """A push/pull brought the layer above's state of a peer."""

    def member_joined(self, peer: Peer) -> None:
        """A member is there that was unknown, dead or gone."""

    def member_updated(self, peer: Peer) -> None:
        """A member's metadata changed."""

    def member_left(self, peer: Peer) -> None:
        """A member died or left."""

    def name_conflict(self, held: Peer, rumour: Alive) -> None:
        """Two addresses claim one name."""

    def name_contested(self, claim: Alive) -> None:
        """Somebody at another address answers to this node's name."""

    def ack_payload(self) -> bytes:
        """What goes along with the answer to a ping."""

    def ping_completed(self, peer: Peer, rtt: float, payload: bytes) -> None:
        """A probe was answered directly, after `rtt` seconds, with this payload."""

    def other_key_understood(self, key: bytes) -> None:
        """A join succeeded with this key, not with the primary, which no member understands."""

    def join_over(self, join: JoinRun) -> None:
        """Every address of a join has answered or failed."""

    def broadcast_over(self, ticket: Hashable, *, in_time: bool) -> None:
        """The broadcast with this ticket was sent often enough, or took too long."""


class Memberlist:
    """Who is alive: probing, gossip and state exchange of one node."""

    def __init__(
        self,
        config: GossipConfig,
        *,
        name: str,
        addr: bytes,
        port: int,
        versions: bytes,
        envelope: Envelope,
        allow_list: AllowList,
        broadcast_timeout: float,
        delegate: Delegate,
        effects: list[Effect],
        now: float,
        rng: Random,
        nonce: NonceSource,
        metrics: Metrics,
        log: logging.Logger,
    ) -> None:
        """`addr`, `port`: the advertised address; `effects`: the list it appends to."""
        self._config = config
        self._delegate = delegate
        self._effects = effects
        self._envelope = envelope
        self._codec = PacketCodec(envelope)
        self._allow_list = allow_list
        self._broadcast_timeout = broadcast_timeout
        self._now = now
        self._rng = rng
        self._nonce = nonce
        self._metrics = metrics
        self._log = log
        self._local = Peer(name, addr, port, delegate.node_meta(), versions)
        self.table = MemberTable(self._local, reclaim_time=config.dead_node_reclaim_time)
        self.awareness = Awareness(config.awareness_max_multiplier)
        self.queue = BroadcastQueue(size_max=QUEUE_MAX, message_max=self.message_max)
        self._timers: Timers[Timer] = Timers()
        self._suspicions: dict[str, Suspicion] = {}
        self._probe: Probe | None = None
        self._probe_missed = False
        self._acked_at = -math.inf
        self._relays: dict[int, RelayedPing | Alive] = {}
        """Pings beside the probe: for others, and to who claims this node's name."""
        self._seq = 0
        self._streams: dict[StreamId, Exchange] = {}
        self._accepted = 0
        self._stream_count = 0
        self._merges: list[Merge] = []
        self._gossip_interval: float = config.gossip_interval
        self._gossiped_at = -math.inf
        self._others_first = False
        self._claims: dict[str, Alive] = {}
        self.dropped = 0
        """Packets, parts and streams that were not understood."""
        self._drops_untold = 0
        self._drop_told_at = -math.inf

    def start(self, now: float) -> None:
        """Come alive. Once, before any input."""
        self._now = now
        self._spread(self.table.start(now))
        self._metrics.count("memberlist.msg.alive")
        self._change_health(0)
        self._delegate.member_joined(self._local)
        self._timers.set(ProbeDue(), now + self._config.probe_interval)
        interval = self._config.push_pull_interval
        if interval > 0:
            self._timers.set(PushPullDue(), now + interval * (1 + self._rng.random()))

    # What happens to it.

    def packet_received(self, now: float, data: bytes, source: Address) -> None:
        """A datagram came in."""
        self._now = now
        self._metrics.count("memberlist.udp.received", len(data))
        try:
            messages, faults = self._codec.open(data)
        except WireError as error:
            self.drop("packet", source, error)
            return
        for message in messages:
            self._handle(message, source)
        for fault in faults:
            self.drop("message", source, fault)

    def packet_unsent(self, now: float, to: Address) -> None:
        """A datagram could not be sent there: a ping that waits for its ack waits in vain."""
        self._now = now
        probe = self._probe
        if probe is not None and probe.peer.address == to and AckOverdue(probe.seq) in self._timers:
            self._timers.cancel(AckOverdue(probe.seq))
            self._ask_others(probe.seq)

    def stream_opened(self, now: float, peer: Address) -> StreamId:
        """A peer connected."""
        self._now = now
        stream = self._next_stream()
        if self._accepted >= STREAMS_ACCEPTED_MAX:
            self.drop("stream", peer, f"{STREAMS_ACCEPTED_MAX} streams are open already")
            self._effects.append(Close(stream))
            return stream
        self._accepted += 1
        self._metrics.count("memberlist.tcp.accept")
        reader = StreamReader(self._envelope, accepting=True)
        self._streams[stream] = Exchange(stream, peer, reader, Answering(), now)
        self._timers.set(StreamOverdue(stream), now + self._config.tcp_timeout)
        return stream

    def stream_received(self, now: float, stream: StreamId, data: bytes) -> None:
        """Bytes came in on a stream, in any pieces."""
        self._now = now
        exchange = self._streams.get(stream)
        if exchange is None:
            return
        exchange.arrived += len(data)
        exchange.reader.feed(data)
        self._read(exchange)

    def stream_closed(self, now: float, stream: StreamId, error: str | None) -> None:
        """A stream ended, or could not be opened; `error` says why, None: the peer closed it."""
        self._now = now
        exchange = self._streams.get(stream)
        if exchange is None:
            return
        exchange.end = error or "closed before the answer was complete: EOF"
        # A large answer is read slice by slice; its end may come before the last of them.
        if not exchange.reader.pending:
            self._ended(exchange)

    def wake(self, now: float) -> None:
        """Time passed: do what is due."""
        self._now = now
        while (timer := self._timers.pop_due(now)) is not None:
            match timer:
                case ProbeDue():
                    self._probe_due()
                case AckOverdue(seq):
                    self._ask_others(seq)
                case ProbeOverdue(seq):
                    self._probe_over(seq)
                case RelayOverdue(seq):
                    self._relay_failed(seq)
                case SuspicionExpired(name):
                    self._declare_dead(name)
                case GossipDue():
                    self._gossip()
                case PushPullDue():
                    self._push_pull_due()
                case StreamOverdue(stream):
                    exchange = self._streams[stream]
                    self._close(exchange)
                    self._failed(exchange, "i/o timeout")
                case StreamReadable(stream):
                    self._read(self._streams[stream])
                case MergeDue():
                    self._merge()
                case BroadcastOverdue(ticket):
                    self._delegate.broadcast_over(ticket, in_time=False)

    def next_wakeup(self) -> float | None:
        """When `wake` is next wanted."""
        return self._timers.next_deadline()

    # What the layer above may ask.

    def join(self, now: float, addresses: Sequence[Address], *, ticket: Hashable) -> None:
        """Exchange state with each address; `join_over` brings the outcome."""
        self._now = now
        run = JoinRun(addresses, ticket)
        self._ask_next(run)

    def update_meta(self, now: float, ticket: Hashable) -> None:
        """Announce `node_meta` anew; `broadcast_over` when it is passed on."""
        self._now = now
        self._spread(self.table.update_self(self._delegate.node_meta()), ticket=ticket)
        self._metrics.count("memberlist.msg.alive")
        self._delegate.member_updated(self._local)
        self.await_broadcast(ticket)

    def leave(self, now: float, ticket: Hashable) -> None:
        """Declare this node as left; `broadcast_over` when that is passed on."""
        self._now = now
        self.table.leaving = True
        name = self._local.name
        farewell = Dead(self._local.incarnation, name, name)
        decision = self.table.dead(farewell, now)
        assert isinstance(decision, Gone)
        self._spread(farewell, ticket=ticket)
        self._metrics.count("memberlist.msg.dead")
        self._delegate.member_left(self._local)
        self.await_broadcast(ticket)

    def hurry(self) -> None:
        """Somebody waits for this node to go: use up the retransmits faster."""
        self._gossip_interval = min(self._gossip_interval, LEAVING_GOSSIP_INTERVAL)

    def await_broadcast(self, ticket: Hashable) -> None:
        """Call `broadcast_over` at the latest when the broadcast timeout has passed.

        With nobody there to tell, at once.
        """
        wait = self._broadcast_timeout if self.table.anyone_else else 0.0
        self._timers.set(BroadcastOverdue(ticket), self._now + wait)

    def broadcast_finished(self, ticket: Hashable, *, is_told: bool) -> None:
        """A broadcast was sent often enough, or lost its place in the queue before it was told."""
        if BroadcastOverdue(ticket) in self._timers:
            self._timers.cancel(BroadcastOverdue(ticket))
            self._delegate.broadcast_over(ticket, in_time=is_told)

    def news(self) -> None:
        """There is something to spread: it does not wait for the next gossip round.

        It is sent `URGENT_ROUNDS` times at once, paced so that a flood is packed, and then again
        every gossip interval. An idle node has no timer at all.
        """
        waiting = len(self.queue) + self._delegate.broadcasts_waiting()
        if not waiting:
            return
        at_once = URGENT_ROUNDS * min(self._config.gossip_nodes, max(1, len(self.table) - 1))
        hurry = (
            waiting > BACKLOG or self.queue.has_news(at_once) or self._delegate.has_news(at_once)
        )
        due = self._gossiped_at + (BURST_GAP if hurry else self._gossip_interval)
        held = self._timers.deadline(GossipDue())
        if held is None or due < held:
            self._timers.set(GossipDue(), max(due, self._now))

    def drop(self, what: str, source: Address, why: object) -> None:
        """Count what came in and is of no use, and say so, but not for every piece of a flood."""
        self.dropped += 1
        self._drops_untold += 1
        if self._now - self._drop_told_at >= DROP_LOG_INTERVAL:
            self._drop_told_at = self._now
            more = f" ({self._drops_untold - 1} more before)" if self._drops_untold > 1 else ""
            self._log.warning("Dropped a %s from %s: %s%s", what, source, why, more)
            self._drops_untold = 0

    def measure(self) -> None:
        """Count the members in each state."""
        counts = Counter(peer.state for peer in self.table)
        for name, state in (
            ("memberlist.node.instances.alive", State.ALIVE),
            ("memberlist.node.instances.suspect", State.SUSPECT),
            ("memberlist.node.instances.dead", State.DEAD),
            ("memberlist.node.instances.left", State.LEFT),
        ):
            self._metrics.gauge(name, counts[state])

    @property
    def retransmit_limit(self) -> int:
        """How often one message is sent, by the cluster's size as it is now."""
        return retransmit_limit(self._config.retransmit_mult, len(self.table))

    @property
    def message_max(self) -> int:
        """Bytes of the longest message that gossip can carry."""
        return self._config.packet_size_max - 5 - self._codec.overhead

    @property
    def local(self) -> Peer:
        """This node's own entry."""
        return self._local

    # Messages.

    def _handle(self, message: Message, source: Address) -> None:
        match message:
            case Ping():
                self._answer_ping(message, source)
            case Ack():
                self._answered(message)
            case Alive():
                # Of a packet its sender counts too, though it may only pass the news on.
                refusal = self._allow_list.refusal(source.host)
                if refusal is not None:
                    self.drop("message", source, f"its sender {refusal}")
                elif self._is_let_in(message, source):
                    self._alive(message, source)
            case Suspect():
                self._suspect(message)
            case Dead():
                self._dead(message)
            case User(payload):
                self._delegate.message_received(payload, source)
            case IndirectPing():
                self._relay_ping(message, source)
            case Nack(seq):
                if self._probe is not None and self._probe.seq == seq:
                    self._probe.nacks += 1

    def _is_let_in(self, rumour: Alive, source: Address) -> bool:
        """Whether the allow list has its address, if that is new here (gossip.md 5.3, 5.8)."""
        peer = self.table.get(rumour.node)
        if peer is not None and peer.addr == rumour.addr:
            return True
        refusal = self._allow_list.refusal(rumour.addr)
        if refusal is not None:
            self.drop("member", source, f"{rumour.node!r} at {refusal}")
        return refusal is None

    def _alive(self, rumour: Alive, source: Address) -> None:
        if rumour.port == 0:
            rumour = rumour._replace(port=self._local.port)
        decision = self.table.alive(rumour, self._now, self._rng)
        match decision:
            case Ignored():
                pass
            case Refused(why):
                self._refused(rumour, why, source)
            case Refute(incarnation):
                self._refute(incarnation, f"an alive at {rumour.incarnation}")
            case Conflict(held, claim):
                if held is self._local:
                    self._ask_claimant(claim)
                elif len(self._claims) < CLAIMS_MAX:
                    self._claims[held.name] = claim
                self._delegate.name_conflict(held, claim)
            case Revived(peer, joined, updated):
                self._forget_suspicion(peer.name)
                self._spread(rumour)
                self._metrics.count("memberlist.msg.alive")
                if joined:
                    self._claims.pop(peer.name, None)
                    self._delegate.member_joined(peer)
                elif updated:
                    self._delegate.member_updated(peer)

    def _refused(self, rumour: Alive, why: str, source: Address) -> None:
        self.drop("member", source, f"{rumour.node[:NAME_TOLD_MAX]!r}: {why}")

    def _suspect(self, rumour: Suspect) -> None:
        decision = self.table.suspect(rumour, self._now)
        match decision:
            case Ignored():
                pass
            case Refute(incarnation):
                self._refute(incarnation, f"a suspicion by {rumour.accuser}")
            case Accused(peer):
                suspicion = self._suspicions[peer.name]
                if suspicion.confirm(rumour.accuser):
                    self._spread(rumour)
                    self._timers.set(SuspicionExpired(peer.name), suspicion.deadline)
            case Suspected(peer):
                self._metrics.count("memberlist.msg.suspect")
                self._start_suspicion(peer, rumour)

    def _dead(self, rumour: Dead) -> None:
        decision = self.table.dead(rumour, self._now)
        match decision:
            case Ignored():
                pass
            case Refute(incarnation):
                self._refute(incarnation, f"a death notice by {rumour.accuser}")
            case Gone(peer):
                self._forget_suspicion(peer.name)
                self._spread(rumour)
                self._metrics.count("memberlist.msg.dead")
                self._delegate.member_left(peer)
                # A restarted node may have claimed the name from a new address before the old
                # one was known to be dead: it need not wait for its next state exchange.
                claim = self._claims.pop(peer.name, None)
                if claim is not None:
                    self._alive(claim, socket_address(claim.addr, claim.port))

    def _refute(self, incarnation: int, what: str) -> None:
        alive = self.table.refute(incarnation)
        self._log.warning("Refuting %s (incarnation now %d)", what, alive.incarnation)
        self._change_health(+1)
        self._spread(alive)

    def _spread(self, news: Alive | Suspect | Dead, *, ticket: Hashable | None = None) -> None:
        self.queue.add(encode(news), name=news.node, ticket=ticket)
        self._settle()
        self.news()

    def _settle(self) -> None:
        if self.queue.finished:
            finished, self.queue.finished = self.queue.finished, []
            for ticket, is_told in finished:
                self.broadcast_finished(ticket, is_told=is_told)

    # Suspicion.

    def _start_suspicion(self, peer: Peer, rumour: Suspect) -> None:
        members = len(self.table)
        needed = self._config.suspicion_mult - 2
        if members - 2 < needed:
            needed = 0
        timeout_min = suspicion_timeout_min(
            members, self._config.probe_interval, self._config.suspicion_mult
        )
        suspicion = Suspicion(
            rumour.accuser,
            self._now,
            needed=needed,
            timeout_min=timeout_min,
            timeout_max=timeout_min * self._config.suspicion_max_timeout_mult,
        )
        self._suspicions[peer.name] = suspicion
        self._timers.set(SuspicionExpired(peer.name), suspicion.deadline)
        self._spread(rumour)
        self._log.debug("%s is suspected by %s", peer.name, rumour.accuser)

    def _forget_suspicion(self, name: str) -> None:
        if self._suspicions.pop(name, None) is not None:
            self._timers.cancel(SuspicionExpired(name))

    def _declare_dead(self, name: str) -> None:
        peer = self.table.get(name)
        assert peer is not None
        assert peer.state is State.SUSPECT
        suspicion = self._suspicions[name]
        self._log.info(
            "Marking %s as failed, suspect timeout reached (%d peer confirmations)",
            name,
            suspicion.confirmations,
        )
        if not suspicion.is_confirmed:
            self._metrics.count("memberlist.degraded.timeout")
        self._dead(Dead(peer.incarnation, name, self._local.name))

    # Probing.

    def _probe_due(self) -> None:
        self._timers.set(ProbeDue(), self._now + self._config.probe_interval)
        if self._probe is not None:
            # Turns that pass during a probe become one, taken when it ends.
            self._probe_missed = True
            return
        peer = self.table.next_probed(
            self._now, self._rng, forget_after=self._config.gossip_to_the_dead_time
        )
        if peer is None:
            return
        interval = self.awareness.scale(self._config.probe_interval)
        self._probe = probe = Probe(peer, self._next_seq(), self._now, interval)
        if self.awareness.score:
            self._metrics.count("memberlist.degraded.probe")
        ping = self._ping(probe.seq, peer.name)
        if peer.state is State.SUSPECT:
            # The suspect hears of it at once, and can refute (Lifeguard §IV.C).
            suspect = Suspect(peer.incarnation, peer.name, self._local.name)
            self._send((encode(ping), encode(suspect)), peer.address, crc=_takes_crc(peer))
        else:
            self._send_with_news(encode(ping), peer.address)
        self._timers.set(AckOverdue(probe.seq), self._now + self._config.probe_timeout)

    def _ask_others(self, seq: int) -> None:
        probe = self._probe
        assert probe is not None
        assert probe.seq == seq
        peer = probe.peer
        local = self._local
        for between in self.table.choose_alive(self._config.indirect_checks, self._rng, but=peer):
            nack = between.protocol_max >= 4
            probe.nacks_expected += nack
            request = IndirectPing(
                seq, peer.addr, peer.port, peer.name, nack, local.addr, local.port, local.name
            )
            self._send_with_news(encode(request), between.address)
        if peer.protocol_max >= 3:
            self._open(peer.address, PingingByStream(probe), until=probe.deadline)
        self._timers.set(ProbeOverdue(seq), probe.deadline)

    def _probe_over(self, seq: int) -> None:
        probe = self._probe
        assert probe is not None
        assert probe.seq == seq
        peer = probe.peer
        if probe.reached_by_stream:
            self._log.warning(
                "%s answers over TCP but not over UDP: are its packets let through?", peer.name
            )
            self._end_probe(-1)
            return
        self._log.info("Suspect %s has failed, no acks received", peer.name)
        self._end_probe(probe.blame)
        self._suspect(Suspect(probe.incarnation, peer.name, self._local.name))

    def _end_probe(self, health_change: int) -> None:
        assert self._probe is not None
        seq = self._probe.seq
        self._metrics.sample("memberlist.probeNode", self._now - self._probe.started)
        self._probe = None
        self._timers.cancel(AckOverdue(seq))
        self._timers.cancel(ProbeOverdue(seq))
        self._change_health(health_change)
        if self._probe_missed:
            self._probe_missed = False
            self._timers.set(ProbeDue(), self._now)

    def _change_health(self, change: int) -> None:
        self.awareness.apply(change)
        self._metrics.gauge("memberlist.health.score", self.awareness.score)

    def _answered(self, ack: Ack) -> None:
        probe = self._probe
        if probe is not None and ack.seq == probe.seq:
            if ack.payload and AckOverdue(ack.seq) in self._timers:
                # Only a direct answer tells of the way between the two.
                self._delegate.ping_completed(probe.peer, self._now - probe.started, ack.payload)
            self._acked_at = self._now
            self._end_probe(-1)
            return
        relay = self._relays.pop(ack.seq, None)
        if relay is not None:
            self._timers.cancel(RelayOverdue(ack.seq))
            if isinstance(relay, RelayedPing):
                self._send_with_news(encode(Ack(relay.asker_seq)), relay.asker)
            else:
                self._delegate.name_contested(relay)

    def _answer_ping(self, ping: Ping, source: Address) -> None:
        if ping.node and ping.node != self._local.name:
            self._log.debug("ping for %s from %s is not for us", ping.node, source)
            return
        to = _reply_address(ping, source)
        if to is not None:
            self._send_with_news(encode(Ack(ping.seq, self._delegate.ack_payload())), to)

    def _relay_ping(self, request: IndirectPing, source: Address) -> None:
        asker = _reply_address(request, source)
        if asker is None or len(request.target) not in (4, 16):
            self.drop("message", source, "indirect ping: an address has not 4 or 16 bytes")
            return
        if len(self._relays) >= RELAYS_MAX:
            self.drop("message", source, f"{RELAYS_MAX} indirect pings are open already")
            return
        seq = self._next_seq()
        self._relays[seq] = RelayedPing(asker, request.seq, nack=request.nack)
        self._timers.set(RelayOverdue(seq), self._now + self._config.probe_timeout)
        target = socket_address(request.target, request.port or self._local.port)
        self._send_with_news(encode(self._ping(seq, request.node)), target)

    def _ask_claimant(self, claim: Alive) -> None:
        """Find out whether somebody really lives there under this node's name.

        After a move to a new address others may tell for a while of the old one.
        """
        if len(claim.addr) not in (4, 16) or len(self._relays) >= RELAYS_MAX:
            return
        if any(isinstance(held, Alive) for held in self._relays.values()):
            return
        seq = self._next_seq()
        self._relays[seq] = claim
        self._timers.set(RelayOverdue(seq), self._now + self._config.probe_timeout)
        self._send((encode(self._ping(seq, claim.node)),), socket_address(claim.addr, claim.port))

    def _relay_failed(self, seq: int) -> None:
        relay = self._relays.pop(seq)
        if isinstance(relay, RelayedPing) and relay.nack:
            self._send_with_news(encode(Nack(relay.asker_seq)), relay.asker)

    def _ping(self, seq: int, node: str) -> Ping:
        local = self._local
        return Ping(seq, node, local.addr, local.port, local.name)

    def _next_seq(self) -> int:
        self._seq = (self._seq + 1) & 0xFFFFFFFF
        return self._seq

    # Gossip.

    def _gossip(self) -> None:
        self._gossiped_at = self._now
        config = self._config
        peers = self.table.next_to_gossip(
            config.gossip_nodes, died_after=self._now - config.gossip_to_the_dead_time
        )
        budget = config.packet_size_max - 2 - self._codec.overhead
        for peer in peers:
            parts = self._fill(budget, peer.address)
            if parts:
                self._send(parts, peer.address, crc=_takes_crc(peer), pack=True)
        # With nobody to tell, wait for somebody to come.
        if peers:
            self.news()

    def _fill(self, budget: int, to: Address) -> list[bytes]:
        """News for one packet of `budget` bytes; each counts as sent once (gossip.md 8.2).

        Membership and the layer above choose first by turns, so that neither starves the other;
        in a real agent membership always does.
        """
        self._others_first = not self._others_first
        room = PARTS_MAX - 1
        present = self.table.present - 1
        target = Target(to, present) if present <= SMALL else None
        if self._others_first:
            others = self._take_others(budget, room, target)
            left = budget - sum(map(len, others)) - 2 * len(others)
            return others + self._take_membership(left, room - len(others), target)
        parts = self._take_membership(budget, room, target)
        left = budget - sum(map(len, parts)) - 2 * len(parts)
        return parts + self._take_others(left, room - len(parts), target)

    def _take_membership(self, budget: int, count: int, target: Target | None) -> list[bytes]:
        if not len(self.queue):
            return []
        parts = self.queue.take(
            budget,
            overhead=2,
            transmits_max=self.retransmit_limit,
            count=count,
            target=target,
        )
        self._settle()
        return parts

    def _take_others(self, budget: int, count: int, target: Target | None) -> list[bytes]:
        if budget <= 3 or not self._delegate.broadcasts_waiting():
            return []
        messages = self._delegate.broadcasts(overhead=3, limit=budget, count=count, target=target)
        return [b"\x08" + message for message in messages]

    def _send_with_news(self, message: bytes, to: Address) -> None:
        if len(self.queue) or self._delegate.broadcasts_waiting():
            budget = self._config.packet_size_max - len(message) - 2 - self._codec.overhead
            parts = self._fill(budget, to)
            if parts:
                self._send((message, *parts), to, pack=True)
                return
        self._send((message,), to)

    def _send(
        self, parts: Sequence[bytes], to: Address, *, crc: bool = False, pack: bool = False
    ) -> None:
        data = self._codec.seal(parts, crc=crc, nonce=self._nonce, pack=pack)
        self._effects.append(SendPacket(data, to))
        self._metrics.count("memberlist.udp.sent", len(data))

    def exchange_soon(self) -> None:
        """News may have been missed: exchange state with somebody now."""
        held = self._timers.deadline(PushPullDue())
        if held is not None:
            self._timers.set(PushPullDue(), self._now)

    def send_user(self, payload: bytes, to: Address) -> None:
        """Send one user message straight to an address."""
        self._send((b"\x08" + payload,), to)

    # Streams.

    def _push_pull_due(self) -> None:
        interval = self._config.push_pull_interval
        if interval > 0:
            scale = 1 if len(self.table) <= 32 else math.ceil(math.log2(len(self.table)) - 5) + 1
            self._timers.set(PushPullDue(), self._now + interval * scale)
        for peer in self.table.choose_alive(1, self._rng):
            self._open(peer.address, Asking(None), until=self._now + self._config.tcp_timeout)

    def _ask_next(self, run: JoinRun) -> None:
        for address in run.next_addresses():
            tried = self._envelope.keyring.keys[:1]
            self._open(address, Asking(run, tried), until=self._now + self._config.tcp_timeout)
        if run.is_over:
            self._delegate.join_over(run)

    def _open(self, to: Address, purpose: Asking | PingingByStream, *, until: float) -> None:
        stream = self._next_stream()
        reader = StreamReader(self._envelope, accepting=False)
        self._streams[stream] = Exchange(stream, to, reader, purpose, self._now)
        self._metrics.count("memberlist.tcp.connect")
        self._timers.set(StreamOverdue(stream), until)
        key = None
        if isinstance(purpose, Asking):
            body = self._own_state(join=purpose.join is not None)
            key = purpose.other_key
        else:
            body = encode(self._ping(purpose.probe.seq, purpose.probe.peer.name))
        self._effects.append(Connect(stream, to))
        self._write(stream, body, calling=True, key=key)

    def _own_state(self, *, join: bool) -> bytes:
        state = encode_push_pull(self.table.states(), self._delegate.local_state(), join=join)
        self._metrics.gauge("memberlist.size.local", len(state))
        return state

    def _write(
        self, stream: StreamId, body: bytes, *, calling: bool, key: bytes | None = None
    ) -> None:
        data = seal_stream(body, self._envelope, calling=calling, nonce=self._nonce, key=key)
        self._effects.append(Write(stream, data))
        self._metrics.count("memberlist.tcp.sent", len(data))

    def _read(self, exchange: Exchange) -> None:
        try:
            items = exchange.reader.read()
        except EnvelopeError as error:
            if isinstance(exchange.purpose, Answering):
                self._write(exchange.stream, encode(StreamError(str(error))), calling=False)
            self._close(exchange)
            self.drop("stream", exchange.peer, error)
            self._failed(exchange, str(error))
            return
        except WireError as error:
            self._close(exchange)
            self.drop("stream", exchange.peer, error)
            self._failed(exchange, str(error))
            return
        if exchange.reader.taken > STREAM_LARGE:
            taken = sum(other.reader.taken for other in self._streams.values())
            if taken > STREAMS_HELD_MAX:
                self._close(exchange)
                self.drop("stream", exchange.peer, f"all streams bring over {taken} bytes")
                self._failed(exchange, "too much is being read already")
                return
        for item in items:
            match item:
                case NodeState():
                    exchange.states.append(item)
                case PushPullHead():
                    exchange.head = item
                case UserState(payload):
                    self._state_received(exchange, payload)
                case Ping():
                    self._ping_received(exchange, item)
                case Ack():
                    self._ack_received(exchange, item)
                case UserStream(payload):
                    self._close(exchange)
                    self._delegate.message_received(payload, exchange.peer)
                case StreamError(text):
                    self._close(exchange)
                    if not self._ask_with_another_key(exchange, text):
                        self._failed(exchange, f"remote error: {text}")
            if exchange.stream not in self._streams:
                return
        if exchange.reader.pending:
            self._timers.set(StreamReadable(exchange.stream), self._now + TURN)
        elif exchange.end is not None:
            self._ended(exchange)

    def _ask_with_another_key(self, exchange: Exchange, error: str) -> bool:
        """Whether a join is tried again, since the peer does not have the key that sealed it.

        Who was away while the cluster changed its keys may still have one that is in use.
        """
        purpose = exchange.purpose
        if (
            not isinstance(purpose, Asking)
            or purpose.join is None
            or KEY_UNKNOWN not in error
            or not self._envelope.seals
        ):
            return False
        for key in self._envelope.keyring.keys:
            if key not in purpose.tried:
                again = Asking(purpose.join, (*purpose.tried, key))
                self._open(exchange.peer, again, until=self._now + self._config.tcp_timeout)
                return True
        return False

    def _ping_received(self, exchange: Exchange, ping: Ping) -> None:
        if isinstance(exchange.purpose, Answering) and ping.node in ("", self._local.name):
            self._write(exchange.stream, encode(Ack(ping.seq)), calling=False)
        self._close(exchange)

    def _ack_received(self, exchange: Exchange, ack: Ack) -> None:
        self._close(exchange)
        purpose = exchange.purpose
        if isinstance(purpose, PingingByStream) and ack.seq == purpose.probe.seq:
            purpose.probe.reached_by_stream = True

    def _state_received(self, exchange: Exchange, user_state: bytes) -> None:
        assert exchange.head is not None
        if isinstance(exchange.purpose, PingingByStream):
            self._close(exchange)
            return
        if isinstance(exchange.purpose, Answering):
            # The answer goes out before anything is merged, so that a fault in the merge does
            # not cost the peer its answer (gossip.md 4.2).
            self._write(exchange.stream, self._own_state(join=exchange.head.join), calling=False)
        self._close(exchange)
        self._metrics.sample("memberlist.size.remote", exchange.arrived)
        fault = self._states_misfit(exchange.states)
        if fault is not None or len(self._merges) >= MERGES_MAX:
            self._failed(exchange, fault or f"{MERGES_MAX} states wait to be merged already")
            return
        # While this node is alone, whoever answers it knows all that its answer says: there is
        # nobody to tell. Otherwise two clusters may be meeting.
        news = self.table.anyone_else or isinstance(exchange.purpose, Answering)
        self._merges.append(Merge(exchange, user_state, news=news, present=self.table.present))
        if len(self._merges) == 1:
            self._merge()

    def _states_misfit(self, states: Iterable[NodeState]) -> str | None:
        """Why a peer's whole state is of no use: it names nobody this node can speak with.

        A real agent refuses a state for one misfit among thousands. Here misfits are left out one
        by one (`MemberTable`), so that a single bad entry cannot part a cluster.
        """
        ours = self._local.versions
        versions = {state.vsn: state.name for state in states if state.state == State.ALIVE}
        faults = {v: fault for v in versions if (fault := versions_misfit(v, ours)) is not None}
        if versions and len(faults) == len(versions):
            worst = next(iter(faults))
            return f"Node {versions[worst]!r} {faults[worst]}"
        return None

    def _merge(self) -> None:
        merge = self._merges[0]
        for state in merge.take(MERGE_SLICE):
            self._merge_state(state, merge.peer, news=merge.news)
        if not merge.is_over:
            self._timers.set(MergeDue(), self._now + TURN)
            return
        del self._merges[0]
        if self._merges:
            self._timers.set(MergeDue(), self._now + TURN)
        if merge.user_state:
            self._delegate.merge_remote_state(merge.user_state, merge.peer, join=merge.with_join)
        self.news()
        if merge.join is not None or self.table.present - merge.present >= MANY:
            self._compare_notes()
        # As long as members answer what the primary seals, it stays: one peer may be the odd one.
        heard_until = self._acked_at + UNDERSTOOD_TURNS * self._config.probe_interval
        if merge.other_key is not None and self._now > heard_until:
            self._delegate.other_key_understood(merge.other_key)
        if merge.join is not None:
            merge.join.answered()
            self._ask_next(merge.join)

    def _compare_notes(self) -> None:
        due = self._timers.deadline(PushPullDue())
        if due is not None:
            delay = NOTES_DELAY * (1 + self._rng.random()) / 2
            self._timers.set(PushPullDue(), min(due, self._now + delay))

    def _merge_state(self, s: NodeState, source: Address, *, news: bool) -> None:
        """Take in one entry of a peer's state (gossip.md 5.6)."""
        match s.state:
            case State.ALIVE:
                rumour = Alive(s.incarnation, s.name, s.addr, s.port, s.meta, s.vsn)
                if not self._is_let_in(rumour, source):
                    return
                if news:
                    self._alive(rumour, source)
                else:
                    self._alive_known_to_all(rumour, source)
            case State.LEFT:
                self._dead(Dead(s.incarnation, s.name, s.name))
            case _:
                # The dead are only suspected: should they live, they can refute.
                self._suspect(Suspect(s.incarnation, s.name, self._local.name))

    def _alive_known_to_all(self, rumour: Alive, source: Address) -> None:
        peer = self.table.get(rumour.node)
        if peer is None:
            decision = self.table.alive(rumour, self._now, self._rng)
            if isinstance(decision, Revived):
                self._metrics.count("memberlist.msg.alive")
                self._delegate.member_joined(decision.peer)
            elif isinstance(decision, Refused):
                self._refused(rumour, decision.why, source)
        else:
            self._alive(rumour, source)

    def _failed(self, exchange: Exchange, why: str) -> None:
        """A stream this node opened brought nothing; one of a peer's needs no more."""
        match exchange.purpose:
            case Asking(join=None):
                self._log.warning("State exchange with %s failed: %s", exchange.peer, why)
            case Asking(join=run):
                assert run is not None
                run.failed(f"Failed to join {exchange.peer.host}: {why}")
                self._ask_next(run)
            case Answering() | PingingByStream():
                pass

    def _ended(self, exchange: Exchange) -> None:
        assert exchange.end is not None
        self._end(exchange)
        self._failed(exchange, exchange.end)

    def _close(self, exchange: Exchange) -> None:
        self._end(exchange)
        self._effects.append(Close(exchange.stream))

    def _end(self, exchange: Exchange) -> None:
        del self._streams[exchange.stream]
        if isinstance(exchange.purpose, Asking):
            self._metrics.sample("memberlist.pushPullNode", self._now - exchange.opened_at)
        self._accepted -= isinstance(exchange.purpose, Answering)
        self._timers.cancel(StreamOverdue(exchange.stream))
        self._timers.cancel(StreamReadable(exchange.stream))

    def _next_stream(self) -> StreamId:
        self._stream_count += 1
        return self._stream_count


def _takes_crc(peer: Peer) -> bool:
    return peer.protocol_max >= 5


def _reply_address(request: Ping | IndirectPing, source: Address) -> Address | None:
    """Where the answer goes: the address the asker gives, else where it came from."""
    if request.source_addr and request.source_port:
        if len(request.source_addr) not in (4, 16):
            return None
        return socket_address(request.source_addr, request.source_port)
    return source
