import inspect

import pytest
from stand_in import Client, StandInAgent, member

from serfd.errors import CommandError
from serfd.rpc import commands
from serfd.rpc.commands import COMMANDS, EventFilter
from serfd.serf.events import MemberEvent, MemberEventKind, Status, UserEvent

OK = {"Error": "", "Seq": 1}
USER, JOIN = UserEvent(1, "deploy", b"", coalesce=True), MemberEvent(MemberEventKind.JOIN, ())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_function_takes_the_session_and_the_fields_of_its_row(name):
    row = COMMANDS[name]
    assert len(inspect.signature(row.function).parameters) == 1 + len(row.fields or ())


@pytest.mark.parametrize("versions", [(0, 1), (2, 1), (-1, 1)])
def test_a_handshake_with_another_version_may_be_repeated(versions, serve):
    client = Client(serve())
    wrong, right = versions
    assert client.ask("handshake", {"Version": wrong}) == [
        {"Error": "Unsupported IPC version", "Seq": 1}
    ]
    assert client.ask("handshake", {"Version": right}) == [OK]
    assert client.ask("handshake", {"Version": 1}) == [
        {"Error": "Handshake already performed", "Seq": 1}
    ]


@pytest.mark.parametrize(
    ("auth", "key", "error"),
    [
        ("sekret", "sekret", ""),
        ("sekret", "sekre", "Invalid authentication token"),
        ("sekret", "", "Invalid authentication token"),
        ("schlüssel", "schlüssel", ""),
        ("", "", ""),
        ("", "x", "Invalid authentication token"),
    ],
)
def test_auth_compares_the_whole_key(auth, key, error, serve, lines):
    client = Client(serve(auth=auth)).shake_hands()
    assert client.ask("auth", {"AuthKey": key}) == [{"Error": error, "Seq": 1}]
    warned = "[WARN] rpc: 127.0.0.1:47080 showed a wrong key" in lines
    assert warned is bool(error)
    assert not any(auth in line for line in lines if auth)


def test_a_wrong_key_takes_nothing_away(serve):
    client = Client(serve(auth="sekret")).shake_hands()
    refused = [{"Error": "Authentication required", "Seq": 1}]
    assert client.ask("stats") == refused
    assert client.ask("nonsense") == refused
    client.ask("auth", {"AuthKey": "wrong"})
    assert client.ask("stats") == refused
    client.ask("auth", {"AuthKey": "sekret"})
    client.ask("auth", {"AuthKey": "wrong"})
    assert client.ask("stats")[0] == OK


@pytest.mark.parametrize(
    ("body", "call", "reply"),
    [
        ({"Existing": ["h:17002"], "Replay": True}, ("join", ["h:17002"], True), [OK, {"Num": 1}]),
        ({"Existing": ["h:17002", "h:1"]}, ("join", ["h:17002", "h:1"], False), [OK, {"Num": 1}]),
        ({}, ("join", [], False), [OK, {"Num": 0}]),
    ],
)
def test_join_tells_how_many_answered(body, call, reply, connect, agent):
    assert connect().ask("join", body) == reply
    assert agent.calls == [call]


def test_a_failed_join_has_an_error_and_a_body(connect):
    error = "1 error occurred:\n\t* Failed to join h: dial tcp h:1: connect: connection refused\n\n"
    reply = connect().ask("join", {"Existing": ["h:1"]})
    assert reply == [{"Error": error, "Seq": 1}, {"Num": 0}]


def test_force_leave_and_tags_reach_the_agent(connect, agent):
    client = connect()
    assert client.ask("force-leave", {"Node": "n2", "Prune": True}) == [OK]
    assert agent.calls == [("force_leave", "n2", True)]
    assert client.ask("tags", {"Tags": {"x": "1"}, "DeleteTags": ["dc"]}) == [OK]
    assert agent.tags == {"role": "web", "x": "1"}
    error = "Encoded length of tags exceeds limit of 512 bytes"
    assert client.ask("tags", {"Tags": {"x": "y" * 513}}) == [{"Error": error, "Seq": 1}]


def test_leave_replies_when_it_is_done_and_then_the_daemon_stops(connect, agent):
    agent.slow = True
    client, other = connect(), connect()
    agent.shut_down = lambda: agent.calls.append(("shut_down", client.received()))
    assert client.ask("leave") == []
    assert other.ask("leave") == [{"Error": "Leave already in progress", "Seq": 1}]
    assert agent.calls == ["leave"]
    agent.slow.callback(None)
    assert agent.calls == ["leave", ("shut_down", [OK])]


def test_the_daemon_stops_after_a_leave_even_if_its_client_went_away(connect, agent):
    agent.slow = True
    client = connect()
    client.ask("leave")
    client.hang_up()
    agent.slow.callback(None)
    assert agent.calls == ["leave", "shut_down"]


EVERYBODY = [
    member("n1", role="web", dc="east"),
    member("n2", role="db", status=Status.FAILED),
    member("xn2x", role="web2", status=Status.LEFT),
    member("new\nline", role="web\n"),
    member("strange-\udcff"),
]


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ({}, "n1 n2 xn2x new\nline strange-\udcff"),
        ({"Status": "alive"}, "n1 new\nline strange-\udcff"),
        ({"Status": "aliv"}, ""),
        ({"Status": "alive|failed"}, "n1 n2 new\nline strange-\udcff"),
        ({"Name": "n1"}, "n1"),
        ({"Name": "n[12]"}, "n1 n2"),
        ({"Name": "n1|n2x"}, "n1 xn2x"),
        ({"Name": "N1"}, ""),
        ({"Name": "(?i)N1"}, "n1"),
        ({"Name": "strange-."}, ""),
        ({"Name": "(?s)strange-\\C"}, "strange-\udcff"),
        ({"Name": "new\nline"}, "new\nline"),
        ({"Name": "new.line"}, ""),
        ({"Tags": {"role": "web"}}, "n1"),
        ({"Tags": {"role": "web.?"}}, "n1 xn2x"),
        ({"Tags": {"role": "[[:alpha:]]+"}}, "n1 n2"),
        ({"Tags": {"role": ""}}, "strange-\udcff"),
        ({"Tags": {"dc": "|east"}}, "n1 n2 xn2x new\nline strange-\udcff"),
        ({"Tags": {"dc": "east", "role": "db"}}, ""),
        ({"Tags": {"role": "web"}, "Name": "n.", "Status": "alive"}, "n1"),
        ([{"role": "web"}, "", "n1"], "n1"),
    ],
)
def test_members_are_filtered_by_regular_expressions(body, names, connect, agent):
    agent.everybody = EVERYBODY
    header, reply = connect().ask("members-filtered", body)
    assert header == OK
    assert " ".join(m["Name"] for m in reply["Members"]) == names


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(", "missing ): ^($"),
        ("(?=x)", "invalid perl operator: (?="),
        ("x\udcff", "invalid UTF-8"),
        ("((a{100}){100}){100}", "invalid repetition size: {100}"),
        ("(x{900}y{900}z{900}){1}" * 40, "pattern too large - compile failed"),
    ],
)
def test_a_bad_regular_expression_closes_the_connection(pattern, reason, connect, lines):
    client = connect()
    assert client.ask("members-filtered", {"Tags": {"role": pattern}}) == []
    assert client.hung_up_on
    assert lines[-1] == (
        "[ERR] rpc: Failed to evaluate request of 127.0.0.1:47080: "
        f"Failed to compile regex: error parsing regexp: {reason}"
    )


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"Name": "x." * 600}, "a regular expression of 1200 bytes, at most 1024 are possible"),
        (
            {"Tags": dict.fromkeys(map(str, range(33)), "")},
            "33 tags to filter by, at most 32 are possible",
        ),
    ],
)
def test_filters_have_limits(body, error, connect):
    reply = connect().ask("members-filtered", body)
    assert reply == [{"Error": error, "Seq": 1}, {}]


def test_filtering_many_members_lets_others_have_their_turn(connect, agent, clock):
    agent.everybody = [member(f"n{i}") for i in range(600)]
    client, other = connect(), connect()
    assert client.ask("members-filtered", {"Name": "n.*9"}) == []
    assert other.ask("stop", {"Stop": 1}) == [OK]
    clock.pump([0, 0])
    header, reply = client.received()
    assert header == OK
    assert [m["Name"] for m in reply["Members"]] == [f"n{i}" for i in range(9, 600, 10)]


@pytest.mark.parametrize(
    ("wanted", "user", "join"),
    [
        ("*", True, True),
        ("", True, True),
        ("user", True, False),
        ("user:", True, False),
        ("user:deploy", True, False),
        ("user:other", False, False),
        ("user:other,user:deploy", True, False),
        ("query,query:,query:deploy", False, False),
        ("member-join", False, True),
        ("member-leave,member-failed,member-update,member-reap", False, False),
        ("member-leave,*", True, True),
    ],
)
def test_a_filter_says_which_events_a_stream_gets(wanted, user, join):
    assert (EventFilter(wanted).matches(USER), EventFilter(wanted).matches(JOIN)) == (user, join)


def test_a_name_in_a_filter_may_hold_a_colon():
    assert EventFilter("user:a:b").matches(UserEvent(1, "a:b", b"", coalesce=False))


@pytest.mark.parametrize(
    "wanted",
    ["bogus", "user, query", ",", "user,", "member-join:", "member-join:n1", "User", ":user"],
)
def test_other_filters_are_refused(wanted):
    with pytest.raises(CommandError, match=r"^Invalid event filter$"):
        EventFilter(wanted)


@pytest.mark.parametrize("level", ["trace", "DEBUG", "Info", "warn", "err"])
def test_a_monitor_takes_any_of_the_levels(level, connect):
    assert connect().ask("monitor", {"LogLevel": level})[0] == OK


@pytest.mark.parametrize(("level", "shown"), [("bogus", "BOGUS"), ("warning", "WARNING"), ("", "")])
def test_a_monitor_of_another_level_is_refused(level, shown, connect):
    reply = connect().ask("monitor", {"LogLevel": level})
    assert reply == [{"Error": f"Unknown log level: {shown}", "Seq": 1}]


def test_a_new_command_is_a_function_and_a_row(monkeypatch, connect):
    def event(session, name, payload, coalesce):
        return {"Said": f"{session.peer} {name} {payload} {coalesce}"}

    fields = (("Name", commands.text), ("Payload", commands.text), ("Coalesce", commands.boolean))
    monkeypatch.setitem(commands.COMMANDS, "event", commands.Command(event, fields, replies=True))
    reply = connect().ask("event", ["a", "b", True])
    assert reply == [OK, {"Said": "127.0.0.1:47080 a b True"}]


def test_stats_come_by_section(connect, agent):
    assert connect().ask("stats") == [OK, agent.stats()]
    assert StandInAgent([member("x")]).stats()["agent"] == {"name": "x"}
