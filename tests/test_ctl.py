"""serfctl, command by command: what it asks, what it prints and how it ends."""

import base64
import json
import os
import pty
import signal
import ssl
import subprocess
import sys

import pytest
from certificates import Authority
from recorded_agent import HELLO, RecordedAgent, frames, reply
from serfctl_runs import SERFCTL, member_map, no_environment, recorded, run, started

from serfd import __version__, ctl, ctl_commands

__all__ = ["no_environment", "run"]

# Commands against real agents' answers.


@pytest.mark.parametrize(
    ("name", "argv", "printed"),
    [
        ("go-join", "join 127.0.0.1:17002", "Successfully joined cluster by contacting 1 nodes.\n"),
        ("go-leave", "leave", "Graceful leave complete\n"),
        ("go-force-leave-unknown", "force-leave nobody", ""),
        ("go-force-leave-prune", "force-leave -prune n2", ""),
        ("go-tags", "tags -set color=red -delete dc", "Successfully updated agent tags\n"),
        ("go-members-filtered-nomatch", "members -name zzz", "\n"),
        (
            "go-members-filtered-nomatch",
            "members -name zzz -format json",
            '{\n  "members": null\n}\n',
        ),
        (
            "go-members-filtered-empty",
            "members",
            "n1  127.0.0.1:17001  alive  dc=east,role=web\n"
            "n2  127.0.0.1:17002  alive  role=db\n"
            "n3  127.0.0.1:17003  alive\n",
        ),
        (
            "go-members-filtered",
            "members -name n.* -status=alive --tag role=web|db -detailed",
            "n1  127.0.0.1:17001  alive  dc=east,role=web  "
            "Protocol Version: 5  Available Protocol Range: [2, 5]\n"
            "n2  127.0.0.1:17002  alive  role=db           "
            "Protocol Version: 5  Available Protocol Range: [2, 5]\n",
        ),
    ],
)
def test_a_command_asks_what_serfs_asks_and_prints_what_serfs_prints(run, name, argv, printed):
    with recorded(name) as agent:
        found = run(*argv.split(), "--rpc-addr", agent.address)
    assert found == (0, printed, "")
    assert agent.received == frames(name, "client")


def test_members_are_written_as_json_in_serfs_shape(run):
    with recorded("go-members-filtered-empty") as agent:
        code, out, err = run("members", "-format=json", "-rpc-addr", agent.address)
    assert (code, err) == (0, "")
    assert out.startswith(
        '{\n  "members": [\n    {\n      "name": "n1",\n      "addr": "127.0.0.1:17001",\n'
        '      "port": 17001,\n      "tags": {\n        "dc": "east",\n        "role": "web"\n'
        '      },\n      "status": "alive",\n      "protocol": {\n        "max": 5,\n'
        '        "min": 2,\n        "version": 5\n      }\n    },\n'
    )
    assert [member["name"] for member in json.loads(out)["members"]] == ["n1", "n2", "n3"]
    assert out == json.dumps(json.loads(out), indent=2) + "\n"


def test_info_is_sections_of_sorted_values(run):
    with recorded("go-stats") as agent:
        code, out, err = run("info", "-rpc-addr", agent.address)
    assert (code, err) == (0, "")
    assert out.startswith("agent:\n\tname = n1\nevent_handlers:\n\tquery:load = ")
    assert out.endswith("tags:\n\tdc = east\n\trole = web\n")


def test_info_is_written_as_sorted_json(run):
    with recorded("go-stats") as agent:
        code, out, err = run("info", "-format", "json", "-rpc-addr", agent.address)
    assert (code, err) == (0, "")
    assert out == json.dumps(json.loads(out), indent=2, sort_keys=True) + "\n"
    assert json.loads(out)["agent"] == {"name": "n1"}


def test_the_deprecated_role_is_a_tag_pattern(run):
    with recorded("go-members-filtered-nomatch") as agent:
        code, out, err = run("members", "-role", "web", "-rpc-addr", agent.address)
    assert (code, out) == (0, "\n")
    assert err == "Deprecation warning: 'Role' has been replaced with 'Tags'\n"
    assert b"\xa4Tags\x81\xa4role\xa3web" in agent.received


@pytest.mark.parametrize(
    ("name", "argv", "told"),
    [
        (
            "go-join-fail",
            "join 127.0.0.1:1",
            "Error joining the cluster: 1 error occurred:\n\t* Failed to join 127.0.0.1: "
            "dial tcp 127.0.0.1:1: connect: connection refused\n\n\n",
        ),
        (
            "go-tags-too-big",
            "tags -set a=b",
            "Error setting tags: Encoded length of tags exceeds limit of 512 bytes\n",
        ),
        (
            "go-members-filtered-badregex",
            "members -name (",
            "Error retrieving members: client closed\n"
            "The agent closes like this when a pattern is no valid regex.\n",
        ),
        (
            "go-members-filtered-badregex",
            "members",
            "Error retrieving members: client closed\n",
        ),
        (
            "go-auth-missing",
            "members",
            "Error retrieving members: Authentication required\n"
            "The agent's rpc_auth is asked for: give it with -rpc-auth or SERF_RPC_AUTH.\n",
        ),
        (
            "go-auth-missing",
            "monitor",
            "Error starting stream: Authentication required\n"
            "The agent's rpc_auth is asked for: give it with -rpc-auth or SERF_RPC_AUTH.\n",
        ),
        (
            "go-auth-wrong",
            "leave -rpc-auth wrong",
            "Error connecting to Serf agent: Invalid authentication token\n"
            "The agent's rpc_auth is asked for: give it with -rpc-auth or SERF_RPC_AUTH.\n",
        ),
    ],
)
def test_what_the_agent_refuses_is_told_on_stderr(run, name, argv, told):
    with recorded(name) as agent:
        found = run(*argv.split(), "-rpc-addr", agent.address)
    assert found == (1, "", told)


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("members", {"Members": [5]}),
        ("members", {"Members": [{"Name": 5}]}),
        ("members", {"Members": [{"Tags": "x"}]}),
        ("members -detailed", {"Members": [{"Addr": 5}]}),
        ("members -format json", {"Members": [{"Name": 5}, {"Name": "a"}]}),
        ("info", {"agent": {"name": 5}}),
        ("info -format json", {"agent": {"name": "a", b"x": "b"}}),
    ],
)
def test_an_answer_that_is_nonsense_is_told_and_not_a_traceback(run, command, answer):
    with RecordedAgent(HELLO + reply(2, "", answer)) as agent:
        code, out, err = run(*command.split(), "-rpc-addr", agent.address)
    assert (code, out) == (1, "")
    assert ": the agent's answer is not as Serf's: " in err


def test_nobody_listening_is_told_with_what_to_do(run):
    code, out, err = run("members", "-rpc-addr", "127.0.0.1:1")
    assert (code, out) == (1, "")
    assert err == (
        "Error connecting to Serf agent: dial tcp 127.0.0.1:1: connect: connection refused\n"
        "Is serfd running there? If it is elsewhere, say where: -rpc-addr HOST:PORT or unix:PATH, "
        "or SERF_RPC_ADDR.\n"
    )


def test_address_and_token_come_from_the_environment(run, monkeypatch):
    with recorded("go-auth-ok") as agent:
        monkeypatch.setenv("SERF_RPC_ADDR", agent.address)
        monkeypatch.setenv("SERF_RPC_AUTH", "sekret")
        code, out, err = run("members")
    assert (code, err) == (0, "")
    assert out.startswith("n9  ")
    assert agent.received == frames("go-auth-ok", "client")


@pytest.fixture
def tls(tmp_path):
    """An agent's side of TLS that asks for a certificate; files of the client's side."""
    authority = Authority(tmp_path)
    asking = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    asking.load_cert_chain(*authority.sign("server", "127.0.0.1"))
    asking.verify_mode = ssl.CERT_REQUIRED
    asking.load_verify_locations(authority.file)
    certificate, key = authority.sign("alice", client=True)
    return asking, {"ca": str(authority.file), "cert": str(certificate), "key": str(key)}


def test_an_agent_is_asked_within_tls(run, tls):
    asking, files = tls
    options = [f"-rpc-tls-{name}={file}" for name, file in files.items()]
    with RecordedAgent(frames("go-stats", "server"), hangs_up=True, tls=asking) as agent:
        code, out, err = run("info", "-rpc-addr", agent.address, *options)
    assert (code, err) == (0, "")
    assert out.startswith("agent:\n\tname = n1\n")


def test_files_for_tls_come_from_the_environment_unless_there_are_options(run, tls, monkeypatch):
    asking, files = tls
    for name, file in files.items():
        monkeypatch.setenv(f"SERFD_RPC_TLS_{name.upper()}", file)
    with RecordedAgent(frames("go-stats", "server"), hangs_up=True, tls=asking) as agent:
        assert run("info", "-rpc-addr", agent.address)[0] == 0
    with RecordedAgent(b"", tls=asking) as agent:
        code, _, err = run("info", "-rpc-addr", agent.address, "-rpc-tls-ca", "none")
    assert code == 1
    assert "-rpc-tls-ca none: No such file or directory\n" in err


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["-rpc-tls-cert=c"], "-rpc-tls-cert is for TLS, which -rpc-tls-ca switches on: give both"),
        (["-rpc-tls-key=k"], "-rpc-tls-key is the key of -rpc-tls-cert: give both."),
        (
            ["-rpc-tls-ca=a", "-rpc-tls-key=k"],
            "-rpc-tls-key is the key of -rpc-tls-cert: give both",
        ),
    ],
)
def test_half_of_what_tls_needs_is_told(run, options, why):
    code, out, err = run("members", *options)
    assert (code, out) == (1, "")
    assert err.startswith(why)
    assert "Usage: serfctl members" in err


def test_an_agent_is_asked_over_a_unix_socket(run, tmp_path, monkeypatch):
    path = str(tmp_path / "rpc.sock")
    for way in ("option", "environment"):
        argv = ["info"]
        with RecordedAgent(frames("go-stats", "server"), hangs_up=True, path=path) as agent:
            if way == "option":
                argv += ["-rpc-addr", agent.address]
            else:
                monkeypatch.setenv("SERF_RPC_ADDR", agent.address)
            code, out, err = run(*argv)
        assert (code, err) == (0, "")
        assert out.startswith("agent:\n\tname = n1\n")
        os.unlink(path)


def test_options_win_over_the_environment(run, monkeypatch):
    monkeypatch.setenv("SERF_RPC_ADDR", "127.0.0.1:1")
    monkeypatch.setenv("SERF_RPC_AUTH", "wrong")
    with recorded("go-auth-ok") as agent:
        code, _, _ = run("members", "-rpc-addr", agent.address, "-rpc-auth=sekret")
    assert code == 0
    assert agent.received == frames("go-auth-ok", "client")


def test_an_empty_address_in_the_environment_counts_as_none(run, monkeypatch):
    monkeypatch.setattr(ctl_commands, "RPC_ADDR", "127.0.0.1:1")
    monkeypatch.setenv("SERF_RPC_ADDR", "")
    _, _, err = run("members")
    assert "127.0.0.1:1: connect: connection refused" in err


# Wrong command lines.


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["members", "-tag", "bad"], "Error: Invalid tag: 'bad'\nExpected KEY=VALUE.\n"),
        (["members", "-tag", "=x"], "Error: Invalid tag: '=x'\nExpected KEY=VALUE.\n"),
        (["tags", "-set", "x"], "Error: Invalid tag: 'x'\nExpected KEY=VALUE.\n"),
        (
            ["members", "-format", "xml"],
            'Encoding error: Invalid output format "xml"\nExpected text or json.\n',
        ),
        (
            ["info", "-format", "xml"],
            'Encoding error: Invalid output format "xml"\nExpected text or json.\n',
        ),
        (["help", "membres"], "Unknown command: membres\nDid you mean members?\n"),
    ],
)
def test_a_wrong_value_is_told_before_anybody_is_asked(run, argv, told):
    assert run(*argv) == (1, "", told)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["join"], "At least one address to join must be specified."),
        (["join", "-replay"], "At least one address to join must be specified."),
        (["force-leave"], "A node name must be specified to force leave."),
        (["force-leave", "a", "b"], "A node name must be specified to force leave."),
        (["tags"], "At least one -set or -delete must be specified."),
        (["members", "-nam", "x"], "flag provided but not defined: -nam\nDid you mean -name?"),
        (["members", "-name"], "flag needs an argument: -name"),
    ],
)
def test_misuse_is_told_with_the_commands_help(run, argv, told):
    assert run(*argv) == (1, "", f"{told}\n\n{ctl.COMMANDS[argv[0]].help()}\n")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], ""),
        (["bogus"], "Unknown command: bogus\n\n"),
        (["membres"], "Unknown command: membres\nDid you mean members?\n\n"),
        (["bogus", "--help"], "Unknown command: bogus\n\n"),
        (["\x1b[2J"], "Unknown command: \\x1b[2J\n\n"),
        (["-rpc-addr", "x", "members"], "Unknown command: x\n\n"),
    ],
)
def test_no_or_an_unknown_command_ends_in_127_with_the_usage(run, argv, told):
    assert run(*argv) == (127, "", f"{told}{ctl.general_usage()}\n")


def test_options_before_the_command_are_refused(run):
    code, out, err = run("-rpc-addr=x", "members")
    assert (code, out) == (1, "")
    assert err == (
        "Invalid flags before the subcommand. If these flags are for\n"
        "the subcommand, please put them after the subcommand.\n\n"
        f"{ctl.COMMANDS['members'].help()}\n"
    )


def test_extra_arguments_are_ignored_but_told(run):
    with recorded("go-leave") as agent:
        code, out, err = run("leave", "n3", "-rpc-addr", agent.address)
    assert (code, out) == (0, "Graceful leave complete\n")
    assert err == "serfctl leave: ignored: n3\n"


# Help, version, keygen.


def test_the_usage_lists_all_commands_sorted(run):
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert out.startswith(
        "Usage: serfctl [--version] [--help] <command> [<args>]\n\nAvailable commands are:\n"
        "    completion      Prints a script that completes command lines\n"
        "    event           "
    )
    assert list(ctl.COMMANDS) == sorted(ctl.COMMANDS)
    assert run("help") == (0, out, "")


@pytest.mark.parametrize("name", list(ctl.COMMANDS))
@pytest.mark.parametrize("argv", ["{} --help", "{} -h", "{} x -help", "help {}", "--help {}"])
def test_the_help_of_a_command_says_everything_it_takes(run, name, argv):
    command = ctl.COMMANDS[name]
    code, out, err = run(*argv.format(name).split())
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: serfctl {name}")
    assert command.summary in out
    assert command.example in out
    assert all(f"\n  -{option.name}" in out and option.help in out for option in command.options)
    assert max(map(len, out.split("\n"))) <= 90


def test_commands_that_ask_an_agent_tell_of_the_environment():
    asks_nobody = {"completion", "help", "keygen", "plugin", "version"}
    for name, command in ctl.COMMANDS.items():
        told = "SERF_RPC_ADDR" in command.help() and "SERF_RPC_AUTH" in command.help()
        assert told is (name not in asks_nobody)


@pytest.mark.parametrize("command", [c for c in ctl.COMMANDS.values() if c.example])
def test_examples_are_right_command_lines(command):
    words = command.example.replace("'", "").split()
    assert words[:2] == ["serfctl", command.name]
    parsed = ctl.parse(words[2:], command.options, options_first=command.options_first)
    assert bool(parsed.arguments) <= bool(command.arguments)


@pytest.mark.parametrize("argv", [["version"], ["--version"], ["-v"], ["join", "-version", "x"]])
def test_the_version_comes_with_the_protocols(run, argv):
    told = f"{__version__}\nAgent Protocol: 5 (Understands back to: 2)\n"
    assert run(*argv) == (0, told, "")


def test_what_looks_like_help_after_dashes_is_an_argument(run):
    with recorded("go-force-leave-unknown") as agent:
        found = run("force-leave", "-rpc-addr", agent.address, "--", "-h")
    assert found == (0, "", "")
    assert b"\xa4Node\xa2-h" in agent.received


@pytest.mark.parametrize("command", ["event", "query"])
def test_a_payload_may_look_like_an_option(run, command):
    with recorded(f"go-{command}") as agent:
        assert run(command, "-rpc-addr", agent.address, "deploy", "-rpc-addr")[0] == 0
    assert b"\xa7Payload\xc4\x09-rpc-addr" in agent.received
    assert "Options stand before NAME" in run(command, "-help")[1]


def test_every_key_is_32_new_random_bytes_in_base64(run):
    keys = {run("keygen", "x")[1] for _ in range(3)}
    assert len(keys) == 3
    assert {len(base64.b64decode(key, validate=False)) for key in keys} == {32}
    assert all(key.endswith("=\n") and len(key) == 45 for key in keys)


# Monitor.


def test_monitor_prints_log_and_events_until_the_agent_is_gone(run):
    with recorded("go-monitor") as agent:
        code, out, err = run("monitor", "-rpc-addr", agent.address)
    assert code == 1
    assert "[INFO] agent: Serf agent starting\n" in out
    assert (
        'Event Info:\n\tEvent: "user"\n\tCoalesce: false\n\tLTime: 1\n\tName: "ev1"\n'
        "\tPayload: []byte{0x70, 0x61, 0x79}\n"
    ) in out
    assert err == (
        "\nRemote side ended the monitor! This usually means that the\n"
        "remote side has exited or crashed.\n"
    )


def test_a_log_level_that_is_none_is_refused_by_the_agent(run):
    answers = HELLO + reply(2) + reply(3, "Unknown log level: ZZZ")
    with RecordedAgent(answers) as agent:
        found = run("monitor", "-log-level", "zzz", "-rpc-addr", agent.address)
    assert found == (1, "", "Error starting monitor: Unknown log level: ZZZ\n")
    assert b"\xa8LogLevel\xa3zzz" in agent.received


def test_a_record_that_is_nonsense_ends_the_monitor(run):
    answers = HELLO + reply(2) + reply(3) + reply(2, "", {"Event": "member-join", "Members": [5]})
    with RecordedAgent(answers) as agent:
        code, out, err = run("monitor", "-rpc-addr", agent.address)
    assert (code, out) == (1, "")
    assert err.startswith("Error starting monitor: the agent's answer is not as Serf's: ")


def test_an_interrupt_ends_the_monitor_in_order():
    answers = HELLO + reply(2) + reply(3) + reply(3, "", {"Log": "hello"})
    with (
        RecordedAgent(answers, when=(b"stop", reply(4) + reply(5))) as agent,
        started("monitor", "-rpc-addr", agent.address) as child,
    ):
        assert child.stdout.readline() == "hello\n"
        child.send_signal(signal.SIGINT)
        assert child.communicate() == ("", "")
    assert child.returncode == 0
    assert agent.received.endswith(
        b"\x82\xa7Command\xa4stop\xa3Seq\x04\x81\xa4Stop\x03"
        b"\x82\xa7Command\xa4stop\xa3Seq\x05\x81\xa4Stop\x02"
    )


def test_an_interrupt_ends_the_monitor_although_the_agent_goes_meanwhile():
    answers = HELLO + reply(2) + reply(3) + reply(3, "", {"Log": "hello"})
    with (
        RecordedAgent(answers, when=(b"stop", b"")) as agent,
        started("monitor", "-rpc-addr", agent.address) as child,
    ):
        assert child.stdout.readline() == "hello\n"
        child.send_signal(signal.SIGINT)
        assert child.communicate() == ("", "")
    assert child.returncode == 0


# The process.


def test_a_reader_that_goes_away_ends_it_quietly():
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed, started("version", stdout=closed) as child:
        assert child.communicate()[1] == ""
    assert child.returncode == 141


def test_a_full_disk_is_told():
    with open("/dev/full", "wb") as full, started("version", stdout=full) as child:
        assert child.communicate()[1] == (
            "serfctl: cannot write its output: No space left on device\n"
        )
    assert child.returncode == 1


def test_every_locale_gets_utf_8():
    answer = reply(2, "", {"Members": [member_map("ü\udcff")]})
    with RecordedAgent(HELLO + answer) as agent:
        done = subprocess.run(
            [*SERFCTL, "members", "-rpc-addr", agent.address],
            env={**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
            capture_output=True,
            check=True,
        )
    assert done.stdout == "ü\\xff  10.0.0.1:1  alive\n".encode()


def test_at_a_terminal_a_long_wait_is_explained_and_can_be_interrupted():
    terminal, other_end = pty.openpty()
    with RecordedAgent(HELLO) as agent:
        child = started("leave", "-rpc-addr", agent.address, stderr=other_end)
        os.close(other_end)
        with os.fdopen(terminal, "rb", buffering=0) as screen:
            told = screen.read(1000)
            child.send_signal(signal.SIGINT)
            assert child.communicate()[0] == ""
    assert told.startswith(b"Waiting for the agent to tell the others and to stop")
    assert child.returncode == 130


def test_it_starts_without_slow_imports():
    slow = "argparse dataclasses enum json re selectors socket ssl textwrap twisted typing"
    with recorded("go-members-filtered-empty") as agent:
        code = (
            f"import sys; sys.path[:0] = {sys.path!r}; from serfd.ctl import main; "
            f"main(['members', '-rpc-addr', {agent.address!r}]); "
            f"print(*set({slow!r}.split()) & set(sys.modules))"
        )
        done = subprocess.run(
            [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True
        )
    assert done.stdout.endswith("n3  127.0.0.1:17003  alive\n\n")
