"""`SerfCluster`: what happens in the cluster, and what its methods promise of the plugins."""

import logging
import sys
import textwrap
from pathlib import Path

import pytest
from twisted.internet.task import deferLater

from serfd.errors import CommandError, ConfigError
from serfd.hooks import Struct, hookimpl
from serfd.hooks.mailbox import MAILBOX_SIZE
from serfd.serf.events import Status
from serfd.testing import CLASSES, HookFailed, SerfCluster


class Diary:
    """Notes down all it hears."""

    def __init__(self, agent):
        self.agent = agent
        self.heard = []

    @hookimpl
    def start(self):
        self.heard.append("start")

    @hookimpl
    def stop(self):
        self.heard.append("stop")

    @hookimpl
    def member_join(self, members):
        self._note("join", members)

    @hookimpl
    def member_leave(self, members):
        self._note("leave", members)

    @hookimpl
    def member_failed(self, members):
        self._note("failed", members)

    @hookimpl
    def member_update(self, members):
        self._note("update", members)

    @hookimpl
    def member_reap(self, members):
        self._note("reap", members)

    @hookimpl
    def user_event(self, event):
        self.heard.append((event.name, event.payload))

    @hookimpl
    def events_lost(self, count):
        self.heard.append(("lost", count))

    def _note(self, what, members):
        self.heard += [(what, member.name) for member in members]


class Answerer:
    """Answers the query `load` with its setting; has two ways to fail."""

    class Settings(Struct, frozen=True, kw_only=True):
        load: str = "0.5"

    def __init__(self, agent, settings):
        self.agent = agent
        self.settings = settings

    @hookimpl
    def query(self, query):
        return self.settings.load if query.name == "load" else None

    @hookimpl
    async def user_event(self, event):
        if event.name == "hang":
            await deferLater(self.agent.reactor, 1e6)
        elif event.name == "raise":
            raise LookupError("no such thing")


class Reloader(Answerer):
    """Takes new settings as they come."""

    @hookimpl
    def reload(self, settings):
        self.settings = settings


@pytest.fixture
def cluster():
    with SerfCluster(5) as cluster:
        yield cluster


@pytest.fixture
def heard(cluster):
    diary = cluster.load(Diary)
    assert diary.heard == ["start"]
    diary.heard.clear()
    return diary.heard


# Nodes


def test_it_has_nodes_that_all_know_each_other(cluster):
    assert list(cluster.simulation.processes) == ["n1", "n2", "n3", "n4", "n5"]
    assert {cluster.member("n1", seen_by=f"n{i}").status for i in range(1, 6)} == {Status.ALIVE}
    assert cluster.member("n9") is None


def test_a_plugin_hears_of_joins_with_tags_of_leaves_and_of_failures(cluster, heard):
    cluster.join("n6", tags={"role": "db"})
    assert heard == [("join", "n6")]
    assert cluster.member("n6").tags == {"role": "db"}
    cluster.leave("n2")
    cluster.fail("n3")
    assert heard[1:] == [("leave", "n2"), ("failed", "n3")]
    assert cluster.member("n3", seen_by="n5").status is Status.FAILED


def test_a_node_that_is_started_again_is_heard_of_and_so_is_one_that_is_pruned(cluster, heard):
    cluster.fail("n3")
    cluster.restart("n3")
    cluster.restart("n4")
    assert cluster.member("n4").status is Status.ALIVE
    cluster.leave("n5")
    cluster.forget("n5")
    assert heard == [("failed", "n3"), ("join", "n3"), ("leave", "n5"), ("reap", "n5")]
    assert cluster.member("n5", seen_by="n2") is None


def test_tags_are_set_and_deleted(cluster, heard):
    cluster.update_tags("n2", role="db", dc="east")
    cluster.update_tags("n2", role=None, dc="west")
    assert heard == [("update", "n2")] * 2
    assert cluster.member("n2", seen_by="n4").tags == {"dc": "west"}


def test_in_a_partition_both_sides_see_the_others_fail_and_then_meet_again(cluster, heard):
    with cluster.partition("n2", "n3"):
        assert sorted(heard) == [("failed", "n2"), ("failed", "n3")]
        assert cluster.member("n2", seen_by="n3").status is Status.ALIVE
        assert cluster.member("n1", seen_by="n3").status is Status.FAILED
        cluster.fail("n5")
        assert cluster.member("n5", seen_by="n2").status is not Status.ALIVE
        cluster.update_tags("n2", role="db")
        assert cluster.member("n2", seen_by="n3").tags == {"role": "db"}
        assert cluster.member("n2").tags == {}
    assert sorted(heard[3:5]) == [("join", "n2"), ("join", "n3")]
    assert cluster.member("n2").tags == {"role": "db"}
    assert cluster.member("n1", seen_by="n3").status is Status.ALIVE


def test_a_plugin_may_leave_and_the_others_go_on_without_it(cluster):
    diary = cluster.load(Diary)
    left = diary.agent.leave()
    cluster.run(10)
    assert left.called
    cluster.fail("n3")
    cluster.restart("n3")
    assert cluster.member("n3", seen_by="n2").status is Status.ALIVE


@pytest.mark.parametrize("size", [1, 2, 12])
def test_clusters_are_of_any_size(size):
    with SerfCluster(size) as cluster:
        heard = cluster.load(Diary).heard
        cluster.user_event("deploy", "1.2")
        assert heard == ["start", ("deploy", b"1.2")]


def test_what_a_node_has_heard_can_be_looked_at(cluster):
    diary = cluster.load(Diary)
    diary.agent.user_event("deploy", b"1")
    cluster.settle()
    assert [event.name for event in cluster.user_events("n4")] == ["deploy"]
    assert cluster.heard("n4")[-1].payload == b"1"


def test_the_same_seed_gives_the_same_run():
    def trace(seed):
        with SerfCluster(4, seed=seed) as cluster:
            cluster.load(Diary)
            with cluster.partition("n2"):
                cluster.user_event("deploy")
            return cluster.simulation.trace

    assert trace(7) == trace(7) != trace(8)


# User events and queries


def test_user_events_come_from_whom_they_are_told_by_and_as_often(cluster, heard):
    cluster.user_event("deploy", "1.2", source="n4")
    cluster.user_event("tick", times=3)
    cluster.user_event("again", times=2, coalesce=True)
    assert heard == [("deploy", b"1.2"), *[("tick", b"")] * 3, ("again", b"")]


def test_queries_give_the_answers_by_name(cluster):
    cluster.load(Answerer)
    assert cluster.query("load") == {"n1": b"0.5"}
    assert cluster.query("other", source="n3") == {}
    assert cluster.query("load", nodes=["n2"]) == {}
    assert cluster.query("load", tags={"role": "db"}) == {}


def test_other_nodes_answer_as_they_are_told_to(cluster):
    diary = cluster.load(Diary)
    cluster.answer("load", {"n2": "0.1", "n3": b"0.3"})
    cluster.join("n6")
    cluster.answer("load", {"n6": "0.6"})
    heard = []

    async def ask():
        async for answer in diary.agent.query("load"):
            heard.append((answer.sender, answer.payload))

    diary.agent.later(1, ask)
    cluster.run(10)
    assert sorted(heard) == [("n2", b"0.1"), ("n3", b"0.3"), ("n6", b"0.6")]
    assert cluster.query("load", source="n2", timeout=1) == dict(heard)


def test_what_a_node_refuses_is_raised(cluster):
    with pytest.raises(CommandError, match="exceeds"):
        cluster.user_event("deploy", b"x" * 10_000)
    with pytest.raises(CommandError, match="exceeds"):
        cluster.query("load", b"x" * 10_000)


# Plugins


def test_a_plugin_is_loaded_from_its_file_its_class_or_by_its_name(tmp_path):
    file = tmp_path / "told.py"
    file.write_text("class Plugin:\n    def __init__(self, agent):\n        self.file = __file__\n")
    with SerfCluster(1, folder=tmp_path) as cluster:
        assert cluster.load("told.py").file == str(file)
        assert cluster.load(file, "again").file == str(file)
        assert isinstance(cluster.load(Diary), Diary)
        cluster.load("script", handlers=["user=true"])
        assert [each.name for each in cluster._running.host.stats()] == [
            "told", "again", "diary", "script",
        ]  # fmt: skip
    assert not [name for name in sys.modules if name.startswith("serfd_plugin_told")]
    assert CLASSES == {}


def test_settings_are_those_of_a_file_and_so_are_the_errors(cluster):
    assert cluster.load(Answerer, load="0.7").settings.load == "0.7"
    with pytest.raises(ConfigError, match=r"unknown key 'laod' in \[plugins.other\].*'load'"):
        cluster.load(Answerer, "other", laod="1")
    with pytest.raises(ConfigError, match=r"'nobody', switched on by .* was not found"):
        cluster.load("nobody")
    assert cluster.query("load") == {"n1": b"0.7"}


def test_a_path_among_the_settings_is_a_text(cluster, tmp_path):
    assert cluster.load(Answerer, load=tmp_path).settings.load == str(tmp_path)


def test_a_reload_replaces_a_plugin_and_leaves_the_others_alone(cluster):
    diary, before = cluster.load(Diary), cluster.load(Answerer)
    after = cluster.reload("answerer", load="0.9")
    assert after is not before
    assert after is cluster.plugin("answerer")
    assert cluster.query("load") == {"n1": b"0.9"}
    assert cluster.reload("answerer") is after
    with pytest.raises(ConfigError, match="expected `str`"):
        cluster.reload("answerer", load=1)
    assert cluster.plugin("answerer") is after
    cluster.unload("answerer")
    assert cluster.query("load") == {}
    assert diary.heard == ["start"]


def test_a_plugin_with_the_hook_reload_is_told_of_its_new_settings(cluster):
    before = cluster.load(Reloader, "one")
    assert cluster.reload(load="0.9") is before
    assert cluster.query("load") == {"n1": b"0.9"}


def test_a_reload_reads_a_file_that_has_changed(cluster, tmp_path):
    file = tmp_path / "told.py"
    text = "class Plugin:\n    what = {}\n    def __init__(self, agent): ...\n"
    file.write_text(text.format(1))
    assert cluster.load(file).what == 1
    file.write_text(text.format(2))
    assert cluster.reload().what == 2


def test_a_restart_of_n1_brings_a_new_plugin_that_hears_of_everybody(cluster):
    before = cluster.load(Diary)
    cluster.restart("n1")
    after = cluster.plugin()
    assert before.heard == ["start", "stop"]
    assert after.heard[0] == "start"
    assert sorted(after.heard[1:]) == [("join", f"n{i}") for i in range(1, 6)]
    cluster.fail("n3")
    assert after.heard[-1] == ("failed", "n3")


def test_a_crash_of_n1_stops_nothing_and_a_durable_plugin_hears_later_what_waited(cluster):
    before = cluster.load(Diary, durable=True)
    with cluster.hold():
        cluster.user_event("deploy")
        cluster.fail("n1")
        assert cluster.member("n1", seen_by="n2").status is Status.FAILED
        with pytest.raises(ValueError, match="n1 does not run: restart it first"):
            cluster.stats()
    cluster.restart("n1")
    assert before.heard == ["start"]
    assert cluster.plugin().heard[:2] == ["start", ("deploy", b"")]


def test_stop_is_told_and_then_n1_is_silent(cluster):
    diary = cluster.load(Diary)
    with cluster.hold():
        cluster.user_event("deploy")
    cluster.stop()
    assert diary.heard == ["start", ("deploy", b""), "stop"]
    cluster.fail("n3")
    assert cluster.member("n1", seen_by="n2").status is Status.FAILED
    cluster.restart("n1")
    cluster.leave("n1")
    assert cluster.member("n1", seen_by="n2").status is Status.LEFT


def test_the_end_of_the_block_stops_the_plugins():
    with SerfCluster(2) as cluster:
        diary = cluster.load(Diary)
        assert "stop" not in diary.heard
    assert diary.heard[-1] == "stop"


def test_a_held_plugin_hears_late_and_loses_what_is_too_much(cluster, heard):
    with cluster.hold():
        cluster.user_event("tick", times=MAILBOX_SIZE + 10)
        assert heard == []
        assert cluster.stats().waiting >= MAILBOX_SIZE
    lost = cluster.stats().lost
    assert lost >= 10
    assert heard[0] == ("lost", lost)
    assert len(heard) == 1 + MAILBOX_SIZE + 10 - lost


def test_numbers_metrics_and_log_can_be_looked_at(cluster):
    diary = cluster.load(Diary)
    diary.agent.metrics.count("seen", 3)
    diary.agent.logger.debug("a word")
    assert cluster.stats().calls == 1
    assert cluster.stats("diary").name == "diary"
    assert cluster.metrics.counters["plugins.diary.seen"] == 3
    assert "DEBUG serfd.plugins.diary: a word" in cluster.log.splitlines()
    assert "INFO serfd.hooks.loader: plugin diary: loaded from" in cluster.log


def test_logging_is_as_before_when_it_is_over(cluster):
    logger = logging.getLogger("serfd.plugins")
    assert logger.level == logging.DEBUG
    cluster.close()
    assert (logger.level, logger.handlers) == (logging.NOTSET, [])


# Errors


def test_a_hook_that_raises_fails_the_call_with_what_it_raised(cluster):
    cluster.load(Answerer)
    with pytest.raises(
        HookFailed, match=r"answerer: user_event.'raise'. failed: LookupError: no"
    ) as it:
        cluster.user_event("raise")
    assert isinstance(it.value.__cause__, LookupError)
    assert it.value.__cause__.__traceback__ is not None
    cluster.user_event("fine")


def test_a_hook_that_hangs_fails_the_call_when_its_time_is_up(cluster):
    cluster.load(Answerer)
    began = cluster.now
    with pytest.raises(HookFailed, match=r"'hang'.* was not done in time"):
        cluster.user_event("hang")
    assert 30 <= cluster.now - began < 31


def test_what_was_held_and_fails_fails_the_end_of_the_block(cluster):
    cluster.load(Answerer)
    with pytest.raises(HookFailed, match="'raise'"), cluster.hold():
        cluster.user_event("raise")


def test_a_start_that_raises_fails_the_load(cluster, tmp_path):
    file = tmp_path / "broken.py"
    file.write_text(
        textwrap.dedent(
            """
            from serfd.hooks import hookimpl

            class Plugin:
                def __init__(self, agent): ...

                @hookimpl
                def start(self):
                    raise OSError("no")
            """
        )
    )
    with pytest.raises(HookFailed, match="broken: start failed: OSError: no") as caught:
        cluster.load(file)
    assert caught.value.__notes__ == ["then: plugin broken: not started, tried again in 1 s"]


def test_errors_that_are_allowed_fail_nothing_and_can_be_looked_at(cluster):
    cluster.load(Answerer)
    with cluster.errors_allowed() as errors:
        cluster.user_event("raise", times=5)  # after three of them it rests
    assert [str(error.__cause__) for error in errors] == ["no such thing"] * 5
    assert cluster.stats().errors == 5
    cluster.user_event("fine")


def test_a_stop_that_raises_fails_the_end(tmp_path):
    file = tmp_path / "broken.py"
    hook = "    @hookimpl\n    def stop(self): 1 / 0"
    text = f"class Plugin:\n    def __init__(self, agent): ...\n{hook}\n"
    file.write_text(f"from serfd.hooks import hookimpl\n{text}")
    with (
        pytest.raises(HookFailed, match="stop failed: ZeroDivisionError"),
        SerfCluster(1) as cluster,
    ):
        cluster.load(file)
    assert not [name for name in sys.modules if name.startswith("serfd_plugin_broken")]


def test_what_a_plugins_own_timer_raises_is_raised(cluster):
    diary = cluster.load(Diary)
    diary.agent.reactor.callLater(1, int, "x")
    with pytest.raises(ValueError, match="invalid literal"):
        cluster.run(2)


def test_waiting_in_vain_says_for_what(cluster):
    cluster.simulation.pause("n3", 1e6)
    with pytest.raises(AssertionError) as caught:
        cluster.update_tags("n2", role="db")
    assert "waited in vain until everybody sees the tags of n2: " in str(caught.value)
    assert "of SerfCluster(5, seed=1)" in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda c: c.fail("n9"), "there is no node 'n9', the nodes are n1, n2, n3, n4, n5"),
        (lambda c: (c.fail("n2"), c.fail("n2")), "n2 does not run: restart it first"),
        (lambda c: c.restart("n9"), "there is no node 'n9' to restart, the nodes are n1,"),
        (lambda c: c.join("n2"), "there is a node 'n2' already: restart it, or take another name"),
        (lambda c: c.forget("n2"), "n2 runs: only one that left or failed is forgotten"),
        (lambda c: c.answer("load", {"n1": b""}), "n1 answers with its plugins"),
        (lambda c: c.load("nowhere.py"), "there is no file /.*nowhere.py"),
        (lambda c: c.load(Diary), r"\[plugins.diary\] is there already: reload it, or give"),
        (lambda c: c.plugin("x"), "no plugin 'x'; the plugins are: diary"),
        (lambda c: (c.unload(), c.plugin()), "no name, and not one plugin only; .* are: none"),
        (lambda c: (c.stop(), c.load("script")), "n1 does not run: restart it first"),
        (lambda c: SerfCluster(0), "a cluster of 0 nodes, expected 1 or more"),
    ],
)
def test_what_cannot_be_is_told(cluster, heard, wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong(cluster)


# Its configuration


def test_serfds_own_settings_can_be_given_as_in_a_file():
    handlers = ["user=true"]
    with SerfCluster(2, hook_timeout="5s", event_handlers=handlers) as cluster:
        assert cluster.stats("script").state == "running"
        cluster.load(Answerer)
        began = cluster.now
        with pytest.raises(HookFailed, match="not done in time"):
            cluster.user_event("hang")
        assert cluster.now - began < 6
    before = logging.getLogger("serfd.hooks").handlers[:]
    with pytest.raises(ConfigError, match="hook_timeuot"):
        SerfCluster(2, hook_timeuot="5s")
    assert logging.getLogger("serfd.hooks").handlers == before


def test_each_plugin_has_a_state_dir_that_is_gone_in_the_end():
    with SerfCluster(1) as cluster:
        folder: Path = cluster.load(Diary).agent.state_dir
        assert folder.is_dir()
    assert not folder.exists()


def test_a_failure_in_the_block_is_not_hidden_by_the_end():
    cluster = SerfCluster(1)
    diary = cluster.load(Diary)
    with pytest.raises(KeyError, match="mine"), cluster:
        raise KeyError("mine")
    assert diary.heard == ["start", "stop"]
