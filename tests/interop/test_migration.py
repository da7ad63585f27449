"""A living cluster moves from Serf to serfd as docs/migrating-from-serf.md tells, and back."""

import base64
import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from processes import (
    BIN,
    LIMIT,
    SERFD,
    AgentProcess,
    Agents,
    everyone_sees,
    free_port,
    until,
    until_is,
)

pytestmark = pytest.mark.interop

PAGE = (Path(__file__).parents[2] / "docs" / "migrating-from-serf.md").read_text(encoding="utf-8")
DIRECTORY = "/etc/serf"
KEYS = [base64.b64encode(bytes([byte]) * 16).decode() for byte in (1, 2)]
HANDLER = """\
#!/bin/sh
printf '%s %s %s\\n' "$SERF_SELF_NAME" "$SERF_USER_EVENT" "$(cat)" >> heard
"""


def blocks(section: str, kind: str) -> list[str]:
    """The examples of one kind in a section of the page."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


[DIFF] = blocks("Move a node", "diff")
BEFORE, AFTER = (line.partition("ExecStart=")[2] for line in DIFF.splitlines())
[CHECK] = blocks("Before the first node", "console")
LOOK = blocks("Move a node", "sh")[1].splitlines()


class Unit(AgentProcess):
    """A machine with a unit, as systemd runs it: the line after `ExecStart=`, and no more."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.directory = folder / "etc"
        self.directory.mkdir(parents=True)
        super().__init__("serf", config["node_name"], (), (), folder=folder, env={})
        self.bind, self.rpc_addr = config["bind"], config["rpc_addr"]
        (self.directory / "serf.json").write_text(json.dumps(config))

    def command(self, line: str) -> list[str]:
        """The line as it is typed or stands in the unit, with this machine's places."""
        program, *words = shlex.split(line.replace(DIRECTORY, str(self.directory)))
        return [{"/usr/bin/serfd": SERFD}.get(program, program), *words]

    def start(self, line: str) -> None:
        """Run the unit's line; wait until it answers, and see that it is the right program."""
        self.spawn(self.command(line))
        until(f"{self.name} answers", self.answers)
        kind = "python" if line == AFTER else "go"
        assert self.stats()["runtime"]["version"].startswith(kind)

    def type(self, line: str) -> str:
        """Type it into a terminal on this machine; gives what it prints."""
        env = {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "SERF_RPC_ADDR": self.rpc_addr,
        }
        done = subprocess.run(
            self.command(line), env=env, cwd=self.folder, timeout=LIMIT, capture_output=True,
            text=True,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, ""), line
        return done.stdout

    def heard(self) -> list[str]:
        """What its script was told, in order."""
        path = self.folder / "heard"
        return path.read_text().splitlines() if path.exists() else []


class Cluster:
    """Three machines, and all that must hold after each change of one."""

    def __init__(self, units: Sequence[Unit], tags: dict[str, dict[str, str]]) -> None:
        self.units = units
        self.tags = tags
        self.events: list[str] = []

    def restart(self, unit: Unit, line: str, number: signal.Signals) -> None:
        """What `systemctl restart` does after the unit's line was changed."""
        unit.signal(number)
        unit.exit_code()
        unit.start(line)
        self.is_whole()
        for look in LOOK:
            assert unit.name in unit.type(look)

    def is_whole(self) -> None:
        """All are alive to all, with their tags, and hear what each of them tells, once."""
        everyone_sees(self.units, {unit.name: "alive" for unit in self.units})
        for unit in self.units:
            until_is(
                f"the tags as {unit.name} sees them",
                lambda unit=unit: {
                    name: dict(member.tags) for name, member in unit.members().items()
                },
                self.tags,
            )
        for teller in self.units:
            payload = f"number-{len(self.events)}-from-{teller.name}"
            self.events.append(payload)
            teller.type(f"serf event -coalesce=false deploy {payload}")
            for unit in self.units:
                until_is(
                    f"what {unit.name}'s script has heard",
                    unit.heard,
                    [f"{unit.name} deploy {payload}" for payload in self.events],
                )


@pytest.fixture
def cluster(agents: Agents, tmp_path: Path) -> Iterator[Cluster]:
    handler = tmp_path / "handler"
    handler.write_text(HANDLER)
    handler.chmod(0o755)
    own: dict[str, dict[str, Any]] = {
        "one": {"tags": {"dc": "east", "role": "web"}},
        "two": {"Role": "db", "retry_interval": "2s", "protocol": 5.0},
        "three": {"tags_file": "tags.json", "enable_compression": False},
    }
    units: list[Unit] = []
    for name, settings in own.items():
        folder = tmp_path / name
        config = {
            "node_name": name, "bind": f"127.0.0.1:{free_port()}",
            "rpc_addr": f"127.0.0.1:{free_port()}", "keyring_file": "keys.json",
            "snapshot_path": "snapshot", "rejoin_after_leave": True,
            "event_handlers": [f"user:deploy={handler}"], **settings,
        }  # fmt: skip
        unit = Unit(folder, config)
        units.append(unit)
        agents.all.append(unit)
        (folder / "keys.json").write_text(json.dumps(KEYS[:1]))
        unit.start(BEFORE)
    units[2].type("serf tags -set dc=west -set note=<kept>")
    for unit in units[1:]:
        unit.join(units[0])
    tags = {
        "one": {"dc": "east", "role": "web"},
        "two": {"role": "db"},
        "three": {"dc": "west", "note": "<kept>"},
    }
    made = Cluster(units, tags)
    made.is_whole()
    return made


def test_the_check_is_good(cluster: Cluster) -> None:
    typed, printed = CHECK.removeprefix("$ ").split("\n", 1)
    for unit in cluster.units:
        assert unit.type(typed) == printed


def test_a_living_cluster_moves_one_node_at_a_time_and_one_goes_back(cluster: Cluster) -> None:
    one, two, three = cluster.units
    cluster.restart(one, AFTER, signal.SIGINT)
    cluster.restart(two, AFTER, signal.SIGTERM)
    # In between, somebody changes the keys of old and new nodes, and tags.
    for change in (f"-install={KEYS[1]}", f"-use={KEYS[1]}", f"-remove={KEYS[0]}"):
        one.type(f"serf keys {change}")
    cluster.restart(three, AFTER, signal.SIGINT)
    three.type("serfctl tags -set note=changed -delete dc")
    cluster.tags["three"] = {"note": "changed"}
    cluster.is_whole()
    for unit in cluster.units:
        assert json.loads((unit.folder / "keys.json").read_text()) == KEYS[1:]

    cluster.restart(three, BEFORE, signal.SIGINT)
    cluster.restart(one, BEFORE, signal.SIGTERM)
    assert (three.folder / "tags.json").read_text() == '{\n  "note": "changed"\n}'
