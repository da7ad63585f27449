"""What serfctl prints, as text and as JSON."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serfctl_runs import member_map

from serfd import ctl_text


@pytest.mark.parametrize(
    ("record", "lines"),
    [
        (
            {"Event": "user", "LTime": 3, "Name": 'a"\\\n', "Payload": None, "Coalesce": True},
            [
                'Event: "user"', "Coalesce: true", "LTime: 3", r'Name: "a\"\\\n"',
                "Payload: <nil>",
            ],
        ),
        ({"Event": "query", "Payload": b""}, ['Event: "query"', "Payload: []byte{}"]),
        ({"Event": "user", "Payload": "p\udcff"}, ['Event: "user"', "Payload: []byte{0x70, 0xff}"]),
        ({"Event": "member-join", "Members": None}, ['Event: "member-join"', "Members: <nil>"]),
        (
            {
                "Members": [
                    {"Name": "web10", "Addr": b"\x0a\0\0\2", "Port": 7946, "Status": "alive"},
                    {"Name": "n1", "Addr": b"\x0a\0\0\1", "Port": 7946, "Status": "failed",
                     "Tags": {"role": "db"}},
                ],
                "Event": "member-join",
            },
            [
                'Event: "member-join"',
                "Members:",
                "\tn1     10.0.0.1:7946  failed  role=db",
                "\tweb10  10.0.0.2:7946  alive",
            ],
        ),
    ],
)  # fmt: skip
def test_events_are_written_in_gos_way(record, lines):
    assert ctl_text.event_text(record) == "".join(
        f"{x}\n" for x in ["Event Info:", *("\t" + x for x in lines)]
    )


def test_a_log_line_cannot_pass_for_another_or_steer_the_terminal():
    text = ctl_text.log_text({"Log": "[INFO] joined: \x1b[2J\n2026/11/23 [ERR] forged\n\t* x"})
    assert text == "[INFO] joined: \\x1b[2J\n    2026/11/23 [ERR] forged\n    \t* x\n"


def test_columns_are_as_wide_as_their_widest_value_in_characters():
    found = ctl_text.members_text(
        [
            member_map("ü日本", Tags={"b": "1", "a": "x|y", "a-b": "2"}),
            member_map("a", Addr=bytes(15) + b"\1", Port=17001, Status="leaving"),
            member_map("left", Addr=bytes(10) + b"\xff\xff\x0a\0\0\2", Status="left"),
        ]
    )
    assert found == (
        "a     [::1]:17001  leaving  \n"
        "left  10.0.0.2:1   left     \n"
        "ü日本   10.0.0.1:1   alive    a=x|y,a-b=2,b=1\n"
    )


def test_missing_fields_of_a_member_are_empty():
    assert ctl_text.members_text([{}, {"Name": "a"}]) == "   ?:0    \na  ?:0\n"
    assert json.loads(ctl_text.members_json([{}]))["members"] == [
        {
            "name": "",
            "addr": "?:0",
            "port": 0,
            "tags": {},
            "status": "",
            "protocol": {"max": 0, "min": 0, "version": 0},
        }
    ]


@given(st.text(st.characters(exclude_categories=())))
def test_a_hostile_tag_never_makes_a_second_line(text):
    found = ctl_text.members_text([member_map("n1", Tags={text: text}), member_map(text)])
    assert found.count("\n") == 2
    assert all(line.isprintable() for line in found.split("\n"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON)
def test_json_says_what_was_said(value):
    text = ctl_text.json_text(value)
    assert json.loads(text) == value
    assert all(line.isprintable() or max(line) > "\uffff" for line in text.split("\n"))


@given(JSON)
def test_json_is_laid_out_as_pythons_own(value):
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if all(c == "\n" or (c.isprintable() and c not in "<>&") for c in text):
        assert ctl_text.json_text(value) == text + "\n"


def test_json_escapes_what_go_escapes():
    written = ctl_text.json_text({"<a>&": "ü日本\u2028\udcff\x9b"})
    assert written == '{\n  "\\u003ca\\u003e\\u0026": "ü日本\\u2028\\ufffd\\u009b"\n}\n'


def test_a_change_of_members_is_a_line_for_each():
    record = {
        "Event": "member-failed",
        "Members": [member_map("n\x1b1"), member_map("n2", Addr=bytes(15) + b"\1", Port=7946)],
    }
    assert ctl_text.change_text("2026-11-23 18:00:00", record) == (
        "2026-11-23 18:00:00  failed  n\\x1b1  10.0.0.1:1\n"
        "2026-11-23 18:00:00  failed  n2  [::1]:7946\n"
    )
    assert list(map(json.loads, ctl_text.change_json("now", record).splitlines())) == [
        {"time": "now", "event": "failed", "name": "n\x1b1", "addr": "10.0.0.1:1"},
        {"time": "now", "event": "failed", "name": "n2", "addr": "[::1]:7946"},
    ]
    assert ctl_text.change_text("now", {"Event": "member-join", "Members": None}) == ""


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        ({"Type": "ack", "From": "n1", "Payload": None}, "Ack from 'n1'"),
        ({"Type": "response", "From": "n1", "Payload": b"hi\n"}, "Response from 'n1': hi"),
        ({"Type": "response", "From": "n1", "Payload": b"a\n\n"}, "Response from 'n1': a\n"),
        ({"Type": "response", "From": "n\n", "Payload": None}, r"Response from 'n\n': "),
        ({"Type": "response", "From": "n", "Payload": b"\x1b\xff"}, r"Response from 'n': \x1b\xff"),
        ({"Type": "response", "From": "n", "Payload": "text"}, "Response from 'n': text"),
    ],
)
def test_an_answer_says_who_and_what(answer, line):
    assert ctl_text.answer_text(answer) == line + "\n"


def test_keys_are_listed_with_how_many_have_them():
    answer = {"Keys": {"BBBB": 1, "AAAA": 2}, "NumNodes": 2}
    assert ctl_text.keys_text(answer) == "AAAA  [2/2]\nBBBB  [1/2]\n"
    assert ctl_text.failures_text({"n2": "no", "n10": "no\x1b"}) == (
        "failed:  n10  no\\x1b\nfailed:  n2   no\n"
    )
    assert ctl_text.failures_text({}) == ""


def stats(**serf):
    return {"agent": {"name": "n1"}, "serf": {"encrypted": "false", "health_score": "0", **serf}}


HERE, THERE = member_map("n1"), member_map("n2")
FAILED = [member_map(f"n{i}", Status="failed") for i in range(10, 23)]


@pytest.mark.parametrize(
    ("stats", "members", "problems"),
    [
        (stats(), [HERE, THERE], []),
        (stats(health_score="2"), [HERE, THERE, *FAILED], []),
        (stats(), [HERE], ["isolated, it sees no other member: it has joined nobody"]),
        (stats(), [HERE, *FAILED], ["isolated, it sees no other member: 13 failed"]),
        (stats(), [HERE | {"Status": "leaving"}, THERE], ["it is leaving"]),
        (stats(), [], ["it is not a member"]),
        (
            stats(health_score="3", internal_errors="2"),
            [HERE, THERE],
            [
                "health score 3: it is slow, or its network loses packets",
                "2 internal errors: see its log",
            ],
        ),
        (
            {**stats(), "plugins": {"a": "running: 1 call", "b": "failing: 9 calls"}},
            [HERE, THERE],
            ["plugin b is failing: see serfctl plugins"],
        ),
    ],
)
def test_a_status_names_its_problems(stats, members, problems):
    status = ctl_text.status_of(stats, members)
    assert status["problems"] == problems
    assert ("healthy" in ctl_text.status_text(status)) is not bool(problems)


def test_a_status_fits_on_a_screen():
    status = ctl_text.status_of(
        stats(encrypted="true", intent_queue="1", query_queue="3"), [THERE, HERE, *FAILED]
    )
    assert status == {
        "node": "n1",
        "addr": "10.0.0.1:1",
        "problems": [],
        "members": {"alive": 2, "leaving": 0, "left": 0, "failed": 13},
        "encrypted": True,
        "health_score": 0,
        "queues": {"intent": 1, "event": 0, "query": 3},
        "failed": [{"name": f"n{i}", "addr": "10.0.0.1:1"} for i in range(10, 23)],
    }
    lines = ctl_text.status_text(status).splitlines()
    assert lines[:7] == [
        "Agent:         n1 at 10.0.0.1:1",
        "State:         healthy",
        "Members:       2 alive, 13 failed",
        "Encrypted:     yes",
        "Health score:  0 (0 is best, 8 is worst)",
        "Queues:        1 intent, 0 event, 3 query",
        "Failed:        n10 at 10.0.0.1:1",
    ]
    assert lines[-1] == "               and 3 more"
    assert len(lines) == 17


PLUGIN = {
    "Name": "hosts", "State": "running", "Source": "/p/hosts.py", "Durable": False,
    "Calls": 12, "Errors": 1, "Timeouts": 2, "Merged": 4, "Lost": 5, "Waiting": 6, "Seconds": 0.5,
    "LastError": "",
}  # fmt: skip


def test_plugins_stand_in_columns_and_their_last_errors_below():
    failing = PLUGIN | {"Name": "x\n", "State": "failing", "Durable": True, "LastError": "no\tluck"}
    healed = PLUGIN | {"Name": "y", "LastError": "long ago"}
    assert ctl_text.plugins_text([PLUGIN, failing, healed]).splitlines() == [
        "NAME   STATE             CALLS  ERRORS  TIMEOUTS  LOST  WAITING  SOURCE",
        "hosts  running           12     1       2         5     6        /p/hosts.py",
        "x\\n    failing, durable  12     1       2         5     6        /p/hosts.py",
        "y      running           12     1       2         5     6        /p/hosts.py",
        "x\\n is failing; its last error: no\\tluck",
        "y is running; its last error: long ago",
    ]
