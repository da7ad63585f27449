"""The node as one plugin sees it."""

from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock

import serfd
from serfd.errors import CommandError, ConfigError
from serfd.hooks.plugin_agent import Answers, PluginAgent
from serfd.metrics import Metrics
from serfd.serf.coordinates import Coordinate
from serfd.serf.events import Member, Status
from serfd.serf.queries import QueryAnswer, QueryDone, QueryParams

FAR = Coordinate((0.1,) + (0.0,) * 7, 1.5, 0.0, 1e-5)
HERE = Coordinate((0.0,) * 8, 1.5, 0.0, 1e-5)


def member(name: str, status: Status = Status.ALIVE, **tags: str) -> Member:
    return Member(name, b"\x7f\0\0\1", 7946, tags, status, bytes(6))


class Node:
    """Stands in for the daemon's agent."""

    name = "n2"

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.asked: list[tuple[str, bytes, QueryParams]] = []
        self.answered: Any = None
        self.query_over: Deferred[QueryDone] = Deferred()
        self.ran: dict[str, Any] = {}

    def members(self) -> list[Member]:
        return [
            member("n3", Status.FAILED, role="web"),
            member("n1", role="web", dc="east"),
            member("n2", role="db"),
            member("n4", Status.LEFT),
        ]

    def member(self, name: str) -> Member | None:
        return next((each for each in self.members() if each.name == name), None)

    def status_counts(self) -> dict[Status, int]:
        return {Status.ALIVE: 2}

    def stats(self) -> dict[str, dict[str, str]]:
        return {"serf": {"isolated": "false"}}

    def plugins(self) -> list[str]:
        return ["numbers"]

    def coordinate(self, name: str) -> Coordinate | None:
        return {"n1": FAR, "n2": HERE}.get(name)

    def query(self, name: str, payload: bytes, *, answered: Any, params: QueryParams) -> Any:
        self.asked.append((name, payload, params))
        self.answered = answered
        return self.query_over

    def run(self, argv: list[str], **given: Any) -> str:
        self.ran = {"argv": argv, **given}
        return "result"


@pytest.fixture
def node() -> Node:
    return Node()


@pytest.fixture
def agent(node: Node, tmp_path: Path) -> PluginAgent:
    return PluginAgent(node, "notebook", tmp_path / "state")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ({}, ["n1", "n2", "n3", "n4"]),
        ({"status": Status.ALIVE}, ["n1", "n2"]),
        ({"status": [Status.FAILED, Status.LEFT]}, ["n3", "n4"]),
        ({"tags": {"role": "web"}}, ["n1", "n3"]),
        ({"tags": {"role": "web|db", "dc": ".*st"}}, ["n1"]),
        ({"tags": {"dc": ""}}, ["n2", "n3", "n4"]),
        ({"status": Status.ALIVE, "tags": {"role": "web"}}, ["n1"]),
    ],
)
def test_members_are_found_by_status_and_tags_and_sorted(agent, wanted, names) -> None:
    assert [found.name for found in agent.members(**wanted)] == names


def test_a_pattern_that_is_none_is_refused(agent: PluginAgent) -> None:
    with pytest.raises(ValueError, match=r"missing \)"):
        agent.members(tags={"role": "(a"})


def test_one_member_and_this_node(agent: PluginAgent) -> None:
    assert agent.me == member("n2", role="db")
    assert agent.member("n1") == member("n1", role="web", dc="east")
    assert agent.member("n9") is None


def test_what_the_daemon_says_of_itself(agent: PluginAgent, node: Node) -> None:
    assert agent.version == serfd.__version__
    assert agent.stats() == {"serf": {"isolated": "false"}}
    assert agent.plugins() == ["numbers"]
    assert agent.status_counts() == {Status.ALIVE: 2}


def test_all_figures_can_be_read_and_the_process_is_measured(
    agent: PluginAgent, node: Node
) -> None:
    node.metrics.count("serf.events")
    agent.metrics.count("lines")
    figures = agent.metrics.all()
    assert figures.counters == {"serf.events": 1, "plugins.notebook.lines": 1}
    assert figures.gauges["runtime.sys_bytes"] > 1e6


def test_round_trips_are_known_between_members_with_coordinates(agent: PluginAgent) -> None:
    assert agent.rtt("n1") == pytest.approx(0.10002)
    assert agent.rtt("n1", "n2") == agent.rtt("n1")
    assert agent.rtt("n3") is None
    assert agent.coordinate() == HERE


def collect(answers: Answers) -> tuple[list[str], "Deferred[None]"]:
    senders: list[str] = []

    async def go() -> None:
        async for answer in answers:
            senders.append(answer.sender)

    steps: Coroutine[Any, Any, None] = go()
    return senders, Deferred.fromCoroutine(steps)


def test_a_querys_answers_come_one_by_one_until_it_is_over(agent, node) -> None:
    answers = agent.query("load", b"now", nodes=["n1"], tags={"role": "web"}, timeout=3)
    assert node.asked == [
        ("load", b"now", QueryParams(nodes=["n1"], tags={"role": "web"}, timeout=3))
    ]
    node.answered(QueryAnswer("n1", b"1", is_ack=False))
    senders, done = collect(answers)
    assert senders == ["n1"]
    node.answered(QueryAnswer("n3", b"", is_ack=True))
    node.answered(QueryAnswer("n4", b"2", is_ack=False))
    assert senders == ["n1", "n4"]
    assert not done.called
    assert answers.done == QueryDone(0, 0, 0)
    node.query_over.callback(QueryDone(1, 2, 3))
    assert done.called
    assert answers.done == QueryDone(1, 2, 3)


def test_a_query_that_cannot_be_asked_raises_where_its_answers_are_read(agent, node) -> None:
    node.query = lambda *args, **kwargs: fail(CommandError("no such luck"))
    _, done = collect(agent.query("load"))
    failed: list[Any] = []
    done.addErrback(failed.append)
    assert failed[0].check(CommandError)


def test_who_stops_listening_to_a_query_breaks_nothing(agent, node) -> None:
    _, done = collect(agent.query("load"))
    done.addErrback(lambda _: None)
    done.cancel()
    node.answered(QueryAnswer("n1", b"", is_ack=False))
    node.query_over.callback(QueryDone(0, 1, 1))


def test_a_program_gets_the_daemons_environment_without_what_systemd_told_it(
    agent, node, monkeypatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    monkeypatch.setenv("HOME", "/somewhere")
    assert agent.run(["true"]) == "result"
    assert node.ran["env"]["HOME"] == "/somewhere"
    assert "NOTIFY_SOCKET" not in node.ran["env"]
    agent.run(["true"], env={})
    assert node.ran["env"] == {}


def test_figures_have_the_plugins_name(agent: PluginAgent, node: Node) -> None:
    agent.metrics.count("lines", 3)
    agent.metrics.gauge("depth", 2)
    agent.metrics.sample("took", 0.5)
    assert node.metrics.counters["plugins.notebook.lines"] == 3
    assert node.metrics.gauges["plugins.notebook.depth"] == 2
    assert node.metrics.samples["plugins.notebook.took"].count == 1
    agent.metrics.sample("size", 70, unit="bytes", bounds=(64, 128))
    assert node.metrics.samples["plugins.notebook.size"].buckets == [0, 1, 0]


def test_the_state_dir_is_the_plugins_own_and_made_when_it_is_used(
    agent: PluginAgent, tmp_path: Path
) -> None:
    assert not (tmp_path / "state").exists()
    assert agent.state_dir == tmp_path / "state" / "notebook"
    assert agent.state_dir.stat().st_mode & 0o777 == 0o700


def test_without_a_state_dir_the_error_says_what_to_set(node: Node, tmp_path: Path) -> None:
    nowhere = PluginAgent(node, "notebook", None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="plugin 'notebook' keeps files: set state_dir"):
        _ = nowhere.state_dir
    (tmp_path / "file").touch()
    blocked = PluginAgent(node, "notebook", tmp_path / "file")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"state_dir: cannot make .*: Not a directory"):
        _ = blocked.state_dir


class Caller:
    """Calls at once, and notes what."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.called: list[object] = []

    def call(self, function: Any) -> "Deferred[object]":
        self.called.append(function())
        return succeed(None)


def test_calls_wait_until_the_plugin_runs_and_end_with_it(agent: PluginAgent) -> None:
    caller = Caller()
    agent.every(10, lambda: "every")
    end = agent.every(1, lambda: "ended")
    agent.later(5, lambda: "later")
    end()
    agent.serve(caller)
    caller.clock.pump([1.0] * 21)
    assert caller.called == ["later", "every", "every"]
    agent.later(100, lambda: "never")
    agent.serve(None)
    caller.clock.pump([50.0] * 4)
    assert caller.called == ["later", "every", "every"]
    assert caller.clock.getDelayedCalls() == []


def test_an_interval_is_longer_than_0(agent: PluginAgent) -> None:
    with pytest.raises(ValueError, match="an interval of 0 s, more than 0 expected"):
        agent.every(0, lambda: None)
