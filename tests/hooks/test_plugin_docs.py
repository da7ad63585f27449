"""docs/plugins.md says what is true."""

import inspect
import re
import textwrap
from pathlib import Path

import msgspec
import pytest
from followed_files import bundled
from twisted.internet.defer import execute, succeed

import serfd.hooks
from serfd import config
from serfd.config import Config, Seconds
from serfd.hooks import FileSettings, Status, hookimpl, loader, specs
from serfd.hooks.host import BLOCKING_MAX, FAILURES_MAX, QUERIES_MAX, REST_MAX, REST_MIN
from serfd.hooks.mailbox import MAILBOX_SIZE, TOGETHER_MAX
from serfd.hooks.plugin_agent import PluginAgent
from serfd.net.process import KILL_AFTER, ProcessResult
from serfd.serf.events import MemberEventKind
from serfd.serf.lamport import RING_SIZE
from serfd.serf.queries import QueryAnswer, QueryDone

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs/plugins.md").read_text()
EXAMPLE, SECOND_EXAMPLE, THIRD_EXAMPLE, ALL_HOOKS = (
    Path(__file__).parent / name for name in ("notebook.py", "deploy.py", "servers.py", "tally.py")
)


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


@pytest.mark.parametrize(
    "name",
    [
        "Member", "Status", "UserEvent", "Query", "QueryAnswer", "QueryDone", "ProcessResult",
        "PluginStats",
    ],
)  # fmt: skip
def test_the_fields_of_each_value_are_all_there_and_no_others(name):
    (row,) = re.findall(rf"^\| `{name}` \| (.*) \|$", section("Values"), re.MULTILINE)
    kind = getattr(serfd.hooks, name)
    fields = set(kind.__members__) if kind is Status else set(inspect.get_annotations(kind))
    properties = inspect.getmembers(kind, lambda each: isinstance(each, property))
    fields |= {name for name, _ in properties} if kind is not Status else set()
    assert fields <= set(re.findall(r"`(\w+)`", row))
    named = set(re.findall(r"(?:^|[;,] (?:and )?| and )`(\w+)`", row))
    assert named <= fields


def test_the_defaults_of_run_are_the_real_ones():
    shown = re.search(r"`run\((.*?)\)`", section("The agent"))[1]
    real = inspect.signature(PluginAgent.run).parameters
    for part in shown.split(", ")[1:]:
        name, _, default = part.partition("=")
        assert eval(default) == real[name].default


def test_every_name_a_plugin_may_import_is_in_the_docs():
    for name in serfd.hooks.__all__:
        assert hasattr(serfd.hooks, name)
        assert f"`{name}`" in DOCS


@pytest.mark.parametrize(
    "example",
    [EXAMPLE, SECOND_EXAMPLE, THIRD_EXAMPLE, ALL_HOOKS],
    ids=["first", "second", "third", "all hooks"],
)
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


def test_the_third_example_writes_its_file_and_names_who_hinders_it(serf_cluster, tmp_path):
    cluster, file = serf_cluster(3), tmp_path / "servers"
    table = {"target": file, "statuses": ["alive"], "tags": {"role": "web"}}
    cluster.update_tags("n2", role="web")
    with cluster.errors_allowed():
        cluster.load(THIRD_EXAMPLE, **table)
        cluster.run(1)
    assert not file.exists()
    assert "n2 has no tag `port`" in cluster.log
    cluster.update_tags("n2", port="80")
    cluster.run(1)
    first = f"{cluster.member('n2').ip}:80\n"
    assert file.read_text() == first
    cluster.join("n4", tags={"role": "web", "port": "81"})
    cluster.run(1)
    assert file.read_text() == f"{first}{cluster.member('n4').ip}:81\n"


def test_the_settings_of_a_file_are_all_there():
    named = set(re.findall(r"`(\w+)`", section("Files that follow the members")))
    assert {field.name for field in msgspec.structs.fields(FileSettings)} <= named


def test_the_configuration_in_the_docs_is_complete_and_loads(agent, tmp_path):
    text = re.search(r"^```toml\n(.*?)^```$", DOCS, re.DOTALL | re.MULTILINE)[1]
    file = tmp_path / "serfd.toml"
    file.write_text(text.replace("/etc/serfd/plugins", str(EXAMPLE.parent)))
    read = config.load([file])
    (plugin,) = loader.load(read, agent)
    assert plugin.settings.file == "/var/lib/serfd/failed.txt"
    assert (read.node_name, read.start_join, read.tags) == ("web1", ["10.0.0.7"], {"role": "web"})
    own = f"`{read.state_dir}/{plugin.name}`"
    assert own in section("The agent")


def test_the_settings_in_the_docs_take_what_they_say(plugins):
    (text,) = re.findall(
        r"^```python\n(class Settings.*?)^```$", section("Settings"), re.DOTALL | re.MULTILINE
    )
    plugins.write(
        "a",
        "from typing import Annotated\nfrom serfd.hooks import matcher\n"
        f"class Plugin:\n{textwrap.indent(text, '    ')}\n"
        "    def __init__(self, agent, settings): ...\n",
    )
    (loaded,) = plugins.load(a={"interval": "1m", "retries": 10})
    assert loaded.settings.interval == 60
    for table, error in (
        ({"interval": "0s"}, "plugin 'a': interval must be longer than 0"),
        ({"retries": 11}, "plugin 'a': key 'retries' in [plugins.a]: expected `int` <= 10"),
        ({"role": "we(b"}, "plugin 'a': missing ): we(b"),
    ):
        with pytest.raises(loader.ConfigError) as caught:
            plugins.load(a=table)
        assert str(caught.value).startswith(error)


class Asker:
    def __init__(self, agent):
        self.agent = agent

    @hookimpl
    async def user_event(self):
        text = re.search(r"^```python\n(heard = .*?)^```$", DOCS, re.DOTALL | re.MULTILINE)[1]
        names = {"agent": self.agent, "Status": Status}
        exec(f"async def ask():\n{textwrap.indent(text, '    ')}\n    return heard, silent", names)
        self.seen = await names["ask"]()

    @hookimpl
    def query(self):
        return "mine"


def test_who_did_not_answer_a_query_is_found_as_the_docs_say(serf_cluster):
    cluster = serf_cluster(4)
    plugin = cluster.load(Asker)
    cluster.answer("load", {"n3": "0.5"})
    began = cluster.now
    cluster.user_event("ask")
    assert plugin.seen == ({"n1": b"mine", "n3": b"0.5"}, ["n2", "n4"])
    assert 3.2 <= cluster.now - began < 3.4


class Diary:
    def __init__(self, agent):
        self.agent = agent
        self.seen = []

    @hookimpl
    def start(self):
        self.seen.append(("start", self._alive()))

    @hookimpl
    def member_join(self, members):
        self.seen.append(("join", sorted(member.name for member in members)))

    @hookimpl
    def member_leave(self, members):
        self.seen.append(("leave", [member.name for member in members], self._alive()))
        self.seen.append(self.agent.me.status)

    @hookimpl
    def user_event(self, event):
        self.seen.append(event.payload)

    def _alive(self):
        return [member.name for member in self.agent.members(status=Status.ALIVE)]


def test_joins_follow_a_start_but_not_a_reload_and_who_leaves_is_told_of_itself(serf_cluster):
    cluster = serf_cluster(2)
    assert cluster.load(Diary).seen == [("start", ["n1", "n2"])]
    cluster.restart("n1")
    diary = cluster.plugin()
    assert diary.seen == [("start", ["n1", "n2"]), ("join", ["n1", "n2"])]
    cluster.leave("n1")
    assert diary.seen[2:] == [("leave", ["n1"], ["n2"]), Status.LEFT]


def test_what_may_coalesce_is_in_no_mailbox_until_it_is_handed_on(serf_cluster):
    cluster = serf_cluster(2)
    cluster.load(Diary, durable=True)
    for payload in ("1", "2"):
        cluster.simulation.user_event("n2", "deploy", payload.encode(), coalesce=True)
    cluster.simulation.user_event("n2", "deploy", b"now", coalesce=False)
    cluster.run(0.9)
    assert cluster.plugin().seen[1:] == [b"now"]
    assert cluster.stats().waiting == 0
    cluster.settle()
    assert cluster.plugin().seen[1:] == [b"now", b"2"]


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
    assert f"`user_quiescent_period` ({Config().user_quiescent_period:g} s)" in DOCS
    assert f"`user_coalesce_period` ({Config().user_coalesce_period:g} s)" in DOCS
    assert f"last {RING_SIZE} counts" in DOCS
    round_ = Config().gossip.gossip_interval * Config().query_timeout_mult
    assert f"{round_:g} s for up to 9 members, {2 * round_:g} s for up to 99" in DOCS


def test_the_limits_in_the_page_on_scripts_are_the_real_ones():
    page = (ROOT / "docs/plugins/script.md").read_text()
    assert f"SIGKILL {KILL_AFTER:g} s later" in page
    assert "The last 8 KiB" in page
    assert bundled("script").OUTPUT_MAX == 8 * 1024


def test_the_example_of_all_hooks_has_them_all_and_counts(serf_cluster, tmp_path):
    cluster = serf_cluster(3, state_dir=str(tmp_path))
    plugin = cluster.load(ALL_HOOKS)
    assert {name for name in dir(plugin) if name in specs.HOOKS} == set(specs.HOOKS)
    cluster.user_event("deploy", b"", source="n2")
    cluster.update_tags("n2", role="db")
    cluster.fail("n3")
    answers = cluster.query("tally", source="n2")
    assert answers["n1"] == b"deploy: 1 times, failed: 1 times, update of n2: 1 times"
    cluster.reload(unit="x")
    assert cluster.query("tally", source="n2")["n1"].startswith(b"deploy: 1 x, ")
    cluster.stop()
    assert (tmp_path / "tally" / "last.txt").read_text().startswith("deploy: 1 x, failed: 1 x")
