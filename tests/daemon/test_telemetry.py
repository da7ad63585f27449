"""What the running daemon counts, and its log in other forms and at other places."""

import json
import re
import signal
import socket
import sys
import threading
from pathlib import Path

import pytest
from processes import AgentProcess, Agents, run, until

pytestmark = pytest.mark.daemon

WITH_SYSLOG_AT = """
import sys
from serfd import config

config.SYSLOG_PATHS = (sys.argv.pop(1),)
from serfd.daemon import main

sys.exit(main())
"""
"""The program, with another place where syslog listens."""


class Heard:
    """A socket, and all that came in."""

    def __init__(self, bound: socket.socket) -> None:
        self._socket = bound
        bound.settimeout(0)
        self.datagrams: list[bytes] = []

    @property
    def port(self) -> int:
        return self._socket.getsockname()[1]

    def lines(self) -> list[str]:
        while True:
            try:
                self.datagrams.append(self._socket.recv(1 << 20))
            except BlockingIOError:
                return b"".join(self.datagrams).decode().splitlines()


@pytest.fixture
def statsd():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bound:
        bound.bind(("127.0.0.1", 0))
        yield Heard(bound)


@pytest.fixture
def statsite():
    """A port, and all that was sent there when it is closed."""
    got: list[bytes] = []
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()

        def read() -> None:
            connection, _ = listening.accept()
            with connection:
                while piece := connection.recv(1 << 20):
                    got.append(piece)

        reading = threading.Thread(target=read, daemon=True)
        reading.start()
        yield listening.getsockname()[1], got, reading


def test_a_whole_life_is_told_to_statsd_and_statsite(agents, statsd, statsite):
    port, got, reading = statsite
    config = {
        "statsd_addr": f"127.0.0.1:{statsd.port}",
        "statsite_addr": f"127.0.0.1:{port}",
        "snapshot_path": "counts.snapshot",
    }
    agent = agents.start("serfd", "counts", config=config)
    agents.start("serfd", "friend").join(agent)
    with agent.client() as client:
        client.call("event", {"Name": "deploy it", "Payload": b"", "Coalesce": False})
        client.leave()
    assert agent.exit_code() == 0
    reading.join(60)
    lines = statsd.lines()
    assert b"".join(got).decode().splitlines() == lines
    assert max(map(len, statsd.datagrams)) <= 1400
    form = re.compile(r"serf-agent\.[!-9;-{}~]+:-?\d+\.\d{6}\|(c|g|ms)")
    assert [line for line in lines if not form.fullmatch(line)] == []
    for line in (
        "serf-agent.serf.events.deploy_it:1.000000|c",
        "serf-agent.serf.events:1.000000|c",
        "serf-agent.serf.member.left:1.000000|c",
        f"serf-agent.{socket.gethostname()}.memberlist.health.score:0.000000|g",
    ):
        assert line in lines
    told = [float(re.split("[:|]", line)[1]) for line in lines if "serf.member.join" in line]
    assert sum(told) == 2
    assert any(re.fullmatch(r"serf-agent\.serf\.snapshot\.appendLine:.*\|ms", x) for x in lines)


def test_sigusr1_tells_all_since_the_start_and_changes_nothing(agents):
    agent = agents.start("serfd", "counts")
    shown = re.compile(
        r"^\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \+0000 UTC\]"
        r"\[C\] 'serf-agent\.serf\.member\.join': Count: 1 Sum: 1\.000$",
        re.MULTILINE,
    )
    agent.signal(signal.SIGUSR1)
    until("it reports", lambda: len(shown.findall(agent.log())) == 1)
    agent.signal(signal.SIGUSR1)
    until("it reports again", lambda: len(shown.findall(agent.log())) == 2)
    assert "'serf-agent.runtime.sys_bytes': " in agent.log()
    assert "Caught signal" not in agent.log()
    agent.signal(signal.SIGTERM)
    assert agent.exit_code() == 1


def test_without_an_address_no_samples_are_kept(agents):
    agent = agents.start("serfd", "counts")
    agent.signal(signal.SIGUSR1)
    until("it reports", lambda: "serf.member.join" in agent.log())
    # Garbage collections are measured for who is told of them only.
    assert "gc_pause_ns" not in agent.log()


# Logs


def test_the_log_can_be_objects(agents):
    agent = agents.start("serfd", "objects", config={"log_format": "json"})
    agent.signal(signal.SIGHUP)
    until("it has reloaded", lambda: "Reload complete" in agent.log())
    lines = [line for line in agent.log().splitlines() if line.startswith("{")]
    told = [json.loads(line) for line in lines]
    assert {tuple(each) for each in told} == {("time", "level", "component", "message")}
    assert all(
        re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", each["time"]) for each in told
    )
    [start] = [each for each in told if each["message"] == "Serf agent starting"]
    assert (start["level"], start["component"]) == ("INFO", "agent")
    # No line of a log in the other form is between them.
    assert "[INFO]" not in agent.log()


def test_another_form_of_the_log_needs_a_restart(agents, tmp_path):
    agent = agents.start("serfd", "objects", config={"log_format": "json"})
    (tmp_path / "objects.toml").write_text('log_format = "text"\nenable_syslog = true\n')
    agent.signal(signal.SIGHUP)
    until("it has reloaded", lambda: "Reload complete" in agent.log())
    for key in ("log_format", "enable_syslog"):
        assert f'"message": "{key} has changed: needs a restart"' in agent.log()


def logging_to(agents: Agents, path: Path, *options: str) -> AgentProcess:
    """An agent that seeks syslog there; not started."""
    command = [sys.executable, "-c", WITH_SYSLOG_AT, str(path)]
    agent = AgentProcess(
        "serfd", "logs", command, ["-syslog", *options], folder=path.parent, env={}
    )
    agents.all.append(agent)
    return agent


def test_the_log_goes_to_syslog_as_a_real_agents_and_survives_its_restart(agents, tmp_path):
    path, config = tmp_path / "log", tmp_path / "logs.toml"
    config.write_text('syslog_facility = "local3"\n')
    agent = logging_to(agents, path, f"-config-file={config}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(str(path))
        agents.launch(agent)
        syslog = Heard(bound)
        pattern = rf"<157>[A-Z][a-z]{{2}} [ 1-3]\d \d\d:\d\d:\d\d serfd\[{agent.pid}\]: "
        until(
            "it says hello", lambda: any("agent: Serf agent starting" in x for x in syslog.lines())
        )
        assert all(re.match(pattern, line) for line in syslog.lines())
    path.unlink()
    config.write_text('syslog_facility = "local3"\nlog_level = "WARN"\nprofile = "wan"\n')
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(str(path))
        syslog = Heard(bound)
        agent.signal(signal.SIGHUP)
        until(
            "it tells the new one", lambda: any("profile has changed" in x for x in syslog.lines())
        )
        agent.signal(signal.SIGTERM)
        agent.exit_code()
        # The new level holds here too.
        assert not any("Reload complete" in line for line in syslog.lines())


def test_without_a_syslog_it_does_not_start_and_says_what_to_do(tmp_path):
    path = tmp_path / "log"
    ended = run(sys.executable, "-c", WITH_SYSLOG_AT, str(path), "-syslog", "-bind=127.0.0.1:0")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        f"serfd: Syslog setup failed: nobody listens at {path}; start a syslog service, or set "
        "enable_syslog = false\n"
    )


def test_a_plugins_own_logger_is_heard(agents, tmp_path):
    folder = tmp_path / "plugins"
    folder.mkdir()
    (folder / "foreign.py").write_text(
        "import logging\n"
        "from serfd.hooks import hookimpl\n\n\n"
        "class Plugin:\n"
        "    def __init__(self, agent): pass\n\n"
        "    @hookimpl\n"
        "    def start(self):\n"
        "        logging.getLogger('mylib').info('hidden')\n"
        "        logging.getLogger('mylib').warning('is heard')\n"
    )
    config = {"plugin_dirs": [str(folder)], "plugins": {"foreign": {}}}
    agent = agents.start("serfd", "hears", config=config)
    until("it is heard", lambda: "[WARN] mylib: is heard" in agent.log())
    assert "mylib: hidden" not in agent.log()
