import logging
import os
import socket
import threading
import tracemalloc

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stand_in import Client, StandInAgent, member, query
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.interfaces import IReactorFromThreads, ITCPTransport, IUNIXTransport
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from zope.interface import implementer

from serfd.logs import LogRing
from serfd.rpc import messages
from serfd.rpc.commands import COMMANDS
from serfd.rpc.server import (
    CLIENTS_MAX,
    CLOSE_TIME_MAX,
    HANDSHAKE_TIME_MAX,
    LAST_WORD_DELAY,
    PENDING_MAX,
    QUERIES_MAX,
    QUEUED_ANSWERS_MAX,
    QUEUED_BYTES_MAX,
    QUEUED_RECORDS_MAX,
    REQUESTS_PER_TURN,
    STREAMS_MAX,
    RpcFactory,
)
from serfd.serf.events import MemberEvent, MemberEventKind, UserEvent

OK = {"Error": "", "Seq": 1}


def user(name="deploy", payload=b"v1", ltime=9):
    return UserEvent(ltime, name, payload, coalesce=False)


def names(received):
    """Of the user events among what a client got."""
    return [body["Name"] for body in received if "Name" in body]


# Requests.


def test_clients_and_their_requests_are_counted(connect, agent):
    for seq in (1, 2):
        connect().send({"Command": "members", "Seq": seq})
    # Each has shaken hands.
    assert agent.metrics.counters == {"agent.ipc.accept": 2, "agent.ipc.command": 4}


def test_requests_sent_at_once_are_answered_in_order(connect, agent):
    client = connect()
    requests = [
        ({"Command": "join", "Seq": seq}, {"Existing": ["h:17002"] * seq}) for seq in range(1, 9)
    ]
    client.send(*(part for request in requests for part in request))
    assert client.received() == [
        part for seq in range(1, 9) for part in ({"Error": "", "Seq": seq}, {"Num": seq})
    ]


def test_a_slow_request_delays_its_own_connection_only(connect, agent):
    agent.slow = True
    client, other = connect(), connect()
    client.send(
        {"Command": "force-leave", "Seq": 1}, {"Node": "n2"}, {"Command": "members", "Seq": 2}
    )
    assert client.received() == []
    assert other.ask("members")[0] == OK
    agent.slow.callback(None)
    assert [h["Seq"] for h in client.received() if "Seq" in h] == [1, 2]


def test_while_a_request_is_served_no_more_are_taken_in(connect, agent):
    agent.slow = True
    client = connect()
    client.ask("join", {"Existing": ["h:17002"]})
    assert client.transport.producerState == "producing"
    client.send({"Command": "stop", "Seq": 2})
    assert client.transport.producerState == "paused"
    agent.slow.callback(1)
    assert client.received() == [OK, {"Num": 1}]
    assert client.transport.producerState == "producing"
    client.send({"Stop": 1})
    assert client.received() == [{"Error": "", "Seq": 2}]


def test_many_requests_at_once_let_others_have_their_turn(connect, clock):
    client = connect()
    client.send(*[{"Command": "members", "Seq": 1}] * (2 * REQUESTS_PER_TURN))
    assert client.received().count(OK) == REQUESTS_PER_TURN
    clock.advance(0)
    assert client.received().count(OK) == REQUESTS_PER_TURN
    clock.advance(0)
    assert client.received() == []


def test_a_request_may_come_byte_by_byte(connect):
    client = connect()
    for byte in msgpack.packb({"Command": "stop", "Seq": 1}) + msgpack.packb({"Stop": 300}):
        assert client.received() == []
        client.send(bytes([byte]))
    assert client.received() == [OK]


# What closes a connection.


@pytest.mark.parametrize(
    ("sent", "replies", "reason"),
    [
        ([b"\xc1"], [], "not MessagePack: "),
        (["text"], [], "failed to decode request header: expected a map, found str"),
        ([{"Command": 1}], [], "failed to decode request header: expected text, found int"),
        ([{"Command": "stop"}, "text"], [], "expected a map, found str"),
        ([{"Command": "stop"}, {"Stop": "1"}], [], "Stop: expected an integer from 0 to "),
        ([{"Command": "stream"}, b"\xc1"], [], "not MessagePack: "),
        (
            [{"Command": "bogus", "Seq": 1}],
            ["Unsupported command"],
            "command 'bogus' not recognized",
        ),
        ([{"Command": "", "Seq": 1}], ["Unsupported command"], "command '' not recognized"),
    ],
)
def test_a_bad_request_closes_the_connection_with_a_line_in_the_log(
    sent, replies, reason, connect, lines
):
    client = connect()
    client.send(*sent)
    assert client.received() == [{"Error": reply, "Seq": 1} for reply in replies]
    assert client.hung_up_on
    prefix = "[ERR] agent.ipc: Failed to evaluate request of 127.0.0.1:47080: "
    assert lines[-1].startswith(prefix + reason)


@pytest.mark.parametrize("name", sorted([*COMMANDS.keys() - {"handshake"}, "bogus"]))
def test_nothing_goes_without_a_handshake(name, serve):
    client = Client(serve(auth="sekret"))
    assert client.ask(name) == [{"Error": "Handshake required", "Seq": 1}]
    assert client.hung_up_on
    client.send({"Command": "handshake", "Seq": 2}, {"Version": 1})
    assert client.received() == []


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"handshake", "auth"}))
def test_nothing_goes_without_auth_and_a_body_is_dropped(name, serve, agent, lines):
    client = Client(serve(auth="sekret")).shake_hands()
    body = None if COMMANDS[name].fields is None else {"Command": "dropped", "Seq": 7}
    assert client.ask(name, body) == [{"Error": "Authentication required", "Seq": 1}]
    assert client.ask("auth", {"AuthKey": "sekret"}, seq=2) == [{"Error": "", "Seq": 2}]
    assert "[WARN] agent.ipc: Client sending commands before auth: 127.0.0.1:47080" in lines
    assert agent.calls == []


def test_a_request_that_is_too_long_closes_the_connection(connect, lines):
    client = connect()
    client.ask("stop", {"Stop": 1})
    list_of_16_texts, text_of_64_kib = b"\xdc\0\x10", b"\xda\xff\xff" + b"x" * 0xFFFF
    client.send(list_of_16_texts)
    for _ in range(15):
        client.send(text_of_64_kib)
    assert not client.hung_up_on
    client.send(text_of_64_kib)
    assert client.hung_up_on
    assert lines[-1].endswith(" 127.0.0.1:47080: a request of more than 1048576 bytes")


def test_a_client_may_send_more_than_that_in_all(connect, clock):
    client = connect()
    for _ in range(40):
        client.send({"Command": "stop", "Seq": 1}, {"Unknown": "x" * 0x8000})
        assert client.received() == [OK]


def test_a_client_that_never_shakes_hands_is_hung_up_on(serve, clock, lines):
    silent, polite = Client(serve()), Client(serve()).shake_hands()
    clock.advance(HANDSHAKE_TIME_MAX - 1)
    assert not silent.hung_up_on
    clock.advance(1)
    assert silent.hung_up_on
    assert not polite.hung_up_on
    assert lines[-1] == "[WARN] agent.ipc: Closing client: 127.0.0.1:47080: no handshake in 30 s"


def test_one_that_does_not_take_its_last_reply_is_cut_off(connect, clock):
    client = connect()
    client.ask("bogus")
    assert client.transport.producer is None  # or Twisted would wait for it, and never close
    clock.advance(CLOSE_TIME_MAX)
    assert client.transport.disconnected


def test_no_timer_is_left_of_clients_that_went_away(serve, clock):
    factory = serve()
    clients = [Client(factory), Client(factory).shake_hands(), Client(factory)]
    clients[2].ask("bogus")
    for client in clients:
        client.hang_up()
    assert clock.getDelayedCalls() == []
    assert factory.connections == {}


def test_there_is_a_limit_of_clients(serve, lines):
    factory = serve()
    clients = [Client(factory) for _ in range(CLIENTS_MAX)]
    assert factory.buildProtocol(IPv4Address("TCP", "10.0.0.1", 5)) is None
    assert (
        lines[-1] == "[WARN] agent.ipc: Refused client: 10.0.0.1:5: 256 are connected, no more may"
    )
    clients[0].hang_up()
    assert factory.buildProtocol(IPv6Address("TCP", "fe80::1", 5)).peer == "[fe80::1]:5"


def test_when_the_port_closes_everybody_is_hung_up_on(agent, logs, clock):
    factory = RpcFactory(agent, logs, auth="", clock=clock)
    factory.startFactory()
    client = Client(factory).shake_hands()
    client.ask("stream", {})
    factory.stopFactory()
    assert client.hung_up_on
    assert agent.listeners == []


# Commands that fail.


@pytest.mark.parametrize(("name", "body"), [("members", [{}]), ("force-leave", []), ("query", [])])
def test_a_mistake_of_ours_is_logged_and_answered(name, body, connect, agent, lines, monkeypatch):
    def mistaken(*args, **kwargs):
        raise ZeroDivisionError("one by zero")

    monkeypatch.setattr(agent, name.replace("-", "_"), mistaken)
    client = connect()
    error = {"Error": "internal error: see the agent's log", "Seq": 1}
    assert client.ask(name, {} if COMMANDS[name].fields else None) == [error, *body]
    assert lines[-1].startswith(
        f"[ERR] agent.ipc: Command {name} of 127.0.0.1:47080 failed\n    Traceback "
    )
    assert lines[-1].endswith("ZeroDivisionError: one by zero")
    assert client.ask("stop", {}) == [OK]


def test_a_query_that_fails_by_our_mistake_is_not_under_way(connect, agent, clock, monkeypatch):
    client = connect()
    with monkeypatch.context() as mistaken:
        mistaken.setattr(agent, "query", None)
        for _ in range(QUERIES_MAX):
            client.ask("query", {})
    clock.pump([0] * 10)
    client.received()
    client.ask("query", {})
    clock.advance(0)
    assert client.received() == [OK]


def test_a_mistake_in_serving_ends_that_connection_only(connect, lines):
    def mistaken(data):
        raise ZeroDivisionError("one by zero")

    client, other = connect(), connect()
    client.transport.write = mistaken
    client.ask("stats")
    assert client.hung_up_on
    assert lines[-1].startswith("[ERR] agent.ipc: Serving 127.0.0.1:47080 failed\n    Traceback ")
    assert other.ask("stats")[0] == OK


def test_small_records_are_sent_at_once_and_dead_machines_are_noticed(serve):
    @implementer(ITCPTransport)
    class Transport(StringTransport):
        options = ()

        def setTcpNoDelay(self, enabled):
            self.options += ("no delay",) * enabled

        def setTcpKeepAlive(self, enabled):
            self.options += ("keep alive",) * enabled

    protocol = serve().buildProtocol(IPv4Address("TCP", "127.0.0.1", 5))
    protocol.makeConnection(Transport())
    assert protocol.transport.options == ("no delay", "keep alive")


def test_a_client_on_a_unix_socket_is_named_by_its_process(serve, lines):
    here, there = socket.socketpair()

    @implementer(IUNIXTransport)
    class Transport(StringTransport):
        def getHandle(self):
            return here

    factory = serve()
    protocol = factory.buildProtocol(UNIXAddress(None))
    protocol.makeConnection(Transport())
    protocol.dataReceived(b"\xc1")
    me = f"process {os.getpid()} of user {os.getuid()}"
    assert f"[INFO] agent.ipc: Accepted client: {me}" in lines
    assert lines[-1].startswith(
        f"[ERR] agent.ipc: Failed to evaluate request of {me}: not MessagePack"
    )
    here.close()
    there.close()


def test_one_too_many_on_a_unix_socket_is_refused_too(serve, lines):
    factory = serve()
    clients = [Client(factory) for _ in range(CLIENTS_MAX)]
    assert factory.buildProtocol(UNIXAddress(None)) is None
    assert lines[-1].startswith(
        "[WARN] agent.ipc: Refused client: a process of this machine: 256 are"
    )
    clients[0].hang_up()


# Streams.


def test_a_stream_gets_events_after_its_reply_until_it_is_stopped(connect, agent):
    client = connect()
    agent.publish(user("before"))
    assert client.ask("stream", {"Type": "user"}, seq=5) == [{"Error": "", "Seq": 5}]
    agent.publish(user())
    agent.publish(MemberEvent(MemberEventKind.JOIN, (member("n3"),)))
    assert client.received() == [
        {"Error": "", "Seq": 5},
        {"Coalesce": False, "Event": "user", "LTime": 9, "Name": "deploy", "Payload": b"v1"},
    ]
    assert client.ask("stop", {"Stop": 5}) == [OK]
    agent.publish(user("after"))
    assert client.received() == []
    assert client.ask("stream", {"Type": "user"}, seq=5) == [{"Error": "", "Seq": 5}]


def test_an_event_while_the_stream_is_opened_comes_after_the_reply(connect, agent):
    client = connect()
    write = client.transport.write

    def write_and_publish(data):
        client.transport.write = write
        write(data)
        agent.publish(user())

    client.transport.write = write_and_publish
    assert client.ask("stream", {}) == [OK]
    agent.publish(user("next"))
    assert names(client.received()) == ["next"]


def test_several_streams_each_get_an_event_once_and_it_is_encoded_once(connect, agent, monkeypatch):
    encoded = []
    encode = messages.event_body
    monkeypatch.setattr(
        messages, "event_body", lambda event: encoded.append(event) or encode(event)
    )
    first, second = connect(), connect()
    first.ask("stream", {"Type": "user,user:deploy,*"}, seq=2)
    first.ask("stream", {"Type": "*"}, seq=3)
    second.ask("stream", {"Type": "user:deploy"}, seq=4)
    second.ask("stream", {"Type": "member-join"}, seq=5)
    agent.publish(user())
    assert [h["Seq"] for h in first.received()[::2]] == [2, 3]
    assert [h["Seq"] for h in second.received()[::2]] == [4]
    assert len(encoded) == 1


def test_the_streams_of_a_client_that_went_away_are_forgotten(serve, agent):
    factory = serve()
    client = Client(factory).shake_hands()
    client.ask("stream", {})
    client.hang_up()
    agent.publish(user())
    assert client.received() == []
    assert factory.streams == {}


def test_a_seq_is_for_one_stream_at_a_time_and_streams_are_limited(connect):
    client = connect()
    for seq in range(STREAMS_MAX):
        assert client.ask("stream", {}, seq=seq) == [{"Error": "", "Seq": seq}]
    taken = {"Error": "Stream with given sequence exists", "Seq": 0}
    assert client.ask("stream", {}, seq=0) == [taken]
    error = "64 streams are open on this connection, no more may"
    assert client.ask("stream", {}, seq=64) == [{"Error": error, "Seq": 64}]
    client.ask("stop", {"Stop": 7}, seq=65)
    assert client.ask("stream", {}, seq=64) == [{"Error": "", "Seq": 64}]


def test_a_reply_is_not_overtaken_by_the_events_it_causes(connect, agent, monkeypatch):
    client, other = connect(), connect()
    for asking in (client, other):
        asking.ask("stream", {"Type": "user"}, seq=9)
    told = agent.user_event

    def tells(name, payload, *, coalesce):
        agent.publish(user(name))
        return told(name, payload, coalesce=coalesce)

    monkeypatch.setattr(agent, "user_event", tells)
    received = client.ask("event", {"Name": "deploy"})
    assert [o.get("Seq", o.get("Name")) for o in received] == [1, 9, "deploy"]
    assert names(other.received()) == ["deploy"]
    # But not kept from a client that waits for a reply.
    agent.slow = True
    assert names(client.ask("event", {"Name": "next"}, seq=2)) == ["next"]
    agent.publish(user("meanwhile"))
    assert names(client.received()) == ["meanwhile"]
    agent.slow.callback(None)
    assert client.received() == [{"Error": "", "Seq": 2}]


# Queries on streams, and responses.


def ids(received):
    """Of the queries among what a client got."""
    return [body["ID"] for body in received if "ID" in body]


def test_a_query_is_told_under_an_id_of_the_clients_own(connect, agent):
    client, other = connect(), connect()
    client.ask("stream", {"Type": "query:other"}, seq=2)
    client.ask("stream", {"Type": "*"}, seq=3)
    client.ask("stream", {"Type": "query"}, seq=4)
    other.ask("stream", {"Type": "query:load"})
    agent.publish(query("load", b"x", number=77, ltime=300))
    body = {"Event": "query", "LTime": 300, "Name": "load", "Payload": b"x"}
    assert client.received() == [
        {"Error": "", "Seq": 3}, {**body, "ID": 1}, {"Error": "", "Seq": 4}, {**body, "ID": 2},
    ]  # fmt: skip
    assert other.received() == [OK, {**body, "ID": 1}]
    agent.publish(query("nil"))
    assert ids(client.received()) == [3, 4]
    assert other.received() == []


def test_a_query_is_answered_by_its_id_once(connect, agent):
    client = connect()
    client.ask("stream", {"Type": "query"}, seq=2)
    for number in (77, 78):
        agent.publish(query(number=number))
    assert ids(client.received()) == [1, 2]
    assert client.ask("respond", {"ID": 2, "Payload": b"so"}) == [OK]
    assert agent.calls == [("respond", 78, b"so")]
    error = "failed to respond to key query: response already sent"
    assert client.ask("respond", {"ID": 2}) == [{"Error": error, "Seq": 1}]
    error = "failed to respond to key query: response exceeds limit of 1024 bytes"
    assert client.ask("respond", {"ID": 1, "Payload": bytes(1024)}) == [{"Error": error, "Seq": 1}]
    assert client.ask("respond", {"ID": 1}) == [OK]


def test_an_id_is_good_until_the_deadline_and_on_its_connection_only(connect, agent, clock):
    client, other = connect(), connect()
    for asking in (client, other):
        asking.ask("stream", {"Type": "query"}, seq=2)
    agent.publish(query(deadline=10))
    none = [{"Error": "No pending queries matching ID", "Seq": 1}]
    assert client.ask("respond", {"ID": 2})[-1:] == none
    clock.advance(9)
    assert other.ask("respond", {"ID": 1})[-1:] == [OK]
    clock.advance(1)
    assert client.ask("respond", {"ID": 1}) == none
    assert connect().ask("respond", {"ID": 1}) == none


def test_queries_that_may_be_answered_are_limited(serve, agent, clock, lines):
    factory = serve()
    client = Client(factory).shake_hands()
    client.ask("stream", {"Type": "query"})
    for number in range(PENDING_MAX + 3):
        agent.publish(query(number=number, deadline=10 if number else 20))
    assert ids(client.received()) == list(range(1, PENDING_MAX + 1))
    warned = "Dropping events to client: 127.0.0.1:47080: it does not respond to queries"
    assert lines[-1] == f"[WARN] agent.ipc: {warned}"
    assert factory.records_dropped == 3
    clock.advance(10)
    agent.publish(query(deadline=20))
    assert ids(client.received()) == [PENDING_MAX + 1]
    assert client.ask("respond", {"ID": 1}) == [OK]


def test_queries_under_way_are_limited(connect, agent, clock):
    client = connect()
    for seq in range(QUERIES_MAX):
        client.ask("query", {}, seq=seq)
        clock.advance(0)
    client.received()
    error = "256 queries are under way on this connection; try later"
    assert client.ask("query", {}) == [{"Error": error, "Seq": 1}]
    agent.asked[7].end()
    clock.advance(LAST_WORD_DELAY)
    client.received()
    client.ask("query", {})
    clock.advance(0)
    assert client.received() == [OK]


def test_answers_for_a_client_that_went_away_go_nowhere(serve, agent, clock):
    factory = serve()
    client, hasty = Client(factory).shake_hands(), Client(factory).shake_hands()
    client.ask("query", {})
    clock.advance(0)
    client.received()
    hasty.ask("query", {})
    for gone in (client, hasty):
        gone.hang_up()
    for asked in agent.asked:
        asked.answer("n1", b"late")
        asked.end()
    clock.advance(0)
    assert client.received() == []
    assert hasty.received() == [OK]
    assert clock.getDelayedCalls() == []


def test_a_client_that_goes_just_before_the_end_of_its_query_leaves_nothing_behind(
    serve, agent, clock
):
    factory = serve()
    client = Client(factory).shake_hands()
    client.ask("query", {})
    clock.advance(0)
    agent.asked[0].end()
    client.hang_up()
    assert clock.getDelayedCalls() == []


def test_the_queries_of_a_client_end_with_it(connect, agent, clock):
    client, other = connect(), connect()
    for asking in (client, client, other):
        asking.ask("query", {})
        clock.advance(0)
    client.ask("query", {})  # its reply is not out yet
    client.hang_up()
    clock.advance(0)
    assert [asked.over.called for asked in agent.asked] == [True, True, False, True]


def test_the_end_of_a_query_is_never_dropped(serve, agent, clock):
    factory = serve()
    client = Client(factory).shake_hands()
    client.ask("query", {})
    clock.advance(0)
    client.received()
    client.stops_reading()
    for n in range(QUEUED_ANSWERS_MAX + 5):
        agent.asked[0].answer(f"n{n}")
    agent.asked[0].end()
    clock.advance(LAST_WORD_DELAY)
    client.reads_again()
    senders = [body["From"] for body in client.received()[1::2]]
    assert senders == [f"n{n}" for n in range(QUEUED_ANSWERS_MAX)] + [""]
    assert factory.records_dropped == 5


# Clients that do not read.


def test_records_wait_for_a_client_that_does_not_read_and_then_new_ones_are_dropped(
    serve, agent, lines
):
    factory = serve()
    client, other = Client(factory).shake_hands(), Client(factory, port=5).shake_hands()
    client.ask("stream", {"Type": "user"}, seq=2)
    client.ask("stream", {"Type": "user:e600"}, seq=3)
    other.ask("stream", {})
    client.stops_reading()
    for n in range(601):
        agent.publish(user(f"e{n}"))
    assert client.received() == []
    assert names(other.received()) == [f"e{n}" for n in range(601)]
    warned = "[WARN] agent.ipc: Dropping events to client: 127.0.0.1:47080: it does not read"
    assert lines.count(warned) == 1
    assert factory.records_dropped == 601 - QUEUED_RECORDS_MAX
    client.reads_again()
    assert names(client.received()) == [f"e{n}" for n in range(QUEUED_RECORDS_MAX)] + ["e600"]
    agent.publish(user("later"))
    assert names(client.received()) == ["later"]
    client.ask("stop", {"Stop": 2})
    assert lines[-1] == "[INFO] agent.ipc: 127.0.0.1:47080 did not get 89 events"


def test_what_waits_is_limited_in_bytes_too(serve, agent):
    factory = serve()
    client = Client(factory).shake_hands()
    client.ask("stream", {})
    client.stops_reading()
    for _ in range(20):
        agent.publish(user(payload=bytes(1 << 20)))
    client.reads_again()
    assert len(names(client.received())) == QUEUED_BYTES_MAX >> 20
    assert factory.records_dropped == 16


@pytest.mark.parametrize(("records", "size"), [(QUEUED_RECORDS_MAX, 1), (4, 1 << 20)])
def test_what_was_read_makes_room_for_as_much_again(records, size, serve, agent):
    factory = serve()
    client = Client(factory).shake_hands()
    client.ask("stream", {})
    for _ in range(3):
        client.stops_reading()
        for _ in range(records):
            agent.publish(user(payload=bytes(size)))
        client.reads_again()
        assert len(names(client.received())) == records
    assert factory.records_dropped == 0


def test_a_client_that_reads_a_little_gets_a_little(connect, agent):
    client = connect()
    client.ask("stream", {})
    client.stops_reading()
    for n in range(5):
        agent.publish(user(f"e{n}"))
    write = client.transport.write

    def write_and_be_full(data):
        write(data)
        client.stops_reading()

    client.transport.write = write_and_be_full
    client.reads_again()
    assert names(client.received()) == ["e0"]
    client.transport.write = write
    agent.publish(user("e5"))
    client.reads_again()
    assert names(client.received()) == ["e1", "e2", "e3", "e4", "e5"]


def test_records_of_a_stopped_stream_are_not_sent_any_more(connect, agent):
    agent.slow = True
    client = connect()
    client.ask("stream", {}, seq=2)
    client.send(
        {"Command": "join", "Seq": 3},
        {"Existing": ["h:17002"]},
        {"Command": "stop", "Seq": 4},
        {"Stop": 2},
    )
    client.stops_reading()
    agent.publish(user())
    client.protocol.stop(2)
    client.reads_again()
    assert client.received() == []


def test_requests_wait_while_the_client_does_not_read(connect):
    client = connect()
    client.stops_reading()
    client.send({"Command": "members", "Seq": 1})
    assert client.received() == []
    client.send({"Command": "members", "Seq": 2})
    assert client.transport.producerState == "paused"
    client.reads_again()
    assert [h["Seq"] for h in client.received()[::2]] == [1, 2]
    assert client.transport.producerState == "producing"


def test_a_request_that_waited_is_not_served_when_its_client_went_away(connect, agent):
    client = connect()
    client.stops_reading()
    client.send({"Command": "leave", "Seq": 1})
    client.hang_up()
    assert agent.calls == []


def test_a_client_that_never_reads_costs_bounded_memory(serve, agent):
    factory = serve()
    client = Client(factory).shake_hands()
    client.ask("stream", {})
    client.ask("monitor", {"LogLevel": "debug"}, seq=2)
    client.stops_reading()
    everybody = tuple(member(f"node-{n}") for n in range(300))
    tracemalloc.start()
    for _ in range(300):
        agent.publish(MemberEvent(MemberEventKind.FAILED, everybody))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * QUEUED_BYTES_MAX


# Monitors.


def monitor_of(client, level, *, seq=1):
    header, *records = client.ask("monitor", {"LogLevel": level}, seq=seq)
    assert header == {"Error": "", "Seq": seq}
    return [body["Log"][20:] for body in records if "Log" in body]


def test_a_monitor_gets_old_lines_then_new_ones(connect, logs):
    client, other = connect(), connect()
    lines = monitor_of(client, "info")
    assert lines[-2:] == ["[INFO] agent.ipc: Accepted client: 127.0.0.1:47080"] * 2
    other.ask("bogus")
    error = "Failed to evaluate request of 127.0.0.1:47080: command 'bogus' not recognized"
    header, body = client.received()
    assert header == OK
    assert body["Log"][20:] == f"[ERR] agent.ipc: {error}"
    assert monitor_of(connect(), "err") == [f"[ERR] agent.ipc: {error}"]


def test_there_is_one_monitor_for_a_connection(connect):
    client = connect()
    client.ask("monitor", {"LogLevel": "err"}, seq=2)
    again = {"Error": "Monitor already exists", "Seq": 3}
    assert client.ask("monitor", {"LogLevel": "info"}, seq=3) == [again]
    assert client.ask("stream", {}, seq=2) == [{"Error": "", "Seq": 2}]
    client.ask("stop", {"Stop": 2})
    assert client.ask("monitor", {"LogLevel": "err"}, seq=2) == [{"Error": "", "Seq": 2}]


def test_a_monitor_at_debug_comes_to_an_end_with_its_own_work(serve, logs, lines):
    factory = serve()
    client, other = Client(factory).shake_hands(), Client(factory).shake_hands()
    monitor_of(client, "trace")
    client.stops_reading()
    for n in range(QUEUED_RECORDS_MAX + 5):
        logs.handle(logging_record(f"line {n}"))
    assert len(lines) < QUEUED_RECORDS_MAX + 20
    client.reads_again()
    received = [body["Log"].split(": ")[1] for body in client.received()[1::2]]
    assert received == [f"line {n}" for n in range(QUEUED_RECORDS_MAX)]
    warned = "[WARN] agent.ipc: Dropping log lines to client: 127.0.0.1:47080: it does not read"
    assert monitor_of(other, "warn") == [warned]


def test_lines_of_other_threads_are_sent_in_the_reactors(agent, logs):
    @implementer(IReactorFromThreads)
    class ClockForThreads(Clock):
        called = ()

        def callFromThread(self, call, *args):
            self.called += ((call, args),)

    clock = ClockForThreads()
    factory = RpcFactory(agent, LogRing(), auth="", clock=clock)
    client = Client(factory).shake_hands()
    monitor_of(client, "info")
    record = logging_record("from a plugin")
    thread = threading.Thread(target=factory.logs.handle, args=[record])
    thread.start()
    thread.join()
    assert client.received() == []
    ((call, args),) = clock.called
    call(*args)
    assert client.received()[1]["Log"].endswith(": from a plugin")
    client.ask("stop", {"Stop": 1})
    call(*args)
    assert client.received() == []


def logging_record(text):
    return logging.LogRecord("serfd.test", logging.INFO, "", 0, text, (), None)


# Whatever comes.


FIELD_NAMES = sorted({name for row in COMMANDS.values() for name, _ in row.fields or ()})


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    requests=st.lists(
        st.tuples(
            st.sampled_from([*COMMANDS, "bogus", ""]),
            st.integers(0, 3),
            st.none()
            | st.dictionaries(
                st.sampled_from(FIELD_NAMES),
                st.sampled_from([0, 1, True, "", "*", "info", "n1", "(", ["a:17002"], {"a": "b"}]),
            ),
        )
        | st.binary(max_size=3)
    ),
    auth=st.sampled_from(["", "n1"]),
    cut=st.integers(1, 50),
)
def test_whatever_a_client_sends_it_is_answered_or_hung_up_on(requests, auth, cut):
    clock, ring = Clock(), LogRing()
    agent = StandInAgent([member("n1")])
    factory = RpcFactory(agent, ring, auth=auth, clock=clock)
    factory.startFactory()
    client = Client(factory).shake_hands()
    data = b""
    for request in requests:
        if isinstance(request, bytes):
            data += request
            continue
        name, seq, body = request
        data += msgpack.packb({"Command": name, "Seq": seq})
        data += b"" if body is None else msgpack.packb(body)
    for start in range(0, len(data), cut):
        client.send(data[start : start + cut])
        agent.publish(user())
        agent.publish(query())
        clock.advance(0)
        for asked in agent.asked:
            asked.answer("n1")
            asked.end()
        agent.asked.clear()
        clock.advance(LAST_WORD_DELAY)
    assert all("Error" not in o or "internal" not in o["Error"] for o in client.received())
    if not client.hung_up_on:
        assert client.protocol._reading  # it waits for the rest
    factory.stopFactory()
    assert client.hung_up_on
    client.hang_up()
    assert not factory.streams
    assert not ring._listeners
