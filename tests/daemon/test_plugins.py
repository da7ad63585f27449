"""Plugins in real daemons: what they hear in a cluster, over a kill, a reload, a failure."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from processes import SERFCTL, AgentProcess, Agents, until

pytestmark = pytest.mark.daemon

DIARY = '''
"""Write down what happens; a user event `wait` hangs for ever, `fail` raises."""

from serfd.hooks import Struct, hookimpl
from twisted.internet.defer import Deferred


class Plugin:
    class Settings(Struct):
        file: str
        mark: str = ""

    def __init__(self, agent, settings):
        self._agent, self._settings = agent, settings

    def _note(self, line):
        with open(self._settings.file, "a") as diary:
            diary.write(f"{self._settings.mark}{line}\\n")

    @hookimpl
    def start(self):
        self._note("start")

    @hookimpl
    def reload(self, settings):
        self._settings = settings
        self._note("reload")

    @hookimpl
    def member_join(self, members):
        for member in members:
            self._note(f"join {member.name}")

    @hookimpl
    def member_failed(self, members):
        for member in members:
            self._note(f"failed {member.name}")

    @hookimpl
    async def user_event(self, event):
        if event.name == "wait":
            await Deferred()
        if event.name == "fail":
            raise ValueError("no such luck")
        self._note(f"event {event.name}")

    @hookimpl
    async def query(self, query):
        if query.name == "ask":
            return ",".join([answer.sender async for answer in self._agent.query("name")])
        return self._agent.name if query.name == "name" else None
'''


class Diary:
    """The plugin's file, and the daemon that has it."""

    def __init__(self, folder: Path, name: str = "diary") -> None:
        (folder / "plugins").mkdir(exist_ok=True)
        (folder / "plugins" / "diary.py").write_text(DIARY)
        self.file = folder / f"{name}.txt"
        self.name = name
        self.config: dict[str, Any] = {
            "plugin_dirs": [str(folder / "plugins")],
            "state_dir": str(folder / "state"),
            "plugins": {name: {"plugin": "diary", "file": str(self.file)}},
        }

    def lines(self) -> list[str]:
        return self.file.read_text().splitlines() if self.file.exists() else []

    def wait(self, line: str) -> None:
        until(f"{self.name} has the line {line!r}", lambda: line in self.lines())


def plugins(agent: AgentProcess) -> dict[str, dict[str, Any]]:
    """What `serfctl plugins` shows."""
    done = subprocess.run(
        [SERFCTL, "plugins", "-format=json", f"-rpc-addr={agent.rpc_addr}"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return {each["name"]: each for each in json.loads(done.stdout)["plugins"]}


def tell(agent: AgentProcess, *names: str) -> None:
    with agent.client() as client:
        for name in names:
            client.event(name, coalesce=False)


def test_a_plugin_hears_of_the_cluster_asks_it_and_is_listed(
    agents: Agents, tmp_path: Path
) -> None:
    diary = Diary(tmp_path)
    first = agents.start("serfd", "n1", "-profile=local", config=diary.config)
    other = agents.start("serfd", "n2", "-profile=local", config=Diary(tmp_path, "two").config)
    other.join(first)
    diary.wait("join n2")
    tell(other, "deploy")
    diary.wait("event deploy")
    with other.client() as client:
        answers = {a["From"]: a["Payload"] for a in client.query("ask") if a["Type"] == "response"}
    # Each asks all from within its answer; the answers come in any order.
    assert {name: sorted(who.split(b",")) for name, who in answers.items()} == {
        "n1": [b"n1", b"n2"],
        "n2": [b"n1", b"n2"],
    }
    other.kill()
    diary.wait("failed n2")
    assert diary.lines()[:2] == ["start", "join n1"]
    listed = plugins(first)["diary"]
    assert (listed["state"], listed["errors"], listed["lost"]) == ("running", 0, 0)
    assert listed["source"].endswith("diary.py (plugin_dirs)")


def test_what_a_durable_plugin_has_not_handled_comes_after_a_kill(
    agents: Agents, tmp_path: Path
) -> None:
    diary = Diary(tmp_path)
    diary.config["plugins"]["diary"]["durable"] = True
    agent = agents.start("serfd", "n1", config=diary.config)
    tell(agent, "one", "wait", "two", "three")
    diary.wait("event one")
    until("the rest waits", lambda: plugins(agent)["diary"]["waiting"] == 2)
    agent.kill()
    # A version of the plugin that does not hang.
    source = tmp_path / "plugins" / "diary.py"
    source.write_text(DIARY.replace("await Deferred()", "pass"))
    agent.restart()
    diary.wait("event three")
    assert diary.lines() == [
        "start", "join n1", "event one", "start", "event wait", "event two", "event three",
        "join n1",
    ][: len(diary.lines())]  # fmt: skip
    agent.signal(signal.SIGTERM)
    agent.exit_code()
    agent.restart()
    until("nothing waits", lambda: plugins(agent)["diary"]["waiting"] == 0)
    assert diary.lines().count("event three") == 1


def test_a_failing_plugin_is_shown_and_a_reload_with_its_new_file_heals_it(
    agents: Agents, tmp_path: Path
) -> None:
    diary = Diary(tmp_path)
    agent = agents.start("serfd", "n1", config=diary.config)
    tell(agent, "fail", "fail", "fail", "fail", "after")
    until("it is failing", lambda: plugins(agent)["diary"]["state"] == "failing")
    assert "ValueError: no such luck" in plugins(agent)["diary"]["last_error"]
    assert "plugin diary is failing" in subprocess.run(
        [SERFCTL, "status", f"-rpc-addr={agent.rpc_addr}"], capture_output=True, text=True
    ).stdout  # fmt: skip
    source = tmp_path / "plugins" / "diary.py"
    source.write_text(DIARY.replace('raise ValueError("no such luck")', "pass"))
    agent.signal(signal.SIGHUP)
    diary.wait("event after")
    until("it runs again", lambda: plugins(agent)["diary"]["state"] == "running")


def test_new_settings_go_to_the_plugin_that_runs(agents: Agents, tmp_path: Path) -> None:
    diary = Diary(tmp_path)
    agent = agents.prepare("serfd", "n1", config=diary.config)
    agents.launch(agent)
    diary.wait("join n1")
    config = tmp_path / "n1.toml"
    config.write_text(config.read_text() + 'mark = "new "\n')
    agent.signal(signal.SIGHUP)
    diary.wait("new reload")
    tell(agent, "x")
    diary.wait("new event x")
    assert diary.lines().count("start") == 1
