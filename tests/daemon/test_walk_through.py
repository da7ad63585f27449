"""What the README tells to type, typed."""

import os
import re
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import BIN, LIMIT, SERFCTL, until

pytestmark = pytest.mark.daemon

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
ENV = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
PORTS = (7946, 7947, 7373, 7374)


def blocks(section: str, kind: str) -> list[str]:
    """The examples of one kind in a section of the README."""
    text = README.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


DAEMONS = [
    line
    for block in blocks("A cluster in three terminals", "sh")
    for line in block.splitlines()
    if line.startswith("serfd ")
]
"""What is typed into the first and the second terminal."""
ASKED = re.findall(
    r"^\$ (.*)\n((?:[^$\n].*\n)*)", blocks("A cluster in three terminals", "console")[0], re.M
)
"""What is typed into the third, and what it prints."""


class Terminal:
    """A window in which a daemon runs."""

    def __init__(self, line: str, screen: Path, folder: Path) -> None:
        self.screen = screen
        with screen.open("ab") as output:
            self.process = subprocess.Popen(
                shlex.split(line, comments=True), stdout=output, stderr=output, env=ENV, cwd=folder
            )

    def shows(self, text: str) -> None:
        until(f"{text!r} on the screen", lambda: text in self.screen.read_text())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Desk:
    """All windows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.opened: list[Terminal] = []

    def type(self, line: str) -> Terminal:
        terminal = Terminal(line, self.folder / f"screen-{len(self.opened)}", self.folder)
        self.opened.append(terminal)
        terminal.shows("Serf agent starting")
        return terminal

    def close(self) -> None:
        for terminal in self.opened:
            terminal.close()
            print(f"--- {terminal.process.args}:\n{terminal.screen.read_text()}")


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    # What is typed has these ports in it. Whoever has an agent running on them keeps it.
    for port in PORTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                pytest.skip(f"something runs on port {port}, which the README uses")
    desk = Desk(tmp_path)
    yield desk
    desk.close()


def ask(line: str) -> str:
    """Type it into the third terminal; gives what it prints."""
    done = subprocess.run(shlex.split(line), env=ENV, timeout=LIMIT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), line
    return done.stdout


def status(name: str) -> str:
    [line] = [line for line in ask("serfctl members").splitlines() if line.startswith(f"{name} ")]
    return line.split()[2]


def test_a_cluster_in_three_terminals(desk):
    first, second = DAEMONS
    one, two = desk.type(first), desk.type(second)
    [(join, joined), (members, both)] = ASKED
    assert ask(join) == joined
    assert ask(members) == both
    # Ctrl-C in the second terminal.
    two.process.send_signal(signal.SIGINT)
    assert two.process.wait(LIMIT) == 0
    until("agent-two has left", lambda: status("agent-two") == "left")
    # Start it again, join again, and end it with `kill -9`.
    two = desk.type(second)
    assert ask(join) == joined
    until("agent-two is alive", lambda: status("agent-two") == "alive")
    two.process.kill()
    two.process.wait()
    until("agent-two has failed", lambda: status("agent-two") == "failed")
    # Started once more, it is found without a join.
    desk.type(second)
    until("agent-two is back", lambda: status("agent-two") == "alive")
    for event in ("Join", "Leave", "Failed"):
        one.shows(f"EventMember{event}: agent-two 127.0.0.1")


def test_serfctl_help_lists_the_rest():
    assert "monitor" in ask(f"{SERFCTL} help")


def test_a_file_is_looked_at_used_and_read_again(desk):
    serfd = "serfd --config my.toml"
    assert serfd in "\n".join(blocks("Configuration", "sh"))
    path = desk.folder / "my.toml"
    path.write_text('node_name = "mine"\nbind = "127.0.0.1:7946"\n')
    done = subprocess.run(
        ["serfd", "--check", "--config", "my.toml"], env=ENV, cwd=desk.folder, timeout=LIMIT
    )
    assert done.returncode == 0
    terminal = desk.type(serfd)
    with path.open("a") as file:
        file.write('tags = { role = "web" }\n')
    terminal.process.send_signal(signal.SIGHUP)
    until("the tag is there", lambda: "role=web" in ask("serfctl members"))


def test_the_plugin_greets_every_node_that_joins(desk):
    [plugin], [settings] = blocks("Plugins", "python"), blocks("Plugins", "toml")
    (desk.folder / "plugins.d").mkdir()
    (desk.folder / "plugins.d" / "greeter.py").write_text(plugin)
    (desk.folder / "my.toml").write_text(settings)
    first, second = DAEMONS
    one = desk.type(f"{first.partition('#')[0]} --config my.toml")
    one.shows("agent-one greets agent-one at 127.0.0.1:7946")
    desk.type(second)
    ask("serfctl join 127.0.0.1:7947")
    one.shows("agent-one greets agent-two at 127.0.0.1:7947")
