"""What each command of serfctl asks and prints; those of test_ctl.py are not repeated here."""

import json
import signal
from base64 import b64decode

import pytest
from recorded_agent import HELLO, RecordedAgent, frames, reply
from serfctl_runs import member_map, no_environment, recorded, run, started

from serfd.ctl_text import plugins_text

__all__ = ["no_environment", "run"]

KEY = "T9jncgl9mbLus+baTTa7q7nPSUrXwbDi2dhbtqir37s="
OLD_KEY = "HvY8ubRZMgafUOWvrOadwOckVa1wN3QWAo46FVKbVN8="
UNKNOWN_KEY = "kZyFABeAmc64UMTrm9XuKA1DgcnjNNLqqVQBOFBXYNs="


PLUGIN = {
    "Name": "hosts", "State": "running", "Source": "hosts.py", "Durable": False, "Calls": 12,
    "Errors": 1, "Timeouts": 2, "Merged": 4, "Lost": 5, "Waiting": 6, "Seconds": 0.5,
    "LastError": "",
}  # fmt: skip


def record(seq, sender, kind="ack", payload=None):
    return reply(seq, "", {"From": sender, "Payload": payload, "Type": kind})


def done(seq=2):
    return record(seq, "", "done")


# As with real agents.


@pytest.mark.parametrize(
    ("name", "argv", "printed"),
    [
        (
            "go-event",
            ["event", "deploy", "v1.2"],
            "Event 'deploy' dispatched! Coalescing enabled: true\n",
        ),
        (
            "go-event-nopayload",
            ["event", "-coalesce=false", "deploy"],
            "Event 'deploy' dispatched! Coalescing enabled: false\n",
        ),
        (
            "go-query",
            ["query", "-timeout=1s", "load", "pp"],
            "Query 'load' dispatched\nAck from 'n1'\nResponse from 'n1': hi-from-n1\n"
            "Ack from 'n3'\nAck from 'n2'\nTotal Acks: 3\nTotal Responses: 1\n",
        ),
        (
            "go-query-default-timeout",
            ["query", "-format", "json", "nobody"],
            '{\n  "Acks": [\n    "n1",\n    "n2",\n    "n3"\n  ],\n  "Responses": {}\n}\n',
        ),
        (
            "go-query-filtered",
            ["query", "-node=n1", "-node", "n2", "-tag=role=web", "-no-ack", "-relay-factor=1",
             "-timeout", "1000ms", "load"],
            "Query 'load' dispatched\nResponse from 'n1': hi-from-n1\nTotal Responses: 1\n",
        ),
        (
            "go-query-filtered",
            ["query", "-node=n1", "-node", "n2", "-tag=role=web", "-no-ack", "-relay-factor=1",
             "-timeout", "0.5s500ms", "-format=json", "load"],
            '{\n  "Acks": null,\n  "Responses": {\n    "n1": "hi-from-n1\\n"\n  }\n}\n',
        ),
        (
            "go-reachability",
            ["reachability"],
            "Total members: 3, live members: 3\nStarting reachability test...\n"
            "Successfully contacted all live nodes\n",
        ),
        ("go-rtt", ["rtt", "n1", "n2"], "Estimated n1 <-> n2 rtt: 0.932 ms\n"),
        (
            "go-keys-install",
            ["keys", "-install", KEY],
            "==> Installing key on all members...\n==> Successfully installed key!\n",
        ),
        (
            "go-keys-use",
            ["keys", "-use", KEY],
            "==> Changing primary key on all members...\n==> Successfully changed primary key!\n",
        ),
        (
            "go-keys-remove",
            ["keys", "-remove", OLD_KEY],
            "==> Removing key on all members...\n==> Successfully removed key!\n",
        ),
        (
            "go-keys-list",
            ["keys", "-list"],
            "==> Asking all members for installed keys...\n"
            f"==> Keys gathered, listing cluster keys...\n\n{OLD_KEY}  [2/2]\n",
        ),
    ],
)  # fmt: skip
def test_a_command_asks_what_serfs_asks_and_prints_what_serfs_prints(run, name, argv, printed):
    with recorded(name) as agent:
        found = run(argv[0], "--rpc-addr", agent.address, *argv[1:])
    assert found == (0, printed, "")
    assert agent.received == frames(name, "client")


@pytest.mark.parametrize(
    ("name", "argv", "printed", "told"),
    [
        (
            "go-event-too-big",
            ["event", "big", "x" * 600],
            "",
            "Error sending event: user event exceeds configured limit of 512 bytes before "
            "encoding\n",
        ),
        (
            "go-query-reserved",
            ["query", "_serf_conflict", "n1"],
            "",
            "Error sending query: Queries cannot contain the '_serf_' prefix\n",
        ),
        (
            "go-query-too-big",
            ["query", "big", "x" * 1100],
            "",
            "Error sending query: query exceeds limit of 1024 bytes\n",
        ),
        (
            "go-rtt-unknown",
            ["rtt", "nope"],
            "",
            'Could not find a coordinate for node "nope"\n',
        ),
        (
            "go-keys-install-badbase64",
            ["keys", "-install", "xx"],
            "==> Installing key on all members...\n",
            "Error installing key: illegal base64 data at input byte 0\n",
        ),
        (
            "go-keys-use-unknown",
            ["keys", "-use", UNKNOWN_KEY],
            "==> Changing primary key on all members...\n",
            "failed:  k1  Requested key is not in the keyring\n"
            "failed:  k2  Requested key is not in the keyring\n\n"
            "Error changing primary key: 2/2 nodes reported failure\n",
        ),
        (
            "go-keys-remove-primary",
            ["keys", "-remove", KEY],
            "==> Removing key on all members...\n",
            "failed:  k1  Removing the primary key is not allowed\n"
            "failed:  k2  Removing the primary key is not allowed\n\n"
            "Error removing key: 2/2 nodes reported failure\n",
        ),
        (
            "go-keys-list-plain",
            ["keys", "-list"],
            "==> Asking all members for installed keys...\n",
            "failed:  n1  Keyring is empty (encryption not enabled)\n"
            "failed:  n2  Keyring is empty (encryption not enabled)\n"
            "failed:  n3  Keyring is empty (encryption not enabled)\n\n"
            "Failed to gather member keys: 3/3 nodes reported failure\n",
        ),
    ],
)
def test_what_fails_is_told_on_stderr_as_serf_tells_it(run, name, argv, printed, told):
    with recorded(name) as agent:
        found = run(argv[0], "-rpc-addr", agent.address, *argv[1:])
    assert found == (1, printed, told)


REFUSED = HELLO + 2 * reply(2, "Authentication required")


@pytest.mark.parametrize(
    ("argv", "prefix"),
    [
        (["event", "x"], "Error sending event: "),
        (["keys", "-list"], "Failed to gather member keys: "),
        (["keys", "-use", "AAAA"], "Error changing primary key: "),
        (["members", "-watch"], "Error starting stream: "),
        (["query", "x"], "Error sending query: "),
        (["reachability"], "Error getting members: "),
        (["rtt", "x"], "Error querying agent: "),
        (["rtt", "x", "y"], "Error getting coordinates: "),
        (["status"], "Error querying agent: "),
    ],
)
def test_a_token_that_is_missing_is_told(run, argv, prefix):
    with RecordedAgent(REFUSED) as agent:
        code, _, err = run(argv[0], "-rpc-addr", agent.address, *argv[1:])
    assert code == 1
    assert err == (
        f"{prefix}Authentication required\n"
        "The agent's rpc_auth is asked for: give it with -rpc-auth or SERF_RPC_AUTH.\n"
    )


# Wrong command lines.


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["query", "-tag", "role"], "Error: Invalid tag: 'role'\nExpected KEY=VALUE.\n"),
        (["query", "-format=xml", "x"], "Invalid format: xml\nExpected text or json.\n"),
        (["query", "-relay-factor=256", "x"], "Relay factor must be between 0 and 255\n"),
        (["query", "-relay-factor", "-1", "x"], "Relay factor must be between 0 and 255\n"),
        (
            ["keys", "-list", "-use", "x"],
            "Only one of -install, -use, -remove, or -list allowed\n",
        ),
        *(
            (
                [*words, "-format", "xml"],
                'Encoding error: Invalid output format "xml"\nExpected text or json.\n',
            )
            for words in (["join", "x"], ["keys"], ["reachability"], ["rtt"], ["status"],
                          ["version"], ["members", "-watch"])
        ),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_before_anybody_is_asked(run, argv, told):
    assert run(*argv) == (1, "", told)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["event"], "An event name must be specified."),
        (
            ["event", "a", "b", "c"],
            "Too many command line arguments. Only a name and payload must be specified.",
        ),
        (["query"], "A query name must be specified."),
        (
            ["query", "a", "b", "c"],
            "Too many command line arguments. Only a name and payload must be specified.",
        ),
        (["keys"], "One of -install, -use, -remove or -list must be specified."),
        (["keys", "-list=false"], "One of -install, -use, -remove or -list must be specified."),
        (["rtt"], "One or two node names must be specified"),
        (["rtt", "a", "b", "c"], "One or two node names must be specified"),
        (
            ["members", "-watch", "-name=n.*"],
            "-watch shows all changes: it takes no -name, -status or -tag.",
        ),
        (["completion"], "A shell must be specified: bash, zsh, fish."),
        (["completion", "csh"], "A shell must be specified: bash, zsh, fish."),
        (
            ["query", "-timeout=5", "x"],
            'invalid value "5" for flag -timeout: parse error\n'
            "Expected a duration like 500ms, 10s or 1m30s.",
        ),
        (
            ["query", "-relay-factor=x", "x"],
            'invalid value "x" for flag -relay-factor: parse error\nExpected a whole number.',
        ),
    ],
)
def test_misuse_is_told_with_the_commands_help(run, argv, told):
    code, out, err = run(*argv)
    assert (code, out) == (1, "")
    assert err.startswith(f"{told}\n\nUsage: serfctl {argv[0]} ")


# Queries.


def test_wait_all_is_asked_for_only_if_wanted(run):
    for words, asked in ((["-wait-all"], True), ([], False)):
        with RecordedAgent(HELLO + reply(2) + done()) as agent:
            assert run("query", *words, "-rpc-addr", agent.address, "x")[0] == 0
        assert (b"\xa7WaitAll\xc3" in agent.received) is asked


def test_answers_of_nobody_are_not_counted(run):
    answers = reply(2) + record(2, "n1") + record(2, "") + record(2, "", "response") + done()
    with RecordedAgent(HELLO + answers) as agent:
        code, out, _ = run("query", "-rpc-addr", agent.address, "x")
    assert (code, out) == (
        0, "Query 'x' dispatched\nAck from 'n1'\nTotal Acks: 1\nTotal Responses: 0\n",
    )  # fmt: skip


def test_an_agent_that_goes_during_a_query_ends_it_with_what_came(run):
    with RecordedAgent(HELLO + reply(2) + record(2, "n1"), hangs_up=True) as agent:
        code, out, err = run("query", "-rpc-addr", agent.address, "x")
    assert code == 0
    assert out.endswith("Ack from 'n1'\nTotal Acks: 1\nTotal Responses: 0\n")
    assert err == "The agent has closed the connection: this is what came until then.\n"


@pytest.mark.parametrize(
    ("argv", "answers", "printed", "told"),
    [
        (
            ["query", "x"],
            reply(2) + record(2, "n1"),
            ["Query 'x' dispatched\n", "Ack from 'n1'\n"],
            "Query interrupted\n",
        ),
        (
            ["reachability", "-verbose"],
            reply(2, "", {"Members": [member_map("n1")]}) + reply(3) + record(3, "n1"),
            ["Total members: 1, live members: 1\n", "Starting reachability test...\n",
             "\tAck from 'n1'\n"],
            "Test interrupted\n",
        ),
    ],
)  # fmt: skip
def test_an_interrupt_ends_a_query_without_totals(argv, answers, printed, told):
    with (
        RecordedAgent(HELLO + answers) as agent,
        started(argv[0], "-rpc-addr", agent.address, *argv[1:]) as child,
    ):
        assert [child.stdout.readline() for _ in printed] == printed
        child.send_signal(signal.SIGINT)
        assert child.communicate() == ("", told)
    assert child.returncode == 1


# Reachability.


def pinged(run, *senders, argv=()):
    members = [member_map("n1"), member_map("n2"), member_map("n3", Status="failed")]
    answers = reply(2, "", {"Members": members}) + reply(3)
    answers += b"".join(record(3, sender) for sender in senders) + done(3)
    with RecordedAgent(HELLO + answers) as agent:
        return run("reachability", *argv, "-rpc-addr", agent.address)


def test_all_that_live_have_answered(run):
    code, out, err = pinged(run, "n2", "n1", argv=["-verbose"])
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[:4] == [
        "Total members: 3, live members: 2", "Starting reachability test...",
        "\tAck from 'n2'", "\tAck from 'n1'",
    ]  # fmt: skip
    assert lines[4].startswith("Query time: 0.")
    assert ", time to last response: 0." in lines[4]
    assert lines[5] == "Successfully contacted all live nodes"


@pytest.mark.parametrize(
    ("senders", "told"),
    [
        (
            ["n2"],
            "Received less acks than live nodes! Missing acks from:\n\tn1\nThis could mean Serf "
            "gossip packets are being lost due to a misconfiguration or network issue.\n\n"
            "Troubleshooting tips:\n* ",
        ),
        (
            ["n1", "n2", "n3"],
            "Received more acks than live nodes! Acks from non-live nodes:\n\tn3\nThis could mean "
            "Serf is detecting false-failures due to a misconfiguration or network issue.\n\n"
            "Troubleshooting tips:\n* ",
        ),
        (
            ["n1", "n1", "n2"],
            "Duplicate response from 'n1'\nDuplicate responses means there is a "
            "misconfiguration. Verify that node names are unique.\n",
        ),
    ],
)
def test_who_does_not_answer_as_expected_is_named(run, senders, told):
    code, out, err = pinged(run, *senders)
    assert (code, out.count("\n")) == (1, 2)
    assert err.startswith(told)
    code, out, _ = pinged(run, *senders, argv=["-format=json"])
    assert code == 1
    found = json.loads(out)
    assert found.pop("seconds") >= found.pop("seconds_to_last") >= 0
    assert found == {
        "members": 3,
        "live": 2,
        "acks": sorted(set(senders)),
        "missing": sorted({"n1", "n2"} - set(senders)),
        "unexpected": sorted(set(senders) - {"n1", "n2"}),
        "duplicates": ["n1"] if senders.count("n1") > 1 else [],
    }


# Round trips, keys, joins and the version as JSON.


def test_the_agents_own_node_is_the_other_end(run):
    place = {"Vec": [0.0] * 8, "Height": 1e-3, "Adjustment": 0.0, "Error": 0.1}
    answers = reply(2, "", {"agent": {"name": "n\n1"}})
    answers += reply(3, "", {"Coord": place, "Ok": True}) * 1
    answers += reply(4, "", {"Coord": {**place, "Vec": [3e-3, 4e-3] + 6 * [0.0]}, "Ok": True})
    for argv, printed in (
        ([], "Estimated n2 <-> n\\n1 rtt: 7.000 ms\n"),
        (
            ["-format", "json"],
            '{\n  "nodes": [\n    "n2",\n    "n\\n1"\n  ],\n  "rtt_ms": 7.0\n}\n',
        ),
    ):
        with RecordedAgent(HELLO + answers) as agent:
            assert run("rtt", "n2", *argv, "-rpc-addr", agent.address) == (0, printed, "")
        assert b"\xa4Node\xa2n2" in agent.received
        assert b"\xa4Node\xa3n\n1" in agent.received


@pytest.mark.parametrize("vec", [[float("nan")], [float("inf")], None, [0.0, 0.0], "x"])
def test_a_coordinate_that_is_nonsense_is_told(run, vec):
    place = {"Vec": [0.0], "Height": 0.0, "Adjustment": 0.0, "Error": 0.1}
    answers = reply(2, "", {"Coord": place, "Ok": True})
    answers += reply(3, "", {"Coord": {**place, "Vec": vec}, "Ok": True})
    with RecordedAgent(HELLO + answers) as agent:
        code, _, err = run("rtt", "a", "b", "-rpc-addr", agent.address)
    assert code == 1
    assert err.startswith("Error querying agent: the agent's answer is not as Serf's: ")


@pytest.mark.parametrize(
    ("name", "argv", "found", "told"),
    [
        (
            "go-keys-list",
            ["-list"],
            {"nodes": 2, "responses": 2, "errors": 0, "messages": {}, "keys": {OLD_KEY: 2}},
            "",
        ),
        (
            "go-keys-use-unknown",
            ["-use", UNKNOWN_KEY],
            {
                "nodes": 2, "responses": 2, "errors": 2, "keys": {},
                "messages": dict.fromkeys(("k1", "k2"), "Requested key is not in the keyring"),
            },
            "Error changing primary key: 2/2 nodes reported failure\n",
        ),
    ],
)  # fmt: skip
def test_what_members_say_of_keys_is_written_as_json(run, name, argv, found, told):
    with recorded(name) as agent:
        code, out, err = run("keys", *argv, "-format=json", "-rpc-addr", agent.address)
    assert (code, err) == (int(bool(told)), told)
    assert json.loads(out) == found


def test_a_list_of_keys_that_was_cut_is_told(run):
    cut = "truncated key list response, showing first 1 of 40 keys"
    body = {"Keys": {"AAAA": 1}, "Messages": {"n1": cut}, "NumErr": 0, "NumNodes": 1, "NumResp": 1}
    with RecordedAgent(HELLO + reply(2, "", body)) as agent:
        code, out, err = run("keys", "-list", "-rpc-addr", agent.address)
    assert (code, err) == (0, f"warning:  n1  {cut}\n")
    assert out.endswith("\n\nAAAA  [1/1]\n")


def test_a_join_is_written_as_json(run):
    with recorded("go-join") as agent:
        found = run("join", "127.0.0.1:17002", "-format=json", "-rpc-addr", agent.address)
    assert found == (0, '{\n  "contacted": 1\n}\n', "")


@pytest.mark.parametrize(
    ("name", "argv", "found"),
    [
        ("go-event", ["event", "-format=json", "deploy", "v1.2"],
         {"event": "deploy", "coalesce": True}),
        ("go-event-nopayload", ["event", "-coalesce=false", "-format=json", "deploy"],
         {"event": "deploy", "coalesce": False}),
        ("go-force-leave-prune", ["force-leave", "-prune", "n2", "-format=json"],
         {"name": "n2", "prune": True}),
        ("go-leave", ["leave", "-format", "json"], {"left": True}),
        ("go-tags", ["tags", "-set", "role=web", "-set", "dc=east", "-delete", "x", "-format=json"],
         {"set": {"role": "web", "dc": "east"}, "deleted": ["x"]}),
    ],
)  # fmt: skip
def test_what_was_done_is_written_as_json(run, name, argv, found):
    with recorded(name) as agent:
        code, out, err = run(argv[0], "-rpc-addr", agent.address, *argv[1:])
    assert (code, err) == (0, "")
    assert json.loads(out) == found


@pytest.mark.parametrize("command", ["event x", "force-leave x", "leave", "tags -set a=b"])
def test_a_wrong_format_is_told_before_the_agent_is_asked(run, command):
    name, *rest = command.split()
    found = run(name, "-format=xml", "-rpc-addr", "127.0.0.1:1", *rest)
    error = 'Encoding error: Invalid output format "xml"\nExpected text or json.\n'
    assert found == (1, "", error)


def test_a_key_is_written_as_json(run):
    code, out, err = run("keygen", "-format=json")
    assert (code, err) == (0, "")
    assert len(b64decode(json.loads(out)["key"], validate=True)) == 32


def test_the_monitor_writes_each_event_and_each_line_of_the_log_as_a_line_of_json(run):
    answers = [
        HELLO, reply(2), reply(3),
        reply(2, "", {"Event": "member-join", "Members": [member_map("n2", Tags={"a": "\x9b<"})]}),
        reply(3, "", {"Log": "2026/11/23 [INFO] two\nlines \u2028"}),
        reply(2, "", {"Event": "user", "LTime": 7, "Name": "deploy", "Payload": b"v1\xff",
                      "Coalesce": True}),
        reply(2, "", {"Event": "query", "ID": 1, "LTime": 8, "Name": "load", "Payload": None}),
    ]  # fmt: skip
    with RecordedAgent(b"".join(answers), hangs_up=True) as agent:
        code, out, err = run("monitor", "-format=json", "-rpc-addr", agent.address)
    assert code == 1
    assert "Remote side ended the monitor!" in err
    assert [json.loads(line) for line in out.splitlines()] == [
        {
            "event": "member-join",
            "members": [
                {"name": "n2", "addr": "10.0.0.1:1", "port": 1, "tags": {"a": "\x9b<"},
                 "status": "alive", "protocol": {"max": 0, "min": 0, "version": 0}},
            ],
        },
        {"log": "2026/11/23 [INFO] two\nlines \u2028"},
        {"event": "user", "coalesce": True, "ltime": 7, "name": "deploy", "payload": "v1\ufffd"},
        {"event": "query", "id": 1, "ltime": 8, "name": "load", "payload": ""},
    ]  # fmt: skip
    assert out.isascii()


def test_the_version_is_written_as_json(run):
    code, out, err = run("version", "-format", "json")
    assert (code, err) == (0, "")
    assert json.loads(out)["protocol"] == {"max": 5, "min": 2}


# Plugins.


def test_plugins_are_listed_and_written_as_json(run):
    body = {"Plugins": [PLUGIN]}
    with RecordedAgent(HELLO + reply(2, "", body)) as agent:
        code, out, err = run("plugins", "-rpc-addr", agent.address)
    assert (code, err) == (0, "")
    assert out == plugins_text([PLUGIN])
    with RecordedAgent(HELLO + reply(2, "", body)) as agent:
        code, out, err = run("plugins", "-format=json", "-rpc-addr", agent.address)
    (found,) = json.loads(out)["plugins"]
    assert (found["name"], found["last_error"]) == ("hosts", "")
    with RecordedAgent(HELLO + reply(2, "", {"Plugins": []})) as agent:
        assert run("plugins", "-rpc-addr", agent.address) == (0, "No plugins run.\n", "")


def test_an_agent_that_knows_no_plugins_is_told_from_an_error(run):
    with RecordedAgent(HELLO + reply(2, "Unsupported command")) as agent:
        code, out, err = run("plugins", "-rpc-addr", agent.address)
    assert (code, out) == (1, "")
    assert err == (
        "Error querying agent: Unsupported command\n"
        "The agent does not know it: it is not serfd, or another version.\n"
    )


# Status.


@pytest.mark.parametrize(
    ("members", "code", "told"),
    [
        ([member_map("n1"), member_map("n2")], 0, ""),
        ([member_map("n1")], 1, "serfctl status: 1 problem(s)\n"),
    ],
)
def test_a_status_says_whether_there_is_a_problem(run, members, code, told):
    answers = frames("go-stats", "server") + reply(3, "", {"Members": members})
    with RecordedAgent(answers) as agent:
        found, out, err = run("status", "-rpc-addr", agent.address)
    assert (found, err) == (code, told)
    assert out.startswith("Agent:         n1 at 10.0.0.1:1\nState:         ")
    with RecordedAgent(answers) as agent:
        found, out, err = run("status", "-format=json", "-rpc-addr", agent.address)
    assert (found, err) == (code, told)
    assert len(json.loads(out)["problems"]) == code


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("status", {"agent": {"name": "n1"}}),
        ("status", {"agent": {"name": "n1"}, "serf": {"health_score": "high"}}),
        ("rtt x", {}),
        ("plugins", {"Plugins": [{"Name": 5}]}),
        ("keys -list", {"NumNodes": 1, "Keys": 5}),
        ("keys -list", {"Messages": 5}),
        ("keys -list -format=json", {"Messages": {}}),
    ],
)
def test_an_answer_that_is_nonsense_is_told_and_not_a_traceback(run, command, answer):
    answers = HELLO + reply(2, "", answer) + reply(3, "", {"Members": [{"Status": "alive"}]})
    with RecordedAgent(answers) as agent:
        code, _, err = run(*command.split(), "-rpc-addr", agent.address)
    assert code == 1
    assert "the agent's answer is not as Serf's: " in err


# Watching.


def change(kind, *names):
    return reply(2, "", {"Event": f"member-{kind}", "Members": [*map(member_map, names)]})


def test_changes_of_members_are_printed_as_they_come_until_an_interrupt():
    answers = HELLO + reply(2) + change("join", "n2") + change("failed", "n3", "n4")
    with (
        RecordedAgent(answers, when=(b"stop", reply(3))) as agent,
        started("members", "-watch", "-rpc-addr", agent.address) as child,
    ):
        lines = [child.stdout.readline() for _ in range(3)]
        child.send_signal(signal.SIGINT)
        assert child.communicate() == ("", "")
    assert child.returncode == 0
    assert [line.split(maxsplit=2)[2] for line in lines] == [
        "join    n2  10.0.0.1:1\n", "failed  n3  10.0.0.1:1\n", "failed  n4  10.0.0.1:1\n",
    ]  # fmt: skip
    assert b"member-join,member-leave,member-failed,member-update,member-reap" in agent.received
    assert agent.received.endswith(b"\x82\xa7Command\xa4stop\xa3Seq\x03\x81\xa4Stop\x02")


def test_watching_ends_with_the_agent(run):
    with RecordedAgent(HELLO + reply(2) + change("leave", "n2"), hangs_up=True) as agent:
        code, out, err = run("members", "-watch", "-format=json", "-rpc-addr", agent.address)
    assert code == 1
    assert json.loads(out)["event"] == "leave"
    assert err == (
        "\nRemote side ended the watch! This usually means that the\n"
        "remote side has exited or crashed.\n"
    )
