"""What scripts and plugins hear under serfd, in a cluster with real Serf agents."""

import signal
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from processes import LOCAL, AgentProcess, Agents, everyone_sees, until

pytestmark = pytest.mark.interop

SCRIPT = """\
#!/bin/sh
{ pwd; env | grep '^SERF_' | sort; echo --; cat; echo ==; } >> "$1"
"""
EVENTS = "member-join,member-update,member-leave,member-failed"

PLUGIN = """\
from serfd.hooks import Struct, hookimpl


class Plugin:
    class Settings(Struct, frozen=True):
        path: str

    def __init__(self, agent, settings):
        self.path = settings.path

    def note(self, what, members):
        with open(self.path, "a") as diary:
            for member in members:
                print(what, member.name, member.tags.get("role"), file=diary)

    @hookimpl
    def member_join(self, members):
        self.note("joined", members)

    @hookimpl
    async def member_update(self, members):
        self.note("updated", members)

    @hookimpl
    def member_leave(self, members):
        self.note("left", members)

    @hookimpl
    def member_failed(self, members):
        self.note("failed", members)
"""


class Run(NamedTuple):
    """One run of the script, as it wrote it down."""

    folder: str
    env: Mapping[str, str]
    stdin: tuple[str, ...]

    @property
    def event(self) -> str:
        return self.env["SERF_EVENT"]


def runs(path: Path) -> list[Run]:
    found: list[Run] = []
    text = path.read_text() if path.exists() else ""
    for record in text.split("==\n")[:-1]:
        head, _, stdin = record.partition("--\n")
        folder, *variables = head.splitlines()
        env = dict(variable.partition("=")[::2] for variable in variables)
        found.append(Run(folder, env, tuple(map(in_order, stdin.splitlines()))))
    return found


def in_order(line: str) -> str:
    """A member's line with its tags sorted."""
    *columns, tags = line.split("\t")
    return "\t".join([*columns, ",".join(sorted(tags.split(",")))])


def told(path: Path) -> set[tuple[str, str]]:
    """Event and member, one by one: a real agent tells of several at once."""
    return {(run.event, line) for run in runs(path) for line in run.stdin}


def happen(agents: Agents, first: AgentProcess, hear) -> None:
    """A real agent comes, changes and leaves; one of ours comes and is killed.

    Each step waits until it was heard: of two in one moment a real agent tells the last only.
    """
    comes = agents.start("serf", "comes", LOCAL, "-tag=role=web", "-tag=text=tab\there\nand a line")
    comes.join(first)
    hear("member-join", "comes", "web")
    with comes.client() as client:
        client.tags({"role": "db"})
    hear("member-update", "comes", "db")
    comes.signal(signal.SIGINT)
    hear("member-leave", "comes", "db")
    dies = agents.start("serfd", "dies", LOCAL, "-tag=role=web", "-tag=text=tab\there\nand a line")
    dies.join(first)
    hear("member-join", "dies", "web")
    dies.kill()
    hear("member-failed", "dies", "web")


def test_a_script_is_told_the_same_under_serfd_as_under_serf(agents, tmp_path):
    script = tmp_path / "script"
    script.write_text(SCRIPT)
    script.chmod(0o755)
    files = {kind: tmp_path / f"heard-by-{kind}" for kind in ("serf", "serfd")}
    for kind, path in files.items():
        agents.start(
            kind, f"{kind}-watches", LOCAL, f"-event-handler={EVENTS}={script} {path}",
            "-tag=role=watch", "-tag=my-tag.x=1 2", "-tag=ünï=x",
        )  # fmt: skip
    real, ours = agents.all
    ours.join(real)
    everyone_sees([real, ours], {"serf-watches": "alive", "serfd-watches": "alive"})

    def hear(event: str, name: str, role: str) -> None:
        for kind, path in files.items():
            until(
                f"the script under {kind} hears {event} of {name}",
                lambda path=path: any(
                    heard == event and line.startswith(f"{name}\t127.0.0.1\t{role}\t")
                    for heard, line in told(path)
                ),
            )

    happen(agents, real, hear)
    assert told(files["serfd"]) == told(files["serf"])
    assert ("member-join", "comes\t127.0.0.1\tweb\trole=web,text=tab\\there\\nand a line") in told(
        files["serfd"]
    )
    for kind, path in files.items():
        for run in runs(path):
            assert run.folder == str(tmp_path)
            assert {k: v for k, v in run.env.items() if k != "SERF_EVENT"} == {
                "SERF_SELF_NAME": f"{kind}-watches",
                "SERF_SELF_ROLE": "watch",
                "SERF_TAG_ROLE": "watch",
                "SERF_TAG_MY_TAG_X": "1 2",
                "SERF_TAG__N_": "x",
            }


def test_a_dropped_in_plugin_is_told_of_real_agents_and_ours(agents, tmp_path):
    folder, diary = tmp_path / "plugins", tmp_path / "diary"
    folder.mkdir()
    (folder / "diary.py").write_text(textwrap.dedent(PLUGIN))
    config = {"plugin_dirs": [str(folder)], "plugins": {"diary": {"path": str(diary)}}}
    ours = agents.start("serfd", "ours", LOCAL, config=config)
    real = agents.start("serf", "real", LOCAL)
    real.join(ours)
    words = {
        "member-join": "joined",
        "member-update": "updated",
        "member-leave": "left",
        "member-failed": "failed",
    }

    def hear(event: str, name: str, role: str) -> None:
        line = f"{words[event]} {name} {role}"
        until(f"the diary says {line!r}", lambda: line in diary.read_text().splitlines())

    happen(agents, real, hear)
    lines = diary.read_text().splitlines()
    assert lines[0] == "joined ours None"
    assert "joined real None" in lines
    assert [line for line in lines if line.split()[1] in ("comes", "dies")] == [
        "joined comes web",
        "updated comes db",
        "left comes db",
        "joined dies web",
        "failed dies web",
    ]
