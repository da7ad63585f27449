"""A stand-in for the agent, and a client without sockets."""

from collections.abc import Callable
from typing import NamedTuple

import msgpack
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import ConnectionDone
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from serfd.errors import CommandError, JoinFailed
from serfd.metrics import Metrics
from serfd.serf.events import Member, Query, Status
from serfd.serf.keys import KeyResult
from serfd.serf.queries import QueryAnswer, QueryDone, QueryParams


def query(name="load", payload=b"", *, number=1, ltime=1, deadline=10.0):
    return Query(ltime, number, name, payload, source="n2", deadline=deadline)


def member(name, *, port=7946, status=Status.ALIVE, addr=b"\x7f\0\0\1", **tags):
    return Member(name, addr, port, tags, status, versions=bytes([1, 5, 2, 2, 5, 5]))


class Asked(NamedTuple):
    """A query that the agent was asked to ask."""

    name: str
    payload: bytes
    params: QueryParams
    answered: Callable[[QueryAnswer], None]
    over: "Deferred[QueryDone]"

    def answer(self, sender, payload=b"", *, is_ack=False):
        self.answered(QueryAnswer(sender, payload, is_ack))

    def end(self):
        self.over.callback(QueryDone(0, 0, 0))


class StandInAgent:
    """What the RPC asks of an agent, answered at once; `slow` makes it take its time."""

    def __init__(self, everybody):
        self.members_version = 0
        self.metrics = Metrics()
        self.everybody = list(everybody)
        self.tags = dict(everybody[0].tags)
        self.event_handlers = {}
        self.calls = []
        self.listeners = []
        self.asked = []
        self.responded = set()
        self.key_results = []
        """What comes of the next key commands; of any after them, that nobody could be asked."""
        self.coordinates = {}
        self.slow = None
        self.shut_down = lambda: self.calls.append("shut_down")

    @property
    def everybody(self):
        return self._everybody

    @everybody.setter
    def everybody(self, members):
        self._everybody = members
        self.members_version += 1

    def members(self):
        return list(self.everybody)

    def join(self, addresses, *, replay=False):
        self.calls.append(("join", addresses, replay))
        refused = [a for a in addresses if not a.endswith(":17002")]
        if len(refused) < len(addresses) or not addresses:
            return self._answer(len(addresses) - len(refused))
        reasons = "".join(
            f"\t* Failed to join {a.split(':')[0]}: dial tcp {a}: connect: connection refused\n"
            for a in refused
        )
        head = f"{len(refused)} error{'s' * (len(refused) > 1)} occurred:\n"
        return fail(JoinFailed(f"{head}{reasons}\n"))

    def leave(self):
        if "leave" in self.calls:
            return fail(CommandError("Leave already in progress"))
        self.calls.append("leave")
        return self._answer(None)

    def force_leave(self, name, *, prune=False):
        self.calls.append(("force_leave", name, prune))
        return self._answer(None)

    def update_tags(self, tags, *, delete=()):
        if sum(map(len, tags.values())) > 512:
            return fail(CommandError("Encoded length of tags exceeds limit of 512 bytes"))
        self.tags = {k: v for k, v in self.tags.items() if k not in delete} | tags
        return self._answer(None)

    def user_event(self, name, payload=b"", *, coalesce=True):
        self.calls.append(("user_event", name, payload, coalesce))
        if len(name) + len(payload) > 512:
            limit = "user event exceeds configured limit of 512 bytes before encoding"
            return fail(CommandError(limit))
        return self._answer(None)

    def query(self, name, payload=b"", *, answered, params):
        if name.startswith("_serf_") and not (name == "_serf_ping" and not payload):
            return fail(CommandError("Queries cannot contain the '_serf_' prefix"))
        if len(payload) > 1000:
            return fail(CommandError("query exceeds limit of 1024 bytes"))
        self.asked.append(Asked(name, payload, params, answered, Deferred()))
        return self.asked[-1].over

    def respond(self, query, payload):
        self.calls.append(("respond", query.id, payload))
        error = ""
        if len(payload) > 1000:
            error = "response exceeds limit of 1024 bytes"
        elif query.id in self.responded:
            error = "response already sent"
        if error:
            return fail(CommandError(f"failed to respond to key query: {error}"))
        self.responded.add(query.id)
        return self._answer(None)

    def change_keys(self, query, key=""):
        self.calls.append((query, key))
        nobody = KeyResult({}, {}, 0, 0, 0, "Feature not supported")
        result = self.key_results.pop(0) if self.key_results else nobody
        return self._answer(result) if result.nodes else fail(CommandError(result.error))

    def plugins(self):
        return []

    def coordinate(self, name):
        return self.coordinates.get(name)

    def stats(self):
        runtime = ("os", "arch", "version", "max_procs", "goroutines", "cpu_count")
        serf = (
            ["members", "failed", "left", "health_score", "encrypted", "coordinate_resets"]
            + [f"{of}_time" for of in ("member", "event", "query")]
            + [f"{of}_queue" for of in ("intent", "event", "query")]
        )
        return {
            "agent": {"name": self.everybody[0].name},
            "runtime": dict.fromkeys(runtime, "?"),
            "serf": dict.fromkeys(serf, "?"),
            "tags": self.tags,
            "event_handlers": self.event_handlers,
        }

    def subscribe(self, listener):
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener)

    def publish(self, event):
        for listener in self.listeners:
            listener(event)

    def _answer(self, value):
        if self.slow is None:
            return succeed(value)
        self.slow = Deferred()
        return self.slow


class Client:
    """A client's end: what it sends is received at once, what it got can be looked at."""

    def __init__(self, factory, *, port=47080):
        self.transport = StringTransport()
        self.protocol = factory.buildProtocol(IPv4Address("TCP", "127.0.0.1", port))
        self.lost = False
        self._seen = 0
        self.protocol.makeConnection(self.transport)

    def send(self, *objects):
        """Objects, or bytes as they are."""
        pack = msgpack.Packer(unicode_errors="surrogateescape").pack
        data = [o if isinstance(o, bytes) else pack(o) for o in objects]
        self.protocol.dataReceived(b"".join(data))

    def received(self):
        """The objects that came since the last look."""
        data = self.transport.value()[self._seen :]
        self._seen += len(data)
        unpacker = msgpack.Unpacker(unicode_errors="surrogateescape")
        unpacker.feed(data)
        return list(unpacker)

    def ask(self, command, body=None, *, seq=1):
        self.send({"Command": command, "Seq": seq}, *([] if body is None else [body]))
        return self.received()

    def shake_hands(self):
        assert self.ask("handshake", {"Version": 1}, seq=0) == [{"Error": "", "Seq": 0}]
        return self

    @property
    def hung_up_on(self):
        return self.transport.disconnecting

    def stops_reading(self):
        self.protocol.pauseProducing()

    def reads_again(self):
        self.protocol.resumeProducing()

    def hang_up(self):
        self.protocol.connectionLost(Failure(ConnectionDone()))
