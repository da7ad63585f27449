"""The program's command line: what it reads, in which order, and what it says of mistakes."""

import base64
import re
import socket

import pytest
from processes import SERFD, Records, everyone_sees, free_port, run, toml, until

from serfd import __version__

pytestmark = pytest.mark.daemon

ANYWHERE = ("-bind=127.0.0.1:0", "-rpc-addr=127.0.0.1:0")
LOG_LINE = re.compile(r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d \[[A-Z]+\] ")


def refused(*options, cwd=None):
    """What serfd says about why it does not start: one line."""
    done = run(SERFD, *options, cwd=cwd)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if not LOG_LINE.match(line)]
    assert len(said) == 1, said
    assert said[0].startswith("serfd: ")
    return said[0].removeprefix("serfd: ")


# Mistakes


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("node_name = ", "not valid TOML: Invalid value (at "),
        ("nod_name = 'a'", "unknown key 'nod_name'; did you mean 'node_name'?"),
        ("[gossip]\nprobe = 1", "unknown key 'probe' in [gossip]"),
        ("log_level = 'LOUD'", "log_level 'LOUD' is unknown, expected one of TRACE, DEBUG,"),
        ("tags = ['web']", "Expected `object`, got `array`, found ['web'] - at `tags`"),
        ("protocol = 9", "Expected `int` <= 5, found 9 - at `protocol`"),
        ("[gossip]\nprobe_interval = '1 s'", "'1 s' is not a duration like '500ms', '10s'"),
        ("[gossip]\nprobe_timeout = '2s'", "must be shorter than probe_interval (1s)"),
        ("advertise = '127.0.0.1:99999'", "'99999' is not a port, expected 0 to 65535"),
        ("encrypt_key = 'c2hvcnQ='", "encrypt_key holds 5 bytes, expected 16, 24 or 32"),
        ("encrypt_key = 'no base64!'", "encrypt_key is not base64"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_the_file_and_what_was_expected(tmp_path, text, says):
    (tmp_path / "serfd.toml").write_text(text)
    line = refused(*ANYWHERE, "--config", "serfd.toml", cwd=tmp_path)
    assert line.startswith("serfd.toml: ")
    assert says in line
    assert "c2hvcnQ=" not in line
    # --check finds the same before anybody restarts a daemon.
    assert refused("--check", "--config", "serfd.toml", cwd=tmp_path) == line


@pytest.mark.parametrize(
    ("files", "options", "says"),
    [
        ({}, ["-config=nope.toml"], "cannot read nope.toml: No such file or directory"),
        ({}, ["-config-dir=nope"], "cannot read nope: No such file or directory"),
        ({"a.toml": b"\xff"}, ["-config=a.toml"], "a.toml: not UTF-8 text"),
        ({}, ["-keyring-file=nope"], "keyring_file nope: No such file or directory"),
        ({"k": b"{}"}, ["-keyring-file=k"], "keyring_file k: expected a JSON list of base64 keys"),
        ({"k": b"[]"}, ["-keyring-file=k"], "keyring_file k: expected a JSON list of base64 keys"),
        ({"k": b"["}, ["-keyring-file=k"], "keyring_file k: "),
        ({"k": b'["AAAA"]'}, ["-keyring-file=k"], "keyring_file k: one of its keys holds 3 bytes"),
        ({}, ["-encrypt=AAAA"], "encrypt_key holds 3 bytes, expected 16, 24 or 32"),
        ({}, [f"-encrypt={'A' * 22}==", "-keyring-file=k"], "exclude each other: give one"),
        ({}, ["-tag=web"], "Invalid tag: 'web', expected KEY=VALUE"),
        ({"t": b""}, ["-tags-file=t"], "tags_file t: Failed to decode tags file: Expecting value"),
        ({"t": b'{"a": "%s"}' % (b"x" * 600)}, ["-tags-file=t"], "Encoded length of tags exceeds"),
        ({}, ["-tags-file=t", "-tag=a=b"], "Tags config not allowed while using tag files: "),
        ({}, ["-tags-file=t", "-role=web"], "Tags config not allowed while using tag files: "),
        ({"old.json": b"{"}, ["-config-dir=."], "old.json: not valid JSON: Expecting property na"),
        ({"old": b'{"nodename": "a"}'}, ["-config-file=old"], "did you mean 'node_name'?"),
        ({}, [f"-tag=a={'x' * 600}"], "Encoded length of tags exceeds limit of 512 bytes"),
        ({}, ["-protocol=five"], "-protocol: 'five' is not a number"),
        ({}, ["-retry-interval=soon"], "-retry-interval: 'soon' is not a duration like '500ms'"),
        ({}, ["-retry-interval=--1s"], "-retry-interval: '--1s' is not a duration like '500ms'"),
        ({}, ["-bind=127.0.0.1:nobodys-port"], "bind: 'nobodys-port' is not a port, 0 to 65535, "),
        ({}, ["-check", "-rpc-addr=127.0.0.1:-5"], "rpc_addr: '-5' is not a port, 0 to 65535, "),
        ({}, ["-advertise=:7946"], "advertise ':7946' has no host"),
        ({}, ["-profile=moon"], "profile"),
        ({}, ["-iface=nope0"], "interface 'nope0' does not exist; there are "),
        ({}, ["-discover=a", "-mdns-iface=nope0"], "interface 'nope0' does not exist; there are"),
        ({}, ["-mdns-iface=lo"], "mDNS interface specified without enabling mDNS discovery: "),
        (
            {},
            ["-discover=a", "-mdns-disable-ipv4", "-mdns-disable-ipv6"],
            "Invalid mDNS configuration: both IPv4 and IPv6 are disabled",
        ),
        ({}, ["-iface=lo", "-bind=127.0.0.9:0"], "interface 'lo' has no address '127.0.0.9'"),
        ({}, ["-bind=198.51.100.7:7946"], "cannot listen on 198.51.100.7:7946 (TCP, bind): "),
        ({}, ["-bind=nobody.invalid"], "bind: cannot resolve 'nobody.invalid'"),
        ({}, ["-rpc-addr=nobody.invalid:1"], "rpc_addr: cannot resolve 'nobody.invalid'"),
        ({}, ["-event-handler=bogus=x"], "Invalid event script: Event 'bogus' invoking 'x'"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_mistake_in_an_option_or_a_file_it_names_is_told_in_one_line(
    tmp_path, files, options, says
):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    line = refused(*ANYWHERE, *options, cwd=tmp_path)
    assert says in line
    assert "AAAA" not in line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--nod=a"], "flag provided but not defined: -nod"),
        (["-join"], "flag needs an argument: -join"),
        (["-check=perhaps"], 'invalid boolean value "perhaps" for -check'),
        (["---node=a"], "bad flag syntax: ---node=a"),
        (["agent", "join"], "unexpected argument 'join'"),
    ],
)
def test_a_mistake_in_the_spelling_of_options_is_told_with_where_to_look(options, says):
    done = run(SERFD, *options)
    assert done.returncode == 2
    assert done.stderr.startswith(f"serfd: {says}")
    assert done.stderr.endswith("\nserfd --help lists the options.\n")


def test_an_option_that_is_nearly_right_is_guessed():
    assert "did you mean -node?" in run(SERFD, "--nod=a").stderr.lower()


@pytest.mark.parametrize(
    ("plugin", "says"),
    [
        (None, "plugin 'mine', switched on by [plugins.mine], was not found"),
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this"),
        ("def", "plugin 'mine' cannot be imported"),
        ("x = 1", "there is no class named Plugin"),
        ("class Plugin:\n    def __init__(self, agent): 1 / 0", "ZeroDivisionError: division"),
    ],
)
def test_a_plugin_that_cannot_be_had_is_told_at_start_and_by_check(tmp_path, plugin, says):
    if plugin is not None:
        (tmp_path / "mine.py").write_text(plugin)
    (tmp_path / "serfd.toml").write_text(
        toml({"plugin_dirs": [str(tmp_path)], "plugins": {"mine": {}}})
    )
    line = refused(*ANYWHERE, "-config=serfd.toml", cwd=tmp_path)
    assert says in line
    assert refused("--check", "-config=serfd.toml", cwd=tmp_path) == line
    # The node was built and is a member of its own cluster, which is of no interest any more.
    assert run(SERFD, *ANYWHERE, "-config=serfd.toml", cwd=tmp_path).stderr == f"serfd: {line}\n"


@pytest.mark.parametrize(
    ("kind", "option", "says"),
    [
        (socket.SOCK_STREAM, "-bind", "(TCP, bind): Address already in use; another agent may"),
        (socket.SOCK_DGRAM, "-bind", "(UDP, bind): Address already in use; another agent may"),
        (socket.SOCK_STREAM, "-rpc-addr", "(TCP, rpc_addr): Address already in use; another agen"),
    ],
)
def test_a_port_that_is_taken_is_named(kind, option, says):
    with socket.socket(socket.AF_INET, kind) as taken:
        taken.bind(("127.0.0.1", free_port()))
        if kind == socket.SOCK_STREAM:
            taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        line = refused(*ANYWHERE, f"{option}={address}")
    assert line.startswith(f"cannot listen on {address} {says}")


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("127.0.0.1:1", "Failed to join 127.0.0.1: dial tcp 127.0.0.1:1: connect: connection refu"),
        ("nobody.invalid", "Failed to resolve nobody.invalid: lookup nobody.invalid: no such host"),
        ("127.0.0.1:x", "'x' is not a port"),
    ],
)
def test_a_join_at_start_that_nobody_answers_ends_the_daemon(target, says):
    assert says in refused(*ANYWHERE, f"-join={target}")


def test_retry_join_gives_up_when_told_to():
    line = refused(*ANYWHERE, "-retry-join=127.0.0.1:1", "-retry-interval=1s", "-retry-max=1")
    assert "no address of retry_join answered in 2 tries: " in line
    assert "connection refused" in line


# What it reads


def test_check_says_that_all_is_good_and_binds_nothing(tmp_path):
    (tmp_path / "quiet.py").write_text("class Plugin:\n    def __init__(self, agent): ...\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = {"bind": address, "rpc_addr": address, "plugin_dirs": ["."]}
        (tmp_path / "serfd.toml").write_text(toml({**config, "plugins": {"quiet": {}}}))
        done = run(SERFD, "--check", "--config", "serfd.toml", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "The configuration is good. Plugins: quiet.\n"


@pytest.mark.parametrize("spelling", ["-version", "--version", "-v"])
def test_it_tells_its_version(spelling):
    done = run(SERFD, spelling)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")


def test_its_help_names_every_option():
    from serfd.daemon import OPTIONS

    done = run(SERFD, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for option in OPTIONS:
        assert f"\n  -{option.name} " in done.stdout
    short = run(SERFD, "agent", "-node=a", "-h")
    assert (short.returncode, short.stdout, short.stderr) == (0, done.stdout, "")


def test_negative_numbers_and_durations_are_taken_as_serf_takes_them(tmp_path):
    (tmp_path / "serfd.toml").write_text("retry_max_attempts = 5")
    odd = ("-retry-max=-1", "-protocol=-1", "-retry-interval=-1s", "-broadcast-timeout", "-1s")
    done = run(SERFD, "-check", *ANYWHERE, "-config=serfd.toml", *odd, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_files_count_in_their_order_then_directories_sorted_by_name_then_options(agents, tmp_path):
    folder = tmp_path / "conf.d"
    folder.mkdir()
    tags = {"from": "first", "first": "yes"}
    (tmp_path / "first.toml").write_text(toml({"node_name": "first", "tags": tags}))
    tags = {"from": "b", "b": "yes"}
    (folder / "b.toml").write_text(toml({"node_name": "b", "tags": tags}))
    (folder / "a.toml").write_text(toml({"node_name": "a", "tags": {"from": "a", "a": "yes"}}))
    (folder / "c.toml.disabled").write_text("this is no TOML")
    agent = agents.start(
        "serfd", "flag", "--config", "first.toml", "--config-dir=conf.d", "--tag", "flag=yes"
    )
    everyone_sees([agent], {"flag": "alive"})
    assert agent.members()["flag"].tags == {
        "from": "b", "first": "yes", "a": "yes", "b": "yes", "flag": "yes",
    }  # fmt: skip


@pytest.mark.parametrize(
    "spell",
    [
        lambda name, value: [f"-{name}={value}"],
        lambda name, value: [f"--{name}={value}"],
        lambda name, value: [f"-{name}", value],
        lambda name, value: [f"--{name}", value],
    ],
    ids=["-name=value", "--name=value", "-name value", "--name value"],
)
def test_options_are_spelled_as_serf_takes_them(agents, spell):
    key = base64.b64encode(bytes(16)).decode()
    options = {"tag": "role=web", "profile": "wan", "encrypt": key, "log-level": "debug"}
    words = [word for name, value in options.items() for word in spell(name, value)]
    agent = agents.start("serfd", "named", *words, "-disable-compression")
    assert agent.members()["named"].tags == {"role": "web"}
    for line in ("Encrypted: true", "Profile: wan", "Compression: false", "Node name: 'named'"):
        assert line in agent.log()


def test_the_banner_tells_ports_that_were_chosen_freely(agents, tmp_path):
    agent = agents.prepare("serfd", "free")
    agent.launch("127.0.0.1:0", "127.0.0.1:0")

    def told(what):
        found = re.search(rf"{what}: '(127.0.0.1:\d+)'", agent.log())
        return found and found[1]

    agent.rpc_addr = until("the RPC address is told", lambda: told("RPC addr"))
    agent.bind = told("Bind addr")
    until("it answers", agent.answers)
    assert agent.members()["free"].address == agent.bind
    # And it is there for others.
    friend = agents.start("serfd", "friend")
    records = Records(agent, "member-join")
    friend.join(agent)
    joined = records.wait("the join of friend", lambda record: True)
    assert [member["Name"] for member in joined["Members"]] == ["friend"]
