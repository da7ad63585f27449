"""What a configuration may say, how files add up, and what is said about a wrong one."""

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serfd.config import (
    PROFILES,
    Config,
    GossipConfig,
    SignedSeconds,
    decode_key,
    load,
    parse_duration,
    parse_networks,
    split_address,
    split_service,
)
from serfd.errors import ConfigError

KEY = base64.b64encode(b"k" * 32).decode()


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def error_of(*paths: Path, flags: Mapping[str, Any] | None = None) -> str:
    """The whole error text; every test below compares it exactly."""
    with pytest.raises(ConfigError) as raised:
        load(paths, flags=flags)
    return str(raised.value)


# One file.


def test_no_file_at_all_gives_the_defaults() -> None:
    assert load([]) == Config()


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load([write(tmp_path / "empty.toml", "")]) == Config()


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ('node_name = "n1"', Config(node_name="n1")),
        ('bind = "[::1]:7000"', Config(bind="[::1]:7000")),
        ('start_join = ["a", "b:1"]', Config(start_join=["a", "b:1"])),
        ('retry_interval = "1m30s"', Config(retry_interval=SignedSeconds(90))),
        ('retry_interval = "-1s"', Config(retry_interval=SignedSeconds(-1))),
        ('broadcast_timeout = "-1m"', Config(broadcast_timeout=SignedSeconds(-60))),
        ('log_level = "debug"', Config(log_level="debug")),
        (f'encrypt_key = "{KEY}"', Config(encrypt_key=KEY)),
        ('[tags]\nrole = "web"\nempty = ""', Config(tags={"role": "web", "empty": ""})),
        ("[gossip]\nretransmit_mult = 2", Config(gossip=GossipConfig(retransmit_mult=2))),
        ('profile = "wan"', Config(profile="wan", gossip=PROFILES["wan"])),
        ("[plugins.a]\n[plugins.b]\nx = 1", Config(plugins={"a": {}, "b": {"x": 1}})),
    ],
)
def test_a_file_says_what_differs_from_the_defaults(
    tmp_path: Path, text: str, config: Config
) -> None:
    assert load([write(tmp_path / "serfd.toml", text)]) == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        # Unknown keys.
        ('nod_name = "x"', "unknown key 'nod_name'; did you mean 'node_name'?"),
        ("xyz = 1", "unknown key 'xyz'"),
        ("[gosip]", "unknown key 'gosip'; did you mean 'gossip'?"),
        (
            '[gossip]\nprobe_intervall = "1s"',
            "unknown key 'probe_intervall' in [gossip]; did you mean 'probe_interval'?",
        ),
        # Wrong types.
        ('protocol = "5"', "Expected `int`, got `str`, found '5' - at `protocol`"),
        ("protocol = true", "Expected `int`, got `bool`, found True - at `protocol`"),
        ('start_join = "a"', "Expected `array`, got `str`, found 'a' - at `start_join`"),
        ('start_join = ["a", 5]', "Expected `str`, got `int`, found 5 - at `start_join[1]`"),
        ("[tags]\nok = 'x'\nn = 5", "Expected `str`, got `int`, found 5 - at `tags.n`"),
        ("[tags.role]\na = 'b'", "Expected `str`, got `object`, found {'a': 'b'} - at `tags.role`"),
        ("gossip = 5", "Expected `object`, got `int`, found 5 - at `gossip`"),
        ("[plugins.ok]\n[plugins]\nx = 5", "Expected `object`, got `int` - at `plugins.x`"),
        ("plugins = 5", "Expected `object`, got `int` - at `plugins`"),
        (
            "[gossip]\npacket_size_max = 1e3",
            "Expected `int`, got `float`, found 1000.0 - at `gossip.packet_size_max`",
        ),
        # Out of limits.
        ("protocol = 9", "Expected `int` <= 5, found 9 - at `protocol`"),
        ("protocol = 1", "Expected `int` >= 2, found 1 - at `protocol`"),
        ("retry_max_attempts = -1", "Expected `int` >= 0, found -1 - at `retry_max_attempts`"),
        (
            "[gossip]\npacket_size_max = 511",
            "Expected `int` >= 512, found 511 - at `gossip.packet_size_max`",
        ),
        (
            "[gossip]\npacket_size_max = 65001",
            "Expected `int` <= 65000, found 65001 - at `gossip.packet_size_max`",
        ),
        # Durations.
        (
            "retry_interval = 30",
            "found 30, expected a duration in quotes like '500ms', '10s', '5m' or '24h' - at "
            "`retry_interval`",
        ),
        (
            '[gossip]\nprobe_interval = "2 sec"',
            "'2 sec' is not a duration like '500ms', '10s', '5m' or '24h' - at "
            "`gossip.probe_interval`",
        ),
        ('hook_timeout = "0s"', "hook_timeout must be longer than 0"),
        ('reconnect_interval = "0"', "reconnect_interval must be longer than 0"),
        ('[gossip]\ngossip_interval = "0"', "gossip_interval must be longer than 0 - at `gossip`"),
        (
            '[gossip]\nprobe_timeout = "1s"',
            "probe_timeout (1s) must be shorter than probe_interval (1s) - at `gossip`",
        ),
        (
            'profile = "wan"\n[gossip]\nprobe_interval = "2s"',
            "probe_timeout (3s) must be shorter than probe_interval (2s) - at `gossip`",
        ),
        # Texts with a form of their own.
        (
            'log_format = "xml"',
            "log_format 'xml' is unknown, expected one of text, json",
        ),
        (
            'syslog_facility = "LOCAL8"',
            "syslog_facility 'LOCAL8' is unknown, expected one of KERN, USER, MAIL, DAEMON, AUTH, "
            "SYSLOG, LPR, NEWS, UUCP, CRON, AUTHPRIV, FTP, LOCAL0, LOCAL1, LOCAL2, LOCAL3, "
            "LOCAL4, LOCAL5, LOCAL6, LOCAL7",
        ),
        (
            'statsd_addr = "localhost:statsd"',
            "statsd_addr 'localhost:statsd': 'statsd' is not a port, expected 0 to 65535",
        ),
        (
            'statsite_addr = ":8125"',
            "statsite_addr ':8125' has no host",
        ),
        (
            'log_level = "LOUD"',
            "log_level 'LOUD' is unknown, expected one of TRACE, DEBUG, INFO, WARN, ERR",
        ),
        ('profile = "moon"', "profile 'moon' is unknown, expected one of lan, wan, local"),
        ('profile = ""', "profile '' is unknown, expected one of lan, wan, local"),
        ('bind = "h:65536"', "bind 'h:65536': '65536' is not a port, expected 0 to 65535"),
        ('rpc_addr = "h:99999"', "rpc_addr 'h:99999': '99999' is not a port, expected 0 to 65535"),
        *(
            (
                f'rpc_addr = "{address}"',
                f"rpc_addr {address!r}: expected a whole path, like 'unix:/run/serfd/rpc.sock'",
            )
            for address in ("unix:", "unix:rpc.sock")
        ),
        (
            f'rpc_addr = "unix:/{"x" * 107}"',
            "rpc_addr: the path of the socket has 108 bytes, at most 107 are allowed: choose a "
            "shorter one, like 'unix:/run/serfd/rpc.sock'",
        ),
        *(
            (
                f'rpc_socket_mode = "{mode}"',
                f"rpc_socket_mode {mode!r} is not a mode like '0600' or '0660'",
            )
            for mode in ("", "0680", "rw-------", "01777", "60", "0o600", "٠600")
        ),
        (
            'rpc_addr = "unix:/run/rpc.sock"\n[rpc_tls]\ncertificate = "c"\nprivate_key = "k"',
            "rpc_tls and a unix rpc_addr exclude each other: TLS is for RPC over TCP",
        ),
        *(
            (
                f'[rpc_tls]\n{key} = "x"',
                "certificate and private_key belong together: give both, or neither - at `rpc_tls`",
            )
            for key in ("certificate", "private_key")
        ),
        (
            '[rpc_tls]\nclient_authority = "x"',
            "client_authority needs a certificate and a private_key - at `rpc_tls`",
        ),
        (
            '[rpc_tls]\ncertficate = "x"',
            "unknown key 'certficate' in [rpc_tls]; did you mean 'certificate'?",
        ),
        ('advertise = ":7946"', "advertise ':7946' has no host"),
        ('advertise = "[::1"', "advertise '[::1' is not an address like '[::1]:7946'"),
        ('advertise = "[::1]7"', "advertise '[::1]7' is not an address like '[::1]:7946'"),
        (
            f'cluster_label = "{"ü" * 128}"',
            "cluster_label has 256 bytes of UTF-8, at most 255 are allowed",
        ),
        (
            'cidrs_allowed = ["10.0.0.0/8", "10.0.0.0/33"]',
            "cidrs_allowed: '10.0.0.0/33' is not a network like '10.0.0.0/8' or 'fd00::/8'",
        ),
        (
            f'discover = "{"ü" * 29}"',
            f"discover {'ü' * 29!r} cannot be part of a DNS name: expected at most 57 bytes of "
            "UTF-8, and none of the parts between dots empty",
        ),
        (
            'discover = "a..b"',
            "discover 'a..b' cannot be part of a DNS name: expected at most 57 bytes of UTF-8, "
            "and none of the parts between dots empty",
        ),
        (
            'discover = "clu"\n[mdns]\ndisable_ipv4 = true\ndisable_ipv6 = true',
            "Invalid mDNS configuration: both IPv4 and IPv6 are disabled",
        ),
        (
            '[mdns]\ninterface = "eth0"',
            "mDNS interface specified without enabling mDNS discovery: [mdns] has an interface, "
            "but there is no `discover`",
        ),
        (
            'cidrs_allowed = ["example.org"]',
            "cidrs_allowed: 'example.org' is not a network like '10.0.0.0/8' or 'fd00::/8'",
        ),
        ('[tags]\n"" = "x"', "tags: a tag needs a name, found an empty one"),
        ('encrypt_key = "?"', "encrypt_key is not base64; `serfctl keygen` prints a good key"),
        (
            'encrypt_key = "c2hvcnQ="',
            "encrypt_key holds 5 bytes, expected 16, 24 or 32; `serfctl keygen` prints a good key",
        ),
        (
            f'encrypt_key = "{KEY}"\nkeyring_file = "keys.json"',
            "encrypt_key and keyring_file exclude each other: give one",
        ),
        # Not TOML.
        ("bind = ", "not valid TOML: Invalid value (at end of document)"),
        (
            "protocol = 5\nprotocol = 4",
            "not valid TOML: Cannot overwrite a value (at end of document)",
        ),
    ],
)
def test_an_error_names_file_key_what_was_found_and_what_was_expected(
    tmp_path: Path, text: str, said: str
) -> None:
    path = write(tmp_path / "serfd.toml", text)
    assert error_of(path) == f"{path}: {said}"


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    assert error_of(path) == f"cannot read {path}: No such file or directory"


def test_a_path_that_cannot_be_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 300)
    assert error_of(path) == f"cannot read {path}: File name too long"


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.toml"
    path.write_bytes(b'node_name = "\xe4"')
    assert error_of(path).startswith(f"{path}: not UTF-8 text: ")


@pytest.mark.parametrize(
    "text",
    [
        'encrypt_key = "SECRET"',
        "encrypt_key = 'SECRETSECRETSECRETSECRET'",
        'encrypt_key = ["SECRET"]',
        'encrypt_key = {SECRET = "SECRET"}',
        'encrypt-key = "SECRET"',
        "encrypt_key = SECRET",
        'encrypt_key = "SECRET',
        'rpc_auth = ["SECRET"]',
        'rpc_auth = {token = "SECRET"}',
        '[gossip]\nrpc_auth = "SECRET"',
        '[plugins]\nhook = "SECRET"',
        'plugins = ["SECRET"]',
        f'encrypt_key = "{KEY}SECRET"',
    ],
)
def test_an_error_never_shows_a_key_or_token(tmp_path: Path, text: str) -> None:
    said = error_of(write(tmp_path / "serfd.toml", text))
    assert "SECRET" not in said
    assert KEY not in said


# Several files, directories, options.


def test_later_files_win_lists_are_appended_and_tables_joined(tmp_path: Path) -> None:
    one = write(
        tmp_path / "1.toml",
        'node_name = "one"\nprotocol = 4\nstart_join = ["a"]\n[tags]\nrole = "web"\ndc = "x"\n'
        '[gossip]\ngossip_nodes = 5\n[plugins.p]\nurl = "u"\n',
    )
    two = write(
        tmp_path / "2.toml",
        'node_name = "two"\nstart_join = ["b"]\n[tags]\nrole = "db"\n'
        "[gossip]\nretransmit_mult = 7\n[plugins.p]\ntries = 3\n[plugins.q]\n",
    )
    assert load([one, two]) == Config(
        node_name="two",
        protocol=4,
        start_join=["a", "b"],
        tags={"role": "db", "dc": "x"},
        gossip=GossipConfig(gossip_nodes=5, retransmit_mult=7),
        plugins={"p": {"url": "u", "tries": 3}, "q": {}},
    )


def test_loading_twice_gives_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "1.toml", 'start_join = ["a"]\n[plugins.p]\nto = ["b"]\n')
    flags = {"start_join": ["c"], "tags": {"k": "v"}}
    first = load([path, path], flags=flags)
    assert load([path, path], flags=flags) == first
    assert first.start_join == ["a", "a", "c"]


def test_a_directory_is_its_toml_files_sorted_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "conf.d"
    folder.mkdir()
    write(folder / "20.toml", 'node_name = "twenty"\nstart_join = ["20"]')
    write(folder / "100.toml", 'node_name = "hundred"\nstart_join = ["100"]')
    write(folder / "notes.txt", "not TOML")
    write(folder / "30.toml~", "not TOML")
    (folder / "40.toml").mkdir()
    after = write(tmp_path / "after.toml", 'start_join = ["after"]')
    config = load([folder, after])
    assert config.node_name == "twenty"
    assert config.start_join == ["100", "20", "after"]


def test_options_win_over_files(tmp_path: Path) -> None:
    path = write(tmp_path / "f.toml", 'bind = "10.0.0.1"\nstart_join = ["a"]\n[tags]\na = "1"')
    flags = {"bind": "10.0.0.2", "start_join": ["b"], "tags": {"b": "2"}}
    config = load([path], flags=flags)
    assert config == Config(bind="10.0.0.2", start_join=["a", "b"], tags={"a": "1", "b": "2"})


def test_of_several_sources_the_wrong_one_is_named(tmp_path: Path) -> None:
    good = write(tmp_path / "good.toml", "protocol = 4")
    bad = write(tmp_path / "bad.toml", "protocol = 6")
    said = "Expected `int` <= 5, found 6 - at `protocol`"
    assert error_of(good, bad) == f"{bad}: {said}"
    assert error_of(good, flags={"protocol": 6}) == f"command line: {said}"


def test_a_wrong_value_that_a_later_one_replaces_does_no_harm(tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.toml", "protocol = 6")
    assert load([bad], flags={"protocol": 3}).protocol == 3


def test_sources_that_are_wrong_only_together_are_named_together(tmp_path: Path) -> None:
    one = write(tmp_path / "1.toml", f'encrypt_key = "{KEY}"')
    two = write(tmp_path / "2.toml", 'keyring_file = "keys.json"')
    said = "encrypt_key and keyring_file exclude each other: give one"
    assert error_of(one, two) == f"{one} + {two}: {said}"


# Profiles.


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_a_profile_gives_the_values_that_are_not_given(tmp_path: Path, profile: str) -> None:
    text = f'profile = "{profile}"\n[gossip]\nindirect_checks = 7\n'
    gossip = load([write(tmp_path / "f.toml", text)]).gossip
    held = PROFILES[profile]
    expected = {name: getattr(held, name) for name in held.__struct_fields__}
    assert gossip == GossipConfig(**{**expected, "indirect_checks": 7})


def test_an_option_chooses_the_profile_under_a_files_values(tmp_path: Path) -> None:
    path = write(tmp_path / "f.toml", "[gossip]\ngossip_nodes = 9")
    gossip = load([path], flags={"profile": "wan"}).gossip
    assert (gossip.gossip_nodes, gossip.probe_interval) == (9, 5.0)


# Durations.


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0), ("0s", 0.0), ("500ms", 0.5), ("10s", 10.0), ("5m", 300.0), ("24h", 86400.0),
        ("1h30m", 5400.0), ("1.5h", 5400.0), (".5s", 0.5), ("2.s", 2.0), ("1s1s", 2.0),
        ("7us", 7e-6), ("7µs", 7e-6), ("7ns", 7e-9), ("2562047h", 2562047 * 3600.0),
    ],
)  # fmt: skip
def test_durations_are_written_as_in_go(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    ["", " ", "1", "s", "1 s", " 1s", "1s ", "-1s", "+1s", "1d", "1S", "1e3s", "٣s", "1s\n", ".s"],
)
def test_what_is_no_duration_is_said_with_what_is_one(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a duration like '500ms', '10s', '5m' or '24h'$"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("-1m30s", -90.0), ("+1s", 1.0), ("1s", 1.0), ("-0", 0.0), ("0", 0.0)]
)
def test_some_durations_may_have_a_sign(text: str, seconds: float) -> None:
    assert parse_duration(text, signed=True) == seconds


@pytest.mark.parametrize("text", ["", "-", "+", "--1s", "-1", "1-1s", "1s-1s", "- 1s", "−1s"])
def test_a_sign_alone_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(repr(text))} is not a duration like "):
        parse_duration(text, signed=True)


@pytest.mark.parametrize("key", ["reconnect_interval", "tombstone_timeout", "hook_timeout"])
def test_others_may_have_none(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "serfd.toml", f'{key} = "-1s"')
    assert error_of(path).startswith(f"{path}: '-1s' is not a duration like ")


@pytest.mark.parametrize("text", ["2562048h", "9" * 400 + "s"])
def test_a_duration_has_a_limit(text: str) -> None:
    with pytest.raises(ValueError, match="is too long for a duration, at most 2562047h"):
        parse_duration(text)


@given(
    hours=st.integers(0, 10_000),
    minutes=st.integers(0, 59),
    seconds=st.integers(0, 59),
    milliseconds=st.integers(0, 999),
)
def test_parts_of_a_duration_are_added(
    hours: int, minutes: int, seconds: int, milliseconds: int
) -> None:
    parsed = parse_duration(f"{hours}h{minutes}m{seconds}s{milliseconds}ms")
    assert parsed == pytest.approx(hours * 3600 + minutes * 60 + seconds + milliseconds / 1000)


@given(st.text(alphabet="0123456789.nuµmshx -", max_size=12))
def test_any_text_is_a_duration_or_a_value_error(text: str) -> None:
    said = ""
    try:
        assert 0 <= parse_duration(text) < 2**63 / 1e9
    except ValueError as error:
        said = str(error)
    assert not said or repr(text) in said


# Addresses and keys.


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("10.0.0.1", "10.0.0.1", 7946),
        ("10.0.0.1:1", "10.0.0.1", 1),
        ("10.0.0.1:", "10.0.0.1", 7946),
        ("host.example:65535", "host.example", 65535),
        (":8000", "", 8000),
        ("::1", "::1", 7946),
        ("[::1]", "::1", 7946),
        ("[fd00::7]:0", "fd00::7", 0),
    ],
)
def test_addresses_come_with_and_without_a_port(text: str, host: str, port: int) -> None:
    assert split_address(text, default_port=7946, key="bind") == (host, port)


def test_where_it_is_wanted_a_port_may_be_a_services_name() -> None:
    assert split_service("[::1]:http-alt", key="bind") == ("::1", "http-alt")
    with pytest.raises(ValueError, match=r"^bind '\[::1\]:http-alt': 'http-alt' is not a port, "):
        split_address("[::1]:http-alt", default_port=7946, key="bind")


@pytest.mark.parametrize("size", [16, 24, 32])
def test_keys_of_three_sizes_are_taken(size: int) -> None:
    key = bytes(range(size))
    assert decode_key(base64.b64encode(key).decode(), what="it") == key


@given(st.binary(max_size=40).filter(lambda key: len(key) not in (16, 24, 32)))
def test_keys_of_other_sizes_are_refused(key: bytes) -> None:
    with pytest.raises(ValueError, match=f"^it holds {len(key)} bytes, expected 16, 24 or 32"):
        decode_key(base64.b64encode(key).decode(), what="it")


@pytest.mark.parametrize(
    ("rpc_addr", "path"),
    [
        ("unix:/run/serfd/rpc.sock", "/run/serfd/rpc.sock"),
        (f"unix:/{'x' * 106}", f"/{'x' * 106}"),
        ("127.0.0.1:7373", None),
        ("unix", None),
        ("", None),
    ],
)
def test_an_rpc_address_may_be_the_path_of_a_socket(rpc_addr: str, path: str | None) -> None:
    assert Config(rpc_addr=rpc_addr).rpc_socket == path


@pytest.mark.parametrize("mode", ["0600", "660", "0777", "000"])
def test_a_sockets_mode_is_octal_digits(mode: str) -> None:
    assert Config(rpc_socket_mode=mode).rpc_socket_mode == mode


@pytest.mark.parametrize(
    ("entry", "network"),
    [
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("10.1.2.3/8", "10.0.0.0/8"),
        ("10.1.2.3", "10.1.2.3/32"),
        ("fd00::/8", "fd00::/8"),
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
        ("::ffff:10.1.2.3", "10.1.2.3/32"),
        ("::/0", "::/0"),
        ("::/96", "::/96"),
    ],
)
def test_a_network_is_read_and_ipv4_is_ipv4_in_either_form(entry: str, network: str) -> None:
    assert [str(one) for one in parse_networks([entry], key="k")] == [network]


def test_a_label_of_the_greatest_length_is_taken() -> None:
    assert Config(cluster_label="ü" * 127 + "x").cluster_label
