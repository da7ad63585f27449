"""`serf` drives our daemon, `serfctl` a real agent; both print the same of the same agent."""

import base64
import json
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import NamedTuple

import pytest
from processes import SERFCTL, AgentProcess, Agents, free_port, run, until, until_is

pytestmark = pytest.mark.interop

TOOLS = {"serf": "serf", "serfctl": SERFCTL}
OTHER_TOOL = {"serf": "serfctl", "serfd": "serf"}


class Answer(NamedTuple):
    """What a command line said."""

    code: int
    text: str


def ask(tool: str, agent: AgentProcess, *words: str) -> Answer:
    """Run one command against an agent. Real ones print errors on stdout, ours on stderr."""
    command, *rest = words
    done = run(TOOLS[tool], command, f"-rpc-addr={agent.rpc_addr}", *rest)
    return Answer(done.returncode, done.stdout + done.stderr)


def ordered(text: str) -> list[str]:
    """Lines without what is arbitrary: their order, that of tags, and measured times."""
    text = re.sub(r"\d+\.\d+ (ms|sec)", r"… \1", text)
    return sorted(
        re.sub(r"\S+=\S+", lambda tags: ",".join(sorted(tags[0].split(","))), line.rstrip())
        for line in text.splitlines()
    )


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    """One agent of each kind, and one that failed; nobody changes anything here."""
    agents = Agents(tmp_path_factory.mktemp("trio"))
    kinds = {"n-real": "serf", "n-ours": "serfd", "gone": "serfd"}
    answering = "-event-handler=query:load=echo hi"
    own = {
        "n-real": ["-tag=role=web", "-tag=dc=east", answering],
        "n-ours": ["-tag=role=db", answering],
    }
    try:
        three = agents.cluster(kinds, own=own)
        three["gone"].kill()
        for name in ("n-real", "n-ours"):
            until_is("statuses", lambda n=name: three[n].statuses().get("gone"), "failed")
        yield {"serf": three["n-real"], "serfd": three["n-ours"]}
    finally:
        agents.end()


BOTH_KINDS = pytest.mark.parametrize("kind", ["serf", "serfd"])


@BOTH_KINDS
@pytest.mark.parametrize(
    "words",
    [
        ["members"],
        ["members", "-detailed"],
        ["members", "-status=alive"],
        ["members", "-status", "failed"],
        ["members", "-status=left"],
        ["members", "-status=alive|failed", "-name=gone"],
        ["members", "-tag=role=web"],
        ["members", "-tag=role=w.b", "-tag", "dc=east"],
        ["members", "-tag=role="],
        ["members", "-name=n-.*"],
        ["members", "-name=nobody"],
        ["members", "-detailed", "-role=d."],
        ["members", "-name=("],
        ["members", "-tag=nonsense"],
        ["force-leave", "never-heard-of"],
        ["tags"],
        ["join"],
        ["monitor", "-log-level=LOUD"],
        ["event", "deploy", "v1"],
        ["event", "-coalesce=false", "deploy"],
        ["event"],
        ["event", "a", "b", "c"],
        ["event", "deploy", "-x"],
        ["event", "-coalesce=false", "deploy", "-coalesce"],
        ["event", "deploy", "--", "-x"],
        ["event", "--", "-a", "-b"],
        ["query", "-timeout=3s", "load", "-timeout=1s"],
        ["query", "-timeout=3s", "load", "-no-ack"],
        ["query", "-timeout=3s", "load", "-timeout", "1s"],
        ["event", "big", "x" * 600],
        ["query", "-timeout=3s", "load"],
        ["query", "-no-ack", "-timeout=3s", "load", "payload"],
        ["query", "-node=n-real", "-node", "nobody", "-relay-factor=2", "-timeout=3s", "load"],
        ["query", "-tag=role=d.", "-timeout", "3s", "load"],
        ["query", "-tag=role=(", "-timeout=300ms", "load"],
        ["query", "-timeout=2s", "nobody-answers"],
        ["query"],
        ["query", "a", "b", "c"],
        ["query", "-format=xml", "load"],
        ["query", "-relay-factor=256", "load"],
        ["query", "-relay-factor=x", "load"],
        ["query", "-timeout=5", "load"],
        ["query", "-tag=nonsense", "load"],
        ["query", "_serf_conflict"],
        ["query", "big", "x" * 1100],
        ["reachability", "-verbose"],
        ["rtt", "n-real"],
        ["rtt", "n-real", "n-ours"],
        ["rtt", "nobody"],
        ["rtt", "n-real", "nobody"],
        ["rtt"],
        ["rtt", "a", "b", "c"],
        ["keys"],
        ["keys", "-list"],
        ["keys", "-list", "-use=x"],
        ["keys", "-install", "xx"],
        ["keys", "-install", "AAAA"],
    ],
    ids=lambda words: " ".join(words)[:40],
)
def test_both_tools_say_the_same_of_an_agent(trio, kind, words):
    real, ours = (ask(tool, trio[kind], *words) for tool in ("serf", "serfctl"))
    assert ours.code == real.code
    if real.code == 0:
        assert ordered(ours.text) == ordered(real.text)
    elif "-name=(" in words:
        assert ours.text.startswith(real.text.rstrip())
    else:
        # Help and advice are freely worded, but what stands before is the same.
        theirs = real.text.partition("Usage:")[0].splitlines()
        assert set(filter(None, theirs)) <= set(ours.text.splitlines())


@BOTH_KINDS
@pytest.mark.parametrize(
    "words", [["members"], ["members", "-status=left"], ["info"]], ids=" ".join
)
def test_both_tools_give_the_same_json_of_an_agent(trio, kind, words):
    real, ours = (
        json.loads(ask(tool, trio[kind], *words, "-format=json").text)
        for tool in ("serf", "serfctl")
    )
    if words[0] == "info":
        assert {section: set(found) for section, found in ours.items()} == {
            section: set(found) for section, found in real.items()
        }
        for name in ("members", "failed", "left", "encrypted"):
            assert ours["serf"][name] == real["serf"][name]
        assert ours["agent"] == real["agent"]
        assert ours["tags"] == real["tags"]
    else:
        for answer in (real, ours):
            answer["members"] = sorted(answer["members"] or [], key=lambda member: member["name"])
        assert ours == real


@BOTH_KINDS
def test_both_tools_give_the_same_json_of_a_query(trio, kind):
    real, ours = (
        json.loads(ask(tool, trio[kind], "query", "-format=json", "-timeout=3s", "load").text)
        for tool in ("serf", "serfctl")
    )
    assert sorted(real.pop("Acks")) == sorted(ours.pop("Acks")) == ["n-ours", "n-real"]
    assert real == ours == {"Responses": {"n-ours": "hi\n", "n-real": "hi\n"}}


@BOTH_KINDS
def test_our_tool_shows_how_an_agent_is(trio, kind):
    answer = ask("serfctl", trio[kind], "status", "-format=json")
    assert answer.code == 0
    status = json.loads(answer.text)
    assert status["node"] == trio[kind].name
    assert status["addr"] == trio[kind].bind
    assert status["members"] == {"alive": 2, "leaving": 0, "left": 0, "failed": 1}
    assert [member["name"] for member in status["failed"]] == ["gone"]
    assert "State:         healthy\n" in ask("serfctl", trio[kind], "status").text


@BOTH_KINDS
@pytest.mark.parametrize("tool", TOOLS)
def test_keys_are_changed_on_all_members_by_either_tool(agents, tool, kind):
    old, new = (base64.b64encode(bytes([n]) * 32).decode() for n in (1, 2))
    agents.cluster({"n-real": "serf", "n-ours": "serfd"}, f"-encrypt={old}")
    agent = next(agent for agent in agents.all if agent.kind == kind)

    def said(*words: str) -> list[str]:
        answer = ask(tool, agent, "keys", *words)
        assert answer.code == 0, answer.text
        return answer.text.splitlines()

    listing = ["==> Asking all members for installed keys..."]
    listing += ["==> Keys gathered, listing cluster keys...", ""]
    assert said("-list") == [*listing, f"{old}  [2/2]"]
    assert said("-install", new) == [
        "==> Installing key on all members...", "==> Successfully installed key!",
    ]  # fmt: skip
    assert sorted(said("-list")) == sorted([*listing, f"{old}  [2/2]", f"{new}  [2/2]"])
    refused = ask(tool, agent, "keys", "-remove", old)
    assert refused.code == 1
    assert ordered(refused.text) == ordered(
        "==> Removing key on all members...\n"
        "failed:  n-ours  Removing the primary key is not allowed\n"
        "failed:  n-real  Removing the primary key is not allowed\n\n"
        "Error removing key: 2/2 nodes reported failure"
    )
    assert said("-use", new) == [
        "==> Changing primary key on all members...", "==> Successfully changed primary key!",
    ]  # fmt: skip
    assert said("-remove", old) == [
        "==> Removing key on all members...", "==> Successfully removed key!",
    ]  # fmt: skip
    assert said("-list") == [*listing, f"{new}  [2/2]"]


@BOTH_KINDS
def test_our_tool_watches_the_members_of_an_agent(agents, tmp_path, kind):
    agent, friend = agents.start(kind, "agent"), agents.start("serfd", "friend")
    output = tmp_path / "watch"
    with output.open("wb") as sink:
        watch = subprocess.Popen(
            [SERFCTL, "members", "-watch", f"-rpc-addr={agent.rpc_addr}"], stdout=sink, stderr=sink
        )
    try:

        def seen(what: str, name: str) -> bool:
            lines = [line.split()[2:] for line in output.read_text().splitlines()]
            return any(line[:2] == [what, name] for line in lines)

        def seen_a_change() -> bool:
            with agent.client() as client:
                client.tags({"changed": str(time.monotonic())})
            return seen("update", "agent")

        # The stream is open some time after the start.
        until("an update", seen_a_change)
        friend.join(agent)
        until("the join", lambda: seen("join", "friend"))
        friend.kill()
        until("the failure", lambda: seen("failed", "friend"))
        watch.send_signal(signal.SIGINT)
        assert watch.wait(60) == 0
        assert f"friend  {friend.bind}\n" in output.read_text()
        assert agent.is_running
    finally:
        watch.kill()
        watch.wait()


@BOTH_KINDS
def test_both_tools_print_info_with_the_same_sections_and_keys(trio, kind):
    def keys(text: str) -> list[str]:
        return [line.partition(" = ")[0] for line in text.splitlines()]

    real, ours = (ask(tool, trio[kind], "info") for tool in ("serf", "serfctl"))
    assert keys(ours.text) == keys(real.text)
    assert "\tmembers" in keys(ours.text)


@BOTH_KINDS
def test_a_join_that_nobody_answers_reads_the_same(trio, kind):
    nobody = f"127.0.0.1:{free_port()}"
    real, ours = (ask(tool, trio[kind], "join", nobody) for tool in ("serf", "serfctl"))
    assert real.code == ours.code == 1
    assert ours.text.rstrip() == real.text.rstrip()
    assert "connection refused" in ours.text


def test_both_tools_say_the_same_version_of_the_protocol():
    real, ours = (run(tool, "version").stdout.splitlines()[1] for tool in TOOLS.values())
    assert ours == real


@BOTH_KINDS
def test_the_other_kinds_tool_does_a_days_work(agents, kind):
    tool = OTHER_TOOL[kind]
    agent, friend = agents.start(kind, "agent"), agents.start("serfd", "friend")
    third = agents.start("serfd", "third")

    def works(*words: str) -> str:
        answer = ask(tool, agent, *words)
        assert answer.code == 0, answer.text
        return answer.text

    joined = works("join", friend.bind, third.bind)
    assert joined == "Successfully joined cluster by contacting 2 nodes.\n"
    updated = works("tags", "-set", "role=web", "-set=dc=east")
    assert updated == "Successfully updated agent tags\n"
    tags = {"role": "web", "dc": "east"}
    until_is("tags", lambda: friend.members()["agent"].tags, tags)
    works("tags", "-delete=role", "-set=dc=west")
    until_is("tags", lambda: friend.members()["agent"].tags, {"dc": "west"})
    third.kill()
    until_is("third as agent sees it", lambda: agent.statuses()["third"], "failed")
    assert works("force-leave", "third") == ""
    until_is("third as friend sees it", lambda: friend.statuses()["third"], "left")
    assert works("force-leave", "-prune", "third") == ""
    until_is("members of friend", friend.statuses, {"agent": "alive", "friend": "alive"})
    assert works("leave") == "Graceful leave complete\n"
    assert agent.exit_code() == 0
    until_is("agent as friend sees it", lambda: friend.statuses()["agent"], "left")


@BOTH_KINDS
def test_the_other_kinds_tool_monitors(agents, tmp_path, kind):
    agent = agents.start(kind, "agent")
    output = tmp_path / "monitor"
    argv: Sequence[str] = [
        TOOLS[OTHER_TOOL[kind]], "monitor", f"-rpc-addr={agent.rpc_addr}", "-log-level=DEBUG",
    ]  # fmt: skip
    with output.open("wb") as sink:
        monitor = subprocess.Popen(argv, stdout=sink, stderr=sink)
    try:
        # What happened before is told first, so the streams are open now.
        until("the log so far", lambda: "[INFO] agent: Serf agent starting" in output.read_text())
        with agent.client() as client:
            client.tags({"role": "monitored"})

        def told() -> bool:
            text = output.read_text()
            return (
                "[INFO] serf: EventMemberUpdate: agent" in text
                and 'Event: "member-update"' in text
                and "monitored" in text
            )

        until("the update on stream and monitor", told)
        monitor.send_signal(signal.SIGINT)
        assert monitor.wait(60) == 0
        assert agent.is_running
    finally:
        monitor.kill()
        monitor.wait()


@BOTH_KINDS
def test_the_other_kinds_monitor_says_when_the_agent_is_gone(agents, tmp_path, kind):
    agent = agents.start(kind, "agent")
    output = tmp_path / "monitor"
    with output.open("wb") as sink:
        monitor = subprocess.Popen(
            [TOOLS[OTHER_TOOL[kind]], "monitor", f"-rpc-addr={agent.rpc_addr}"],
            stdout=sink, stderr=sink,
        )  # fmt: skip
    try:
        until("the log so far", lambda: "Serf agent starting" in output.read_text())
        agent.kill()
        assert monitor.wait(60) == 1
        assert "Remote side ended the monitor! This usually means that the" in output.read_text()
    finally:
        monitor.kill()
        monitor.wait()
