import logging
import re

import pytest
from twisted.internet.defer import Deferred

from serfd.hooks.host import QUERIES_MAX
from serfd.hooks.mailbox import MAILBOX_SIZE
from serfd.serf.events import MemberEventKind

RECORDER = """
@hookimpl
def start(self): self.agent.seen.append("{name} start")
@hookimpl
def stop(self): self.agent.seen.append("{name} stop")
@hookimpl
def member_join(self, members):
    self.agent.seen += [f"{name} {{m.name}}" for m in members]
"""


def write_recorders(plugins, *names):
    for name in names:
        plugins.write(name, RECORDER.format(name=name))


def start(host, plugins, *names, **tables):
    loaded = plugins.load(*names, **tables)
    host.attach(loaded)
    done = outcome(host.start())
    return loaded, done


def outcome(deferred: "Deferred[None]") -> list[object]:
    """What the Deferred has fired with, as a list that fills."""
    fired: list[object] = []
    deferred.addBoth(fired.append)
    return fired


def stats(host, name):
    return next(each for each in host.stats() if each.name == name)


def turns(clock, count=20):
    clock.pump([0.0] * count)


def test_plugins_start_in_the_order_of_the_config_and_stop_in_reverse(agent, host, plugins):
    write_recorders(plugins, "b", "a", "c")
    _, started = start(host, plugins, "b", "a", "c")
    assert started == [None]
    assert agent.seen == ["b start", "a start", "c start"]
    agent.seen.clear()
    assert outcome(host.stop()) == [None]
    assert agent.seen == ["c stop", "a stop", "b stop"]
    assert not agent.is_listened_to


def test_tryfirst_and_trylast_move_a_plugin_in_the_order_of_starts_and_stops(agent, host, plugins):
    write_recorders(plugins, "a", "d")
    for name, mark in (("late", "trylast"), ("early", "tryfirst")):
        plugins.write(
            name, RECORDER.format(name=name).replace("@hookimpl", f"@hookimpl({mark}=True)")
        )
    start(host, plugins, "late", "a", "d", "early")
    assert agent.seen == ["early start", "a start", "d start", "late start"]
    agent.seen.clear()
    host.stop()
    assert agent.seen == ["early stop", "d stop", "a stop", "late stop"]


def test_a_hook_is_called_in_a_later_turn_and_never_inside_the_listener(
    agent, clock, host, plugins
):
    write_recorders(plugins, "a")
    start(host, plugins, "a")
    agent.seen.clear()
    agent.happen("n2", "n3")
    assert agent.seen == []
    turns(clock)
    assert agent.seen == ["a n2", "a n3"]


@pytest.mark.parametrize("kind", MemberEventKind)
def test_every_membership_event_has_its_hook(kind, agent, clock, host, plugins):
    hook = kind.value.replace("-", "_")
    plugins.write(
        "a", f"@hookimpl\ndef {hook}(self, members): self.agent.seen.append(members[0].name)"
    )
    start(host, plugins, "a")
    for other in MemberEventKind:
        agent.happen(other.value, kind=other)
    agent.user_event_happens()
    turns(clock)
    assert agent.seen == [kind.value]
    assert stats(host, "a").calls == 1


@pytest.mark.parametrize(
    "hook",
    [
        "def member_join(self, members): self.agent.seen.append('done')",
        "def member_join(self): self.agent.seen.append('done')",
        "def member_join(self, *, members): self.agent.seen.append('done')",
        "@staticmethod\ndef member_join(members): SEEN.append('done')",
        "def member_join(self, members): return succeed(self.agent.seen.append('done'))",
        "async def member_join(self): self.agent.seen.append('done')",
        "async def member_join(self, members): self.agent.seen.append(await succeed('done'))",
    ],
)
def test_a_hook_is_a_function_a_coroutine_or_returns_a_deferred_and_takes_what_it_wants(
    hook, agent, clock, host, plugins
):
    plugins.write(
        "a",
        "SEEN = []\nclass Plugin:\n    def __init__(self, agent):\n"
        "        self.agent = agent = agent._agent\n        globals()['SEEN'] = agent.seen\n"
        "    @hookimpl\n    " + hook.replace("\n", "\n    "),
    )
    start(host, plugins, "a")
    agent.happen("n2")
    turns(clock)
    assert agent.seen == ["done"]
    assert (stats(host, "a").calls, stats(host, "a").errors) == (1, 0)


def test_events_wait_until_the_start_is_done_and_then_come_in_order_one_at_a_time(
    agent, clock, host, plugins
):
    plugins.write(
        "slow",
        """
        @hookimpl
        async def start(self): await self.agent.gate("start")
        @hookimpl
        async def member_join(self, members):
            self.agent.seen.append("begin " + members[0].name)
            await self.agent.gate(members[0].name)
            self.agent.seen.append("end " + members[0].name)
        @hookimpl
        def member_failed(self, members): self.agent.seen.append("failed " + members[0].name)
        """,
    )
    _, started = start(host, plugins, "slow")
    agent.happen("n2")
    agent.happen("n2", kind=MemberEventKind.FAILED)
    agent.happen("n3")
    turns(clock)
    assert started == []
    assert agent.seen == []
    assert stats(host, "slow").state == "starting"
    agent.gate("start").callback(None)
    assert started == [None]
    turns(clock)
    assert agent.seen == ["begin n2"]
    agent.gate("n2").callback(None)
    turns(clock)
    assert agent.seen == ["begin n2", "end n2", "failed n2", "begin n3"]


TROUBLE = {
    "raises": "def member_join(self): raise ValueError('no such luck')",
    "exits": "def member_join(self): raise SystemExit(3)",
    "raises later": """async def member_join(self):
    await self.agent.gate("opened")
    raise ValueError("no such luck")""",
    "fails": "def member_join(self): return Deferred()",
    "hangs": "async def member_join(self): await Deferred()",
    "blocks": "def member_join(self): self.agent.block(60)",
    "refuses to be cancelled": """async def member_join(self):
    while True:
        try: await Deferred()
        except CancelledError: pass""",
    "cannot be cancelled": """def member_join(self):
    def canceller(_): raise KeyError("no")
    return Deferred(canceller)""",
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_one_plugins_trouble_reaches_no_other(trouble, agent, clock, host, plugins):
    agent.gate("opened").callback(None)
    write_recorders(plugins, "before", "after")
    plugins.write("bad", "@hookimpl\n" + TROUBLE[trouble])
    _, started = start(host, plugins, "before", "bad", "after")
    assert started == [None]
    agent.seen.clear()
    for name in ("n2", "n3"):
        agent.happen(name)
        turns(clock)
    assert sorted(agent.seen) == ["after n2", "after n3", "before n2", "before n3"]
    # And it does not lose its own turn: in time, it has got both events.
    clock.pump([30.0, 0, 30.0, 0])
    assert stats(host, "bad").calls == 2
    assert stats(host, "bad").waiting == 0
    assert outcome(host.stop()) == [None]


def test_an_exception_is_logged_with_plugin_hook_and_event_and_counted(
    agent, clock, host, plugins, caplog
):
    path = plugins.write("bad", "@hookimpl\n" + TROUBLE["raises"])
    start(host, plugins, "bad")
    agent.happen("n2", "n3", "n4", "n5", "n6")
    turns(clock)
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert record.getMessage() == ("plugin bad: member_join('n2', 'n3', 'n4' and 2 more) failed")
    assert "ValueError: no such luck" in caplog.text
    assert str(path) in caplog.text
    assert (stats(host, "bad").errors, stats(host, "bad").timeouts) == (1, 0)


def test_a_hook_that_hangs_is_cancelled_after_hook_timeout_and_named(
    agent, clock, host, plugins, caplog
):
    plugins.write(
        "bad",
        """
        @hookimpl
        async def member_join(self, members):
            try:
                await Deferred()
            except CancelledError:
                self.agent.seen.append("cancelled " + members[0].name)
                raise
        """,
    )
    start(host, plugins, "bad")
    for name in ("n2", "n3"):
        agent.happen(name)
        turns(clock)
    clock.advance(29.9)
    assert agent.seen == []
    clock.advance(0.1)
    assert agent.seen == ["cancelled n2"]
    assert "plugin bad: member_join('n2') was not done in time and is cancelled" in caplog.text
    clock.pump([0, 30])
    assert agent.seen == ["cancelled n2", "cancelled n3"]
    assert (stats(host, "bad").errors, stats(host, "bad").timeouts) == (0, 2)
    assert clock.getDelayedCalls() == []


@pytest.mark.parametrize(("own", "limit"), [({}, 30), ({"hook_timeout": "2m"}, 120)])
def test_a_plugin_may_have_a_limit_of_its_own_and_knows_it(
    own, limit, agent, clock, host, plugins, caplog
):
    plugins.write(
        "slow",
        """
        class Plugin:
            class Settings(Struct): pass
            def __init__(self, agent, settings): self.outside, self.agent = agent, agent._agent
            @hookimpl
            def start(self): self.agent.seen.append(self.outside.hook_timeout)
            @hookimpl
            async def member_join(self): await Deferred()
        """,
    )
    start(host, plugins, slow=own)
    assert agent.seen == [limit]
    agent.happen("n2")
    turns(clock)
    clock.advance(limit - 0.1)
    assert stats(host, "slow").timeouts == 0
    clock.advance(0.1)
    assert stats(host, "slow").timeouts == 1


@pytest.mark.parametrize(
    "hook",
    [
        "def member_join(self): self.agent.block(0.25)",
        "async def member_join(self):\n    await self.agent.gate('x')\n    self.agent.block(0.25)",
        "async def member_join(self):\n    self.agent.block(0.25)\n    raise ValueError",
    ],
)
def test_a_hook_that_blocks_the_reactor_is_named(hook, agent, clock, host, plugins, caplog):
    plugins.write("bad", "@hookimpl\n" + hook)
    start(host, plugins, "bad")
    agent.happen("n2")
    turns(clock)
    agent.gate("x").callback(None)
    assert "plugin bad: member_join('n2') blocked the daemon for 250 ms" in caplog.text


def test_waiting_is_not_blocking(agent, clock, host, plugins, caplog):
    plugins.write("good", "@hookimpl\nasync def member_join(self): await self.agent.gate('x')")
    start(host, plugins, "good")
    agent.happen("n2")
    turns(clock)
    agent.block(20)
    agent.gate("x").callback(None)
    assert stats(host, "good").calls == 1
    assert "blocked" not in caplog.text


def test_a_full_mailbox_drops_the_oldest_counts_them_and_says_so_once_and_to_the_plugin(
    agent, clock, host, plugins, caplog
):
    plugins.write(
        "slow",
        """
        @hookimpl
        async def user_event(self, event):
            if event.name.startswith("gate"):
                await self.agent.gate(event.name)
            self.agent.seen.append(event.name)
        @hookimpl
        def events_lost(self, count): self.agent.seen.append(count)
        """,
    )
    start(host, plugins, "slow")

    def flood(gate):
        agent.user_event_happens(gate)
        turns(clock)
        for number in range(MAILBOX_SIZE + 3):
            agent.user_event_happens(f"{number} after {gate}")

    flood("gate1")
    assert stats(host, "slow").lost == 3
    assert agent.metrics.gauges["plugin.waiting.slow"] == stats(host, "slow").waiting > 1000
    agent.gates["gate1"].callback(None)
    turns(clock, MAILBOX_SIZE + 3)
    # The oldest of those that waited are missing; all others came in order.
    assert agent.seen == ["gate1", 3, *(f"{n} after gate1" for n in range(3, MAILBOX_SIZE + 3))]
    said = "plugin slow: 1024 events are waiting for it, the oldest are dropped"
    assert caplog.text.count(said) == 1
    # The mailbox was empty in between: it is said again.
    flood("gate2")
    assert caplog.text.count(said) == 2


def test_changes_that_wait_are_told_together(agent, clock, host, plugins):
    plugins.write(
        "slow",
        """
        @hookimpl
        async def member_join(self, members):
            self.agent.seen.append([member.name for member in members])
            await self.agent.gate("open")
        """,
    )
    start(host, plugins, "slow")
    agent.happen("n1")
    turns(clock)
    for number in range(2, 5):
        agent.happen(f"n{number}")
    agent.gates["open"].callback(None)
    turns(clock)
    assert agent.seen == [["n1"], ["n2", "n3", "n4"]]
    assert stats(host, "slow").merged == 2


def test_a_plugin_that_fails_again_and_again_rests_between_its_events_until_it_works(
    agent, clock, host, plugins, caplog
):
    caplog.set_level(logging.INFO)
    plugins.write(
        "bad",
        """
        @hookimpl
        def user_event(self, event):
            self.agent.seen.append(event.name)
            if event.name != "good": raise ValueError("no such luck")
        """,
    )
    start(host, plugins, "bad")
    for number in range(5):
        agent.user_event_happens(f"e{number}")
    agent.user_event_happens("good")
    agent.user_event_happens("good")
    turns(clock)
    # Three in a row: now it is let rest for 1 s, then 2 s, then 4 s.
    assert agent.seen == ["e0", "e1", "e2"]
    assert stats(host, "bad").state == "failing"
    assert stats(host, "bad").last_error == "user_event('e2'): ValueError: no such luck"
    assert "plugin bad: failing, 3 calls in a row went wrong; the next comes in 1 s" in caplog.text
    for rest, seen in ((1, "e3"), (2, "e4"), (4, "good")):
        clock.advance(rest - 0.01)
        assert agent.seen[-1] != seen
        clock.advance(0.01)
        assert agent.seen[-1] == seen
    turns(clock)
    assert agent.seen[-2:] == ["good", "good"]
    assert "plugin bad: works again" in caplog.text
    assert stats(host, "bad").state == "running"


def test_a_rest_is_never_longer_than_a_minute(agent, clock, host, plugins):
    plugins.write("bad", "@hookimpl\ndef user_event(self): raise ValueError")
    start(host, plugins, "bad")
    for number in range(30):
        agent.user_event_happens(f"e{number}")
    clock.pump([60.0] * 60)
    assert stats(host, "bad").errors == 30


def test_a_plugin_that_fails_on_queries_is_not_asked_while_it_rests(agent, clock, host, plugins):
    plugins.write("bad", "@hookimpl\ndef query(self): raise ValueError")
    start(host, plugins, "bad")
    for _ in range(5):
        agent.query_happens(deadline=100.0)
        turns(clock)
    assert stats(host, "bad").calls == 3
    clock.advance(1)
    agent.query_happens(deadline=100.0)
    turns(clock)
    assert stats(host, "bad").calls == 4


def test_new_settings_are_told_to_a_plugin_that_takes_them_in_the_order_of_events(
    agent, clock, host, plugins
):
    plugins.write(
        "set",
        """
        class Plugin:
            class Settings(Struct, frozen=True):
                level: int = 1
            def __init__(self, agent, settings):
                self.agent, self.level = agent._agent, settings.level
            @hookimpl
            def start(self): self.agent.seen.append(f"start {self.level}")
            @hookimpl
            def reload(self, settings): self.level = settings.level
            @hookimpl
            async def user_event(self, event):
                await self.agent.gate(event.name)
                self.agent.seen.append(f"{event.name} {self.level}")
        """,
    )
    old, _ = start(host, plugins, set={"level": 1})
    agent.user_event_happens("e1")
    agent.user_event_happens("e2")
    turns(clock)
    new = plugins.load(held=host.kept(), set={"level": 2})
    assert new[0].plugin is old[0].plugin
    reloaded = outcome(host.reload(new))
    turns(clock)
    assert reloaded == []
    agent.gates["e1"].callback(None)
    agent.gate("e2").callback(None)
    turns(clock)
    assert reloaded == [None]
    assert agent.seen == ["start 1", "e1 1", "e2 2"]


def test_a_plugin_that_did_not_take_its_settings_is_failing_until_it_is_built_anew(
    agent, clock, host, plugins, caplog
):
    caplog.set_level(logging.INFO)
    plugins.write(
        "set",
        """
        class Plugin:
            class Settings(Struct, frozen=True):
                level: int = 1
            def __init__(self, agent, settings):
                self.agent, self.level = agent._agent, settings.level
            @hookimpl
            def reload(self, settings):
                if settings.level < 0: raise ValueError("too low")
                self.level = settings.level
            @hookimpl
            def user_event(self): self.agent.seen.append(self.level)
        """,
    )
    old, _ = start(host, plugins, set={"level": 1})

    def reload(level):
        loaded = plugins.load(held=host.kept(), set={"level": level})
        reloaded = outcome(host.reload(loaded))
        turns(clock)
        assert reloaded == [None]
        agent.user_event_happens()
        turns(clock)
        return loaded[0].plugin

    assert reload(2) is old[0].plugin
    assert caplog.messages[-1] == "plugin set: has taken its new settings"
    assert reload(-1) is old[0].plugin
    assert "plugin set: did not take its new settings, it may use the old ones; " in caplog.text
    # Its events go well meanwhile.
    assert (stats(host, "set").state, agent.seen) == ("failing", [2, 2])
    assert stats(host, "set").last_error == "reload: ValueError: too low"
    new = reload(-1)
    assert new is not old[0].plugin
    assert (stats(host, "set").state, agent.seen) == ("running", [2, 2, -1])


def test_periodic_calls_are_like_hooks_and_end_with_the_plugin(agent, clock, host, plugins, caplog):
    plugins.write(
        "a",
        """
        class Plugin:
            def __init__(self, agent):
                self.agent = agent._agent
                agent.every(10, self.look)
                self.end = agent.every(4, self.short)
                agent.later(3, self.once)
            async def look(self):
                self.agent.seen.append("look")
                await self.agent.gate("look")
                raise ValueError("no such luck")
            def short(self):
                self.agent.seen.append("short")
                self.end()
            def once(self): self.agent.seen.append("once")
        """,
    )
    start(host, plugins, "a")
    assert clock.getDelayedCalls()
    clock.pump([1.0] * 9)
    assert agent.seen == ["once", "short"]
    clock.advance(1)
    assert agent.seen[2:] == ["look"]
    clock.pump([1.0] * 20)
    # One does not come while the one before it is under way.
    assert agent.seen[2:] == ["look"]
    agent.gates["look"].callback(None)
    assert "plugin a: look() failed" in caplog.text
    assert stats(host, "a").errors == 1
    clock.pump([1.0] * 10)
    assert agent.seen[2:] == ["look", "look"]
    assert outcome(host.stop()) == [None]
    assert clock.getDelayedCalls() == []


@pytest.mark.parametrize(
    ("hook", "wait"),
    [
        ("def start(self):\n        if 'works' not in self.agent.gates: raise ValueError", 0),
        ("async def start(self): await self.agent.gate('works')", 30),
    ],
)
def test_a_plugin_whose_start_fails_is_shown_as_failing_and_tried_again_and_its_events_wait(
    hook, wait, agent, clock, host, plugins, caplog
):
    write_recorders(plugins, "good")
    plugins.write(
        "bad",
        "FAILS = True\nclass Plugin:\n    def __init__(self, agent): self.agent = agent._agent\n"
        f"    @hookimpl\n    {hook}\n"
        "    @hookimpl\n    def member_join(self, members):\n"
        "        self.agent.seen.append(f'bad {[m.name for m in members]}')\n"
        "    @hookimpl\n    def stop(self): self.agent.seen.append('bad stop')",
    )
    _, started = start(host, plugins, "bad", "good")
    agent.happen("n2")
    clock.advance(wait)
    assert started == [None]
    agent.happen("n3")
    turns(clock)
    assert agent.seen == ["good start", "good n2", "good n3"]
    assert stats(host, "bad").state == "failing"
    assert stats(host, "good").state == "running"
    assert "plugin bad: not started, tried again in 1 s" in caplog.text
    agent.gate("works").callback(None)
    clock.advance(1)
    turns(clock)
    assert agent.seen[3:] == ["bad ['n2', 'n3']"]
    assert stats(host, "bad").state == "running"
    host.stop()
    assert agent.seen[4:] == ["good stop", "bad stop"]
    assert stats(host, "bad").state == "stopped"
    assert clock.getDelayedCalls() == []


def test_a_failed_plugin_gets_a_new_try_at_the_next_reload(agent, host, plugins):
    plugins.write(
        "flaky",
        """
        @hookimpl
        def start(self):
            self.agent.seen.append("try")
            if len(self.agent.seen) == 1: raise ValueError
        """,
    )
    start(host, plugins, "flaky")
    assert stats(host, "flaky").state == "failing"
    assert outcome(host.reload(plugins.load("flaky", held=host.kept()))) == [None]
    assert stats(host, "flaky").state == "running"
    assert agent.seen == ["try", "try"]


def test_stop_delivers_what_waits_first(agent, clock, host, plugins):
    write_recorders(plugins, "a")
    start(host, plugins, "a")
    agent.seen.clear()
    agent.happen("n2")
    agent.happen("n3")
    stopped = outcome(host.stop())
    assert stopped == []
    agent.happen("too late")
    turns(clock)
    assert agent.seen == ["a n2", "a n3", "a stop"]
    assert stopped == [None]


def test_stop_takes_at_most_hook_timeout_whatever_plugins_do(agent, clock, host, plugins, caplog):
    plugins.write(
        "bad",
        """
        @hookimpl
        async def member_join(self): await Deferred()
        @hookimpl
        async def stop(self):
            self.agent.seen.append("stop")
            await Deferred()
        """,
    )
    plugins.write("unready", "@hookimpl\nasync def start(self): await Deferred()")
    write_recorders(plugins, "good")
    start(host, plugins, "bad", "unready", "good")
    agent.happen("n2")
    turns(clock)
    agent.happen("n3")
    agent.happen("n3")
    turns(clock)
    agent.seen.clear()
    stopped = outcome(host.stop())
    clock.advance(14.9)
    assert agent.seen == []
    clock.advance(0.1)
    assert agent.seen == ["good stop", "stop"]
    assert "plugin bad: stops, 2 waiting events are dropped" in caplog.text
    assert stats(host, "bad").lost == 2
    assert agent.metrics.gauges["plugin.waiting.bad"] == 2
    assert stopped == []
    clock.advance(15)
    assert stopped == [None]
    assert {each.state for each in host.stats()} == {"stopped"}
    assert agent.metrics.gauges["plugin.waiting.bad"] == 0
    assert clock.getDelayedCalls() == []
    assert outcome(host.stop()) == [None]


def test_reload_replaces_exactly_what_changed(agent, host, plugins):
    write_recorders(plugins, "same", "edited", "removed")
    settings = """
        class Plugin:
            class Settings(Struct, frozen=True):
                level: int = 1
            def __init__(self, agent, settings):
                self.agent, self.level = agent._agent, settings.level
            @hookimpl
            def start(self): self.agent.seen.append(f"set {self.level} start")
            @hookimpl
            def stop(self): self.agent.seen.append(f"set {self.level} stop")
        """
    plugins.write("set", settings)
    old, _ = start(host, plugins, "same", "edited", "removed", set={"level": 1})
    agent.seen.clear()
    plugins.write("edited", RECORDER.format(name="new"))
    write_recorders(plugins, "added")
    loaded = plugins.load("same", "edited", "added", held=host.kept(), set={"level": 2})
    assert agent.seen == []
    assert outcome(host.reload(loaded)) == [None]
    assert agent.seen == [
        "set 1 stop", "removed stop", "edited stop", "new start", "added start", "set 2 start",
    ]  # fmt: skip
    assert loaded[0] is old[0]
    assert [new is before for new, before in zip(loaded, old, strict=True)] == [
        True, False, False, False,
    ]  # fmt: skip
    assert [each.name for each in host.stats()] == ["same", "edited", "added", "set"]
    # A second reload with nothing changed does nothing.
    agent.seen.clear()
    again = plugins.load("same", "edited", "added", held=host.kept(), set={"level": 2})
    assert again == loaded
    assert outcome(host.reload(again)) == [None]
    assert agent.seen == []


def test_a_reload_loses_no_event(agent, clock, host, plugins):
    source = """
        @hookimpl
        async def member_join(self, members):
            await self.agent.gate("old")
            self.agent.seen.append("{} " + " ".join(member.name for member in members))
        @hookimpl
        async def start(self): await self.agent.gate("{} start")
        """
    plugins.write("a", source.replace("{}", "old"))
    agent.gate("old start").callback(None)
    start(host, plugins, "a")
    agent.happen("n2")
    turns(clock)
    agent.happen("n3")
    plugins.write("a", source.replace("{}", "new"))
    reloaded = outcome(host.reload(plugins.load("a", held=host.kept())))
    agent.happen("n4")
    turns(clock)
    assert agent.seen == []
    agent.gates["old"].callback(None)
    agent.happen("n5")
    turns(clock)
    # The old instance finishes what it had begun; the new one waits for its own start.
    assert agent.seen == ["old n2"]
    assert reloaded == []
    agent.gates["new start"].callback(None)
    turns(clock)
    assert agent.seen == ["old n2", "new n3 n4 n5"]
    assert reloaded == [None]


def test_reloads_wait_for_each_other_and_a_stop_ends_them(agent, clock, host, plugins):
    plugins.write("a", "@hookimpl\nasync def stop(self): await Deferred()")
    write_recorders(plugins, "b", "c")
    start(host, plugins, "a")
    first = outcome(host.reload(plugins.load("b")))
    second = outcome(host.reload(plugins.load("c")))
    assert agent.seen == []
    stopped = outcome(host.stop())
    assert (first, second, stopped) == ([], [], [])
    clock.advance(30)
    assert (first, second, stopped) == ([None], [None], [None])
    # Neither was started, so neither is stopped.
    assert agent.seen == []


def test_the_numbers_say_where_a_plugin_came_from(host, plugins):
    write_recorders(plugins, "a")
    start(host, plugins, "a")
    assert re.fullmatch(r".*/own/a\.py \(plugin_dirs\)", stats(host, "a").source)


# User events and queries


def test_user_events_and_membership_events_come_in_one_order(agent, clock, host, plugins):
    plugins.write(
        "a",
        """
        @hookimpl
        async def user_event(self, event):
            await self.agent.gate(event.name)
            self.agent.seen.append((event.name, event.payload, event.ltime, event.coalesce))
        @hookimpl
        def member_join(self, members): self.agent.seen.append(members[0].name)
        """,
    )
    plugins.write("deaf", "@hookimpl\ndef member_failed(self): self.agent.seen.append('never')")
    start(host, plugins, "a", "deaf")
    agent.user_event_happens("one", b"1\xff")
    agent.happen("n2")
    agent.user_event_happens("two")
    turns(clock)
    assert agent.seen == []
    agent.gate("two").callback(None)
    agent.gate("one").callback(None)
    turns(clock)
    assert agent.seen == [("one", b"1\xff", 1, False), "n2", ("two", b"", 1, False)]


def test_a_user_events_name_is_in_the_log(agent, clock, host, plugins, caplog):
    plugins.write("bad", "@hookimpl\ndef user_event(self): raise ValueError('no such luck')")
    start(host, plugins, "bad")
    agent.user_event_happens("de\nploy")
    turns(clock)
    assert "plugin bad: user_event('de\\nploy') failed" in caplog.text


ANSWER = """
@hookimpl
def query(self, query):
    self.agent.seen.append("{name} " + query.name)
    return {answer}
"""


@pytest.mark.parametrize(
    ("hook", "sent"),
    [
        ("def query(self, query): return b'\\xff\\0'", [b"\xff\0"]),
        ("def query(self, query): return query.name + ' ä\\udcff'", [b"load \xc3\xa4\xff"]),
        ("def query(self): return b''", [b""]),
        ("def query(self): return ''", [b""]),
        ("def query(self): return None", []),
        ("def query(self): pass", []),
        ("async def query(self): return await succeed(b'x')", [b"x"]),
        ("async def query(self): return await succeed(None)", []),
        ("def query(self): return succeed(b'x')", [b"x"]),
        ("@staticmethod\ndef query(query): return query.source", [b"n2"]),
    ],
)  # fmt: skip
def test_what_the_hook_gives_or_its_deferred_or_its_coroutine_is_the_answer(
    hook, sent, agent, clock, host, plugins
):
    plugins.write("a", f"@hookimpl\n{hook}")
    start(host, plugins, "a")
    query = agent.query_happens("load")
    assert agent.responses == []  # not inside the listener
    turns(clock)
    assert agent.responses == [(query, payload) for payload in sent]
    assert (stats(host, "a").calls, stats(host, "a").errors) == (1, 0)
    assert clock.getDelayedCalls() == []


@pytest.mark.parametrize(
    ("answers", "asked", "sent"),
    [
        ({"a": "b'A'", "b": "b'B'", "c": "None"}, "ab"[:1], [b"A"]),
        ({"a": "None", "b": "b'B'", "c": "b'C'"}, "ab", [b"B"]),
        ({"a": "None", "b": "succeed(None)", "c": "b'C'"}, "abc", [b"C"]),
        ({"a": "1 / 0", "b": "Deferred().errback", "c": "''"}, "abc", [b""]),
        ({"a": "7", "b": "[b'x']", "c": "'\\ud800'"}, "abc", []),
        ({"c": "b'C'", "b": "b'B'", "a": "b'A'"}, "c", [b"C"]),
    ],
)
def test_the_first_plugin_in_the_configs_order_that_gives_something_answers(
    answers, asked, sent, agent, clock, host, plugins
):
    for name, answer in answers.items():
        plugins.write(name, ANSWER.format(name=name, answer=answer))
    start(host, plugins, *answers)
    agent.query_happens("load")
    turns(clock)
    assert agent.seen == [f"{name} load" for name in asked]
    assert [payload for _, payload in agent.responses] == sent


def test_tryfirst_and_trylast_move_a_plugin_in_the_order_of_those_asked(
    agent, clock, host, plugins
):
    for name, mark in (("late", "trylast"), ("early", "tryfirst")):
        source = ANSWER.format(name=name, answer=None)
        plugins.write(name, source.replace("@hookimpl", f"@hookimpl({mark}=True)"))
    for name in ("a", "b"):
        plugins.write(name, ANSWER.format(name=name, answer=None))
    start(host, plugins, "late", "a", "b", "early")
    agent.query_happens("load")
    turns(clock)
    assert agent.seen == ["early load", "a load", "b load", "late load"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("7", "TypeError: query gave a int, expected bytes, str or None"),
        ("bytearray(1)", "TypeError: query gave a bytearray, expected bytes, str or None"),
        ("'\\ud800'", "surrogates not allowed"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_an_answer_that_is_none_is_an_error_of_the_plugin(
    answer, said, agent, clock, host, plugins, caplog
):
    plugins.write("bad", ANSWER.format(name="bad", answer=answer))
    start(host, plugins, "bad")
    agent.query_happens("load")
    turns(clock)
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert record.getMessage() == "plugin bad: query('load' of 'n2') failed"
    assert said in caplog.text
    assert stats(host, "bad").errors == 1


def test_an_answer_that_is_refused_is_logged_with_the_plugin_and_the_agents_text(
    agent, clock, host, plugins, caplog
):
    plugins.write("a", ANSWER.format(name="a", answer="'x' * 101"))
    plugins.write("b", ANSWER.format(name="b", answer="'short'"))
    start(host, plugins, "a", "b")
    agent.query_happens("big")
    turns(clock)
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert record.getMessage() == (
        "plugin a: Failed to respond to query 'query: big': response exceeds limit"
    )
    # It has had its say.
    assert agent.seen == ["a big"]
    assert agent.responses == []


WAITS = """
@hookimpl
async def query(self, query):
    self.agent.seen.append("begin " + query.name)
    try:
        return await self.agent.gate(query.name)
    except CancelledError:
        self.agent.seen.append("cancelled " + query.name)
        raise
@hookimpl
async def member_join(self, members):
    self.agent.seen.append("join")
    await self.agent.gate("join")
"""


def test_queries_wait_neither_for_events_nor_for_each_other(agent, clock, host, plugins):
    plugins.write("a", WAITS)
    start(host, plugins, "a")
    agent.happen("n2")
    agent.happen("n3")
    turns(clock)
    one, two = agent.query_happens("one"), agent.query_happens("two")
    turns(clock)
    assert agent.seen == ["join", "begin one", "begin two"]
    agent.gate("two").callback(b"2")
    assert agent.responses == [(two, b"2")]
    agent.gate("one").callback(b"1")
    assert agent.responses == [(two, b"2"), (one, b"1")]
    # Nor does their end let an event go ahead of the one under way.
    turns(clock)
    assert agent.seen.count("join") == 1


@pytest.mark.parametrize("trouble", ["waits", "refuses to be cancelled", "cannot be cancelled"])
def test_a_query_is_cancelled_at_its_own_deadline_and_nobody_is_asked_after_it(
    trouble, agent, clock, host, plugins, caplog
):
    hooks = WAITS if trouble == "waits" else "@hookimpl\n" + TROUBLE[trouble]
    plugins.write("a", hooks.replace("member_join(self)", "query(self)"))
    plugins.write("b", ANSWER.format(name="b", answer="'late'"))
    clock.advance(100)
    start(host, plugins, "a", "b")
    agent.query_happens("load", deadline=145.0)
    turns(clock)
    clock.advance(44.9)  # longer than any other hook may take
    assert stats(host, "a").timeouts == 0
    clock.advance(0.1)
    assert stats(host, "a").timeouts == 1
    assert "plugin a: query('load' of 'n2') was not done in time and is cancelled" in caplog.text
    not_cancelled = "plugin a: cancelling query('load' of 'n2') failed"
    assert (not_cancelled in caplog.text) is (trouble == "cannot be cancelled")
    if trouble == "waits":
        assert agent.seen == ["begin load", "cancelled load"]
        agent.gate("load").callback(b"much too late")
    turns(clock)
    assert agent.responses == []
    assert "b load" not in agent.seen
    assert clock.getDelayedCalls() == []


def test_a_slow_plugin_leaves_those_after_it_the_rest_of_the_time(agent, clock, host, plugins):
    plugins.write("a", WAITS)
    plugins.write("b", WAITS.replace("query.name)", "'b')"))
    start(host, plugins, "a", "b")
    agent.query_happens("load", deadline=10.0)
    turns(clock)
    clock.advance(9)
    agent.gate("load").callback(None)
    clock.advance(0.9)
    assert stats(host, "b").timeouts == 0
    clock.advance(0.1)
    assert stats(host, "b").timeouts == 1


def test_a_query_heard_too_late_is_put_to_nobody(agent, clock, host, plugins):
    plugins.write("a", ANSWER.format(name="a", answer="'x'"))
    start(host, plugins, "a")
    agent.query_happens("load", deadline=5.0)
    clock.advance(5)
    assert agent.seen == []


def test_too_many_queries_at_once_are_left_unanswered_counted_and_told_once(
    agent, clock, host, plugins, caplog
):
    plugins.write("a", WAITS)
    start(host, plugins, "a")

    def flood():
        for number in range(QUERIES_MAX + 3):
            agent.query_happens(str(number), deadline=clock.seconds() + 10)
        turns(clock)

    flood()
    assert len(agent.seen) == QUERIES_MAX
    assert host.unanswered == 3
    said = f"{QUERIES_MAX} queries are with plugins, more are left unanswered"
    assert caplog.text.count(said) == 1
    # One that is answered makes room for the next.
    agent.gate("0").callback(b"x")
    agent.query_happens("next")
    turns(clock)
    assert agent.seen[-1] == "begin next"
    clock.advance(10)
    assert agent.seen.count("cancelled next") == 1
    assert len([line for line in agent.seen if line.startswith("cancelled")]) == QUERIES_MAX
    agent.gates.clear()
    flood()
    assert host.unanswered == 6
    assert caplog.text.count(said) == 2


def test_queries_that_no_plugin_answers_are_not_counted(agent, clock, host, plugins):
    write_recorders(plugins, "a")
    start(host, plugins, "a")
    for _ in range(QUERIES_MAX + 1):
        agent.query_happens("load")
    assert host.unanswered == 0
    assert clock.getDelayedCalls() == []


def test_a_plugin_is_asked_only_while_it_runs(agent, clock, host, plugins):
    plugins.write(
        "a", ANSWER.format(name="a", answer=None)
        + "@hookimpl\nasync def start(self): await self.agent.gate('start')",
    )  # fmt: skip
    plugins.write(
        "bad", ANSWER.format(name="bad", answer=None) + "@hookimpl\ndef start(self): 1 / 0"
    )
    start(host, plugins, "a", "bad")
    agent.query_happens("early")
    turns(clock)
    assert agent.seen == []
    agent.gate("start").callback(None)
    agent.query_happens("load")
    turns(clock)
    assert agent.seen == ["a load"]


def test_a_stop_waits_for_the_queries_under_way_and_asks_nobody_new(agent, clock, host, plugins):
    plugins.write("a", WAITS + "@hookimpl\ndef stop(self): self.agent.seen.append('stop')")
    plugins.write("b", ANSWER.format(name="b", answer="'b'"))
    start(host, plugins, "a", "b")
    one = agent.query_happens("one")
    agent.query_happens("two")
    agent.query_happens("three", deadline=100.0)
    turns(clock)
    stopped = outcome(host.stop())
    agent.gate("one").callback(b"1")
    agent.gate("two").callback(None)
    assert agent.responses == [(one, b"1")]
    assert "b two" not in agent.seen
    assert stopped == []
    clock.advance(15)
    assert agent.seen[-2:] == ["cancelled three", "stop"]
    assert stopped == [None]
    assert clock.getDelayedCalls() == []


def test_a_query_in_the_turn_of_the_stop_asks_nobody(agent, clock, host, plugins):
    plugins.write("a", ANSWER.format(name="a", answer="'x'"))
    start(host, plugins, "a")
    agent.query_happens("load")
    assert outcome(host.stop()) == [None]
    turns(clock)
    assert agent.seen == []


def test_after_a_reload_the_new_plugins_answer_in_their_new_order(agent, clock, host, plugins):
    for name in ("a", "b"):
        plugins.write(name, ANSWER.format(name=name, answer=None))
    start(host, plugins, "a", "b")
    plugins.write("a", ANSWER.format(name="new a", answer=None))
    assert outcome(host.reload(plugins.load("b", "a", held=host.kept()))) == [None]
    agent.query_happens("load")
    turns(clock)
    assert agent.seen == ["b load", "new a load"]


def test_a_plugin_may_answer_by_itself_before_its_hook_is_done(agent, clock, host, plugins):
    plugins.write(
        "a",
        """
        @hookimpl
        async def query(self, query):
            await self.agent.respond(query, b"at once")
            await self.agent.gate("rest")
        """,
    )
    start(host, plugins, "a")
    query = agent.query_happens("load")
    turns(clock)
    assert agent.responses == [(query, b"at once")]
    agent.gate("rest").callback(None)
    assert agent.responses == [(query, b"at once")]
