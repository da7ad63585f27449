"""docs/plugins.md says what is true."""

import inspect
import re
from pathlib import Path

import pytest
from followed_files import bundled
from twisted.internet.defer import execute, succeed

import serfd.hooks
from serfd.config import Config, Seconds
from serfd.hooks import loader, specs
from serfd.hooks.host import BLOCKING_MAX, FAILURES_MAX, QUERIES_MAX, REST_MAX, REST_MIN
from serfd.hooks.mailbox import MAILBOX_SIZE, TOGETHER_MAX
from serfd.hooks.plugin_agent import PluginAgent
from serfd.net.process import KILL_AFTER, ProcessResult
from serfd.serf.events import MemberEventKind
from serfd.serf.queries import QueryAnswer, QueryDone

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs/plugins.md").read_text()
EXAMPLE, SECOND_EXAMPLE = (Path(__file__).parent / name for name in ("notebook.py", "deploy.py"))


def section(title: str) -> str:
    return DOCS.partition(f"\n## {title}")[2].partition("\n## ")[0]


def test_the_hooks_are_those_of_the_specs_with_their_signatures_and_words():
    text = section("The hooks")
    shown = re.findall(r'^def (\w+)(\(.*\) -> .*):\n    """(.*)"""$', text, re.MULTILINE)
    assert shown == [
        (name, _signature(getattr(specs, name)), getattr(specs, name).__doc__)
        for name in specs.HOOKS
    ]


def _signature(function) -> str:
    lines = inspect.getsource(function).splitlines()
    (line,) = [line for line in lines if line.startswith("def ")]
    return line.removeprefix(f"def {function.__name__}").removesuffix(":")


def test_there_is_a_hook_for_every_event():
    members = {kind.value.replace("-", "_") for kind in MemberEventKind}
    others = {"user_event", "events_lost", "query", "start", "stop", "reload"}
    assert set(specs.HOOKS) == members | others


def test_the_agents_table_names_everything_a_plugin_may_use():
    named = set(re.findall(r"`([a-z_]+)", section("The agent")))
    public = {name for name in vars(PluginAgent) if not name.startswith("_")} - {"serve"}
    assert public | {"logger", "metrics"} <= named


def test_every_name_a_plugin_may_import_is_in_the_docs():
    for name in serfd.hooks.__all__:
        assert hasattr(serfd.hooks, name)
        assert f"`{name}`" in DOCS


@pytest.mark.parametrize("example", [EXAMPLE, SECOND_EXAMPLE], ids=["first", "second"])
def test_the_examples_in_the_docs_are_the_tested_files(example):
    assert f"```python\n{example.read_text().rstrip()}\n```" in DOCS


def test_the_example_loads_and_does_what_it_says(agent, clock, host, plugins, tmp_path):
    (plugins.own / "notebook.py").write_text(EXAMPLE.read_text())
    agent.in_thread = execute  # no threads here: it runs at once
    file = tmp_path / "failed.txt"
    host.attach(plugins.load(notebook={"file": str(file)}))
    host.start()
    agent.happen("n2", "n3", kind=MemberEventKind.FAILED)
    clock.pump([0, 0])
    agent.happen("n4", kind=MemberEventKind.FAILED)
    clock.pump([0, 0])
    assert [line.split()[2:] for line in file.read_text().splitlines()] == [["n2", "n3"], ["n4"]]


def test_the_second_example_loads_and_does_what_it_says(agent, clock, host, plugins, caplog):
    (plugins.own / "deploy.py").write_text(SECOND_EXAMPLE.read_text())
    asked = []

    def run(argv, *, stdin, env, timeout, output_max):
        asked.append(argv)
        return succeed(ProcessResult(3, b"", b"", timed_out=False, seconds=Seconds(1)))

    def query(name, payload, *, answered, params):
        asked.append((name, params.tags, params.timeout))
        answered(QueryAnswer("n2", b"1.2: exit status 3", is_ack=False))
        return succeed(QueryDone(0, 1, 1))

    agent.run, agent.query = run, query
    caplog.set_level("INFO")
    host.attach(plugins.load("deploy"))
    host.start()
    before, other = agent.query_happens("deployed"), agent.query_happens("other")
    for name, payload in (("other", b""), ("deploy", b"1.2"), ("deploy-report", b"")):
        agent.user_event_happens(name, payload)
    clock.pump([0] * 4)
    after = agent.query_happens("deployed")
    clock.pump([0])
    assert asked == [["/usr/local/bin/deploy", "1.2"], ("deployed", {"role": "web"}, 5.0)]
    assert agent.responses == [(before, b"nothing"), (after, b"1.2: exit status 3")]
    assert other not in dict(agent.responses)
    assert "n2 has 1.2: exit status 3" in caplog.text
    assert "1 nodes have answered" in caplog.text


def test_the_error_in_the_docs_is_the_real_one(plugins):
    plugins.write(
        "webhook",
        "class Plugin:\n    class Settings(Struct):\n        url: str\n"
        "    def __init__(self, agent, settings): ...",
    )
    with pytest.raises(loader.ConfigError) as caught:
        plugins.load(webhook={"ulr": ""})
    assert f"\n    {caught.value}\n" in DOCS


def test_the_limits_in_the_docs_are_the_real_ones():
    assert f"Up to {MAILBOX_SIZE} events" in DOCS
    assert f"Up to {QUERIES_MAX} queries" in DOCS
    assert f"at most {Config().query_response_size_limit} bytes" in DOCS
    assert f"`hook_timeout` ({Config().hook_timeout:g} s)" in DOCS
    assert f"up to {TOGETHER_MAX}" in DOCS
    assert f"After {FAILURES_MAX} calls in a row" in DOCS
    assert f"{REST_MIN:g} s, then twice as long each time, up to {REST_MAX:g} s" in DOCS
    assert f"more than {BLOCKING_MAX * 1000:g} ms" in DOCS


def test_the_limits_in_the_page_on_scripts_are_the_real_ones():
    page = (ROOT / "docs/plugins/script.md").read_text()
    assert f"SIGKILL {KILL_AFTER:g} s later" in page
    assert "The last 8 KiB" in page
    assert bundled("script").OUTPUT_MAX == 8 * 1024
