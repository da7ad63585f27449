"""The RPC server: connections, what a client may do when, and the records it is sent (rpc.md)."""

import logging
import socket
import struct
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from threading import get_ident
from typing import Any, Final

import msgpack
from twisted.internet.address import UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionClosed
from twisted.internet.interfaces import (
    IAddress,
    IDelayedCall,
    IPushProducer,
    IReactorFromThreads,
    IReactorTime,
    ITCPTransport,
    IUNIXTransport,
)
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.task import deferLater
from twisted.python.failure import Failure
from zope.interface import implementer

from serfd.agent import Agent
from serfd.errors import CommandError
from serfd.logs import LogRing
from serfd.net.sockets import peer_address
from serfd.rpc import messages
from serfd.rpc.commands import COMMANDS, Body, Command, EventFilter, Incomplete, Stage
from serfd.rpc.messages import UNDECODABLE, BadRequest, Header, PackedMembers
from serfd.serf.events import Event, Query

log = logging.getLogger("serfd.agent.ipc")

CLIENTS_MAX: Final = 256
HANDSHAKE_TIME_MAX: Final = 30.0
"""Seconds a client has to shake hands."""
CLOSE_TIME_MAX: Final = 10.0
"""Seconds a client we hang up on has to take what was written before."""
STREAMS_MAX: Final = 64
"""Streams of one client."""
QUERIES_MAX: Final = 256
"""Queries one client has under way."""
PENDING_MAX: Final = 4096
"""Queries one client has been told of and may still answer."""
QUEUED_RECORDS_MAX: Final = 512
"""Records of one stream that wait for a slow client."""
QUEUED_ANSWERS_MAX: Final = 8192
"""Answers of one query that wait for a slow client: many come at once, and each only once."""
LAST_WORD_DELAY: Final = 0.1
"""Seconds between a query's last answer and its end. Serf's command line tool drops an answer that
it has not printed when the end comes; real agents keep it waiting for the deadline."""
QUEUED_BYTES_MAX: Final = 4 << 20
"""The same in bytes, over all streams of one client."""
REQUESTS_PER_TURN: Final = 64
"""So many requests sent at once are served before everybody else gets a turn."""

INTERNAL_ERROR: Final = "internal error: see the agent's log"


class RpcFactory(Factory):
    """Builds a connection for each client, and passes events on to their streams."""

    noisy = False

    def __init__(self, agent: Agent, logs: LogRing, *, auth: str, clock: IReactorTime) -> None:
        """`auth` is the key that clients must show, empty if none; `clock` is the reactor."""
        self.agent = agent
        self.logs = logs
        self.auth = auth
        self.clock = clock
        self.connections: dict[RpcConnection, None] = {}
        self.streams: dict[Records, EventFilter] = {}
        self.records_dropped = 0
        """Records that slow clients did not get, since the start."""
        self._everybody: PackedMembers | None = None
        self._everybody_version = 0
        self._unsubscribe: Callable[[], None] | None = None
        self._thread = get_ident()
        self._all_gone: Deferred[None] | None = None

    def startFactory(self) -> None:
        """The port is open."""
        self._unsubscribe = self.agent.subscribe(self._event)

    def stopFactory(self) -> None:
        """The port is closed: hang up on everybody."""
        assert self._unsubscribe is not None
        self._unsubscribe()
        for connection in tuple(self.connections):
            connection.hang_up()

    def all_gone(self) -> Deferred[None]:
        """Fires when the last client has hung up and got all that was written to it. Once."""
        self._all_gone = Deferred()
        if not self.connections:
            self._all_gone.callback(None)
        return self._all_gone

    def forget(self, connection: "RpcConnection") -> None:
        """A client is gone."""
        del self.connections[connection]
        if not self.connections and self._all_gone is not None and not self._all_gone.called:
            self._all_gone.callback(None)

    def buildProtocol(self, addr: IAddress | None) -> "RpcConnection | None":
        """A client connects. None, which closes the connection, if there are too many."""
        peer = _peer(addr)
        if len(self.connections) >= CLIENTS_MAX:
            log.warning("Refused client: %s: %d are connected, no more may", peer, CLIENTS_MAX)
            return None
        return RpcConnection(self, peer)

    def everybody(self) -> PackedMembers:
        """All members; the same object as long as none of them changes."""
        version = self.agent.members_version
        if self._everybody is None or self._everybody_version != version:
            self._everybody = PackedMembers(self.agent.members())
            self._everybody_version = version
        return self._everybody

    def in_reactor_thread(self, call: Callable[..., None], *args: Any) -> None:
        """Call it now, or soon if this is another thread."""
        if get_ident() == self._thread:
            call(*args)
        else:
            IReactorFromThreads(self.clock).callFromThread(call, *args)

    def _event(self, event: Event) -> None:
        body: bytes | None = None
        for records, wanted in tuple(self.streams.items()):
            if not wanted.matches(event):
                continue
            if isinstance(event, Query):
                body = body or messages.query_rest(event)
                records.send_query(event, body)
            else:
                body = body or messages.event_body(event)
                records.send(body)


class Records:
    """The records of one stream, monitor or query, on their way to its client."""

    def __init__(
        self, connection: "RpcConnection", seq: int, what: str, *, queued_max: int
    ) -> None:
        self.seq = seq
        self.what = what
        """`events`, `log lines` or `answers`."""
        self.queued_max = queued_max
        self.header = messages.header(seq)
        self.queued = 0
        """How many wait for the client to read."""
        self.dropped = 0
        self.is_open = False
        """Whether the reply to the request is out."""
        self.ended = False
        self.detach: Callable[[], object] | None = None
        """Ends their source; of streams and monitors None before the reply is out."""
        self._query: Deferred[Any] | None = None
        """Brings the answers."""
        self._last_word: IDelayedCall | None = None
        self._connection = connection

    def send(self, body: bytes) -> None:
        """Send one: at once, or when the client reads again; or drop it, if too many wait."""
        self._connection.send_record(self, body)

    def send_query(self, query: Query, rest: bytes) -> None:
        """Tell of a query, under an ID of this client's; `rest` is `messages.query_rest`."""
        number = self._connection.await_response(query)
        if number is None:
            self._connection.drop_record(self, "it does not respond to queries")
        else:
            self.send(messages.query_body(number, rest))

    def end_with(self, query: Deferred[Any]) -> None:
        """Tell the end of a query, some time after its last answer; it is never dropped.

        Nobody else waits for it: if the client goes before, it is cancelled.
        """
        self._query = query.addBoth(self._query_over)
        if self.ended:
            query.cancel()

    def _query_over(self, _: object) -> None:
        if not self.ended:
            self._last_word = self._connection.later(LAST_WORD_DELAY, self._say_last_word)

    def _say_last_word(self) -> None:
        self._last_word = None
        self._connection.send_record(self, messages.DONE, is_last=True)

    def end(self) -> None:
        """There are no more, and those that wait are not sent."""
        self.ended = True
        if self._last_word is not None:
            self._last_word.cancel()
        if self._query is not None:
            self._query.cancel()
        if self.detach is not None:
            self.detach()
        if self.dropped:
            log.info("%s did not get %d %s", self._connection.peer, self.dropped, self.what)


@implementer(IPushProducer)
class RpcConnection(Protocol):
    """One client, whose requests are served one after the other.

    To commands it is their `Session`. To its transport it is the producer of what is written: so it
    hears when the client does not keep up with reading.
    """

    transport: Any  # ITransport and IConsumer

    def __init__(self, clients: RpcFactory, peer: str) -> None:
        self.agent = clients.agent
        self.auth = clients.auth
        self.peer = peer
        self.stage = Stage.STRANGER
        self._clients = clients
        self._unpacker = messages.unpacker()
        self._bytes_in = 0
        self._bytes_taken = 0
        """How far whole objects have been read. One that is half read is kept by the unpacker."""
        self._header = Header("", 0)
        self._streams: dict[int, Records] = {}
        self._monitor: dict[int, Records] = {}
        self._queries: dict[Records, None] = {}
        """Those under way."""
        self._pending: dict[int, Query] = {}
        """Those told of that can still be answered, by the ID they were told with."""
        self._last_number = 0
        self._queue: deque[tuple[Records, bytes]] = deque()
        self._queued_bytes = 0
        self._after_reply: list[Callable[[], None]] = []
        self._is_answering = False
        """Whether a request is being served that may be replied to in this very moment."""
        self._held: list[tuple[Records, bytes]] = []
        """Records that must not overtake a reply."""
        self._wakeup: Deferred[None] | None = None
        self._reading = False
        """Whether the next request, or the rest of it, is waited for."""
        self._served = 0
        """Requests, since the last wait."""
        self._full = False
        """Whether the transport holds all it should, as the client does not read."""
        self._gone = False
        """Whether the connection ended, or is about to."""
        self._alarm: IDelayedCall | None = None

    # What happens to it.

    def connectionMade(self) -> None:
        """Start to serve."""
        if IUNIXTransport.providedBy(self.transport):
            self.peer = _process(self.transport)
        log.info("Accepted client: %s", self.peer)
        self.agent.metrics.count("agent.ipc.accept")
        self._clients.connections[self] = None
        if ITCPTransport.providedBy(self.transport):
            self.transport.setTcpNoDelay(True)
            # Or a client whose machine died would keep its place for ever.
            self.transport.setTcpKeepAlive(True)
        self.transport.registerProducer(self, streaming=True)
        self._alarm = self._clients.clock.callLater(HANDSHAKE_TIME_MAX, self._handshake_overdue)
        _ = Deferred.fromCoroutine(self._serve()).addErrback(self._serving_failed)

    def dataReceived(self, data: bytes) -> None:
        """The client sent something."""
        if self._gone:
            return
        self._bytes_in += len(data)
        if self._bytes_in - self._bytes_taken > messages.UNREAD_MAX:
            self._refuse(f"a request of more than {messages.UNREAD_MAX} bytes")
            return
        self._unpacker.feed(data)
        if self._reading:
            self._wake()
        else:
            # A request is being served: let the following ones wait at the client's.
            self.transport.pauseProducing()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The client is gone, and with it its streams. A command that runs goes on to its end."""
        if not reason.check(ConnectionClosed):
            # Only TLS has more to say.
            log.warning("TLS with client %s failed: %s", self.peer, reason.getErrorMessage())
        self._end()
        self._set_alarm(None)
        self._clients.forget(self)

    def pauseProducing(self) -> None:
        """The transport is full."""
        self._full = True

    def resumeProducing(self) -> None:
        """The transport is empty again: send the records that wait, then serve on."""
        self._full = False
        while self._queue and not self._full:
            records, body = self._queue.popleft()
            self._queued_bytes -= len(body)
            records.queued -= 1
            if not records.ended:
                self.transport.write(records.header + body)
        if not self._full:
            self._wake()

    def stopProducing(self) -> None:
        """The transport needs no more; `connectionLost` follows."""

    def hang_up(self) -> None:
        """Close, after the client took what was written, or without if it does not."""
        if self._gone:
            return
        self._end()
        self._set_alarm(self._clients.clock.callLater(CLOSE_TIME_MAX, self._closing_overdue))
        # With TLS the client says goodbye too, and is to be heard.
        self.transport.resumeProducing()
        self.transport.unregisterProducer()
        self.transport.loseConnection()

    # What commands ask.

    def enter(self, stage: Stage) -> None:
        """The client has come further."""
        self.stage = stage
        self._set_alarm(None)

    def open_stream(self, wanted: EventFilter) -> None:
        """Send records of events, once the reply is out."""
        if self._header.seq in self._streams:
            raise CommandError("Stream with given sequence exists")
        if len(self._streams) >= STREAMS_MAX:
            raise CommandError(f"{STREAMS_MAX} streams are open on this connection, no more may")
        records = Records(self, self._header.seq, "events", queued_max=QUEUED_RECORDS_MAX)
        self._streams[records.seq] = records

        def start() -> None:
            records.is_open = True
            self._clients.streams[records] = wanted
            records.detach = partial(self._clients.streams.pop, records)

        self.after_reply(start)

    def open_monitor(self, level: int) -> None:
        """Send records of log lines, once the reply is out."""
        if self._monitor:
            raise CommandError("Monitor already exists")
        records = Records(self, self._header.seq, "log lines", queued_max=QUEUED_RECORDS_MAX)
        self._monitor[records.seq] = records

        def send(line: str) -> None:
            records.send(messages.log_body(line))

        def start() -> None:
            records.is_open = True
            # Plugins also log in other threads.
            listener = partial(self._clients.in_reactor_thread, send)
            records.detach = self._clients.logs.attach(level, listener)

        self.after_reply(start)

    def open_query(self) -> Records:
        """The records of a query that is about to be asked."""
        if len(self._queries) >= QUERIES_MAX:
            raise CommandError(f"{QUERIES_MAX} queries are under way on this connection; try later")
        records = Records(self, self._header.seq, "answers", queued_max=QUEUED_ANSWERS_MAX)
        records.detach = partial(self._queries.pop, records, None)
        self._queries[records] = None

        def start() -> None:
            records.is_open = True

        self.after_reply(start)
        return records

    def pending(self, number: int) -> Query:
        """The query that this client's streams told of under this ID."""
        query = self._pending.get(number)
        if query is None or query.deadline <= self._clients.clock.seconds():
            self._pending.pop(number, None)
            raise CommandError("No pending queries matching ID")
        return query

    def everybody(self) -> PackedMembers:
        """All members; the same object as long as none of them changes."""
        return self._clients.everybody()

    def stop(self, seq: int) -> None:
        """End the stream and the monitor that were opened with `seq`, if any."""
        for opened in (self._streams, self._monitor):
            records = opened.pop(seq, None)
            if records is not None:
                records.end()

    def after_reply(self, call: Callable[[], None]) -> None:
        """Do this once the reply is out."""
        self._after_reply.append(call)

    def turn(self) -> Deferred[None]:
        """Fires when everybody else had a turn of the reactor."""
        return deferLater(self._clients.clock, 0)

    # What streams ask.

    def send_record(self, records: Records, body: bytes, *, is_last: bool = False) -> None:
        """Write a record; keep it while the transport is full; drop it when too many are kept.

        The last one of a query is never dropped.
        """
        if records.ended:
            return
        if self._is_answering or not records.is_open:
            assert not is_last  # it comes from a timer
            self._held.append((records, body))
            return
        if not self._full:
            self.transport.write(records.header + body)
        elif is_last or (
            records.queued < records.queued_max and self._queued_bytes < QUEUED_BYTES_MAX
        ):
            self._queue.append((records, body))
            self._queued_bytes += len(body)
            records.queued += 1
        else:
            self.drop_record(records, "it does not read")
        if is_last:
            del self._queries[records]

    def later(self, delay: float, call: Callable[[], None]) -> IDelayedCall:
        """Do this in so many seconds."""
        return self._clients.clock.callLater(delay, call)

    def drop_record(self, records: Records, why: str) -> None:
        """A record is not sent."""
        self._clients.records_dropped += 1
        records.dropped += 1
        if records.dropped == 1:
            log.warning("Dropping %s to client: %s: %s", records.what, self.peer, why)

    def await_response(self, query: Query) -> int | None:
        """An ID under which the client may answer until the deadline; None: too many wait."""
        if len(self._pending) >= PENDING_MAX:
            now = self._clients.clock.seconds()
            self._pending = {n: q for n, q in self._pending.items() if q.deadline > now}
            if len(self._pending) >= PENDING_MAX:
                return None
        self._last_number += 1
        self._pending[self._last_number] = query
        return self._last_number

    # Its steps.

    async def _serve(self) -> None:
        try:
            while True:
                await self._serve_one()
                self._served += 1
                if self._served == REQUESTS_PER_TURN:
                    self._served = 0
                    await self.turn()
        except BadRequest as error:
            self._refuse(str(error))
        except _Gone:
            pass

    async def _serve_one(self) -> None:
        value = await self._next()
        while self._full and not self._gone:
            await self._wait()
        if self._gone:
            raise _Gone
        try:
            self._header = messages.read_header(value, self._header)
        except BadRequest as error:
            raise BadRequest(f"failed to decode request header: {error}") from None
        name = self._header.command
        self.agent.metrics.count("agent.ipc.command")
        if self.stage is Stage.STRANGER and name != "handshake":
            self._reply("Handshake required")
            raise BadRequest("Handshake required")
        command = COMMANDS.get(name)
        if self.stage is Stage.GREETED and name not in ("handshake", "auth"):
            log.warning("Client sending commands before auth: %s", self.peer)
            self._reply("Authentication required")
            if command is not None and command.fields is not None:
                await self._next()
        elif command is None:
            self._reply("Unsupported command")
            raise BadRequest(f"command {name!r} not recognized")
        else:
            given = None if command.fields is None else await self._next()
            body = messages.read_body(command.fields or (), given)
            self._reply(*await self._run(command, body))

    async def _run(self, command: Command, body: Sequence[Any]) -> tuple[str, bytes]:
        """The reply's error and body."""
        try:
            self._is_answering = True
            result = command.function(self, *body)
            if isinstance(result, Coroutine):
                running = Deferred.fromCoroutine(result)
                if not running.called:
                    # It takes its time: meanwhile records go out.
                    self._release()
                result = await running
            return "", _packed(result)
        except BadRequest:
            raise
        except Incomplete as failed:
            return str(failed), _packed(failed.body)
        except CommandError as failed:
            error = str(failed)
        except Exception:  # our mistake must not cost the client its connection
            log.exception("Command %s of %s failed", self._header.command, self.peer)
            error = INTERNAL_ERROR
        # The client reads a body where one belongs, and an empty one as zero values.
        return error, messages.pack({}) if command.replies else b""

    def _reply(self, error: str, body: bytes = b"") -> None:
        self.transport.write(messages.header(self._header.seq, error) + body)
        calls, self._after_reply = self._after_reply, []
        for call in calls:
            call()
        self._release()

    def _release(self) -> None:
        """Send the records that waited for a reply."""
        self._is_answering = False
        held, self._held = self._held, []
        for records, body in held:
            self.send_record(records, body)

    async def _next(self) -> object:
        """The next object the client sent."""
        while not self._gone:
            try:
                value: object = self._unpacker.unpack()
            except msgpack.OutOfData:
                self._served = 0
                self._reading = True
                self.transport.resumeProducing()
                await self._wait()
                self._reading = False
            except UNDECODABLE as error:
                raise BadRequest(f"not MessagePack: {error}") from None
            else:
                self._bytes_taken = self._unpacker.tell()
                return value
        raise _Gone

    async def _wait(self) -> None:
        self._wakeup = Deferred()
        await self._wakeup

    def _wake(self) -> None:
        wakeup, self._wakeup = self._wakeup, None
        if wakeup is not None:
            wakeup.callback(None)

    def _refuse(self, reason: str) -> None:
        log.error("Failed to evaluate request of %s: %s", self.peer, reason)
        self.hang_up()

    def _serving_failed(self, failure: Failure) -> None:
        log.error("Serving %s failed", self.peer, extra={"details": failure})
        self.hang_up()

    def _handshake_overdue(self) -> None:
        self._alarm = None
        log.warning("Closing client: %s: no handshake in %g s", self.peer, HANDSHAKE_TIME_MAX)
        self.hang_up()

    def _closing_overdue(self) -> None:
        self._alarm = None
        self.transport.abortConnection()

    def _set_alarm(self, alarm: IDelayedCall | None) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = alarm

    def _end(self) -> None:
        self._gone = True
        self._is_answering = False
        for records in (*self._streams.values(), *self._monitor.values(), *self._queries):
            records.end()
        self._streams.clear()
        self._monitor.clear()
        self._pending.clear()
        self._held.clear()
        self._queue.clear()
        self._wake()


class _Gone(Exception):
    """The connection ended while a request was waited for."""


def _packed(body: Body | None) -> bytes:
    if body is None:
        return b""
    return body if isinstance(body, bytes) else messages.pack(body)


def _peer(addr: Any) -> str:
    if isinstance(addr, UNIXAddress):
        return "a process of this machine"
    return str(peer_address(addr.host, addr.port))


def _process(transport: Any) -> str:
    """Who is at the other end of a unix socket."""
    connection: socket.socket = transport.getHandle()
    size = struct.calcsize("3i")
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    pid, user, _ = struct.unpack("3i", found)
    return f"process {pid} of user {user}"
