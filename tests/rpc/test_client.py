"""The RPC client against conversations that real agents had with the real client."""

import itertools
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded_agent import HELLO, RecordedAgent, frames, reply

from serfd.rpc.client import (
    RECORDS_EARLY_MAX,
    CannotConnect,
    Client,
    ConnectionClosed,
    RpcError,
    address_text,
    distance,
)
from serfd.serf.coordinates import Coordinate
from serfd.serf.coordinates import distance as distance_of_agent

KEY = "T9jncgl9mbLus+baTTa7q7nPSUrXwbDi2dhbtqir37s="
OLD_KEY = "HvY8ubRZMgafUOWvrOadwOckVa1wN3QWAo46FVKbVN8="


def told(answers):
    """What each record of a query tells."""
    return [
        f"{a['From']} {a['Type']}" + (f": {a['Payload'].decode()}" if a["Payload"] else "")
        for a in answers
    ]


@pytest.mark.parametrize(
    ("name", "ask", "answer"),
    [
        ("go-join", lambda c: c.join(["127.0.0.1:17002"]), 1),
        ("go-force-leave-prune", lambda c: c.force_leave("n2", prune=True), None),
        ("go-force-leave-unknown", lambda c: c.force_leave("nobody"), None),
        ("go-tags", lambda c: c.tags({"color": "red"}, delete=["dc"]), None),
        ("go-leave", lambda c: c.leave(), None),
        ("go-members-filtered-nomatch", lambda c: c.members_filtered(name="zzz"), []),
        ("go-stats", lambda c: c.stats()["agent"], {"name": "n1"}),
        (
            "go-members-filtered",
            lambda c: [
                m["Name"]
                for m in c.members_filtered(name="n.*", status="alive", tags={"role": "web|db"})
            ],
            ["n2", "n1"],
        ),
        (
            "go-keys-list",
            lambda c: c.list_keys()["Keys"],
            {OLD_KEY: 2},
        ),
        ("go-keys-install", lambda c: c.install_key(KEY)["NumResp"], 2),
        ("go-keys-use", lambda c: c.use_key(KEY)["Messages"], {}),
        ("go-keys-remove", lambda c: c.remove_key(OLD_KEY)["Keys"], None),
        ("go-event", lambda c: c.event("deploy", b"v1.2"), None),
        ("go-event-nopayload", lambda c: c.event("deploy", coalesce=False), None),
        (
            "go-query",
            lambda c: told(c.query("load", b"pp", tags={}, want_ack=True, timeout=1.0)),
            ["n1 ack", "n1 response: hi-from-n1\n", "n2 ack", "n3 ack"],
        ),
        (
            "go-query-filtered",
            lambda c: told(
                c.query("load", nodes=["n1", "n2"], tags={"role": "web"}, relay_factor=1, timeout=1)
            ),
            ["n1 response: hi-from-n1\n"],
        ),
        (
            "go-reachability",
            lambda c: (
                [m["Name"] for m in c.members()] and told(c.query("_serf_ping", want_ack=True))
            ),
            ["n1 ack", "n2 ack", "n3 ack"],
        ),
        ("go-rtt", lambda c: f"{distance(c.coordinate('n1'), c.coordinate('n2')):.6f}", "0.000932"),
        ("go-rtt-unknown", lambda c: c.stats() and c.coordinate("nope"), None),
    ],
)
def test_requests_are_byte_for_byte_those_of_the_real_client(name, ask, answer):
    with RecordedAgent(frames(name, "server")) as agent, Client(agent.address) as client:
        found = ask(client)
    assert (sorted(found) if isinstance(answer, list) else found) == (
        sorted(answer) if isinstance(answer, list) else answer
    )
    assert agent.received == frames(name, "client")


def test_handshake_token_and_first_command_do_not_wait_for_each_other():
    asked = frames("go-auth-ok", "client")
    answers = frames("go-auth-ok", "server")
    # This agent says nothing before it has heard all three.
    with RecordedAgent(answers, after=len(asked)) as agent, Client(agent.address, "sekret") as c:
        members = c.members_filtered()
    assert [member["Name"] for member in members] == ["n9"]
    assert agent.received == asked


@pytest.mark.parametrize(
    ("name", "ask", "error"),
    [
        (
            "go-join-fail",
            lambda c: c.join(["127.0.0.1:1"]),
            "1 error occurred:\n\t* Failed to join 127.0.0.1: dial tcp 127.0.0.1:1: "
            "connect: connection refused\n\n",
        ),
        (
            "go-tags-too-big",
            lambda c: c.tags({}),
            "Encoded length of tags exceeds limit of 512 bytes",
        ),
        ("go-auth-missing", lambda c: c.members_filtered(), "Authentication required"),
    ],
)
def test_the_agents_error_text_is_the_errors_text(name, ask, error):
    with (
        RecordedAgent(frames(name, "server")) as agent,
        Client(agent.address) as client,
        pytest.raises(RpcError) as caught,
    ):
        ask(client)
    assert str(caught.value) == error


def test_what_members_say_of_keys_comes_with_the_error_too():
    with (
        RecordedAgent(frames("go-keys-use-unknown", "server")) as agent,
        Client(agent.address) as client,
        pytest.raises(RpcError, match=r"^2/2 nodes reported failure$") as caught,
    ):
        client.use_key("kZyFABeAmc64UMTrm9XuKA1DgcnjNNLqqVQBOFBXYNs=")
    said = "Requested key is not in the keyring"
    assert caught.value.body["Messages"] == {"k1": said, "k2": said}


def answer(seq, sender, kind="response", payload=None):
    return reply(seq, "", {"From": sender, "Payload": payload, "Type": kind})


def test_a_query_ends_with_its_last_record_and_the_connection_can_be_used_on():
    answers = HELLO + reply(2) + answer(2, "n1", "ack") + answer(2, "", "response")
    answers += answer(2, "n2", payload=b"x") + answer(2, "", "done")
    answers += reply(3) + answer(3, "", "done") + reply(4)
    with RecordedAgent(answers) as agent, Client(agent.address) as client:
        assert told(client.query("a")) == ["n1 ack", "n2 response: x"]
        assert told(client.query("b", wait_all=True)) == []
        client.event("c")
    assert agent.received.count(b"WaitAll") == 1


def test_a_query_that_the_agent_leaves_without_an_end_is_told():
    answers = HELLO + reply(2) + answer(2, "n1")
    with RecordedAgent(answers, hangs_up=True) as agent, Client(agent.address) as client:
        answering = client.query("a")
        assert next(answering)["From"] == "n1"
        with pytest.raises(ConnectionClosed):
            next(answering)


def test_a_query_that_is_left_does_not_confuse_what_follows():
    answers = HELLO + reply(2) + answer(2, "n1") + answer(2, "n2") + answer(2, "", "done")
    answers += reply(3, "", {"Members": []}) + reply(4) + answer(4, "n3") + answer(4, "", "done")
    with RecordedAgent(answers) as agent, Client(agent.address) as client:
        answering = client.query("a")
        assert next(answering)["From"] == "n1"
        answering.close()
        assert client.members() == []
        assert told(client.query("b")) == ["n3 response"]


def test_queries_of_a_stream_are_answered_on_its_connection():
    asked = {"Event": "query", "ID": 7, "LTime": 1, "Name": "load", "Payload": None}
    answers = HELLO + reply(2) + reply(2, "", asked) + reply(3) + reply(2, "", {**asked, "ID": 8})
    with RecordedAgent(answers) as agent, Client(agent.address) as client:
        queries = client.stream("stream", {"Type": "query"})
        client.respond(next(queries)["ID"], b"0.5")
        assert next(queries)["ID"] == 8
    assert agent.received.endswith(
        b"\x82\xa7Command\xa7respond\xa3Seq\x03\x82\xa2ID\x07\xa7Payload\xc4\x030.5"
    )


def test_a_query_whose_members_are_slow_is_told_once():
    waited = []

    def waiting():
        waited.append(1)
        agent.released.set()

    with RecordedAgent(HELLO + reply(2) + answer(2, "", "done")) as agent:
        agent.released.clear()
        with Client(agent.address, waiting=waiting, patience=0.01) as client:
            assert told(client.query("a")) == []
    assert waited == [1]


PLACES = st.builds(
    Coordinate,
    st.lists(st.floats(-1e3, 1e3), min_size=8, max_size=8).map(tuple),
    st.just(1.0),
    st.floats(-1e3, 1e3),
    st.floats(1e-5, 1e3),
)


@given(PLACES, PLACES)
def test_the_distance_is_that_of_the_agent(a, b):
    def as_sent(place):
        return {"Vec": list(place.vec), "Height": place.height, "Adjustment": place.adjustment}

    assert distance(as_sent(a), as_sent(b)) == pytest.approx(distance_of_agent(a, b), abs=1e-12)


def test_a_refused_request_leaves_the_connection_usable():
    answers = HELLO + reply(2, "1 error occurred", {"Num": 0}) + reply(3, "", {"Num": 2})
    with RecordedAgent(answers) as agent, Client(agent.address) as client:
        with pytest.raises(RpcError, match="1 error occurred"):
            client.join(["a"])
        assert client.join(["b", "c"]) == 2


def test_the_second_refusal_of_a_request_without_token_is_ignored():
    again = reply(2, "Authentication required")
    answers = HELLO + again + again + reply(3) + reply(4, "", {"Members": None})
    with RecordedAgent(answers) as agent, Client(agent.address) as client:
        with pytest.raises(RpcError, match="Authentication required") as caught:
            client.members_filtered()
        assert "SERF_RPC_AUTH" in caught.value.advice
        client.call("auth", {"AuthKey": "sekret"})
        assert client.members() == []


def test_a_wrong_token_means_that_one_cannot_connect():
    answers = frames("go-auth-wrong", "server") + reply(3, "Authentication required")
    with (
        RecordedAgent(answers) as agent,
        Client(agent.address, "wrong") as client,
        pytest.raises(CannotConnect) as caught,
    ):
        client.members()
    assert caught.value.reason == "Invalid authentication token"
    assert "SERF_RPC_AUTH" in str(caught.value)


def test_an_agent_that_closes_instead_of_answering_is_told_so():
    answers = frames("go-members-filtered-badregex", "server")
    with (
        RecordedAgent(answers, hangs_up=True) as agent,
        Client(agent.address) as client,
        pytest.raises(ConnectionClosed, match=r"^client closed$"),
    ):
        client.members_filtered(name="(")


@pytest.mark.parametrize("heard", [0, 1])
def test_an_agent_that_breaks_off_has_closed(heard):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        client = Client(f"127.0.0.1:{listening.getsockname()[1]}")
        connection, _ = listening.accept()

    def break_off():
        connection.recv(heard)
        # Without lingering, closing is a reset.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    breaking = threading.Thread(target=break_off)
    breaking.start()
    if not heard:
        breaking.join()
    with client, pytest.raises((ConnectionClosed, CannotConnect), match="client closed"):
        client.members()
    breaking.join()


def test_an_unsupported_command_is_refused_without_a_body():
    answers = HELLO + reply(2, "Unsupported command")
    with (
        RecordedAgent(answers, hangs_up=True) as agent,
        Client(agent.address) as client,
        pytest.raises(RpcError, match=r"^Unsupported command$"),
    ):
        client.call("get-coordinate", {"Node": "n1"})


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"", "client closed"),
        (b"HTTP/1.1 400 Bad Request\r\n", "expected a map, found int"),
        (b"\xc1", "does not speak Serf's RPC"),
        (b"\x81\x01\x02", "does not speak Serf's RPC"),
        (b"\xdd\xff\xff\xff\xff", "does not speak Serf's RPC"),
        (reply(1, "Unsupported IPC version"), "^Unsupported IPC version$"),
    ],
)
def test_something_that_is_no_agent_is_not_talked_to(said, reason):
    with (
        RecordedAgent(said, hangs_up=True) as agent,
        Client(agent.address) as client,
        pytest.raises(CannotConnect) as caught,
    ):
        client.members()
    assert re.search(reason, caught.value.reason)
    assert caught.value.advice == (
        f"Is {agent.address} the RPC address of a Serf agent? "
        "If it speaks TLS: -rpc-tls-ca FILE or SERFD_RPC_TLS_CA."
    )


@pytest.mark.parametrize(
    ("ask", "answer", "text"),
    [
        (Client.members, {"Members": {}}, "Members in the agent's answer is no list but dict"),
        (Client.stats, {"agent": 5}, "section agent of stats is no map but int"),
    ],
)
def test_an_answer_of_a_wrong_shape_is_named(ask, answer, text):
    with (
        RecordedAgent(HELLO + reply(2, "", answer)) as agent,
        Client(agent.address) as client,
        pytest.raises(RpcError) as caught,
    ):
        ask(client)
    assert str(caught.value) == text


def test_texts_that_are_not_utf_8_come_and_go_unchanged():
    answer = reply(2, "", {"Members": [{"Name": "n\udcff"}]})
    with RecordedAgent(HELLO + answer) as agent, Client(agent.address) as client:
        assert client.members_filtered(name="n\udcff") == [{"Name": "n\udcff"}]
    assert b"\xa2n\xff" in agent.received


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("", "dial tcp: missing address"),
        ("localhost", "dial tcp: address localhost: missing port in address"),
        ("localhost:", "dial tcp: address localhost:: missing port in address"),
        ("[::1]", "dial tcp: address [::1]: missing port in address"),
        ("::1:7373", "dial tcp: address ::1:7373: too many colons in address"),
        ("127.0.0.1:99999", "dial tcp: address 99999: invalid port"),
        ("127.0.0.1:²", "dial tcp: address ²: invalid port"),
        ("127.0.0.1:nosuch", "dial tcp: address tcp/nosuch: unknown port"),
        ("a" * 300 + ":1", f"dial tcp: lookup {'a' * 300}: no such host"),
        ("ü" * 300 + ":1", f"dial tcp: lookup {'ü' * 300}: no such host"),
        ("127.0.0.1:1", "dial tcp 127.0.0.1:1: connect: connection refused"),
    ],
)
def test_an_address_that_does_not_work_is_told_with_what_to_do(address, reason):
    with pytest.raises(CannotConnect) as caught:
        Client(address)
    assert caught.value.reason == reason
    assert "-rpc-addr" in caught.value.advice


def test_an_agent_is_asked_over_a_unix_socket(tmp_path):
    path = str(tmp_path / "rpc.sock")
    answers = HELLO + reply(2, "", {"Members": []})
    with RecordedAgent(answers, path=path) as agent, Client(agent.address) as client:
        assert agent.address == f"unix:{path}"
        assert client.members() == []


IS_IT_THERE = "Is serfd running there? Its rpc_addr says where the socket is."


def test_a_unix_socket_that_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with socket.socket(socket.AF_UNIX) as ended:
        ended.bind("left")
    for path, reason in (
        ("none", "no such file or directory"),
        ("file", "connection refused"),
        ("left", "connection refused"),
    ):
        with pytest.raises(CannotConnect) as caught:
            Client(f"unix:{path}")
        assert caught.value.reason == f"dial unix {path}: connect: {reason}"
        assert caught.value.advice == IS_IT_THERE


@pytest.mark.parametrize(("path", "size"), [("", 0), ("x" * 108, 108), ("ü" * 54, 108)])
def test_a_path_that_no_socket_can_have_is_told(path, size):
    with pytest.raises(CannotConnect) as caught:
        Client(f"unix:{path}")
    assert caught.value.reason == f"dial unix {path}: a path of {size} bytes"
    assert caught.value.advice == "Expected -rpc-addr unix:PATH, with a path of at most 107 bytes."


def test_a_unix_socket_that_is_not_for_everybody_is_told_with_who_may():
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listening:
        os.chmod(folder, 0o755)
        path = f"{folder}/rpc.sock"
        listening.bind(path)
        listening.listen()
        os.chmod(path, 0)
        if is_root := os.geteuid() == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(CannotConnect) as caught:
                Client(f"unix:{path}")
        finally:
            if is_root:
                os.seteuid(0)
    assert caught.value.reason == f"dial unix {path}: connect: permission denied"
    assert caught.value.advice == (
        "The agent's rpc_socket_mode and rpc_socket_group say who may connect: become a member of "
        f"the group that `ls -l {path}` shows, or its user."
    )


def test_a_write_to_a_unix_socket_that_does_not_get_through_in_time_is_given_up(tmp_path):
    path = str(tmp_path / "rpc.sock")
    with socket.create_server(path, family=socket.AF_UNIX):
        expected = pytest.raises(RpcError, match=rf"^write unix {path}: i/o timeout$")
        with Client(f"unix:{path}", timeout=0.05) as client, expected:
            client.call("event", {"Payload": bytes(50_000_000)})


def test_ipv6_addresses_stand_in_brackets():
    try:
        listening = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")
    address = f"[::1]:{listening.getsockname()[1]}"
    with listening:
        Client(address).close()
    with pytest.raises(CannotConnect, match=r"dial tcp \[::1\]:\d+: connect: connection refused"):
        Client(address)


def test_a_connection_that_is_not_accepted_in_time_is_given_up():
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(0)
    waiting = socket.create_connection(listening.getsockname())
    port = listening.getsockname()[1]
    with listening, waiting, pytest.raises(CannotConnect) as caught:
        Client(f"127.0.0.1:{port}", timeout=0.05)
    assert caught.value.reason == f"dial tcp 127.0.0.1:{port}: i/o timeout"


def test_a_write_that_does_not_get_through_in_time_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        port = deaf.getsockname()[1]
        expected = pytest.raises(RpcError, match=rf"write tcp 127.0.0.1:{port}: i/o timeout")
        with Client(f"127.0.0.1:{port}", timeout=0.05) as client, expected:
            client.call("event", {"Payload": bytes(50_000_000)})


def test_a_slow_answer_is_waited_for_and_told_once():
    told = []

    def waiting():
        told.append("waiting")
        agent.released.set()

    with RecordedAgent(HELLO + reply(2)) as agent:
        agent.released.clear()
        with Client(agent.address, waiting=waiting, patience=0.01) as client:
            client.leave()
    assert told == ["waiting"]


def test_records_of_several_streams_come_in_order_and_after_the_reply():
    asked, answers = frames("go-monitor", "client"), frames("go-monitor", "server")
    expected = recorded(answers, streams={2, 3})
    with RecordedAgent(answers) as agent, Client(agent.address) as client:
        assert client.start("stream", {"Type": "*"}) == 2
        assert client.start("monitor", {"LogLevel": "INFO"}) == 3
        records = list(itertools.islice(client.records(), len(expected)))
        client.stop(3)
        client.stop(2)
    assert records == expected
    assert {seq for seq, _ in records} == {2, 3}
    assert agent.received == asked


def recorded(answers, *, streams):
    """Seq and body of each record in what an agent sent."""
    unpacker = msgpack.Unpacker(raw=False)
    unpacker.feed(answers)
    records, seen = [], set()
    for header in unpacker:
        if header["Seq"] in streams:
            if header["Seq"] in seen:
                records.append((header["Seq"], unpacker.unpack()))
            seen.add(header["Seq"])
    return records


def test_records_that_come_before_another_reply_are_kept():
    early = [{"Log": str(number)} for number in range(3)]
    answers = HELLO + reply(2) + b"".join(reply(2, "", log) for log in early)
    answers += reply(3, "", {"Members": []}) + reply(2, "", {"Log": "late"})
    with RecordedAgent(answers, hangs_up=True) as agent, Client(agent.address) as client:
        logs = client.monitor("info")
        assert client.members() == []
        assert list(itertools.islice(logs, 4)) == ["0", "1", "2", "late"]
        with pytest.raises(ConnectionClosed):
            next(logs)


def test_records_that_come_before_another_reply_are_not_kept_without_limit():
    many = RECORDS_EARLY_MAX + 1
    answers = HELLO + reply(2) + many * reply(2, "", {"Log": "early"})
    answers += reply(3, "", {"Members": []}) + reply(2, "", {"Log": "late"})
    with RecordedAgent(answers, hangs_up=True) as agent, Client(agent.address) as client:
        logs = client.monitor("info")
        client.members()
        assert list(itertools.islice(logs, many)) == ["early"] * (many - 1) + ["late"]


@pytest.mark.parametrize(
    ("member", "text"),
    [
        ({"Addr": b"\x7f\0\0\1", "Port": 17001}, "127.0.0.1:17001"),
        ({"Addr": bytes(10) + b"\xff\xff\x0a\0\0\7", "Port": 1}, "10.0.0.7:1"),
        ({"Addr": b"\xfd" + bytes(14) + b"\7", "Port": 7946}, "[fd00::7]:7946"),
        ({"Addr": "\x7f\0\0\1", "Port": 1}, "127.0.0.1:1"),
        ({"Addr": "\udcff\0\0\1", "Port": 1}, "255.0.0.1:1"),
        ({"Addr": b"\1\2\3", "Port": 1}, "?010203:1"),
        ({"Addr": None}, "?:0"),
        ({}, "?:0"),
    ],
)
def test_a_members_address_is_written_as_a_person_would(member, text):
    assert address_text(member) == text


def test_the_client_is_imported_without_slow_modules():
    code = (
        "import serfd.rpc.client; "
        "print(*{'socket', 'ssl', 'selectors', 'enum', 're', 'typing', 'dataclasses', 'twisted'}"
        " & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )
    assert done.stdout == "\n"


def test_a_client_is_interrupted_while_it_waits():
    code = (
        "import sys; from serfd.rpc.client import Client\n"
        "c = Client(sys.argv[1], waiting=lambda: print('waiting', flush=True), patience=0.01)\n"
        "try: c.leave()\n"
        "except KeyboardInterrupt: print('interrupted')"
    )
    with RecordedAgent(b"") as agent:
        child = subprocess.Popen(
            [sys.executable, "-c", code, agent.address], stdout=subprocess.PIPE, text=True
        )
        with child:
            assert child.stdout.readline() == "waiting\n"
            child.send_signal(2)
            assert child.stdout.read() == "interrupted\n"
