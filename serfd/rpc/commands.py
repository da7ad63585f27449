"""The RPC's commands, one function each, and the table that names them (rpc.md 4).

A new command is a function and a row. The function is given the session and then its body's
fields, as the row declares them; it returns the reply's body, or None for a command that has none.
It raises CommandError for what the caller is to be told, and BadRequest to close the connection.
"""

import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping
from enum import Enum
from functools import lru_cache
from typing import Any, Concatenate, Final, NamedTuple, Protocol, TypeAlias

from twisted.internet.defer import Deferred

from serfd.agent import Agent
from serfd.errors import CommandError
from serfd.logs import LEVELS
from serfd.rpc.messages import (
    I32,
    I64,
    U8,
    U64,
    BadRequest,
    Fields,
    PackedMembers,
    answer_body,
    boolean,
    coordinate_body,
    keys_body,
    octets,
    text,
    text_map,
    texts,
)
from serfd.serf.events import Event, Member, MemberEvent, MemberEventKind, Query, Status, UserEvent
from serfd.serf.keys import INSTALL, LIST, REMOVE, USE
from serfd.serf.patterns import PatternTooLong, matcher
from serfd.serf.queries import QueryAnswer, QueryParams

log = logging.getLogger("serfd.agent.ipc")

IPC_VERSION: Final = 1
TAG_FILTERS_MAX: Final = 32
EVENT_FILTERS_MAX: Final = 256
"""Parts of one stream's type."""
VALUES_KEPT: Final = 256
"""Values of a tag for which it is kept whether they match, during one request."""
MEMBERS_PER_TURN: Final = 1024
"""So many members are filtered before other clients and the gossip get their turn."""

Body: TypeAlias = Mapping[str, object] | bytes
"""Of a reply: to be packed, or packed already."""


class Stage(Enum):
    """How far a client has come."""

    STRANGER = 1
    """Has yet to shake hands."""
    GREETED = 2
    """Has yet to show the key."""
    TRUSTED = 3


class EventFilter:
    """Which events a stream wants (rpc.md 6)."""

    def __init__(self, wanted: str) -> None:
        """From a comma list like `member-join,user:deploy`; empty is all.

        Raises CommandError if a part of it is nothing that can be asked for, or if they are many.
        """
        parts = (wanted or "*").split(",")
        if len(parts) > EVENT_FILTERS_MAX:
            raise CommandError(
                f"{len(parts)} event filters, at most {EVENT_FILTERS_MAX} are possible"
            )
        self._names = frozenset(map(_filter_name, parts))

    def matches(self, event: Event) -> bool:
        """Whether the stream gets this event."""
        names = self._names
        if "*" in names:
            return True
        match event:
            case MemberEvent():
                return event.name in names
            case UserEvent():
                return "user" in names or f"user:{event.name}" in names
            case Query():
                return "query" in names or f"query:{event.name}" in names


class AnswerRecords(Protocol):
    """The records of a query, on their way to who asked; they wait for the reply to be out."""

    def send(self, body: bytes) -> None:
        """Send an answer."""

    def end_with(self, query: "Deferred[Any]") -> None:
        """When it fires there are no more answers; if the client goes before, it is cancelled."""

    def end(self) -> None:
        """There are no more records at all."""


class Session(Protocol):
    """What a command may know and do about the connection it came over."""

    agent: Agent
    auth: str
    """The key clients must show; empty if none."""
    peer: str
    """`127.0.0.1:5000`."""
    stage: Stage

    def enter(self, stage: Stage) -> None:
        """The client has come further."""

    def open_stream(self, wanted: EventFilter) -> None:
        """Send records of events, once the reply to this request is out. Raises CommandError."""

    def open_monitor(self, level: int) -> None:
        """Send records of log lines, once the reply to this request is out. Raises CommandError."""

    def stop(self, seq: int) -> None:
        """End the streams and the monitor that were opened with `seq`, if any."""

    def everybody(self) -> PackedMembers:
        """All members; the same object as long as none of them changes."""

    def open_query(self) -> AnswerRecords:
        """The records of a query that is about to be asked. Raises CommandError."""

    def pending(self, number: int) -> Query:
        """The query that this client's streams told of under this ID. Raises CommandError."""

    def after_reply(self, call: Callable[[], None]) -> None:
        """Do this once the reply to this request is out."""

    def turn(self) -> "Deferred[None]":
        """Fires when everybody else had a turn of the reactor."""


class Incomplete(CommandError):
    """A command that failed and still has something to say: the body goes out with the error."""

    def __init__(self, error: str, body: Body) -> None:
        super().__init__(error)
        self.body = body


def handshake(session: Session, version: int) -> None:
    """Agree on the protocol; the first thing a client does (rpc.md 2)."""
    if version != IPC_VERSION:
        raise CommandError("Unsupported IPC version")
    if session.stage is not Stage.STRANGER:
        raise CommandError("Handshake already performed")
    session.enter(Stage.GREETED if session.auth else Stage.TRUSTED)


def auth(session: Session, key: str) -> None:
    """Show the key. A wrong one takes nothing away from a client that is trusted already."""
    shown, right = (k.encode("utf-8", "surrogateescape") for k in (key, session.auth))
    import hmac  # loads OpenSSL, 3 MB, which an agent without keys can do without

    if not hmac.compare_digest(shown, right):
        log.warning("%s showed a wrong key", session.peer)
        raise CommandError("Invalid authentication token")
    session.enter(Stage.TRUSTED)


async def join(session: Session, addresses: list[str], replay: bool) -> Body:  # noqa: FBT001 -- a row's field
    """Join a cluster; tells how many addresses answered."""
    try:
        return {"Num": await session.agent.join(addresses, replay=replay)}
    except CommandError as error:
        raise Incomplete(str(error), {"Num": 0}) from None


async def leave(session: Session) -> None:
    """Leave the cluster, tell the client, then stop the daemon."""
    log.info("Graceful leave triggered")
    await session.agent.leave()
    session.after_reply(session.agent.shut_down)


async def force_leave(session: Session, name: str, prune: bool) -> None:  # noqa: FBT001 -- a row's field
    """Declare a failed member as left."""
    await session.agent.force_leave(name, prune=prune)


async def event(session: Session, name: str, payload: bytes, coalesce: bool) -> None:  # noqa: FBT001 -- a row's field
    """Tell the whole cluster something."""
    await session.agent.user_event(name, payload, coalesce=coalesce)


async def query(
    session: Session,
    nodes: list[str],
    tags: dict[str, str],
    want_ack: bool,  # noqa: FBT001 -- a row's field
    relay_factor: int,
    nanoseconds: int,
    name: str,
    payload: bytes,
    wait_all: bool,  # noqa: FBT001 -- a row's field
) -> None:
    """Ask the whole cluster something; records bring the answers, and the end (rpc.md 8).

    It ends as soon as all that are meant have answered, or at its timeout. `wait_all`, which is
    serfd's own and unknown to other agents, makes it wait for the timeout in any case, as theirs.
    """
    records = session.open_query()

    def answered(answer: QueryAnswer) -> None:
        # Without a name it would look like the end.
        if answer.sender:
            records.send(answer_body(answer))

    params = QueryParams(nodes, tags, want_ack, relay_factor, nanoseconds / 1e9, wait_all)
    try:
        over = session.agent.query(name, payload, answered=answered, params=params)
        if not over.called:
            # While the end of another command is carried out, a refusal comes after that.
            await session.turn()
        if over.called:
            await over
    except BaseException:
        records.end()
        raise
    # From now on it can only fail because the daemon stops or the client goes.
    records.end_with(over)


async def respond(session: Session, number: int, payload: bytes) -> None:
    """Answer a query that a stream told of."""
    await session.agent.respond(session.pending(number), payload)


def members(session: Session) -> Body:
    """Everybody known."""
    return session.everybody().body


async def members_filtered(session: Session, tags: dict[str, str], status: str, name: str) -> Body:
    """Those whose tags, status and name match regular expressions (rpc.md 5)."""
    if len(tags) > TAG_FILTERS_MAX:
        raise CommandError(f"{len(tags)} tags to filter by, at most {TAG_FILTERS_MAX} are possible")
    filters: list[Callable[[Member], bool]] = []
    if status:
        filters.append(_by_status(status))
    filters += [_by_tag(tag, pattern) for tag, pattern in tags.items()]
    if name:
        filters.append(_by_name(name))
    everybody = session.everybody()
    if not filters:
        return everybody.body
    members, found = everybody.members, list[int]()
    for start in range(0, len(members), MEMBERS_PER_TURN):
        if start:
            await session.turn()
        some: Iterable[int] = range(start, min(start + MEMBERS_PER_TURN, len(members)))
        for matches in filters:
            some = [i for i in some if matches(members[i])]
        found += some
    return everybody.body_of(found)


async def tags(session: Session, changed: dict[str, str], deleted: list[str]) -> None:
    """Delete tags of this node, then set others."""
    await session.agent.update_tags(changed, delete=deleted)


def stream(session: Session, wanted: str) -> None:
    """Send events from now on."""
    session.open_stream(EventFilter(wanted))


def monitor(session: Session, level: str) -> None:
    """Send the log lines kept, then new ones."""
    number = LEVELS.get(level.upper())
    if number is None:
        raise CommandError(f"Unknown log level: {level.upper()}")
    session.open_monitor(number)


def stop(session: Session, seq: int) -> None:
    """End a stream or the monitor; not an error if there is none."""
    session.stop(seq)


def stats(session: Session) -> Body:
    """Counters and facts, by section."""
    return session.agent.stats()


def plugins(session: Session) -> Body:
    """What plugins there are, and how each is; Serf has none of it."""
    return {
        "Plugins": [
            {
                "Name": each.name,
                "State": each.state,
                "Source": each.source,
                "Durable": each.durable,
                "Calls": each.calls,
                "Errors": each.errors,
                "Timeouts": each.timeouts,
                "Merged": each.merged,
                "Lost": each.lost,
                "Waiting": each.waiting,
                "Seconds": each.seconds,
                "LastError": each.last_error,
            }
            for each in session.agent.plugins()
        ]
    }


def get_coordinate(session: Session, name: str) -> Body:
    """Where a member is in the network."""
    return coordinate_body(session.agent.coordinate(name))


async def install_key(session: Session, key: str) -> Body:
    """Give all members one more key."""
    return await _change_keys(session, INSTALL, key)


async def use_key(session: Session, key: str) -> Body:
    """Let all members encrypt with this key."""
    return await _change_keys(session, USE, key)


async def remove_key(session: Session, key: str) -> Body:
    """Take a key from all members."""
    return await _change_keys(session, REMOVE, key)


async def list_keys(session: Session) -> Body:
    """The keys of all members, and how many have each."""
    return await _change_keys(session, LIST, "")


async def _change_keys(session: Session, query: str, key: str) -> Body:
    try:
        result = await session.agent.change_keys(query, key)
    except CommandError as error:
        raise Incomplete(str(error), keys_body(query, None)) from None
    if result.error:
        raise Incomplete(result.error, keys_body(query, result))
    return keys_body(query, result)


class Command(NamedTuple):
    """A row of the table."""

    function: Callable[Concatenate[Session, ...], Coroutine[Any, Any, Body | None] | Body | None]
    fields: Fields | None = None
    """The request's body; None if it has none."""
    replies: bool = False
    """Whether the reply has a body, be it with an error."""


COMMANDS: Final[Mapping[str, Command]] = {
    "handshake": Command(handshake, (("Version", I32),)),
    "auth": Command(auth, (("AuthKey", text),)),
    "join": Command(join, (("Existing", texts), ("Replay", boolean)), replies=True),
    "leave": Command(leave),
    "force-leave": Command(force_leave, (("Node", text), ("Prune", boolean))),
    "event": Command(event, (("Name", text), ("Payload", octets), ("Coalesce", boolean))),
    "query": Command(
        query,
        (
            ("FilterNodes", texts),
            ("FilterTags", text_map),
            ("RequestAck", boolean),
            ("RelayFactor", U8),
            ("Timeout", I64),
            ("Name", text),
            ("Payload", octets),
            ("WaitAll", boolean),
        ),
    ),
    "respond": Command(respond, (("ID", U64), ("Payload", octets))),
    "members": Command(members, replies=True),
    "members-filtered": Command(
        members_filtered, (("Tags", text_map), ("Status", text), ("Name", text)), replies=True
    ),
    "tags": Command(tags, (("Tags", text_map), ("DeleteTags", texts))),
    "stream": Command(stream, (("Type", text),)),
    "monitor": Command(monitor, (("LogLevel", text),)),
    "stop": Command(stop, (("Stop", U64),)),
    "stats": Command(stats, replies=True),
    "plugins": Command(plugins, replies=True),
    "get-coordinate": Command(get_coordinate, (("Node", text),), replies=True),
    "install-key": Command(install_key, (("Key", text),), replies=True),
    "use-key": Command(use_key, (("Key", text),), replies=True),
    "remove-key": Command(remove_key, (("Key", text),), replies=True),
    "list-keys": Command(list_keys, replies=True),
}
"""Every command there is, by its name on the wire."""


_PLAIN_FILTERS: Final = frozenset(["*", "user", "query", *(kind.value for kind in MemberEventKind)])


def _filter_name(part: str) -> str:
    kind, colon, name = part.partition(":")
    if part in _PLAIN_FILTERS:
        return part
    if colon and kind in ("user", "query"):
        return part if name else kind
    raise CommandError("Invalid event filter")


def _by_status(pattern: str) -> Callable[[Member], bool]:
    matches = _matcher(pattern)
    wanted = {status for status in Status if matches(status.text)}
    return lambda member: member.status in wanted


def _by_name(pattern: str) -> Callable[[Member], bool]:
    matches = _matcher(pattern)
    return lambda member: matches(member.name)


def _by_tag(tag: str, pattern: str) -> Callable[[Member], bool]:
    # Most members have one of a few values, which are not looked at again and again.
    matches = lru_cache(VALUES_KEPT)(_matcher(pattern))
    return lambda member: matches(member.tags.get(tag, ""))


def _matcher(pattern: str) -> Callable[[str], bool]:
    try:
        return matcher(pattern, whole=True)
    except PatternTooLong as error:
        raise CommandError(str(error)) from None
    except ValueError as error:
        raise BadRequest(f"Failed to compile regex: error parsing regexp: {error}") from None
