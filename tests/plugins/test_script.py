import importlib.util
import logging
import os
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock

from serfd.agent import Agent
from serfd.config import Config, Seconds
from serfd.errors import CommandError, ConfigError
from serfd.hooks.host import PluginHost
from serfd.hooks.loader import bundled_dir, load
from serfd.metrics import Metrics
from serfd.net.process import ProcessResult
from serfd.serf.events import Member, MemberEvent, MemberEventKind, Query, Status, UserEvent

spec = importlib.util.spec_from_file_location("script_under_test", bundled_dir() / "script.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def result(
    status: int = 0,
    stdout: bytes = b"",
    stderr: bytes = b"",
    *,
    timed_out: bool = False,
    seconds: float = 0.1,
) -> ProcessResult:
    return ProcessResult(status, stdout, stderr, timed_out, Seconds(seconds))


@dataclass
class Started:
    """A program the plugin asked for."""

    script: str
    stdin: bytes
    env: dict[str, str]
    timeout: float
    output_max: int
    done: "Deferred[ProcessResult]"


class StandInAgent(Agent):
    name = "n1"
    tags: ClassVar[dict[str, str]] = {}
    metrics = Metrics()

    def __init__(self) -> None:
        self.started: list[Started] = []
        self.refuse: OSError | None = None
        self.responses: list[tuple[str, bytes]] = []

    def subscribe(self, listener):
        self.listener = listener
        return lambda: None

    def run(self, argv, *, stdin=b"", env, timeout, output_max):
        if len(argv) > 1:
            self.check_shell(argv, env)
        done: Deferred[ProcessResult] = Deferred()
        self.started.append(Started(argv[-1], stdin, dict(env), timeout, output_max, done))
        return fail(self.refuse) if self.refuse else done

    def check_shell(self, argv, env):
        of_query = ['exec /bin/sh -c "$0" 2>&1'] if env["SERF_EVENT"] == "query" else []
        assert argv[:-1] == ["/bin/sh", "-c", *of_query]

    def respond(self, query, payload):
        """As the core does it."""
        if len(payload) > 1000:
            return fail(CommandError("failed to respond to key query: response exceeds limit"))
        if query.name in dict(self.responses):
            return fail(CommandError("failed to respond to key query: response already sent"))
        self.responses.append((query.name, payload))
        return succeed(None)

    def scripts(self) -> list[str]:
        """The scripts asked for since the last look."""
        seen = [each.script for each in self.started]
        self.started.clear()
        return seen


class Running:
    """The plugin in its host, on virtual time."""

    def __init__(self, *handlers: str, **settings: Any) -> None:
        self.agent = StandInAgent()
        self.agent.reactor = self.clock = Clock()
        self.host = PluginHost(self.agent, self.clock, hook_timeout=Seconds(30))
        plugins = {"script": settings} if settings else {}
        config = Config(event_handlers=list(handlers), plugins=plugins)
        self.host.attach(load(config, self.agent))
        self.host.start()

    def happen(self, kind: MemberEventKind, *members: Member) -> None:
        self.agent.listener(MemberEvent(kind, members or (member("n2"),)))
        self.clock.pump([0, 0])

    def user(self, name: str, payload: bytes = b"", ltime: int = 7) -> None:
        self.agent.listener(UserEvent(ltime, name, payload, coalesce=True))
        self.clock.pump([0, 0])

    def query(
        self, name: str, payload: bytes = b"", *, ltime: int = 7, seconds: float = 1000.0
    ) -> None:
        """`seconds` until its deadline."""
        deadline = self.clock.seconds() + seconds
        self.agent.listener(Query(ltime, 1, name, payload, "n2", deadline))
        self.clock.pump([0, 0])

    def join(self, *members: Member) -> None:
        self.happen(MemberEventKind.JOIN, *members)


def member(name: str, tags: dict[str, str] | None = None) -> Member:
    return Member(name, b"\x0a\0\0\x07", 7946, tags or {}, Status.ALIVE, bytes(6))


@pytest.mark.parametrize(
    ("spec", "filters", "command"),
    [
        ("handler.sh", ("*",), "handler.sh"),
        ("=x", ("*",), "x"),
        ("*=x", ("*",), "x"),
        ("*=A=1 x", ("*",), "A=1 x"),
        ("member-join=x", ("member-join",), "x"),
        ("member-join,member-reap=x a=b", ("member-join", "member-reap"), "x a=b"),
        ("user=x", ("user",), "x"),
        ("user:=x", ("user:",), "x"),
        ("user:a:b,query:load,query=x", ("user:a:b", "query:load", "query"), "x"),
    ],
)
def test_a_handler_is_filters_and_a_script(spec, filters, command):
    assert script.parse_handler(spec) == (filters, command)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("bogus=x", "Invalid event script: Event 'bogus' invoking 'x'"),
        ("user, query=x", "Invalid event script: Event ' query' invoking 'x'"),
        ("member-join,=x", "Invalid event script: Event '' invoking 'x'"),
        ("member-joined=x", "Invalid event script: Event 'member-joined' invoking 'x'"),
        ("*:a=x", "Invalid event script: Event '*:a' invoking 'x'"),
        ("bogus:a=x", "Invalid event script: Event 'bogus:a' invoking 'x'"),
    ],
)
def test_a_wrong_filter_is_a_config_error(spec, text):
    with pytest.raises(ConfigError) as caught:
        Running(spec)
    assert str(caught.value) == f"plugin 'script': {text}"


@pytest.mark.parametrize("table", [{"concurrency": 0}, {"queue": 0}, {"timeout": "0s"}])
def test_settings_have_limits(table):
    with pytest.raises(ConfigError, match=next(iter(table))):
        Running("x", **table)


@pytest.mark.parametrize("kind", MemberEventKind)
def test_the_filter_decides_which_scripts_run(kind):
    running = Running(f"{kind.value}=one", "*=all", "user,query:x=never", "=every", concurrency=9)
    running.happen(kind)
    assert running.agent.scripts() == ["one", "all", "every"]
    for other in set(MemberEventKind) - {kind}:
        running.happen(other)
    assert "one" not in running.agent.scripts()


USER, QUERY = ["user a", "user b", "user a:b"], ["query a", "query b", "query a:b"]


@pytest.mark.parametrize(
    ("spec", "events"),
    [
        ("*", USER + QUERY),
        ("user", USER),
        ("user:", USER),
        ("user:a", ["user a"]),
        ("user:a:b", ["user a:b"]),
        ("query", QUERY),
        ("query:", QUERY),
        ("query:a", ["query a"]),
        ("query:a:b", ["query a:b"]),
        ("user:b,query:a", ["user b", "query a"]),
        ("member-join", []),
    ],
)
def test_the_filter_decides_for_which_user_events_and_queries_a_script_runs(spec, events):
    running = Running(f"{spec}=x")
    heard = []
    for event in USER + QUERY:
        kind, name = event.split()
        getattr(running, kind)(name)
        for started in running.agent.started:
            started.done.callback(result())
            heard.append(event)
        running.agent.started.clear()
    assert heard == events


def test_a_script_runs_once_for_each_filter_that_matches():
    running = Running("member-join,*,member-leave,query:a,query=x")
    running.join()
    running.agent.started[0].done.callback(result())
    assert running.agent.scripts() == ["x", "x"]
    running.query("a")
    assert running.agent.scripts() == ["x", "x", "x"]


def test_a_script_gets_its_event_and_the_tags_in_its_environment(monkeypatch):
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("KEPT", "yes")
    running = Running("x")
    running.agent.tags = {"role": "web", "my-tag.x": "a b", "ünï": "1", "9x": "2", "ß": "3"}
    running.happen(MemberEventKind.UPDATE)
    env = running.agent.started[0].env
    assert {key: value for key, value in env.items() if key.startswith("SERF_")} == {
        "SERF_EVENT": "member-update",
        "SERF_SELF_NAME": "n1",
        "SERF_SELF_ROLE": "web",
        "SERF_TAG_ROLE": "web",
        "SERF_TAG_MY_TAG_X": "a b",
        "SERF_TAG__N_": "1",
        "SERF_TAG_9X": "2",
        "SERF_TAG__": "3",
    }
    assert env["KEPT"] == "yes"
    assert not {key for key in env if key.startswith(("NOTIFY_", "WATCHDOG_", "LISTEN_"))}
    assert (running.agent.started[0].timeout, running.agent.started[0].output_max) == (60, 8192)


@pytest.mark.parametrize(
    ("happen", "variables"),
    [
        ("user", {"SERF_EVENT": "user", "SERF_USER_EVENT": "de ploy", "SERF_USER_LTIME": "12"}),
        ("query", {"SERF_EVENT": "query", "SERF_QUERY_NAME": "de ploy", "SERF_QUERY_LTIME": "12"}),
    ],
)
def test_a_script_gets_the_user_events_or_querys_name_and_time(happen, variables):
    running = Running("x")
    getattr(running, happen)("de ploy", ltime=12)
    env = running.agent.started[0].env
    assert {key: value for key, value in env.items() if key.startswith("SERF_")} == {
        "SERF_SELF_NAME": "n1",
        "SERF_SELF_ROLE": "",
        **variables,
    }


@pytest.mark.parametrize("happen", ["user", "query"])
@pytest.mark.parametrize(
    ("payload", "read"),
    [
        (b"", b""),
        (b"v 1.2", b"v 1.2\n"),
        (b"v 1.2\n", b"v 1.2\n"),
        (b"\n", b"\n"),
        (b"a\n\n", b"a\n\n"),
        (b"\0\xff\r", b"\0\xff\r\n"),
    ],
)
def test_a_script_reads_the_payload_with_a_lines_end(happen, payload, read):
    running = Running("x")
    getattr(running, happen)("deploy", payload)
    assert running.agent.started[0].stdin == read


def test_the_role_is_always_in_the_environment():
    running = Running("x")
    running.join()
    assert running.agent.started[0].env["SERF_SELF_ROLE"] == ""


def test_a_script_reads_a_line_for_each_member():
    running = Running("x")
    running.join(
        member("n2", {"role": "web", "dc": "a"}),
        member("n\t3\n\\t", {"role": "r\tole", "k\n": "v\t"}),
        member("\udcff"),
    )
    assert running.agent.started[0].stdin == (
        b"n2\t10.0.0.7\tweb\trole=web,dc=a\n"
        b"n\\t3\\n\\t\t10.0.0.7\tr\\tole\trole=r\\tole,k\\n=v\\t\n"
        b"\xff\t10.0.0.7\t\t\n"
    )


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.binary(max_size=30), st.dictionaries(st.binary(max_size=9), st.binary(max_size=9))
        ),
        max_size=4,
    )
)
def test_whatever_a_member_is_called_it_is_one_line_of_four_fields(members):
    def text(raw: bytes) -> str:
        return raw.decode("utf-8", "surrogateescape")

    lines = script.member_lines(
        [member(text(name), {text(k): text(v) for k, v in tags.items()}) for name, tags in members]
    ).split(b"\n")
    assert lines.pop() == b""
    assert [line.count(b"\t") for line in lines] == [3] * len(members)


@pytest.mark.parametrize(
    ("ended", "lines"),
    [
        (result(), [("DEBUG", "Event 'member-join' script output: ")]),
        (result(stdout=b"hi\n"), [("DEBUG", "Event 'member-join' script output: hi\n")]),
        (
            result(3, stdout=b"\xff"),
            [
                ("DEBUG", "Event 'member-join' script output: \\xff"),
                ("ERROR", "Error invoking script 'x': exit status 3"),
            ],
        ),
        (
            result(-9),
            [
                ("DEBUG", "Event 'member-join' script output: "),
                ("ERROR", "Error invoking script 'x': signal: killed"),
            ],
        ),
        (
            result(-15, timed_out=True, seconds=60.2),
            [
                ("DEBUG", "Event 'member-join' script output: "),
                ("WARNING", "Script 'x' slow, execution exceeding 1s"),
                ("ERROR", "Error invoking script 'x': ended after 60s"),
            ],
        ),
        (
            result(stderr=b"so far\ndone\x1b[0m"),
            [
                ("DEBUG", "Event 'member-join' script output: "),
                ("INFO", "'x': so far"),
                ("INFO", "'x': done\\x1b[0m"),
            ],
        ),
        (
            result(1, stderr=b"".join(b"%d\n" % n for n in range(22))),
            [
                ("DEBUG", "Event 'member-join' script output: "),
                ("WARNING", "'x': (2 lines are left out)"),
                *(("WARNING", f"'x': {n}") for n in range(2, 22)),
                ("ERROR", "Error invoking script 'x': exit status 1"),
            ],
        ),
    ],
)
def test_how_a_script_ended_is_logged(ended, lines, caplog):
    caplog.set_level(logging.DEBUG, "serfd.plugins.script")
    running = Running("x")
    running.join()
    running.agent.started[0].done.callback(ended)
    assert [
        (r.levelname, r.getMessage()) for r in caplog.records if r.name == "serfd.plugins.script"
    ] == lines


def test_scripts_that_cannot_be_started_are_logged_and_hold_nothing_up(caplog):
    running = Running("x", queue=2000)
    running.agent.refuse = OSError(11, "Resource temporarily unavailable")
    for _ in range(1500):
        running.agent.listener(UserEvent(7, "deploy", b"", coalesce=False))
    running.clock.pump([0] * 1500)
    assert len(running.agent.scripts()) == 1024  # the mailbox's size
    assert "Error invoking script 'x': [Errno 11] Resource temporarily" in caplog.text
    running.agent.refuse = None
    running.join()
    assert running.agent.scripts() == ["x"]


def test_a_handlers_scripts_run_one_at_a_time_in_the_order_of_events():
    running = Running("x")
    names = [f"n{n}" for n in range(5)]
    for name in names:
        running.join(member(name))
    for number, name in enumerate(names):
        assert len(running.agent.started) == number + 1
        assert running.agent.started[number].stdin.startswith(name.encode() + b"\t")
        running.agent.started[number].done.callback(result())


def test_scripts_of_several_handlers_run_side_by_side_up_to_concurrency():
    running = Running("a", "b", "c", concurrency=2)
    running.join()
    running.join()
    a, b = running.agent.started
    assert (a.script, b.script) == ("a", "b")
    b.done.callback(result())
    # The oldest that may run comes next: c of the first event.
    c = running.agent.started[2]
    assert c.script == "c"
    c.done.callback(result(1))
    assert running.agent.started[3].script == "b"
    a.done.callback(result())
    assert running.agent.scripts() == ["a", "b", "c", "b", "a"]


def test_user_events_and_membership_events_of_a_handler_keep_their_order():
    running = Running("x")
    running.user("a", b"1")
    running.join(member("n2"))
    running.user("b", b"2")
    for number in range(3):
        running.agent.started[number].done.callback(result())
    assert [started.stdin.split()[0] for started in running.agent.started] == [b"1", b"n2", b"2"]


def test_what_a_script_writes_is_the_answer_to_its_query():
    running = Running("x")
    running.query("load")
    # So many of its bytes as Serf keeps; whether they are too many is the agent's to say.
    assert running.agent.started[0].output_max == 8192
    running.agent.started[0].done.callback(result(stdout=b"\xff 0.5\n\n"))
    assert running.agent.responses == [("load", b"\xff 0.5\n\n")]


@pytest.mark.parametrize(
    "ended",
    [
        result(),
        result(1, stdout=b"load"),
        result(-9, stdout=b"load"),
        result(0, stdout=b"load", timed_out=True),
    ],
)
def test_a_script_that_fails_or_writes_nothing_does_not_answer(ended, caplog):
    running = Running("x")
    running.query("load")
    running.agent.started[0].done.callback(ended)
    assert running.agent.responses == []
    assert ("Error invoking script 'x'" in caplog.text) == (ended != result())
    # What it said of its trouble was meant for the answer; here it is not lost.
    assert ("'x': load" in caplog.text) == (ended != result())


def test_an_answer_that_is_too_long_is_told_in_serfs_words(caplog):
    running = Running("x")
    running.query("big")
    running.agent.started[0].done.callback(result(stdout=b"x" * 8192))
    assert caplog.messages == [
        "Failed to respond to query 'query: big': failed to respond to key query: "
        "response exceeds limit"
    ]
    assert caplog.records[0].levelname == "WARNING"


def test_of_several_scripts_for_a_query_all_run_and_the_first_that_is_done_answers(caplog):
    running = Running("query:load=one", "query=two", "*=three", "user=four", "query:b=five")
    running.query("load")
    one, two, three = running.agent.started
    assert (one.script, two.script, three.script) == ("one", "two", "three")
    one.done.callback(result())
    three.done.callback(result(stdout=b"3"))
    two.done.callback(result(stdout=b"2"))
    assert running.agent.responses == [("load", b"3")]
    assert caplog.messages == [
        "Failed to respond to query 'query: load': failed to respond to key query: "
        "response already sent"
    ]


def test_queries_do_not_wait_for_events_nor_one_handlers_for_anothers():
    running = Running("*=x", "query=y", "query:b=z", concurrency=2)
    for number in range(10):
        running.user(str(number))
    assert running.agent.scripts() == ["x"]
    running.query("a")
    running.query("a")
    running.query("a")
    # Two of each handler at once.
    assert running.agent.scripts() == ["x", "y", "x", "y"]
    running.query("b")
    assert running.agent.scripts() == ["z"]


def test_queries_that_wait_for_their_handler_come_in_their_order():
    running = Running("x", concurrency=1)
    for name in ("a", "b", "c"):
        running.query(name)
    for number, name in enumerate("abc"):
        assert len(running.agent.started) == number + 1
        assert running.agent.started[number].env["SERF_QUERY_NAME"] == name
        running.agent.started[number].done.callback(result(stdout=b"x"))
    assert [name for name, _ in running.agent.responses] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("seconds", "limit"), [(5.0, 5.0), (59.0, 59.0), (61.0, 60.0), (86_400.0, 60.0)]
)
def test_a_script_for_a_query_has_until_its_deadline_if_that_is_sooner(seconds, limit):
    running = Running("x")
    running.query("load", seconds=seconds)
    assert running.agent.started[0].timeout == limit


def test_a_script_whose_turn_comes_after_its_querys_deadline_is_not_run(caplog):
    running = Running("x", concurrency=1)
    running.query("a")
    running.query("b", seconds=1.0)
    running.query("c")
    running.query("d", seconds=1.0)
    running.clock.advance(1.0)
    for started in running.agent.started:
        started.done.callback(result())
    assert [started.env["SERF_QUERY_NAME"] for started in running.agent.started] == ["a", "c"]
    assert caplog.messages == ["Script 'x': 2 runs were dropped, none waits now"]


def test_a_name_with_a_line_in_it_makes_no_line_in_the_log(caplog):
    running = Running("x")
    running.query("a\nb")
    running.agent.started[0].done.callback(result(stdout=b"x" * 8192))
    assert len(caplog.messages) == 1
    assert not [message for message in caplog.messages if "\n" in message]


def test_a_flood_of_queries_drops_the_oldest_of_them_and_no_event(caplog):
    running = Running("x", queue=3, concurrency=1)
    for number in range(3):
        running.join(member(f"n{number}"))
    for number in range(7):
        running.query(str(number))
    assert caplog.messages == ["Script 'x': 3 runs wait for their turn, the oldest are dropped"]
    for started in running.agent.started:  # it grows: each that is done makes room for the next
        started.done.callback(result())
    ran = [s.env.get("SERF_QUERY_NAME", s.stdin[:2].decode()) for s in running.agent.started]
    assert sorted(ran) == ["0", "4", "5", "6", "n0", "n1", "n2"]


def test_what_waits_for_a_script_that_hangs_pushes_nobody_elses_out(caplog):
    running = Running("query=hangs", "query=x", queue=3, concurrency=1)
    for number in range(5):
        running.query(str(number))
        running.agent.started[-1].done.callback(result(stdout=b"x"))
    assert [name for name, _ in running.agent.responses] == list("01234")
    assert caplog.messages == ["Script 'hangs': 3 runs wait for their turn, the oldest are dropped"]


def test_a_full_queue_drops_the_oldest_counts_them_and_says_so_once(caplog):
    running = Running("x", queue=3)
    for number in range(7):
        running.join(member(f"n{number}"))
    said = "Script 'x': 3 runs wait for their turn, the oldest are dropped"
    assert caplog.text.count(said) == 1
    for number in range(4):
        running.agent.started[number].done.callback(result())
    assert [s.stdin[:2] for s in running.agent.started] == [b"n0", b"n4", b"n5", b"n6"]
    assert "Script 'x': 3 runs were dropped, none waits now" in caplog.text


def test_stop_waits_for_the_scripts_that_run_and_wait():
    running = Running("x")
    running.join(member("n2"))
    running.join(member("n3"))
    stopped: list[Any] = []
    running.host.stop().addBoth(stopped.append)
    running.agent.started[0].done.callback(result())
    assert stopped == []
    running.agent.started[1].done.callback(result())
    assert stopped == [None]


def test_stop_waits_for_the_answers_to_queries():
    running = Running("x", concurrency=1)
    running.query("a")
    running.query("b")
    stopped: list[Any] = []
    running.host.stop().addBoth(stopped.append)
    running.agent.started[0].done.callback(result(stdout=b"a"))
    assert stopped == []
    running.agent.started[1].done.callback(result(stdout=b"b"))
    assert running.agent.responses == [("a", b"a"), ("b", b"b")]
    assert stopped == [None]


def test_scripts_that_take_too_long_to_stop_are_cancelled(caplog):
    running = Running("x", "y")
    running.join(member("n2"))
    running.join(member("n3"))
    running.query("load")
    stopped: list[Any] = []
    running.host.stop().addBoth(stopped.append)
    running.clock.advance(30)
    assert stopped == [None]
    assert "2 waiting scripts are not run, serfd stops" in caplog.text
    assert caplog.text.count("Error invoking script 'x': ended because serfd stops") == 2
    assert running.agent.scripts() == ["x", "y", "x", "y"]


def test_how_long_each_script_took_is_measured():
    running = Running("x --all")
    running.join()
    running.agent.started[0].done.callback(result(3, seconds=0.5))
    series = running.agent.metrics.samples["plugins.script.invoke.x --all"]
    assert (series.last, series.unit) == (0.5, "seconds")


def test_events_that_were_dropped_are_told(caplog):
    running = Running("x")
    for number in range(1030):
        running.agent.listener(UserEvent(7, str(number), b"", coalesce=False))
    for _ in range(9):
        running.clock.advance(0)
    assert "6 user events were dropped, no script is run for them" in caplog.messages


# handlers_dir


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "handlers.d"
    root.mkdir()
    return root


def drop_in(folder, *places: str, mode: int = 0o755) -> list[str]:
    """Scripts; gives their paths."""
    paths = [folder / place for place in places]
    folder.chmod(0o755)
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.parent.chmod(0o755)
        path.write_text("#!/bin/sh\n")
        path.chmod(mode)
    return [str(path) for path in paths]


HAPPENINGS = [
    ("member-join", lambda running: running.join()),
    ("member-failed", lambda running: running.happen(MemberEventKind.FAILED)),
    ("user a", lambda running: running.user("a")),
    ("user b:c", lambda running: running.user("b:c")),
    ("query a", lambda running: running.query("a")),
]


@pytest.mark.parametrize(
    ("directory", "events"),
    [
        ("all", [event for event, _ in HAPPENINGS]),
        ("member-join", ["member-join"]),
        ("member-failed", ["member-failed"]),
        ("user", ["user a", "user b:c"]),
        ("user:a", ["user a"]),
        ("user:b:c", ["user b:c"]),
        ("query", ["query a"]),
        ("query:a", ["query a"]),
        ("query:b", []),
        ("*", []),
        ("joined", []),
    ],
)
def test_a_directory_decides_for_which_events_its_scripts_run(directory, events, folder):
    (path,) = drop_in(folder, f"{directory}/x")
    running = Running(handlers_dir=str(folder))
    heard = []
    for event, happens in HAPPENINGS:
        happens(running)
        for started in running.agent.started:
            assert started.script == path
            started.done.callback(result())
        heard += [event] * len(running.agent.scripts())
    assert heard == events


def test_a_script_that_is_dropped_in_runs_at_the_next_event_and_not_once_it_is_gone(folder):
    running = Running(handlers_dir=str(folder))
    running.join()
    (path,) = drop_in(folder, "member-join/x")
    running.join()
    os.remove(path)
    running.join()
    assert running.agent.scripts() == [path]


def test_scripts_of_a_directory_run_by_name_one_at_a_time_and_those_of_others_beside_them(folder):
    every = sorted(drop_in(folder, *(f"all/{name}" for name in ("20", "b", "10", "9", "B", "30"))))
    (join,) = drop_in(folder, "member-join/1")
    running = Running("handler", handlers_dir=str(folder))
    running.join(member("n2"))
    running.join(member("n3"))
    order = []
    for started in running.agent.started:
        order.append((started.script, started.stdin[:2]))
        if started.script in every:
            started.done.callback(result())
    assert [script for script, _ in order[:3]] == ["handler", every[0], join]
    own = [each for each in order if each[0] in every]
    assert own == [(path, name) for name in (b"n2", b"n3") for path in every]


def test_a_script_of_a_directory_gets_what_others_get(folder):
    drop_in(folder, "user:deploy/x")
    running = Running("y", handlers_dir=str(folder))
    running.user("deploy", b"1.2", ltime=9)
    handler, dropped_in = running.agent.started
    assert (dropped_in.env, dropped_in.stdin) == (handler.env, handler.stdin)
    assert (dropped_in.timeout, dropped_in.output_max) == (60, 8192)


@pytest.mark.parametrize("status", [0, 1])
def test_what_a_script_of_a_directory_writes_to_stderr_is_no_part_of_the_answer(
    status, folder, caplog
):
    caplog.set_level(logging.INFO)
    (path,) = drop_in(folder, "query:load/x")
    running = Running(handlers_dir=str(folder))
    running.query("load")
    running.agent.started[0].done.callback(result(status, stdout=b"0.5\n", stderr=b"oh"))
    assert running.agent.responses == ([] if status else [("load", b"0.5\n")])
    assert f"'{path}': oh" in caplog.messages


@pytest.mark.parametrize(
    ("name", "mode", "why"),
    [
        (".x", 0o755, "it is hidden, or a backup"),
        (".x.swp", 0o755, "it is hidden, or a backup"),
        ("x~", 0o755, "it is hidden, or a backup"),
        ("x.bak", 0o755, "it is hidden, or a backup"),
        ("x.dpkg-old", 0o755, "it is hidden, or a backup"),
        ("x.dpkg-dist", 0o755, "it is hidden, or a backup"),
        ("x.rpmsave", 0o755, "it is hidden, or a backup"),
        ("#x#", 0o755, "it is hidden, or a backup"),
        ("x", 0o644, "it is not executable"),
        ("x", 0o757, "others may write to it"),
        ("x", 0o777, "others may write to it"),
        ("directory", 0o755, "it is no file"),
        ("link", 0o755, "No such file or directory"),
        ("x.sh", 0o755, None),
        ("x", 0o500, None),
        ("x", 0o775, None),
    ],
)
def test_what_is_no_script_or_not_safe_is_left_out_and_told_once(name, mode, why, folder, caplog):
    if name == "directory":
        (folder / "all" / name).mkdir(parents=True)
        path = str(folder / "all" / name)
    elif name == "link":
        (folder / "all").mkdir()
        path = str(folder / "all" / name)
        os.symlink("nowhere", path)
    else:
        (path,) = drop_in(folder, f"all/{name}", mode=mode)
    running = Running(handlers_dir=str(folder))
    ran = []
    for _ in range(3):
        running.join()
        for started in running.agent.started:
            started.done.callback(result())
        ran += running.agent.scripts()
    assert ran == ([] if why else [path] * 3)
    assert caplog.messages == ([f"{path} is left out: {why}"] if why else [])


@pytest.mark.parametrize("directory", ["handlers.d", "handlers.d/all"])
def test_a_directory_that_others_may_write_to_is_left_out_until_that_is_mended(
    directory, folder, caplog
):
    (path,) = drop_in(folder, "all/x")
    place = folder.parent / directory
    running = Running(handlers_dir=str(folder))
    for mode in (0o777, 0o777, 0o755, 0o1777):
        place.chmod(mode)
        running.join()
    assert running.agent.scripts() == [path]
    assert caplog.messages == [f"{place} is left out: others may write to it"] * 2


def test_a_handlers_dir_that_is_not_there_is_told_and_looked_for_again(folder, caplog):
    running = Running(handlers_dir=str(folder / "later"))
    running.join()
    running.join()
    assert caplog.messages == [f"{folder / 'later'} is left out: No such file or directory"]
    (folder / "later").mkdir()
    drop_in(folder / "later", "all/x")
    running.join()
    assert len(running.agent.scripts()) == 1


@pytest.mark.parametrize("name", ["../../x", "a/b", "/", "..", "\0", "", "\udcff", "x" * 1000])
def test_no_name_from_the_network_leads_out_of_the_directory(name, folder, caplog):
    drop_in(folder.parent, "x/x", "a/x")
    drop_in(folder, "user:a/x")
    (folder / "user:a" / "b").mkdir()
    drop_in(folder / "user:a", "b/x")
    running = Running(handlers_dir=str(folder))
    running.user(name)
    running.query(name)
    assert running.agent.scripts() == []
    assert caplog.messages == []


def test_the_handlers_dir_is_a_whole_path():
    with pytest.raises(ConfigError) as caught:
        Running(handlers_dir="handlers.d")
    assert str(caught.value) == (
        "plugin 'script': handlers_dir is 'handlers.d', expected a path that begins with '/'"
    )


def test_in_a_cluster_a_dropped_in_script_is_run_without_a_shell(serf_cluster, folder):
    cluster = serf_cluster(3)
    cluster.load("script", handlers_dir=folder)
    (path,) = drop_in(folder, "member-failed/it's $a script")
    written = folder / "written"
    os.truncate(path, 0)
    with open(path, "a") as file:
        file.write(f"#!/bin/sh\necho $SERF_EVENT $(cut -f 1) > {written}\n")
    cluster.fail("n3")
    assert written.read_text() == "member-failed n3\n"
    samples = cluster.metrics.samples
    assert samples[f"plugins.script.invoke.{path}"].count == 1
