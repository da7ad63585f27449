"""Serf's JSON files: what is read, what counts as not given, and what is said about a wrong one."""

import base64
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serfd import __version__, options, serf_config
from serfd.config import Config, MdnsConfig, Seconds, load
from serfd.daemon import OPTIONS, main, read_config
from serfd.errors import ConfigError

KEY = base64.b64encode(b"k" * 32).decode()


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def loaded(folder: Path, *texts: str, flags: dict[str, Any] | None = None) -> Config:
    """What JSON files with these texts come to, in this order."""
    files = [write(folder / f"{number}.json", text) for number, text in enumerate(texts)]
    return load(files, flags=flags)


# One file.


WHOLE = {
    "node_name": "n", "tags": {"dc": "east", "empty": ""}, "bind": "10.0.0.1",
    "advertise": "10.0.0.2:7", "interface": "eth0", "encrypt_key": KEY,
    "rpc_addr": "127.0.0.1:7", "rpc_auth": "token", "protocol": 4, "profile": "wan",
    "log_level": "debug", "event_handlers": ["user=a"], "start_join": ["b"],
    "replay_on_join": True, "retry_join": ["c"], "retry_interval": "1m",
    "retry_max_attempts": 7, "snapshot_path": "s", "rejoin_after_leave": True, "discover": "d",
    "enable_syslog": True, "syslog_facility": "LOCAL7", "broadcast_timeout": "2s",
    "disable_coordinates": True, "reconnect_interval": "3s", "reconnect_timeout": "4h",
    "tombstone_timeout": "5h", "disable_name_resolution": True, "leave_on_terminate": True,
    "skip_leave_on_interrupt": True, "query_response_size_limit": 11, "query_size_limit": 12,
    "user_event_size_limit": 13, "statsite_addr": "e:1", "statsd_addr": "f:2",
}  # fmt: skip
DURATIONS = {
    "retry_interval": 60, "broadcast_timeout": 2, "reconnect_interval": 3,
    "reconnect_timeout": 4 * 3600, "tombstone_timeout": 5 * 3600,
}  # fmt: skip
NOT_TOGETHER = {"role": "web", "tags_file": "t", "keyring_file": "k"}
"""Valid, but not beside those above."""


def test_every_key_of_serfs_means_what_it_means_there(tmp_path: Path) -> None:
    expected = {**WHOLE, **{key: Seconds(value) for key, value in DURATIONS.items()}}
    config = loaded(tmp_path, json.dumps(WHOLE))
    assert {key: getattr(config, key) for key in WHOLE} == expected
    assert loaded(tmp_path, '{"role": "web"}').tags == {"role": "web"}
    assert loaded(tmp_path, '{"tags_file": "t", "keyring_file": "k"}') == Config(
        tags_file="t", keyring_file="k"
    )
    mdns = '{"discover": "d", "mdns": {"interface": "eth0", "disable_ipv4": true}}'
    assert loaded(tmp_path, mdns).mdns == MdnsConfig(interface="eth0", disable_ipv4=True)
    assert loaded(tmp_path, '{"mdns": {"disable_ipv6": true}}').mdns.disable_ipv6
    without_effect = {"enable_compression", "validate_node_names", "MsgpackUseNewTimeFormat"}
    assert serf_config.KEYS.keys() == {*WHOLE, *NOT_TOGETHER, "mdns", *without_effect}
    assert serf_config.KEYS.keys() - set(Config.__struct_fields__) == {
        "validate_node_names", "MsgpackUseNewTimeFormat",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("{}", Config()),
        (" \n{} and {more}", Config()),
        ('{"node_name": "a"}{"node_name": "b"}', Config(node_name="a")),
        ('{"Node_Name": "a", "START_JOIN": ["b"]}', Config(node_name="a", start_join=["b"])),
        ('{"mdns": {"Disable_IPv4": true}}', Config(mdns=MdnsConfig(disable_ipv4=True))),
        ('{"tags": {"Role": "a", "role": "b"}}', Config(tags={"Role": "a", "role": "b"})),
        ('{"protocol": 4.7}', Config(protocol=4)),
        ('{"protocol": 0.9}', Config()),
        ('{"protocol": 4e0}', Config(protocol=4)),
        ('{"tags": {"a": null}, "start_join": ["b", null]}',
         Config(tags={"a": ""}, start_join=["b", ""])),
        ('{"node_name": "\\ud800", "tags": {"\\udfff": "\\ud83d\\ude00"}}',
         Config(node_name="\ufffd", tags={"\ufffd": "😀"})),
        # What Serf reads and does nothing with.
        ('{"enable_compression": false, "validate_node_names": true}', Config()),
        ('{"MsgpackUseNewTimeFormat": true, "msgpackusenewtimeformat": null}', None),
        # What to Serf is not given.
        (json.dumps(dict.fromkeys(serf_config.KEYS)), Config()),
        (json.dumps({k: "" for k, kind in serf_config.KEYS.items() if kind is str}), Config()),
        (json.dumps({k: 0 for k, kind in serf_config.KEYS.items() if kind is int}), Config()),
        (json.dumps({k: False for k, kind in serf_config.KEYS.items() if kind is bool}), Config()),
        (json.dumps({k: [] for k, kind in serf_config.KEYS.items() if kind is list}), Config()),
        (json.dumps({k: {} for k, kind in serf_config.KEYS.items() if kind is dict}), Config()),
        *((json.dumps(dict.fromkeys(DURATIONS, none)), Config())
          for none in ("0", "0s", "0.0ms", "0h0m", ".0us")),
        ('{"protocol": -1, "retry_max_attempts": -1}', Config()),
        ('{"mdns": {"interface": "", "disable_ipv6": null}}', Config()),
    ],
)  # fmt: skip
def test_a_file_is_read_as_serf_reads_it(tmp_path: Path, text: str, config: Config | None) -> None:
    if config is None:
        with pytest.raises(ConfigError, match="stands twice, in two spellings"):
            loaded(tmp_path, text)
    else:
        assert loaded(tmp_path, text) == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        # Not JSON.
        ("", "not valid JSON: Expecting value: line 1 column 1"),
        ("  ", "not valid JSON: Expecting value: line 1 column 3"),
        ('\n{"node_name": ', "not valid JSON: Expecting value: line 2 column 15"),
        ('{\n"node_name" "a"}', "not valid JSON: Expecting ':' delimiter: line 2 column 13"),
        ('{"protocol": NaN}', "not valid JSON: NaN is not a number there"),
        ('{"protocol": 1e999}', "not valid JSON: 1e999 is too large for a number"),
        (f'{{"protocol": {"9" * 5000}}}',
         f"not valid JSON: {'9' * 60}… is too large for a number"),
        ("[" * 100_000, "not a configuration: its lists and objects are too deep"),
        ("\ufeff{}", "not valid JSON: Expecting value: line 1 column 1"),
        # Not an object of Serf's.
        ("[]", "found a list, expected an object of Serf's settings"),
        ("null", "found null, expected an object of Serf's settings"),
        # Names.
        ('{"nod_name": 1}', "unknown key 'nod_name'; did you mean 'node_name'?"),
        ('{"StartJoin": 1}', "unknown key 'StartJoin'; did you mean 'start_join'?"),
        ('{"mdns": {"disable_ip4": true}}',
         "unknown key 'mdns.disable_ip4'; did you mean 'disable_ipv4'?"),
        ('{"plugins": {}}', "unknown key 'plugins'; Serf has none of this name, and settings of "
         "serfd alone belong in a .toml file"),
        (f'{{"{"x" * 10_000}": 1}}', f"unknown key '{'x' * 60}…'; Serf has none of this name, and "
         "settings of serfd alone belong in a .toml file"),
        ('{"bind": "a", "bind": "b"}', "key 'bind' stands twice: give it once"),
        ('{"tags": {"a": "1", "a": "2"}}', "key 'a' stands twice: give it once"),
        ('{"bind": "a", "Bind": "b"}',
         "key 'bind' stands twice, in two spellings: give it once"),
        # Types.
        ('{"node_name": 5}', "node_name: found a number, expected a text"),
        ('{"node_name": ["SECRET"]}', "node_name: found a list, expected a text"),
        ('{"protocol": "5"}', "protocol: found a text, expected a number"),
        ('{"protocol": true}', "protocol: found true or false, expected a number"),
        ('{"protocol": ""}', "protocol: found a text, expected a number"),
        ('{"replay_on_join": 0}', "replay_on_join: found a number, expected true or false"),
        ('{"enable_compression": "no"}',
         "enable_compression: found a text, expected true or false"),
        ('{"retry_interval": 5}', "retry_interval: found a number, expected a text"),
        ('{"start_join": "a"}', "start_join: found a text, expected a list of texts"),
        ('{"start_join": ["a", {}]}', "start_join[1]: found an object, expected a text"),
        ('{"tags": ["a"]}', "tags: found a list, expected an object"),
        ('{"tags": {"a": 1}}', "tags.a: found a number, expected a text"),
        ('{"tags": {"a\\nb": 1}}', "tags.a\\nb: found a number, expected a text"),
        ('{"mdns": {"disable_ipv4": 1}}',
         "mdns.disable_ipv4: found a number, expected true or false"),
        # What the file's values mean.
        ('{"protocol": 6}', "Expected `int` <= 5, found 6 - at `protocol`"),
        ('{"retry_interval": "30"}', "'30' is not a duration like '500ms', '10s', '5m' or '24h' - "
         "at `retry_interval`"),
        ('{"node_name": "a\\u0000b"}', "node_name contains a NUL character"),
        ('{"tags_file": "t", "role": "web"}', "Tags config not allowed while using tag files: "
         "found tags_file and the tag 'role'"),
        ('{"tags_file": "t", "tags": {"dc": ""}}', "Tags config not allowed while using tag "
         "files: found tags_file and the tag 'dc'"),
    ],
    ids=lambda value: value[:50],
)  # fmt: skip
def test_an_error_names_file_key_what_was_found_and_what_was_expected(
    tmp_path: Path, text: str, said: str
) -> None:
    path = write(tmp_path / "old.json", text)
    with pytest.raises(ConfigError) as raised:
        load([path])
    assert str(raised.value) == f"{path}: {said}"


@pytest.mark.parametrize(
    "text",
    [
        '{"encrypt_key": "SECRET"}',
        '{"encrypt_key": ["SECRET"]}',
        '{"encrypt_key": {"SECRET": 1, "SECRET": 1}}'.replace("SECRET", "x", 2),
        '{"encrypt_key": "SECRET',
        '{"encrypt_key": SECRET}',
        '{"encryptkey": "SECRET"}',
        '{"rpc_auth": ["SECRET"]}',
        '{"rpc_auth": "SECRET", "bogus": 1}',
    ],
)
def test_an_error_never_shows_a_key_or_token(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        loaded(tmp_path, text)
    assert "SECRET" not in str(raised.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def told(text: str) -> dict[str, Any] | str:
    """What is read, or the error's text; anything else that is raised is a mistake."""
    try:
        return serf_config.read(text)
    except ValueError as error:
        return str(error)


@given(st.dictionaries(st.sampled_from(list(serf_config.KEYS)) | st.text(), JSON))
def test_any_object_is_read_or_refused(table: dict[str, Any]) -> None:
    read = told(json.dumps(table))
    assert read or not any(table.values())
    if isinstance(read, dict):
        assert {key.lower() for key in read} <= {key.lower() for key in table}


@given(st.text(alphabet='{}[]":,\\ue0 1-tagsbind'))
def test_any_text_is_read_or_refused(text: str) -> None:
    assert told(text) or text.lstrip().startswith("{")


# Several files, and options.


@pytest.mark.parametrize(
    ("key", "earlier", "later", "result"),
    [
        ("node_name", "a", "b", "b"),
        ("node_name", "a", "", "a"),
        ("protocol", 4, 3, 3),
        ("protocol", 4, 0, 4),
        ("protocol", 4, -1, 4),
        ("query_size_limit", 100, 0, 100),
        ("replay_on_join", False, True, True),
        ("replay_on_join", True, False, True),
        ("retry_interval", "5s", "6s", Seconds(6)),
        ("retry_interval", "5s", "0s", Seconds(5)),
        ("start_join", ["a"], ["b"], ["a", "b"]),
        ("start_join", ["a"], [], ["a"]),
        ("tags", {"a": "1", "b": "2"}, {"b": "", "c": "3"}, {"a": "1", "b": "", "c": "3"}),
        ("tags", {"a": "1"}, None, {"a": "1"}),
        ("mdns", {"disable_ipv4": True}, {"interface": "", "disable_ipv4": False},
         MdnsConfig(disable_ipv4=True)),
        ("enable_compression", False, False, True),
        ("validate_node_names", True, False, None),
    ],
)  # fmt: skip
def test_files_add_up_as_in_serf(
    tmp_path: Path, key: str, earlier: object, later: object, result: object
) -> None:
    config = loaded(tmp_path, json.dumps({key: earlier}), json.dumps({key: later}))
    assert getattr(config, key, None) == result


@pytest.mark.parametrize(
    ("file", "words", "key", "result"),
    [
        ({"node_name": "a"}, ["-node=b"], "node_name", "b"),
        ({"node_name": "a"}, ["-node="], "node_name", "a"),
        ({"profile": "wan"}, ["-profile="], "profile", "wan"),
        ({"retry_max_attempts": 3}, ["-retry-max=0"], "retry_max_attempts", 3),
        ({"retry_interval": "5s"}, ["-retry-interval=0s"], "retry_interval", 5.0),
        ({"retry_interval": "5s"}, ["-retry-interval="], "retry_interval", 5.0),
        ({"replay_on_join": True}, ["-replay=false"], "replay_on_join", True),
        ({"rejoin_after_leave": False}, ["-rejoin=1"], "rejoin_after_leave", True),
        ({"start_join": ["a"]}, ["-join=b", "-join", "c"], "start_join", ["a", "b", "c"]),
        ({"retry_join": ["a"]}, ["-retry-join=b"], "retry_join", ["a", "b"]),
        ({"event_handlers": ["a"]}, ["-event-handler=b"], "event_handlers", ["a", "b"]),
        ({"tags": {"a": "1", "b": "2"}}, ["-tag=b=3", "-tag", "c="], "tags",
         {"a": "1", "b": "3", "c": ""}),
        ({"tags": {"role": "a"}}, ["-role=b"], "tags", {"role": "b"}),
        ({"role": "a"}, ["-tag=role=b"], "tags", {"role": "a"}),
        ({"enable_compression": True}, ["-disable-compression"], "enable_compression", False),
        ({"enable_compression": False}, ["-disable-compression=false"], "enable_compression", True),
        ({}, ["-disable-compression"], "enable_compression", False),
    ],
)  # fmt: skip
def test_options_add_to_serfs_files_as_in_serf(
    tmp_path: Path, file: dict[str, Any], words: list[str], key: str, result: object
) -> None:
    path = write(tmp_path / "old.json", json.dumps(file))
    given = options.parse([f"-config-file={path}", *words], OPTIONS)
    assert getattr(read_config(given), key) == result


def test_beside_toml_an_option_may_switch_off_what_the_file_switches_on(tmp_path: Path) -> None:
    path = write(tmp_path / "new.toml", "replay_on_join = true\nretry_max_attempts = 3\n")
    given = options.parse([f"-config={path}", "-replay=false", "-retry-max=0"], OPTIONS)
    assert read_config(given) == Config()


def test_files_and_directories_count_in_the_order_of_the_command_line(tmp_path: Path) -> None:
    folder = tmp_path / "conf.d"
    folder.mkdir()
    write(folder / "20.json", '{"start_join": ["20"], "node_name": "json"}')
    write(folder / "10.toml", 'start_join = ["10"]\nnode_name = "toml"')
    write(folder / "30.json~", "not JSON")
    (folder / "40.json").mkdir()
    first = write(tmp_path / "first.json", '{"start_join": ["first"]}')
    last = write(tmp_path / "last", ' {"start_join": ["last"]}')
    words = ["-config-file", str(first), f"-config-dir={folder}", f"-config={last}"]
    config = read_config(options.parse(words, OPTIONS))
    assert config == Config(start_join=["first", "10", "20", "last"], node_name="json")
    words = [f"-config-file={folder}", f"-config-dir={first}"]
    assert read_config(options.parse(words, OPTIONS)).start_join == ["10", "20", "first"]


# Serf's command line.


FLAGS = (
    "-node=a", "--node b", "-role=web", "-tag=a=b", "-tag a=", "-tags-file=t", "-bind=127.0.0.1",
    "-bind [::1]:7946", "-advertise=10.0.0.1", "-iface=lo", "-keyring-file=k",
    "-rpc-addr=127.0.0.1:7373", "-protocol=5", "-profile=local", "-log-level=err",
    "-event-handler='user:deploy=x --y=z'", "-join=a", "-replay", "--replay=true", "-replay=false",
    "-replay=T", "-replay=0", "-retry-join=a", "-retry-interval=1.5h", "-retry-max=3",
    "-snapshot=s", "-rejoin", "-rejoin=1", "-rejoin=f", "-discover=d -mdns-iface=lo",
    "-discover=d -mdns-disable-ipv4", "-mdns-disable-ipv6=FALSE", "-syslog", "-syslog=false",
    "-broadcast-timeout=300ms", "-disable-compression", f"-encrypt={KEY}",
)  # fmt: skip
"""Of every flag in agent.md 1, the forms that Go takes; the two for files are tested above."""


@pytest.mark.parametrize("line", FLAGS)
def test_every_flag_of_serf_agent_is_taken(line: str) -> None:
    given = options.parse(shlex.split(line), OPTIONS)
    assert given.arguments == []
    assert given.values
    assert read_config(given)


def test_the_word_agent_is_no_more_than_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["agent", "-version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"
    assert main(["-version", "agent"]) == 0
    assert main(["agent", "agent", "-node=a"]) == 2
    assert "unexpected argument 'agent'" in capsys.readouterr().err
