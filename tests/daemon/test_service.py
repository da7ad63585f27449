"""The running process: its signals, its reload, its end, and what it tells systemd."""

import os
import re
import signal
import socket
import textwrap
import time
from pathlib import Path

import pytest
from own_network import INTERFACE, ip, own_network
from processes import (
    LIMIT,
    SERFCTL,
    AgentProcess,
    all_see,
    everyone_sees,
    free_port,
    run,
    toml,
    until,
    until_is,
)

from serfd.rpc.client import ConnectionClosed
from serfd.wire.swim_messages import Ping, encode

pytestmark = pytest.mark.daemon

__all__ = ["own_network"]

# A member that does not answer is seen as failed within two seconds.
QUICK = {"gossip": {"probe_interval": "200ms", "probe_timeout": "100ms"}}

DIARY = """
from pathlib import Path
from twisted.internet.defer import Deferred
from serfd.hooks import Struct, hookimpl


class Plugin:
    class Settings(Struct, frozen=True):
        diary: str

    def __init__(self, agent, settings):
        self.agent, self.path = agent, Path(settings.diary)

    def note(self, text):
        with self.path.open("a") as file:
            print(text, file=file)

"""


def plugin(folder: Path, name: str, hooks: str) -> Path:
    """Write a plugin that keeps a diary; returns the diary's path."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(DIARY + textwrap.indent(textwrap.dedent(hooks), "    "))
    return folder / f"{name}.diary"


def switched_on(folder: Path, *names: str) -> dict[str, object]:
    """The settings that switch these plugins on."""
    plugins = {name: {"diary": str(folder / f"{name}.diary")} for name in names}
    return {"plugin_dirs": [str(folder)], "plugins": plugins}


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def logs(agent: AgentProcess, text: str) -> None:
    until(f"{agent.name} logs {text!r}", lambda: text in agent.log())


# Signals


@pytest.mark.parametrize(
    ("number", "setting", "code", "seen"),
    [
        (signal.SIGINT, {}, 0, "left"),
        (signal.SIGTERM, {}, 1, "failed"),
        (signal.SIGTERM, {"leave_on_terminate": True}, 0, "left"),
        (signal.SIGINT, {"skip_leave_on_interrupt": True}, 1, "failed"),
    ],
)
def test_a_signal_ends_it_with_or_without_a_farewell(agents, number, setting, code, seen):
    pair = agents.cluster(
        {"stays": "serfd", "goes": "serfd"}, configs={"serfd": {**QUICK, **setting}}
    )
    pair["goes"].signal(number)
    assert pair["goes"].exit_code() == code
    everyone_sees([pair["stays"]], {"stays": "alive", "goes": seen})
    shown = signal.strsignal(number).lower()
    assert f"[INFO] agent: Caught signal: {shown}\n" in pair["goes"].log()
    is_silent = "[WARN] serf: Shutdown without a Leave\n" in pair["goes"].log()
    assert is_silent == (seen == "failed")
    assert pair["goes"].log().endswith("[INFO] agent: shutdown complete\n")


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_ends_it_at_once(agents, tmp_path, second):
    diary = plugin(
        tmp_path / "plugins", "slow", "@hookimpl\nasync def stop(self):\n"
        "    self.note('stopping')\n    await Deferred()",
    )  # fmt: skip
    agent = agents.start("serfd", "slow", config=switched_on(diary.parent, "slow"))
    agent.signal(signal.SIGINT)
    until("its plugin is asked to stop", lambda: lines(diary) == ["stopping"])
    begun = time.monotonic()
    agent.signal(second)
    assert agent.exit_code() == 1
    # The plugin alone had 30 s for its stop.
    assert time.monotonic() - begun < 15


def test_sigquit_shows_where_every_thread_is_and_ends_even_what_hangs(agents, tmp_path):
    diary = plugin(
        tmp_path / "plugins", "busy", "@hookimpl\ndef member_update(self):\n"
        "    self.working = self.agent.in_thread(self.work)\n"
        "    while True: pass\n"
        "def work(self):\n"
        "    self.note('working')\n"
        "    while True: pass",
    )  # fmt: skip
    busy = agents.start("serfd", "busy", config=switched_on(diary.parent, "busy"))
    idle = agents.start("serfd", "idle")
    idle.join(busy)
    with idle.client() as client:
        client.tags({"busy": "loop"})
    until("its plugin is at work", lambda: lines(diary) == ["working"])
    for agent in (busy, idle):
        agent.signal(signal.SIGQUIT)
        assert agent.exit_code() == 2
        assert "(most recent call first):\n" in agent.log()
        assert re.search(r'serfd/service.py", line \d+ in run\n', agent.log())
    assert re.search(r'busy.py", line \d+ in member_update\n', busy.log())
    assert re.search(r'busy.py", line \d+ in work\n', busy.log())


def test_a_plugin_that_does_not_stop_is_given_up(agents, tmp_path):
    diary = plugin(
        tmp_path / "plugins", "slow", "@hookimpl\nasync def stop(self): await Deferred()"
    )
    config = {"hook_timeout": "500ms", **switched_on(diary.parent, "slow")}
    agent = agents.start("serfd", "slow", config=config)
    agent.signal(signal.SIGINT)
    assert agent.exit_code() == 0


def test_a_leave_by_rpc_is_answered_before_the_end(agents):
    pair = agents.cluster({"stays": "serfd", "goes": "serfd"})
    with pair["goes"].client() as client, pair["goes"].client() as other:
        assert other.members()
        client.leave()  # raises ConnectionClosed if the answer is lost
        with pytest.raises(ConnectionClosed):
            client.members()
        with pytest.raises(ConnectionClosed):
            other.members()
    assert pair["goes"].exit_code() == 0
    all_see([pair["stays"]], goes="left")


def test_serfctl_leave_says_that_it_is_done(agents):
    agent = agents.start("serfd", "alone")
    done = run(SERFCTL, "leave", f"-rpc-addr={agent.rpc_addr}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Graceful leave complete\n", "")
    assert agent.exit_code() == 0


def test_plugins_are_stopped_before_the_end_and_may_still_ask(agents, tmp_path):
    diary = plugin(
        tmp_path / "plugins",
        "polite",
        """
        @hookimpl
        async def stop(self):
            self.note("stop of one of %d" % len(self.agent.members()))
        """,
    )
    agent = agents.start("serfd", "one", config=switched_on(diary.parent, "polite"))
    agent.signal(signal.SIGTERM)
    assert agent.exit_code() == 1
    assert lines(diary) == ["stop of one of 1"]


# Addresses


def test_where_there_is_ipv6_alone_agents_bound_to_all_addresses_reach_each_other(
    own_network, agents
):
    ip(f"addr flush dev {INTERFACE}")
    ip(f"addr add fd00::7/64 dev {INTERFACE} nodad")
    one, other = (agents.start("serfd", name, host="0.0.0.0") for name in ("one", "other"))
    with one.client() as client:
        assert client.join([f"[fd00::7]:{other.port}"]) == 1
        everyone_sees([one, other], {"one": "alive", "other": "alive"})
        assert one.members()["other"].address == f"[fd00::7]:{other.port}"
        # Question and acks are packets.
        answers = client.query("load", want_ack=True, timeout=LIMIT)
        assert {next(answers)["From"] for _ in range(2)} == {"one", "other"}


# Joining at start


def test_one_answer_is_enough_for_a_join_at_start(agents):
    friend = agents.start("serfd", "friend")
    agent = agents.start("serfd", "agent", "-join=127.0.0.1:1", f"-join={friend.bind}")
    everyone_sees([agent, friend], {"agent": "alive", "friend": "alive"})


@pytest.mark.parametrize("profile", ["lan", "local"])
def test_one_join_of_two_strangers_makes_them_known_to_each_other(agents, profile):
    # Without exchanges of states that would mend it later.
    never = {"gossip": {"push_pull_interval": "0s"}}
    three = {
        name: agents.start("serfd", name, f"-profile={profile}", config=never)
        for name in ("agent", "one", "two")
    }
    with three["agent"].client() as client:
        assert client.join([three["one"].bind, three["two"].bind]) == 2
    everyone_sees(three.values(), dict.fromkeys(three, "alive"))


@pytest.mark.parametrize("end", ["kill", "terminate"])
def test_a_node_with_a_snapshot_comes_back_by_itself(agents, tmp_path, end):
    # Nobody looks for it: it must remember.
    never = {"reconnect_interval": "24h"}
    path = tmp_path / "snapshot"
    friend = agents.start("serfd", "friend", config=never)
    agent = agents.start("serfd", "agent", config={**never, "snapshot_path": str(path)})
    agent.join(friend)
    everyone_sees([agent, friend], {"agent": "alive", "friend": "alive"})
    until(
        "the snapshot names the friend", lambda: f"alive: friend {friend.bind}" in path.read_text()
    )
    if end == "kill":
        agent.kill()
    else:
        agent.signal(signal.SIGTERM)
        assert agent.exit_code() == 1
    all_see([friend], agent="failed")
    agent.restart()
    everyone_sees([agent, friend], {"agent": "alive", "friend": "alive"})
    assert "Re-joined to previously known node: friend" in agent.log()


def test_retry_join_goes_on_until_somebody_is_there(agents):
    friend = agents.prepare("serfd", "friend")
    bind = f"127.0.0.1:{free_port()}"
    agent = agents.start("serfd", "agent", f"-retry-join={bind}", "-retry-interval=1s")
    logs(agent, "connect: connection refused, retrying in 1s\n")
    friend.launch(bind, f"127.0.0.1:{free_port()}")
    everyone_sees([agent, friend], {"agent": "alive", "friend": "alive"})


def test_after_a_total_outage_those_who_were_joined_at_start_are_found_again(agents):
    # It forgets who failed, and tries nobody of its own accord.
    forgetful = {**QUICK, "reconnect_timeout": "1s", "reconnect_interval": "24h"}
    friend = agents.start("serfd", "friend")
    agent = agents.start(
        "serfd", "agent", f"-retry-join={friend.bind}", "-retry-interval=1s", config=forgetful
    )
    everyone_sees([agent, friend], {"agent": "alive", "friend": "alive"})
    friend.kill()
    everyone_sees([agent], {"agent": "alive"})
    friend.restart()
    everyone_sees([agent, friend], {"agent": "alive", "friend": "alive"})
    logs(agent, f"[INFO] agent: found 1 members again through {friend.bind}")


# Reload


class Reloads:
    """An agent with a file, and how the file is changed."""

    def __init__(self, agents, tmp_path: Path, table) -> None:
        self.path = tmp_path / "serfd.toml"
        self.write(table)
        self.agent = agents.start("serfd", "reloads", f"-config={self.path}")

    def write(self, table) -> None:
        self.path.write_text(table if isinstance(table, str) else toml(table))

    def reload(self, table, *, says: str = "[INFO] agent: Reload complete") -> None:
        """Change the file, and wait until the agent says what has come of it."""
        said = self.agent.log().count(says)
        self.write(table)
        self.agent.signal(signal.SIGHUP)
        until(f"the agent says {says!r}", lambda: self.agent.log().count(says) > said)


@pytest.fixture
def reloads(agents, tmp_path):
    return lambda table: Reloads(agents, tmp_path, table)


def test_a_reload_changes_the_tags_that_changed_in_the_file_and_others_see_it(agents, reloads):
    reloading = reloads({"tags": {"role": "web", "same": "file", "old": "yes"}})
    agent, friend = reloading.agent, agents.start("serfd", "friend")
    agent.join(friend)
    with agent.client() as client:
        client.tags({"same": "rpc", "new": "rpc", "by-rpc": "rpc"})
    reloading.reload({"tags": {"role": "db", "same": "file", "new": "file"}})
    for sees in (agent, friend):
        until_is(
            f"the tags as {sees.name} sees them",
            lambda sees=sees: sees.members()["reloads"].tags,
            {"role": "db", "same": "rpc", "new": "file", "by-rpc": "rpc"},
        )


def ping(agent: AgentProcess, name: str) -> None:
    """Ping somebody else, which is told at DEBUG, and the agent, until that is answered."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.settimeout(LIMIT)
        udp.sendto(encode(Ping(1, name)), ("127.0.0.1", agent.port))
        udp.sendto(encode(Ping(2, agent.name)), ("127.0.0.1", agent.port))
        udp.recv(65_536)


def test_a_reload_changes_what_is_logged(reloads):
    reloading = reloads({"log_level": "INFO"})
    agent = reloading.agent
    ping(agent, "before")
    reloading.reload({"log_level": "DEBUG"})
    ping(agent, "after")
    logs(agent, "[DEBUG] memberlist: ping for after from ")
    assert "ping for before" not in agent.log()


def test_a_reload_replaces_drops_in_and_removes_plugins_and_leaves_others_alone(reloads, tmp_path):
    folder = tmp_path / "plugins"
    hooks = "@hookimpl\ndef start(self): self.note('{0} starts')\n"
    hooks += "@hookimpl\ndef stop(self): self.note('{0} stops')\n"
    diaries = {
        name: plugin(folder, name, hooks.format(f"{name} 1")) for name in ("kept", "new", "gone")
    }
    reloading = reloads(switched_on(folder, "kept", "gone"))
    until("plugins start", lambda: lines(diaries["gone"]) and lines(diaries["kept"]))
    reloading.reload(switched_on(folder, "kept", "new"))
    assert {name: lines(path) for name, path in diaries.items()} == {
        "kept": ["kept 1 starts"],
        "new": ["new 1 starts"],
        "gone": ["gone 1 starts", "gone 1 stops"],
    }
    plugin(folder, "new", hooks.format("new 2"))
    reloading.reload(switched_on(folder, "kept", "new"))
    assert lines(diaries["new"]) == ["new 1 starts", "new 1 stops", "new 2 starts"]
    assert lines(diaries["kept"]) == ["kept 1 starts"]


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        ("tags = ", "not valid TOML"),
        ({"tags": {"role": "db"}, "log_level": "LOUD"}, "log_level 'LOUD' is unknown"),
        ({"tags": {"role": "db"}, "bogus": 1}, "unknown key 'bogus'"),
        ({"tags": {"role": "db"}, "plugins": {"nope": {}}}, "plugin 'nope'"),
    ],
)
def test_a_reload_of_a_broken_file_changes_nothing_and_says_why(reloads, broken, why):
    reloading = reloads({"tags": {"role": "web"}})
    reloading.reload(broken, says="[ERR] agent: Failed to reload configs, nothing is changed: ")
    assert why in reloading.agent.log()
    assert reloading.agent.members()["reloads"].tags == {"role": "web"}
    reloading.reload({"tags": {"role": "mended"}})
    assert reloading.agent.members()["reloads"].tags == {"role": "mended"}


def test_a_reload_with_tags_that_are_too_long_changes_nothing_else_either(reloads, tmp_path):
    hooks = "@hookimpl\ndef start(self): self.note('starts')\n"
    hooks += "@hookimpl\ndef stop(self): self.note('stops')\n"
    diary = plugin(tmp_path / "plugins", "old", hooks)
    before = {"tags": {"role": "web"}, **switched_on(diary.parent, "old")}
    reloading = reloads(before)
    agent = reloading.agent
    until("the plugin starts", lambda: lines(diary) == ["starts"])
    reloading.reload(
        {"tags": {"role": "x" * 600}, "log_level": "DEBUG"},
        says="[ERR] agent: Failed to reload configs, nothing is changed: Encoded length of tags "
        "exceeds limit of 512 bytes",
    )
    ping(agent, "somebody else")
    assert "[DEBUG]" not in agent.log()
    assert agent.members()["reloads"].tags == {"role": "web"}
    reloading.reload({**before, "tags": {"role": "db"}})
    assert agent.members()["reloads"].tags == {"role": "db"}
    assert lines(diary) == ["starts"]


def test_tags_in_a_file_outlive_reloads_and_restarts(agents, tmp_path):
    file = tmp_path / "tags.json"
    agent = agents.start("serfd", "tagged", f"-tags-file={file}")
    with agent.client() as client:
        client.tags({"role": "web", "dc": "east"})
        client.tags({"role": "db"}, delete=["dc"])
    agent.signal(signal.SIGHUP)
    logs(agent, "Reload complete")
    assert agent.members()["tagged"].tags == {"role": "db"}
    assert file.read_text() == '{\n  "role": "db"\n}'
    agent.kill()
    agent.restart()
    assert agent.members()["tagged"].tags == {"role": "db"}
    assert f"[INFO] agent: Restored 1 tag(s) from {file}" in agent.log()


def test_a_role_is_a_tag_that_a_reload_may_change(reloads):
    reloading = reloads({"role": "web", "tags": {"dc": "east"}})
    assert reloading.agent.members()["reloads"].tags == {"role": "web", "dc": "east"}
    told = "[WARN] agent: Deprecation warning: 'role' has been replaced with 'tags'"
    assert told in reloading.agent.log()
    reloading.reload({"role": "db", "tags": {"dc": "east"}})
    assert reloading.agent.members()["reloads"].tags == {"role": "db", "dc": "east"}
    assert "role has changed: needs a restart" not in reloading.agent.log()


def test_settings_that_are_raised_or_mean_nothing_are_warned_of(reloads):
    told = [
        "[WARN] agent: 'RetryInterval' is too low. Setting to 1s\n",
        "[WARN] agent: 'BroadcastTimeout' is too low. Setting to 1s\n",
        "[WARN] agent: 'RejoinAfterLeave' enabled without snapshot file\n",
    ]
    odd = {"retry_interval": "-1s", "broadcast_timeout": "999ms", "rejoin_after_leave": True}
    reloading = reloads(odd)
    logs(reloading.agent, told[-1])
    assert all(line in reloading.agent.log() for line in told)
    reloading.reload(odd)
    assert [reloading.agent.log().count(line) for line in told] == [2, 2, 2]
    reloading.reload({"retry_interval": "1s", "broadcast_timeout": "1s", "snapshot_path": "s"})
    assert [reloading.agent.log().count(line) for line in told] == [2, 2, 2]


def test_a_reload_says_what_needs_a_restart(reloads):
    reloading = reloads({"profile": "local"})
    reloading.reload({"profile": "local", "reconnect_interval": "5s", "rpc_auth": "secret"})
    log = reloading.agent.log()
    assert "[WARN] agent: reconnect_interval has changed: needs a restart" in log
    assert "[WARN] agent: rpc_auth has changed: needs a restart" in log
    assert "secret" not in log
    assert "profile has changed" not in log


# systemd


class Systemd:
    """The socket that systemd listens on, and all that came in."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.heard: list[list[str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.setblocking(False)

    def listen(self) -> list[list[str]]:
        """All messages so far, each as its lines."""
        while True:
            try:
                self.heard.append(self._socket.recv(65536).decode().split("\n"))
            except BlockingIOError:
                return self.heard

    def wait(self, line: str, *, times: int = 1) -> None:
        until(
            f"systemd hears {line!r} {times} times",
            lambda: sum(line in message for message in self.listen()) >= times,
        )

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def systemd(tmp_path):
    listening = Systemd(str(tmp_path / "notify"))
    yield listening
    listening.close()


def test_systemds_socket_may_have_no_place_in_the_file_system(agents, tmp_path):
    listening = Systemd(f"@serfd-test{tmp_path}")
    agents.start("serfd", "unit", env={"NOTIFY_SOCKET": listening.address})
    listening.wait("READY=1")
    listening.close()


def test_systemd_is_told_of_every_step_of_a_life(agents, systemd):
    env = {"NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": "200000", "WATCHDOG_PID": ""}
    agent = agents.start("serfd", "unit", env=env)
    systemd.wait("READY=1")
    [ready] = [message for message in systemd.listen() if "READY=1" in message]
    assert "STATUS=unit: 1 members, 0 failed, 0 left" in ready
    systemd.wait("WATCHDOG=1", times=5)
    friend = agents.start("serfd", "friend")
    friend.join(agent)
    systemd.wait("STATUS=unit: 2 members, 0 failed, 0 left")
    agent.signal(signal.SIGHUP)
    systemd.wait("READY=1", times=2)
    [reloading] = [message for message in systemd.listen() if "RELOADING=1" in message]
    [stamp] = [line for line in reloading if line.startswith("MONOTONIC_USEC=")]
    assert 0 <= time.monotonic() - int(stamp.partition("=")[2]) / 1e6 < 60
    agent.signal(signal.SIGINT)
    assert agent.exit_code() == 0
    systemd.wait("STOPPING=1")


def test_ready_comes_when_the_join_and_the_plugins_starts_are_done(agents, systemd, tmp_path):
    diary = plugin(
        tmp_path / "plugins",
        "waits",
        """
        @hookimpl
        async def start(self):
            self.note("starting with %d members" % len(self.agent.members()))
            await self.agent.in_thread(self.wait)
            self.note("started")

        def wait(self):
            with open(self.path.with_suffix(".gate")) as gate:
                gate.read()
        """,
    )
    gate = diary.with_suffix(".gate")
    os.mkfifo(gate)
    friend = agents.start("serfd", "friend")
    agent = agents.start(
        "serfd", "unit", f"-join={friend.bind}", config=switched_on(diary.parent, "waits"),
        env={"NOTIFY_SOCKET": systemd.address},
    )  # fmt: skip
    until("the plugin starts", lambda: lines(diary) == ["starting with 2 members"])
    assert agent.stats()
    assert not any("READY=1" in message for message in systemd.listen())
    gate.write_text("go")
    systemd.wait("READY=1")
    assert lines(diary) == ["starting with 2 members", "started"]


def test_without_systemd_nothing_is_told(agents, systemd):
    agent = agents.start("serfd", "free", env={"NOTIFY_SOCKET": ""})
    agent.signal(signal.SIGTERM)
    assert agent.exit_code() == 1
    assert systemd.listen() == []
