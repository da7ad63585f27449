"""`serf` drives our daemon, `serfctl` a real agent; both print the same of the same agent."""

import json
import re
import signal
import subprocess
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
    """Lines without what is arbitrary: their order and that of tags."""
    return sorted(
        re.sub(r"\S+=\S+", lambda tags: ",".join(sorted(tags[0].split(","))), line.rstrip())
        for line in text.splitlines()
    )


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    """One agent of each kind, and one that failed; nobody changes anything here."""
    agents = Agents(tmp_path_factory.mktemp("trio"))
    kinds = {"n-real": "serf", "n-ours": "serfd", "gone": "serfd"}
    own = {"n-real": ["-tag=role=web", "-tag=dc=east"], "n-ours": ["-tag=role=db"]}
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
    ],
    ids=" ".join,
)
def test_both_tools_say_the_same_of_an_agent(trio, kind, words):
    real, ours = (ask(tool, trio[kind], *words) for tool in ("serf", "serfctl"))
    assert ours.code == real.code
    if real.code == 0:
        assert ordered(ours.text) == ordered(real.text)
    elif "-name=(" in words:
        assert ours.text.startswith(real.text.rstrip())
    else:
        # Help and advice are freely worded, but the first line is the same, if there is one.
        theirs, mine = real.text.splitlines()[0], ours.text.splitlines()[0]
        assert mine.startswith(theirs) or theirs.startswith("Usage:")


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
