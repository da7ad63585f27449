import inspect

import pytest
from stand_in import Client, StandInAgent, member, query

from serfd.agent import PluginStats
from serfd.errors import CommandError
from serfd.rpc import commands
from serfd.rpc.commands import COMMANDS, EVENT_FILTERS_MAX, MEMBERS_PER_TURN, EventFilter
from serfd.rpc.server import LAST_WORD_DELAY
from serfd.serf import keys
from serfd.serf.coordinates import Coordinate
from serfd.serf.events import MemberEvent, MemberEventKind, Status, UserEvent
from serfd.serf.keys import KeyResult
from serfd.serf.queries import QueryParams

OK = {"Error": "", "Seq": 1}
USER, JOIN = UserEvent(1, "deploy", b"", coalesce=True), MemberEvent(MemberEventKind.JOIN, ())
QUERY = query("load")


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
    warned = "[WARN] agent.ipc: 127.0.0.1:47080 showed a wrong key" in lines
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
        ("(", "missing ): ("),
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
        "[ERR] agent.ipc: Failed to evaluate request of 127.0.0.1:47080: "
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
    agent.everybody = [member(f"n{i}") for i in range(2 * MEMBERS_PER_TURN + 1)]
    client, other = connect(), connect()
    assert client.ask("members-filtered", {"Name": "n.*9"}) == []
    assert other.ask("stop", {"Stop": 1}) == [OK]
    clock.pump([0, 0])
    header, reply = client.received()
    assert header == OK
    assert [m["Name"] for m in reply["Members"]] == [
        f"n{i}" for i in range(9, 2 * MEMBERS_PER_TURN + 1, 10)
    ]


@pytest.mark.parametrize(
    ("wanted", "user", "join", "query"),
    [
        ("*", True, True, True),
        ("", True, True, True),
        ("user", True, False, False),
        ("user:", True, False, False),
        ("user:deploy", True, False, False),
        ("user:other,user:load,query:deploy", False, False, False),
        ("user:other,user:deploy", True, False, False),
        ("query", False, False, True),
        ("query:", False, False, True),
        ("query:load", False, False, True),
        ("query:deploy", False, False, False),
        ("user,query:load", True, False, True),
        ("member-join", False, True, False),
        ("member-leave,member-failed,member-update,member-reap", False, False, False),
        ("member-leave,*", True, True, True),
    ],
)
def test_a_filter_says_which_events_a_stream_gets(wanted, user, join, query):
    matches = EventFilter(wanted).matches
    assert (matches(USER), matches(JOIN), matches(QUERY)) == (user, join, query)


def test_a_name_in_a_filter_may_hold_a_colon():
    assert EventFilter("user:a:b").matches(UserEvent(1, "a:b", b"", coalesce=False))


@pytest.mark.parametrize(
    "wanted",
    ["bogus", "user, query", ",", "user,", "member-join:", "member-join:n1", "User", ":user"],
)
def test_other_filters_are_refused(wanted):
    with pytest.raises(CommandError, match=r"^Invalid event filter$"):
        EventFilter(wanted)


def test_a_filter_may_have_many_parts_but_not_any_number():
    many = ",".join(f"user:e{n}" for n in range(EVENT_FILTERS_MAX))
    assert EventFilter(many).matches(UserEvent(1, "e255", b"", coalesce=False))
    error = r"^257 event filters, at most 256 are possible$"
    with pytest.raises(CommandError, match=error):
        EventFilter(f"{many},user")


@pytest.mark.parametrize("level", ["trace", "DEBUG", "Info", "warn", "err"])
def test_a_monitor_takes_any_of_the_levels(level, connect):
    assert connect().ask("monitor", {"LogLevel": level})[0] == OK


@pytest.mark.parametrize(("level", "shown"), [("bogus", "BOGUS"), ("warning", "WARNING"), ("", "")])
def test_a_monitor_of_another_level_is_refused(level, shown, connect):
    reply = connect().ask("monitor", {"LogLevel": level})
    assert reply == [{"Error": f"Unknown log level: {shown}", "Seq": 1}]


def test_a_new_command_is_a_function_and_a_row(monkeypatch, connect):
    def say(session, name, payload, coalesce):
        return {"Said": f"{session.peer} {name} {payload} {coalesce}"}

    fields = (("Name", commands.text), ("Payload", commands.text), ("Coalesce", commands.boolean))
    monkeypatch.setitem(commands.COMMANDS, "say", commands.Command(say, fields, replies=True))
    reply = connect().ask("say", ["a", "b", True])
    assert reply == [OK, {"Said": "127.0.0.1:47080 a b True"}]


@pytest.mark.parametrize(
    ("body", "call"),
    [
        ({"Name": "deploy", "Payload": b"v1", "Coalesce": True}, ("deploy", b"v1", True)),
        ({"Name": "deploy", "Payload": "v1"}, ("deploy", b"v1", False)),
        ({}, ("", b"", False)),
        (["a", None, True], ("a", b"", True)),
    ],
)
def test_an_event_reaches_the_agent(body, call, connect, agent):
    assert connect().ask("event", body) == [OK]
    assert agent.calls == [("user_event", *call)]


# Queries.


@pytest.mark.parametrize(
    ("body", "params"),
    [
        ({}, QueryParams([], {}, want_ack=False, relay_factor=0, timeout=0.0, wait_all=False)),
        (
            {
                "FilterNodes": ["n1"], "FilterTags": {"role": "web"}, "RequestAck": True,
                "RelayFactor": 255, "Timeout": 1_500_000_000, "WaitAll": True,
            },
            QueryParams(["n1"], {"role": "web"}, True, 255, 1.5, wait_all=True),
        ),
        ([["n1"], {}, True, 3, -1], QueryParams(["n1"], {}, True, 3, -1e-9)),
    ],
)  # fmt: skip
def test_a_query_is_asked_as_its_caller_wants(body, params, connect, agent, clock):
    client = connect()
    client.ask("query", body)
    clock.advance(0)
    assert client.received() == [OK]
    assert [asked.params for asked in agent.asked] == [params]


@pytest.mark.parametrize("factor", [-1, 256])
def test_there_is_no_such_relay_factor(factor, connect):
    client = connect()
    assert client.ask("query", {"RelayFactor": factor}) == []
    assert client.hung_up_on


def record(sender, kind, payload=None):
    return [OK, {"From": sender, "Payload": payload, "Type": kind}]


def test_answers_come_after_the_reply_and_at_last_the_end(connect, agent, clock):
    client = connect()
    assert client.ask("query", {"Name": "load", "RequestAck": True}) == []
    agent.asked[0].answer("n1", is_ack=True)
    assert client.received() == []
    clock.advance(0)
    assert client.received() == [OK, *record("n1", "ack")]
    agent.asked[0].answer("n1", b"0.5")
    agent.asked[0].answer("n2")
    assert client.received() == record("n1", "response", b"0.5") + record("n2", "response")
    agent.asked[0].end()
    # Serf's command line tool drops what it has not printed when it hears of the end.
    clock.advance(LAST_WORD_DELAY / 2)
    assert client.received() == []
    clock.advance(LAST_WORD_DELAY / 2)
    assert client.received() == record("", "done")


def test_a_query_that_ends_at_once_is_replied_to_first(connect, agent, clock):
    client = connect()
    client.ask("query", {"Timeout": -1})
    agent.asked[0].end()
    clock.pump([0, LAST_WORD_DELAY])
    assert client.received() == [OK, *record("", "done")]


def test_an_answer_of_nobody_is_not_sent_as_it_would_look_like_the_end(connect, agent, clock):
    client = connect()
    client.ask("query", {})
    clock.advance(0)
    agent.asked[0].answer("", b"x")
    assert client.received() == [OK]


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"Name": "_serf_conflict"}, "Queries cannot contain the '_serf_' prefix"),
        ({"Name": "_serf_ping", "Payload": b"x"}, "Queries cannot contain the '_serf_' prefix"),
        ({"Name": "big", "Payload": bytes(1001)}, "query exceeds limit of 1024 bytes"),
    ],
)
def test_a_query_that_cannot_be_asked_is_refused(body, error, connect, agent, clock):
    client = connect()
    assert client.ask("query", body) == [{"Error": error, "Seq": 1}]
    client.ask("query", {"Name": "_serf_ping"})
    clock.advance(0)
    assert client.received() == [OK]


def test_a_refusal_that_comes_a_moment_later_is_still_the_reply(connect, agent, clock):
    client = connect()
    client.ask("query", {"Name": "load"})
    agent.asked[0].over.errback(CommandError("Feature not supported"))
    clock.advance(0)
    assert client.received() == [{"Error": "Feature not supported", "Seq": 1}]
    agent.asked.clear()
    assert client.ask("stats")[0] == OK


def test_a_query_ends_when_the_daemon_stops(connect, agent, clock):
    client = connect()
    client.ask("query", {})
    clock.advance(0)
    agent.asked[0].over.errback(CommandError("the agent is shutting down"))
    clock.advance(LAST_WORD_DELAY)
    assert client.received() == [OK, *record("", "done")]


def test_two_queries_of_one_client_do_not_mix(connect, agent, clock):
    client = connect()
    for seq in (5, 6):
        client.ask("query", {}, seq=seq)
        clock.advance(0)
    client.received()
    agent.asked[1].answer("n1", b"b")
    agent.asked[0].answer("n1", b"a")
    agent.asked[1].end()
    clock.advance(LAST_WORD_DELAY)
    assert [(h["Seq"], b["Payload"]) for h, b in pairs(client.received())] == [
        (6, b"b"), (5, b"a"), (6, None),
    ]  # fmt: skip


def pairs(received):
    return list(zip(received[::2], received[1::2], strict=True))


# Keys and coordinates.


KEYS = KeyResult({"n1": "so"}, {"AAAA": 2}, 2, 0, 2, "")
KEY_COMMANDS = {
    "install-key": keys.INSTALL,
    "use-key": keys.USE,
    "remove-key": keys.REMOVE,
    "list-keys": keys.LIST,
}


@pytest.mark.parametrize("name", KEY_COMMANDS)
@pytest.mark.parametrize("error", ["", "1/2 nodes reported failure"])
def test_key_commands_tell_what_each_member_said_also_with_an_error(name, error, connect, agent):
    agent.key_results = [KEYS._replace(error=error)]
    lists = name == "list-keys"
    reply = connect().ask(name, None if lists else {"Key": "BBBB"})
    body = {"Messages": {"n1": "so"}, "NumErr": 0, "NumNodes": 2, "NumResp": 2}
    assert reply == [{"Error": error, "Seq": 1}, {"Keys": {"AAAA": 2} if lists else None, **body}]
    assert agent.calls == [(KEY_COMMANDS[name], "" if lists else "BBBB")]


@pytest.mark.parametrize("name", KEY_COMMANDS)
def test_a_key_command_that_asks_nobody_has_an_empty_body(name, connect):
    lists = name == "list-keys"
    empty = {"Messages": {}, "NumErr": 0, "NumNodes": 0, "NumResp": 0}
    assert connect().ask(name, None if lists else {}) == [
        {"Error": "Feature not supported", "Seq": 1}, {"Keys": {} if lists else None, **empty},
    ]  # fmt: skip


def test_a_coordinate_is_told_or_that_there_is_none(connect, agent):
    agent.coordinates["n1"] = Coordinate((0.5,) * 8, 1.5, -0.25, 1e-5)
    client = connect()
    place = {"Adjustment": -0.25, "Error": 1.5, "Height": 1e-5, "Vec": [0.5] * 8}
    assert client.ask("get-coordinate", {"Node": "n1"}) == [OK, {"Coord": place, "Ok": True}]
    nowhere = {"Adjustment": 0.0, "Error": 0.0, "Height": 0.0, "Vec": None}
    assert client.ask("get-coordinate", {"Node": "x"}) == [OK, {"Coord": nowhere, "Ok": False}]


def test_members_are_packed_once_until_one_of_them_changes(connect, agent):
    client, other = connect(), connect()
    assert [m["Name"] for m in client.ask("members")[1]["Members"]] == ["n1", "n2"]
    # As the agent's version did not change, it is not asked again.
    agent.everybody.append(member("n3"))
    for asking in (client, other):
        for reply in (asking.ask("members"), asking.ask("members-filtered", {"Name": "n."})):
            assert [m["Name"] for m in reply[1]["Members"]] == ["n1", "n2"]
    agent.members_version += 1
    assert [m["Name"] for m in client.ask("members-filtered", {"Name": "n[13]"})[1]["Members"]] == [
        "n1", "n3",
    ]  # fmt: skip


def test_plugins_come_with_their_numbers(connect, agent):
    source = "/p/a.py (plugin_dirs)"
    agent.plugins = lambda: [
        PluginStats("a", "failing", source, True, 9, 1, 2, 3, 4, 5, 0.25, "no luck")
    ]
    (_, body) = connect().ask("plugins")
    assert body == {
        "Plugins": [
            {
                "Name": "a", "State": "failing", "Source": source, "Durable": True, "Calls": 9,
                "Errors": 1, "Timeouts": 2, "Merged": 3, "Lost": 4, "Waiting": 5, "Seconds": 0.25,
                "LastError": "no luck",
            }
        ]
    }  # fmt: skip


def test_stats_come_by_section(connect, agent):
    assert connect().ask("stats") == [OK, agent.stats()]
    assert StandInAgent([member("x")]).stats()["agent"] == {"name": "x"}
