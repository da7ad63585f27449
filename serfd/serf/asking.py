"""The queries of one node: those it asks and those it hears (serf.md 10 to 12)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from serfd.effects import Address, Answer, Command, Emit
from serfd.errors import CommandError, WireError
from serfd.gossip.member_table import socket_address
from serfd.serf.common import Common
from serfd.serf.events import Query, Status
from serfd.serf.lamport import LamportClock, RecentRing
from serfd.serf.members import tags_of
from serfd.serf.queries import (
    INTERNAL,
    PING,
    QUERIES_OPEN_MAX,
    HeardQuery,
    OpenQuery,
    QueryAnswer,
    QueryDone,
    QueryParams,
    encode_filters,
    is_meant,
)
from serfd.timers import Timers
from serfd.wire.serf_messages import IS_ACK, WANTS_ACK, QueryMessage, QueryResponse, Relay, encode

QUERY_TIMEOUT_MAX = 86_400.0
"""Seconds; a longer wait, of a stranger or of the node's owner, is cut to it."""
QUERY_PROTOCOL_MIN = 4
"""Serf's protocol that has queries."""
RELAY_PROTOCOL_MIN = 5
"""memberlist's protocol of those who are asked to relay."""
_RESPONSE = b"\x05"


@dataclass(frozen=True, slots=True)
class QueryOver:
    """A query this node asked has reached its deadline."""

    ltime: int


@dataclass(frozen=True, slots=True)
class HeardOver:
    """A query this node heard can no longer be answered."""

    ltime: int
    id: int


class Asker(Protocol):
    """Who wants to know: what becomes of the answers to one query."""

    def answered(self, answer: QueryAnswer) -> None:
        """One member's answer or acknowledgement; each sender's first only."""

    @property
    def has_enough(self) -> bool:
        """Whether more answers would change nothing."""

    def over(self, done: QueryDone) -> None:
        """There will be no more answers."""


class UserAsker:
    """The node's owner asked: every answer is handed on."""

    has_enough = False

    def __init__(self, common: Common, command: Command[QueryDone]) -> None:
        self._common = common
        self.command = command

    def answered(self, answer: QueryAnswer) -> None:
        """Hand it on."""
        self._common.effects.append(Answer(self.command, answer))

    def over(self, done: QueryDone) -> None:
        """Tell how many there were."""
        self._common.finish(self.command, done)


class Queries:
    """Queries asked and heard, each until its deadline."""

    def __init__(
        self,
        common: Common,
        timers: Timers[Any],
        *,
        spread: Callable[[bytes], None],
        answer_internal: Callable[[HeardQuery], None],
    ) -> None:
        """`spread` queues a query for everybody; `answer_internal` gets Serf's own queries."""
        self._common = common
        self._timers = timers
        self._spread = spread
        self._answer_internal = answer_internal
        self.clock = LamportClock()
        self._seen: RecentRing[int] = RecentRing()
        self._time_min = 0
        self._asked: dict[int, OpenQuery] = {}
        self._askers: dict[int, Asker] = {}
        self._heard: dict[tuple[int, int], HeardQuery] = {}

    def ignore_before(self, ltime: int) -> None:
        """Queries before `ltime` were heard in an earlier life."""
        self._time_min = max(self._time_min, ltime)

    # Asked by this node.

    @property
    def default_timeout(self) -> float:
        """Seconds; by the members that are there (serf.md 10)."""
        config = self._common.config
        rounds = math.ceil(math.log10(self._common.memberlist.table.present + 1))
        return config.gossip.gossip_interval * config.query_timeout_mult * rounds

    def ask(self, name: str, payload: bytes, params: QueryParams, asker: Asker) -> None:
        """Ask. Raises CommandError, and asks nobody, if the query cannot be sent."""
        config, memberlist = self._common.config, self._common.memberlist
        if config.protocol < QUERY_PROTOCOL_MIN:
            raise CommandError("Feature not supported")
        if len(self._asked) >= QUERIES_OPEN_MAX:
            raise CommandError(f"{QUERIES_OPEN_MAX} queries are open already; try later")
        timeout = min(params.timeout or self.default_timeout, QUERY_TIMEOUT_MAX)
        local = memberlist.local
        message = QueryMessage(
            ltime=self.clock.time,
            id=self._common.rng.getrandbits(31),
            addr=local.addr,
            port=local.port,
            source_node=self._common.name,
            filters=encode_filters(params),
            flags=WANTS_ACK if params.want_ack else 0,
            relay_factor=params.relay_factor,
            timeout_ns=int(timeout * 1e9),
            name=name,
            payload=payload,
        )
        encoded = encode(message)
        if len(encoded) > config.query_size_limit:
            raise CommandError(f"query exceeds limit of {config.query_size_limit} bytes")
        if len(encoded) > memberlist.message_max:
            fits = memberlist.message_max
            raise CommandError(f"query exceeds limit of {fits} bytes: it fits no packet")
        audience = self._audience(message.filters)
        assert message.ltime not in self._asked  # the clock only goes forward
        self._asked[message.ltime] = OpenQuery(
            message.ltime, message.id, params, audience, acks_suffice=name == PING
        )
        self._askers[message.ltime] = asker
        self._timers.set(QueryOver(message.ltime), self._common.now + max(0.0, timeout))
        self.heard(message)
        if memberlist.table.anyone_else:
            self._spread(encoded)

    def response(self, message: QueryResponse) -> None:
        """Somebody answered."""
        asked = self._asked.get(message.ltime)
        log = self._common.log
        if asked is None or asked.id != message.id:
            log.debug("reply for non-running query (LTime: %d)", message.ltime)
            return
        if self._common.members.get(message.sender) is None:
            log.warning("query answered by %r, who is no member", message.sender)
            return
        answer = asked.take(message)
        kind = "acks" if message.flags & IS_ACK else "responses"
        if answer is None:
            self._common.metrics.count(f"serf.query_duplicate_{kind}")
            return
        self._common.metrics.count(f"serf.query_{kind}")
        asker = self._askers[message.ltime]
        asker.answered(answer)
        if asker.has_enough or asked.is_answered:
            self.over(message.ltime)

    def over(self, ltime: int) -> None:
        """A query of this node ends: all have answered, or its time is up."""
        self._timers.cancel(QueryOver(ltime))
        asked = self._asked.pop(ltime)
        self._askers.pop(ltime).over(asked.done)

    def forget(self, command: Command[QueryDone]) -> None:
        """Nobody wants to know any more what comes of a query that was asked by this command."""
        for ltime, asker in self._askers.items():
            if isinstance(asker, UserAsker) and asker.command is command:
                del self._askers[ltime]
                number = self._asked.pop(ltime).id
                self._timers.cancel(QueryOver(ltime))
                if self._heard.pop((ltime, number), None) is not None:
                    self._timers.cancel(HeardOver(ltime, number))
                return

    def member_gone(self, name: str) -> None:
        """A member left or failed: nobody waits for its answers."""
        for ltime, asked in list(self._asked.items()):
            asked.forget(name)
            if asked.is_answered:
                self.over(ltime)

    def _audience(self, filters: Sequence[bytes]) -> set[str]:
        """Names of the living members that are meant. An unreadable filter means nobody."""
        peers = [r.peer for r in self._common.members if r.status is Status.ALIVE]
        try:
            return {p.name for p in peers if is_meant(filters, p.name, tags_of(p.meta))}
        except WireError:
            return set()

    # Heard by this node.

    def heard(self, message: QueryMessage) -> bool:
        """A query came in; whether it is news."""
        common = self._common
        self.clock.witness(message.ltime)
        if message.ltime < self._time_min:
            return False
        if not self._seen.is_new(message.ltime, message.id, self.clock.time):
            return False
        common.metrics.count_one_of("serf.queries", message.name)
        try:
            if not is_meant(message.filters, common.name, common.tags):
                return True
        except WireError as error:
            common.log.warning("query %r of %s: %s", message.name, message.source_node, error)
            return True
        timeout = min(message.timeout_ns / 1e9, QUERY_TIMEOUT_MAX)
        query = HeardQuery(message, common.now + timeout)
        if message.flags & WANTS_ACK:
            self._send(query, encode(query.acknowledgement(common.name)))
        if timeout <= 0 or len(self._heard) >= QUERIES_OPEN_MAX:
            return True
        self._heard[message.ltime, message.id] = query
        self._timers.set(HeardOver(message.ltime, message.id), query.deadline)
        if message.name.startswith(INTERNAL):
            self._answer_internal(query)
        else:
            common.effects.append(Emit(query.event))
        return True

    def heard_over(self, ltime: int, number: int) -> None:
        """The deadline of a query that was heard."""
        del self._heard[ltime, number]

    def respond(self, query: Query, payload: bytes) -> None:
        """Answer for the node's owner. Raises CommandError: too long, too late, or again."""
        heard = self._heard.get((query.ltime, query.id))
        if heard is None:
            raise CommandError("response is past the deadline")
        self.answer(heard, payload)

    def answer(self, heard: HeardQuery, payload: bytes) -> None:
        """Answer. Raises CommandError: too long, or not the first answer."""
        encoded = encode(heard.response(self._common.name, payload))
        limit = self._common.config.query_response_size_limit
        if len(encoded) > limit:
            raise CommandError(f"response exceeds limit of {limit} bytes")
        if heard.answered:
            raise CommandError("response already sent")
        heard.answered = True
        self._send(heard, encoded)

    def relay(self, message: Relay, source: Address) -> None:
        """Pass an answer on. Nothing else, and to members only: this is no open relay."""
        target = self._common.members.get(message.name)
        if (
            len(message.addr) not in (4, 16)
            or target is None
            or target.peer.address != socket_address(message.addr, message.port)
            or message.inner[:1] != _RESPONSE
        ):
            self._common.log.warning("refused to relay a message of %s to %r", source, message.name)
            return
        self._common.memberlist.send_user(message.inner, target.peer.address)

    def _send(self, heard: HeardQuery, encoded: bytes) -> None:
        """Straight to the asker, and through others as often as it wants (serf.md 11.6)."""
        common, message = self._common, heard.message
        if len(message.addr) not in (4, 16):
            common.log.debug("query %r has no address to answer to", message.name)
            return
        to = socket_address(message.addr, message.port)
        common.memberlist.send_user(encoded, to)
        if not message.relay_factor or len(common.members) < message.relay_factor + 1:
            return
        relayed = encode(Relay(message.addr, message.port, message.source_node, encoded))
        if len(relayed) > common.config.query_response_size_limit:
            common.log.warning("the answer to %r is too long to be relayed", message.name)
            return
        for peer in common.memberlist.table.choose_alive(message.relay_factor, common.rng):
            if peer.protocol_max >= RELAY_PROTOCOL_MIN:
                common.memberlist.send_user(relayed, peer.address)
