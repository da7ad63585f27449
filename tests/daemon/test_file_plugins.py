"""The plugins that write files, in the real program."""

import json
import signal
from pathlib import Path

import pytest
from processes import LOCAL, toml, until, until_is

pytestmark = pytest.mark.daemon


def content(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_files_follow_members_that_join_and_fail_and_settings_that_are_reloaded(agents, tmp_path):
    hosts, targets, list_, template = (
        tmp_path / name for name in ("hosts", "targets.json", "list", "list.j2")
    )
    hosts.write_text("127.0.0.1 localhost\n")
    template.write_text("{% for m in members %}{{ m.name }}={{ m.tags.get('role') }}\n{% endfor %}")
    plugins = {
        "hosts": {"target": str(hosts), "domain": "one.test", "statuses": ["alive", "failed"]},
        "prometheus_sd": {"target": str(targets), "port": 9100, "tags": {"role": "web"}},
        "list": {
            "plugin": "template", "template": str(template), "target": str(list_),
            "check": ["grep", "-q", "first", "{}"], "reload": f"cp {list_} {list_}.read",
        },
    }  # fmt: skip
    first = agents.start("serfd", "first", LOCAL, config={"plugins": plugins})
    own = "127.0.0.1 first.one.test first\n"
    head, end = "127.0.0.1 localhost\n# BEGIN serfd hosts\n", "# END serfd hosts\n"
    until_is("hosts", lambda: content(hosts), head + own + end)
    assert not targets.exists()

    web = agents.start("serfd", "web", LOCAL, "-tag=role=web", f"-join={first.bind}")
    both = head + own + "127.0.0.1 web.one.test web\n" + end
    until_is("hosts", lambda: content(hosts), both)
    until("there are targets", lambda: content(targets))
    (group,) = json.loads(content(targets))
    assert group["targets"] == ["127.0.0.1:9100"]
    assert group["labels"]["__meta_serf_name"] == "web"
    until_is("what was read", lambda: content(Path(f"{list_}.read")), "first=None\nweb=web\n")

    web.kill()
    until_is("the list", lambda: content(list_), "first=None\n")
    until_is("what was read", lambda: content(Path(f"{list_}.read")), "first=None\n")
    # The one target is gone: the last good file stays. The failed one keeps its name.
    assert (json.loads(content(targets)), content(hosts)) == ([group], both)
    until("that is told", lambda: "no member is left for it" in first.log())

    plugins["hosts"]["domain"] = "two.test"
    (tmp_path / "first.toml").write_text(toml({"plugins": plugins}))
    first.signal(signal.SIGHUP)
    until_is("hosts", lambda: content(hosts), both.replace("one.test", "two.test"))
    # What the check refuses stays out, and the old file in.
    template.write_text("{{ members | length }}\n")
    until("the check is told of", lambda: "its check failed: exit status 1" in first.log())
    assert content(list_) == "first=None\n"
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()
    first.signal(signal.SIGTERM)
    assert first.exit_code() == 1
