"""A real Prometheus takes what the plugin `metrics` serves, and its alerts mean what they say."""

import json
import os
import re
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import LIMIT, LOCAL, Agents, free_port, run, until, until_is
from programs import require

pytestmark = pytest.mark.interop("prometheus", "promtool")

PAGE = (Path(__file__).parents[2] / "docs/plugins/metrics.md").read_text()
STRANGE = 'a"b\\c{d}'


def block(title: str) -> str:
    """The YAML of the page that begins with this comment."""
    found = re.search(rf"^```yaml\n(# {title}\n.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def get(url: str) -> tuple[int, str]:
    """Status and body; (0, why) if nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=LIMIT) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


@contextmanager
def prometheus(folder: Path, target: int) -> Iterator[str]:
    """A real one that scrapes this port with the page's configuration; gives its address."""
    config = folder / "prometheus.yml"
    text = block("prometheus.yml").replace("127.0.0.1:9546", f"127.0.0.1:{target}")
    config.write_text(f"global:\n  scrape_interval: 500ms\n{text}")
    address = f"127.0.0.1:{free_port()}"
    argv = [
        require("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address={address}",
    ]  # fmt: skip
    log = folder / "prometheus.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=folder,
            env={**os.environ, "GOMAXPROCS": "1"},
        )  # fmt: skip
    try:
        yield f"http://{address}"
    finally:
        process.kill()
        process.wait(LIMIT)
        print(log.read_text()[-3000:])


def query(address: str, expression: str) -> dict[str, float]:
    """Values by the text of their labels, without those that every target has."""
    status, body = get(f"{address}/api/v1/query?" + urllib.parse.urlencode({"query": expression}))
    if status != 200:
        return {}
    found: dict[str, float] = {}
    for result in json.loads(body)["data"]["result"]:
        labels = {k: v for k, v in result["metric"].items() if k not in ("instance", "job")}
        labels.pop("__name__", None)
        found[", ".join(labels.values())] = float(result["value"][1])
    return found


def test_prometheus_scrapes_a_cluster_in_which_a_member_fails(agents: Agents, tmp_path: Path):
    port = free_port()
    served = {"plugins": {"metrics": {"listen": f"127.0.0.1:{port}"}}}
    first = agents.start("serfd", "first", LOCAL, config=served)
    other = agents.start("serfd", "other", LOCAL)
    other.join(first)
    until_is("members", lambda: first.statuses(), {"first": "alive", "other": "alive"})
    with first.client() as client:
        client.event(STRANGE)
    base = f"http://127.0.0.1:{port}"
    assert get(f"{base}/health")[0] == 200
    assert get(f"{base}/ready")[0] == 200

    # Nothing that Prometheus's own rules find fault with.
    status, text = get(f"{base}/metrics")
    assert status == 200
    checked = subprocess.run(
        [require("promtool"), "check", "metrics"], input=text, capture_output=True, text=True
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")

    with prometheus(tmp_path, port) as address:

        def members() -> dict[str, float]:
            return query(address, "serfd_members")

        until_is("members in Prometheus", members,
                 {"alive": 2, "leaving": 0, "left": 0, "failed": 0})  # fmt: skip
        assert query(address, "serfd_isolated") == {"": 0}
        assert query(address, "serfd_events_by_name_total") == {STRANGE: 1}
        assert query(address, "serfd_plugin_state") == {"metrics, running": 1}
        received = query(address, "histogram_quantile(1, serfd_msgs_received_bytes_bucket)")
        assert received[""] > 0
        other.kill()
        until_is("members in Prometheus", members,
                 {"alive": 1, "leaving": 0, "left": 0, "failed": 1})  # fmt: skip
        # The only other one is gone.
        until_is("isolated in Prometheus", lambda: query(address, "serfd_isolated"), {"": 1})
        status, body = get(f"{base}/ready")
        assert status == 503
        assert "isolated" in json.loads(body)["reason"]


def test_a_port_in_use_is_told_and_tried_again(agents: Agents, tmp_path: Path):
    port = free_port()
    served = {"plugins": {"metrics": {"listen": f"127.0.0.1:{port}"}}}
    first = agents.start("serfd", "first", LOCAL, config=served)
    second = agents.start("serfd", "second", LOCAL, config=served)
    told = f"[plugins.metrics] cannot listen on 127.0.0.1:{port}: Address already in use"
    until("it is told", lambda: told in second.log())
    assert second.stats()["plugins"]["metrics"].startswith("failing")

    def name() -> str:
        status, body = get(f"http://127.0.0.1:{port}/health")
        return json.loads(body)["name"] if status == 200 else ""

    assert name() == "first"
    first.kill()
    until_is("who serves", name, "second")


def check_rules(tmp_path: Path, tests: str) -> "subprocess.CompletedProcess[str]":
    (tmp_path / "rules.yml").write_text(block("rules.yml"))
    (tmp_path / "tests.yml").write_text(tests)
    return run(require("promtool"), "test", "rules", "tests.yml", cwd=tmp_path)


def test_the_configuration_and_the_alerts_of_the_page_are_good(tmp_path: Path):
    for name, kind in (("prometheus.yml", "config"), ("rules.yml", "rules")):
        (tmp_path / name).write_text(block(name))
        checked = run(require("promtool"), "check", kind, name, cwd=tmp_path)
        assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "3 rules found" in checked.stdout


@pytest.mark.parametrize(
    ("alert", "series", "minutes", "text"),
    [
        ("SerfdIsolated", 'serfd_isolated{instance="x"}', 1, "x sees no other member"),
        ("SerfdMembersFailed", 'serfd_members{status="failed"}', 5, "1 members have failed"),
        (
            "SerfdPluginFailing",
            'serfd_plugin_state{plugin="web",state="failing",instance="x"}',
            5,
            "plugin web fails on x",
        ),
    ],
)
def test_an_alert_fires_when_it_should_and_not_before(tmp_path, alert, series, minutes, text):
    labels = dict(re.findall(r'(\w+)="(\w+)"', series))
    kept = {} if "max by" in block("rules.yml").partition(alert)[2].partition("for:")[0] else labels
    tests = {
        "rule_files": ["rules.yml"],
        "tests": [
            {
                "interval": "1m",
                # Well for ten minutes, then not.
                "input_series": [{"series": series, "values": "0x9 1x20"}],
                "alert_rule_test": [
                    {"eval_time": "9m", "alertname": alert, "exp_alerts": []},
                    {"eval_time": f"{9 + minutes}m", "alertname": alert, "exp_alerts": []},
                    {
                        "eval_time": f"{10 + minutes}m",
                        "alertname": alert,
                        "exp_alerts": [{"exp_labels": kept, "exp_annotations": {"summary": text}}],
                    },
                ],
            }
        ],
    }
    done = check_rules(tmp_path, json.dumps(tests))
    assert done.returncode == 0, done.stdout + done.stderr
