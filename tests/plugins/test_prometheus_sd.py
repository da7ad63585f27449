import json
import shutil
import subprocess

import pytest
from followed_files import Node, agent_of, bundled, member

from serfd.config import Config
from serfd.errors import ConfigError
from serfd.hooks import CannotMake
from serfd.hooks.loader import load
from serfd.serf.events import Member, Status

prometheus_sd = bundled("prometheus_sd")
ME = member("me", 1)
SIX = Member("six", bytes(15) + b"\7", 7946, {}, Status.FAILED, bytes(6))


def groups(*members: Member, **settings) -> list[dict]:
    agent = agent_of(Node(), "prometheus_sd")
    made = prometheus_sd.Targets(
        prometheus_sd.Plugin.Settings(target="/x", **settings), agent.logger
    )
    return json.loads(made(members, ME, None))


def test_a_member_is_a_group_with_its_target_and_labels():
    assert groups(member("n1", 7, {"role": "web", "data-center": "eu"}), SIX, port=9100) == [
        {
            "targets": ["10.0.0.7:9100"],
            "labels": {
                "__meta_serf_name": "n1",
                "__meta_serf_ip": "10.0.0.7",
                "__meta_serf_status": "alive",
                "__meta_serf_tag_role": "web",
                "__meta_serf_tag_data_center": "eu",
            },
        },
        {
            "targets": ["[::7]:9100"],
            "labels": {
                "__meta_serf_name": "six",
                "__meta_serf_ip": "::7",
                "__meta_serf_status": "failed",
            },
        },
    ]


@pytest.mark.parametrize(
    ("settings", "tag", "ports"),
    [
        ({"port": 1}, None, [1]),
        ({"port": 1, "port_tag": "m"}, None, [1]),
        ({"port": 1, "port_tag": "m"}, "2", [2]),
        ({"port_tag": "m"}, "9100, 9256,9100", [9100, 9256]),
        ({"port_tag": "m"}, "65535", [65535]),
    ],
)
def test_the_port_is_that_of_the_tag_or_else_that_of_the_settings(settings, tag, ports):
    tags = {} if tag is None else {"m": tag}
    (group,) = groups(member("n1", 7, tags), **settings)
    assert group["targets"] == [f"10.0.0.7:{port}" for port in ports]


@pytest.mark.parametrize(
    "tag", ["", "0", "65536", "x", "1,", "-1", "1.5", "٣", ",".join(["1"] * 17)]
)
def test_who_has_no_port_is_left_out_and_told_once(tag, caplog):
    agent = agent_of(Node(), "prometheus_sd")
    settings = prometheus_sd.Plugin.Settings(target="/x", port_tag="m", port=5)
    targets = prometheus_sd.Targets(settings, agent.logger)
    members = [member("bad", 1, {"m": tag}), member("good", 2, {"m": "1"})]
    for _ in range(3):
        (group,) = json.loads(targets(members, ME, None))
        assert group["targets"] == ["10.0.0.2:1"]
    assert caplog.text.count("'bad' is left out: its tag 'm' is") == 1


def test_without_any_target_the_old_file_stays_unless_it_may_be_empty():
    with pytest.raises(CannotMake, match="no member has a port"):
        groups(member("n1"), port_tag="m")
    assert groups(member("n1"), port_tag="m", allow_empty=True) == []


def test_labels_are_names_prometheus_takes_and_the_first_tag_has_a_name_that_two_get():
    (group,) = groups(member("n\udc80", 7, {"a.b": "2", "a-b": "1", "ä": "\udcff"}), port=1)
    assert group["labels"] == {
        "__meta_serf_name": "n\ufffd",
        "__meta_serf_ip": "10.0.0.7",
        "__meta_serf_status": "alive",
        "__meta_serf_tag_a_b": "1",
        "__meta_serf_tag__": "\ufffd",
    }


def test_the_file_follows_the_members_and_prometheus_takes_it(tmp_path):
    target = tmp_path / "serf.json"
    node = Node()
    settings = prometheus_sd.Plugin.Settings(target=str(target), port=9100, statuses=("alive",))
    plugin = prometheus_sd.Plugin(agent_of(node, "prometheus_sd"), settings)
    plugin.start()
    node.pass_time(0)
    node.put(member("n2", 2, {"weird tag!": "a\nb\0\udc80"}), SIX)
    plugin.member_join()
    node.pass_time(0.5)
    assert [g["targets"] for g in json.loads(target.read_text())] == [
        ["10.0.0.1:9100"], ["10.0.0.2:9100"],
    ]  # fmt: skip
    plugin.reload(prometheus_sd.Plugin.Settings(target=str(target), port=9200))
    node.pass_time(0)
    assert "10.0.0.2:9200" in target.read_text()
    if promtool := shutil.which("promtool"):
        config = tmp_path / "prometheus.yml"
        config.write_text(
            "scrape_configs:\n- job_name: serf\n  file_sd_configs:\n"
            f"  - files: [{json.dumps(str(target))}]\n"
        )
        checked = subprocess.run(
            [promtool, "check", "config", str(config)], capture_output=True, text=True
        )
        assert checked.returncode == 0, checked.stderr
        assert "WARNING" not in checked.stdout + checked.stderr
        target.write_text(target.read_text().replace('"10.0.0.2:9200"', "9200"))
        broken = subprocess.run([promtool, "check", "config", str(config)], capture_output=True)
        assert broken.returncode != 0


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"target": "/x"}, "port or port_tag is missing"),
        ({"target": "/x", "port": 65536}, "key 'port' in [plugins.prometheus_sd]"),
        ({"port": 1}, "missing key 'target'"),
    ],
)
def test_wrong_settings_are_told_before_anything_starts(table, told):
    with pytest.raises(ConfigError) as caught:
        load(Config(plugins={"prometheus_sd": table}), Node())
    assert told in str(caught.value)
