"""Ask, answer, relay, collect: questions to the whole cluster (serf.md 10 to 12).

Leaves without sockets: what a query is for, who is meant by it, who has answered.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from serfd.errors import CommandError, WireError
from serfd.serf.events import Query
from serfd.serf.patterns import matcher
from serfd.wire.gomsgpack import as_bytes, pack, scalars, text, unpack
from serfd.wire.serf_messages import IS_ACK, QueryMessage, QueryResponse

QUERIES_OPEN_MAX = 1024
"""Own queries that are open at once, and queries of others that can still be answered."""
ANSWERS_MAX = 100_000
"""Answers of one query that are kept apart."""
FILTERS_MAX = 64
"""Filters of one query that are looked at; a query with more matches nobody."""
PATTERNS_SIZE_MAX = 1024
"""Bytes of all patterns of one query; a hostile pattern of that size takes some 25 ms to compile,
and every node passes it on."""
INTERNAL = "_serf_"
"""Names that begin so are Serf's own."""
PING = "_serf_ping"
"""Only acknowledged, never answered: it tells who is reached."""

_BY_NODE, _BY_TAG = 0, 1


class QueryParams(NamedTuple):
    """How a query is asked."""

    nodes: Sequence[str] = ()
    """Only these answer; none: everybody."""
    tags: Mapping[str, str] = {}
    """Only whose tags match these patterns, Go's regular expressions."""
    want_ack: bool = False
    relay_factor: int = 0
    """So many others pass each answer on, in case the direct way is closed; 0 to 255."""
    timeout: float = 0.0
    """Seconds; 0: by the cluster's size."""
    wait_all: bool = False
    """Serf's way: wait for the timeout although all that can answer have."""


EVERYBODY = QueryParams()
"""All members, without acknowledgements, with the default timeout."""


class QueryAnswer(NamedTuple):
    """One member's answer, or its word that it has heard the query."""

    sender: str
    payload: bytes
    is_ack: bool


class QueryDone(NamedTuple):
    """A query is over."""

    acks: int
    responses: int
    audience: int
    """How many were known to be meant by it."""


def encode_filters(params: QueryParams) -> tuple[bytes, ...]:
    """The filters as a query carries them."""
    filters: list[bytes] = []
    if params.nodes:
        filters.append(bytes((_BY_NODE,)) + pack(list(params.nodes)))
    for tag in params.tags:
        filters.append(bytes((_BY_TAG,)) + pack({"Expr": params.tags[tag], "Tag": tag}))
    return tuple(filters)


def is_meant(filters: Iterable[bytes], name: str, tags: Mapping[str, str]) -> bool:
    """Whether a node of that name and tags is to answer: all filters match (serf.md 11).

    Raises WireError for a filter that cannot be understood; it matches nobody.
    """
    patterns_size = 0
    for count, one in enumerate(filters):
        if count >= FILTERS_MAX:
            raise WireError(f"query: more than {FILTERS_MAX} filters")
        if not one:
            # Real agents die of it.
            raise WireError("query: an empty filter")
        if one[0] == _BY_NODE:
            names = scalars(one[1:], "query: node filter", limit=65536)
            if name.encode("utf-8", "surrogateescape") not in names:
                return False
        elif one[0] == _BY_TAG:
            fields = unpack(one[1:], "query: tag filter")
            tag = text(fields, "query: tag filter", b"Tag")
            pattern = text(fields, "query: tag filter", b"Expr")
            patterns_size += len(as_bytes(pattern))
            if patterns_size > PATTERNS_SIZE_MAX:
                raise WireError(f"query: patterns of more than {PATTERNS_SIZE_MAX} bytes")
            try:
                found = matcher(pattern, whole=False)
            except ValueError as error:
                raise WireError(f"query: pattern {pattern[:80]!r}: {error}") from None
            if not found(tags.get(tag, "")):
                return False
        else:
            raise WireError(f"query: unknown filter type {one[0]}")
    return True


class OpenQuery:
    """A query this node has asked, and who has answered so far (serf.md 11.7)."""

    __slots__ = (
        "_acks", "_acks_suffice", "_awaited", "_responses", "_wait_all", "_wants_ack", "id", "ltime"
    )  # fmt: skip

    def __init__(
        self,
        ltime: int,
        number: int,
        params: QueryParams,
        audience: set[str],
        *,
        acks_suffice: bool = False,
    ) -> None:
        """`audience`: names of those who are known to be meant.

        `acks_suffice`: nobody will respond, an acknowledgement is all that there is to come.
        """
        self.ltime = ltime
        self.id = number
        self._wants_ack = params.want_ack
        self._acks_suffice = acks_suffice and params.want_ack
        self._awaited = audience
        self._wait_all = params.wait_all
        self._acks: set[str] = set()
        self._responses: set[str] = set()

    def take(self, message: QueryResponse) -> QueryAnswer | None:
        """Note an answer. None: it is a second one of its sender, or one too many."""
        is_ack = bool(message.flags & IS_ACK)
        seen = self._acks if is_ack else self._responses
        if message.sender in seen or len(seen) >= ANSWERS_MAX:
            return None
        seen.add(message.sender)
        return QueryAnswer(message.sender, message.payload, is_ack)

    @property
    def is_answered(self) -> bool:
        """Whether nobody is left who could say more: all that are meant have responded."""
        if self._wait_all or not self._awaited:
            return False
        done = self._acks_suffice or self._awaited <= self._responses
        return done and (not self._wants_ack or self._awaited <= self._acks)

    def forget(self, name: str) -> None:
        """A member is gone: its answer is not waited for."""
        self._awaited.discard(name)

    @property
    def done(self) -> QueryDone:
        """What came of it."""
        return QueryDone(len(self._acks), len(self._responses), len(self._awaited))


class HeardQuery:
    """A query of anybody that this node may answer once, until its deadline."""

    __slots__ = ("answered", "deadline", "message")

    def __init__(self, message: QueryMessage, deadline: float) -> None:
        self.message = message
        self.deadline = deadline
        self.answered = False

    @property
    def event(self) -> Query:
        """What this node's owner hears of it."""
        m = self.message
        return Query(m.ltime, m.id, m.name, m.payload, m.source_node, self.deadline)

    def response(self, name: str, payload: bytes) -> QueryResponse:
        """This node's answer, unsent."""
        return QueryResponse(self.message.ltime, self.message.id, name, 0, payload)

    def acknowledgement(self, name: str) -> QueryResponse:
        """This node's word that it heard the query."""
        return QueryResponse(self.message.ltime, self.message.id, name, IS_ACK, b"")


def check_name(name: str, payload: bytes) -> None:
    """Refuse names that are Serf's own, but for a bare ping. Raises CommandError."""
    if name.startswith(INTERNAL) and not (name == PING and not payload):
        raise CommandError("Queries cannot contain the '_serf_' prefix")
