import gc
import io
import json
import logging
import os
import re
import socket
import threading
import time
import warnings

import pytest
from twisted.internet.defer import fail
from twisted.logger import Logger, LogLevel

from serfd import logs
from serfd.config import LOG_LEVELS, SYSLOG_FACILITIES, SYSLOG_PATHS
from serfd.errors import ConfigError
from serfd.logs import (
    LEVELS,
    LINES_KEPT,
    SYSLOG_SIZE_MAX,
    TRACE,
    Foreign,
    LogRing,
    Syslog,
    json_of,
    line_of,
    set_level,
    set_up,
)

LINE = re.compile(r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d \[(TRACE|DEBUG|INFO|WARN|ERR)\] [a-z.0-9]+: .*")


@pytest.fixture(autouse=True)
def logging_as_before():
    # Failures that other tests left behind are told now, not in the midst of one of these.
    gc.collect()
    logs._route_twisted()
    root = logging.getLogger("serfd")
    before = root.level, root.propagate, list(root.handlers)
    names = ("logThreads", "logProcesses", "logMultiprocessing", "_srcfile")
    switches = {name: getattr(logging, name) for name in names}
    yield
    others = logging.getLogger()
    others.handlers[:] = [h for h in others.handlers if not isinstance(h, Foreign)]
    root.setLevel(before[0])
    root.propagate, root.handlers[:] = before[1:]
    for name, value in switches.items():
        setattr(logging, name, value)


@pytest.fixture
def console():
    return io.StringIO()


@pytest.fixture
def log():
    return logging.getLogger("serfd.serf.n1")


def record(text, *args, level=logging.INFO, name="serfd.agent", created=None, exc_info=None):
    made = logging.LogRecord(name, level, "", 0, text, args, exc_info)
    if created is not None:
        made.created = created
    return made


def details(text, details):
    """A record with more lines."""
    made = record(text)
    made.details = details
    return made


def kept(ring, level=0):
    """What a new listener gets, without the time."""
    lines = []
    ring.attach(level, lines.append)()
    return [line[20:] for line in lines]


def test_what_is_held_back_is_shown_later_in_its_order_or_never(console, log):
    ring = set_up("INFO", console, held=True)
    log.info("one")
    log.debug("not for the console")
    log.warning("two")
    assert console.getvalue() == ""
    assert len(kept(ring)) == 3
    logs.show_held()
    log.info("three")
    assert [line[20:] for line in console.getvalue().splitlines()] == [
        "[INFO] serf.n1: one", "[WARN] serf.n1: two", "[INFO] serf.n1: three",
    ]  # fmt: skip


# The line.


def test_a_line_has_time_level_component_and_text():
    moment = time.mktime((2026, 11, 23, 3, 21, 39, 0, 0, -1))
    line = line_of(record("%s starts", "it", created=moment + 0.9))
    assert line == "2026/11/23 03:21:39 [INFO] agent: it starts"
    assert line_of(record("next", created=moment + 1)).startswith("2026/11/23 03:21:40 ")


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        (1, "TRACE"),
        (TRACE, "TRACE"),
        (logging.DEBUG, "DEBUG"),
        (logging.INFO, "INFO"),
        (25, "INFO"),
        (logging.WARNING, "WARN"),
        (logging.ERROR, "ERR"),
        (logging.CRITICAL, "ERR"),
    ],
)
def test_levels_have_serfs_names(level, shown):
    assert line_of(record("x", level=level))[20:] == f"[{shown}] agent: x"


def test_the_levels_are_those_of_the_configuration():
    assert tuple(LEVELS) == LOG_LEVELS


@pytest.mark.parametrize(
    ("name", "component"),
    [("serfd.serf.n1", "serf.n1"), ("serfd", "serfd"), ("urllib3.pool", "urllib3.pool")],
)
def test_the_component_is_the_loggers_name(name, component):
    assert line_of(record("x", name=name))[20:] == f"[INFO] {component}: x"


def test_a_traceback_is_part_of_the_entry():
    try:
        raise KeyError("n1")
    except KeyError as error:
        made = record("failed", exc_info=(KeyError, error, error.__traceback__))
    lines = line_of(made).split("\n")
    assert lines[0].endswith("agent: failed")
    assert lines[1] == "    Traceback (most recent call last):"
    assert lines[-1] == "    KeyError: 'n1'"


FORGED = "n2\r\n2026/11/23 03:21:39 [ERR] serf: EventMemberFailed: n1\x1b[2J\u2028\x9b"
SHOWN = r"n2\r\n2026/11/23 03:21:39 [ERR] serf: EventMemberFailed: n1\x1b[2J\u2028\x9b"


@pytest.mark.parametrize(
    ("text", "args"),
    [
        ("%s joined", (FORGED,)),
        (f"{FORGED} joined", ()),
        ("%s joined", (ConfigError(FORGED),)),
        ("%(name)s joined", ({"name": FORGED},)),
    ],
    ids=["argument", "text", "error", "mapping"],
)
def test_nobodys_name_makes_a_line_of_its_own_or_steers_the_terminal(text, args, console, log):
    ring = set_up("INFO", console)
    log.info(text, *args)
    [shown] = console.getvalue().splitlines()
    assert shown[20:] == kept(ring)[-1] == f"[INFO] serf.n1: {SHOWN} joined"


def test_what_an_exception_says_stands_behind_blanks(console, log):
    set_up("INFO", console)
    try:
        raise KeyError(FORGED) from ConfigError(FORGED)
    except KeyError:
        log.exception("failed")
    first, *rest = console.getvalue().splitlines()
    assert first.endswith("[ERR] serf.n1: failed")
    assert all(line.startswith("    ") and line.isprintable() for line in rest)
    assert sum("EventMemberFailed" in line for line in rest) > 1


def test_details_stand_below_the_line_as_a_traceback_does(console, log):
    ring = set_up("INFO", console)
    log.warning("%s is slow", "x", extra={"details": "first\n\tsecond\x1b\n"})
    expected = "[WARN] serf.n1: x is slow\n    first\n    \tsecond\\x1b"
    assert console.getvalue()[20:] == expected + "\n"
    assert kept(ring)[-1] == expected


def test_a_wrong_format_is_told_and_not_raised():
    assert line_of(record("%d", "x"))[20:] == "[INFO] agent: '%d' does not fit its arguments ('x',)"
    assert "does not fit" in line_of(record("%(name)s", {"other": 1}))


def test_names_that_are_no_utf8_can_be_written():
    line = line_of(record("%s failed: %s", "n\udcff", "é"))
    assert line.encode().endswith(b"n\\xff failed: \xc3\xa9")


def test_a_line_is_made_once_for_all_who_want_it(console):
    class Counted:
        made = 0

        def __str__(self):
            self.made += 1
            return "x"

    ring, counted = set_up("DEBUG", console), Counted()
    ring.attach(0, lambda line: None)
    logging.getLogger("serfd.agent").info("%s", counted)
    assert kept(ring)[-1] == "[INFO] agent: x"
    assert console.getvalue().endswith("[INFO] agent: x\n")
    assert counted.made == 1


# The ring.


def test_the_ring_keeps_the_last_lines():
    ring = LogRing()
    for n in range(LINES_KEPT + 3):
        ring.handle(record("line %d", n))
    assert kept(ring) == [f"[INFO] agent: line {n}" for n in range(3, LINES_KEPT + 3)]


def test_a_listener_gets_what_is_kept_then_what_comes_of_its_level():
    ring, heard = LogRing(), []
    for level in LEVELS.values():
        ring.handle(record("old", level=level))
    detach = ring.attach(logging.WARNING, lambda line: heard.append(line[20:]))
    for level in LEVELS.values():
        ring.handle(record("new", level=level))
    detach()
    ring.handle(record("late", level=logging.ERROR))
    assert heard == [
        f"[{name}] agent: {when}" for when in ("old", "new") for name in ("WARN", "ERR")
    ]
    detach()  # twice is no error


def test_what_a_listener_logs_is_kept_but_not_told(log):
    ring, heard = LogRing(), []
    log.addHandler(ring)

    def listen(line):
        heard.append(line[20:])
        log.warning("heard a line")

    detach = ring.attach(0, listen)
    log.error("one")
    detach()
    assert heard == ["[ERR] serf.n1: one"]
    assert kept(ring) == ["[ERR] serf.n1: one", "[WARN] serf.n1: heard a line"]
    log.removeHandler(ring)


def test_a_listener_may_log_already_when_it_gets_the_old_lines(log):
    ring, heard = LogRing(), []
    log.addHandler(ring)
    log.error("old")
    ring.attach(0, lambda line: (heard.append(line[20:]), log.error("mine")))()
    assert heard == ["[ERR] serf.n1: old"]
    assert kept(ring) == ["[ERR] serf.n1: old", "[ERR] serf.n1: mine"]
    log.removeHandler(ring)


def test_a_listener_may_end_itself_and_others_go_on():
    ring, heard = LogRing(), []
    detach = ring.attach(0, lambda line: detach())
    ring.attach(0, heard.append)
    ring.handle(record("one"))
    ring.handle(record("two"))
    assert len(heard) == 2


def test_a_failing_listener_leaves_the_ring_as_it_should_be():
    def failing(line):
        raise ZeroDivisionError

    ring, heard = LogRing(), []
    detach = ring.attach(0, failing)
    with pytest.raises(ZeroDivisionError):
        ring.handle(record("one"))
    detach()
    ring.attach(0, lambda line: heard.append(line[20:]))
    ring.handle(record("two"))
    assert heard == ["[INFO] agent: one", "[INFO] agent: two"]


def test_a_line_of_another_thread_waits_until_a_listener_has_the_old_ones():
    ring, heard = LogRing(), []
    ring.handle(record("old"))
    other = threading.Thread(target=ring.handle, args=[record("new")])

    def listen(line):
        if not heard:
            other.start()
            other.join(timeout=0.05)
        heard.append(line[20:])

    ring.attach(0, listen)
    other.join()
    assert heard == ["[INFO] agent: old", "[INFO] agent: new"]


# The console.


def test_the_console_shows_its_level_and_the_ring_all(console, log):
    ring = set_up("info", console)
    for level in LEVELS.values():
        log.log(level, "at %d", level)
    shown = console.getvalue().splitlines()
    assert all(LINE.fullmatch(line) for line in shown)
    assert [line[20:] for line in shown] == [
        "[INFO] serf.n1: at 20",
        "[WARN] serf.n1: at 30",
        "[ERR] serf.n1: at 40",
    ]
    assert kept(ring)[-5:] == [f"[{name}] serf.n1: at {number}" for name, number in LEVELS.items()]


def test_the_level_can_be_changed(console, log):
    set_up("ERR", console)
    log.warning("hidden")
    set_level("Debug")
    log.debug("shown")
    assert [line[20:] for line in console.getvalue().splitlines()] == ["[DEBUG] serf.n1: shown"]


@pytest.mark.parametrize("change", [lambda level: set_up(level, io.StringIO()), set_level])
def test_another_level_is_refused_with_those_there_are(change):
    error = r"^log level 'LOUD' is unknown, expected one of TRACE, DEBUG, INFO, WARN, ERR$"
    with pytest.raises(ValueError, match=error):
        change("LOUD")


def test_set_up_again_replaces_what_was(console, log):
    set_up("INFO", io.StringIO())
    set_up("INFO", console)
    log.info("once")
    assert console.getvalue().count("once") == 1
    assert len(logging.getLogger("serfd").handlers) == 2


def test_the_roots_handlers_do_not_print_it_again(console, log):
    elsewhere = LogRing()
    logging.getLogger().addHandler(elsewhere)
    set_up("INFO", console)
    log.error("x")
    logging.getLogger().removeHandler(elsewhere)
    assert kept(elsewhere) == []


# The journal.


@pytest.fixture
def file(tmp_path):
    with (tmp_path / "stderr").open("w+") as opened:
        yield opened


def shown_in(file):
    file.seek(0)
    return file.read().splitlines()


def test_the_journal_gets_priorities_and_no_time(file, log, monkeypatch):
    status = os.fstat(file.fileno())
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    set_up("TRACE", file)
    for level in LEVELS.values():
        log.log(level, "x")
    log.error("first", extra={"details": "second"})
    assert shown_in(file)[-7:] == [
        "<7>[TRACE] serf.n1: x",
        "<7>[DEBUG] serf.n1: x",
        "<6>[INFO] serf.n1: x",
        "<4>[WARN] serf.n1: x",
        "<3>[ERR] serf.n1: x",
        "<3>[ERR] serf.n1: first",
        "<3>    second",
    ]


@pytest.mark.parametrize("named", ["1:1", "", "nonsense"])
def test_another_stream_than_the_journals_is_for_people(named, file, log, monkeypatch):
    monkeypatch.setenv("JOURNAL_STREAM", named)
    set_up("INFO", file)
    log.info("x")
    assert LINE.fullmatch(shown_in(file)[-1])


def test_a_stream_that_is_no_file_is_for_people(console, log, monkeypatch):
    monkeypatch.setenv("JOURNAL_STREAM", "1:1")
    set_up("INFO", console)
    log.info("x")
    assert LINE.fullmatch(console.getvalue().strip())


# JSON.


def test_an_object_has_time_level_component_and_message():
    made = record("%s failed", "n2", level=logging.WARNING, created=1795404099.123456)
    assert json.loads(json_of(made)) == {
        "time": "2026-11-23T03:21:39.123456Z",
        "level": "WARN",
        "component": "agent",
        "message": "n2 failed",
    }


def test_a_fraction_that_rounds_up_is_still_a_time():
    made = record("x", created=1795404099.9999998)
    assert json.loads(json_of(made))["time"] == "2026-11-23T03:21:40.000000Z"


def test_an_object_is_one_line_of_ascii_with_the_traceback_apart():
    try:
        raise KeyError("n\udcff é")
    except KeyError as error:
        made = record("first\nsecond \udcff é", exc_info=(KeyError, error, error.__traceback__))
    shown = json_of(made)
    assert shown.isascii()
    assert "\n" not in shown
    held = json.loads(shown)
    assert held["message"] == "first\nsecond \\udcff é"
    assert held["traceback"].startswith("Traceback (most recent call last):\n")
    assert held["traceback"].endswith("KeyError: 'n\\udcff é'")
    assert json.loads(json_of(details("x", "one\ntwo\n")))["traceback"] == "one\ntwo"


def test_the_console_shows_objects_and_the_ring_lines(console, log):
    ring = set_up("INFO", console, as_json=True)
    log.debug("hidden")
    log.info("joined\nand more")
    [shown] = console.getvalue().splitlines()
    assert json.loads(shown)["message"] == "joined\nand more"
    assert kept(ring)[-1] == r"[INFO] serf.n1: joined\nand more"


def test_the_journal_gets_objects_with_their_priority_in_front(file, log, monkeypatch):
    status = os.fstat(file.fileno())
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    set_up("INFO", file, as_json=True)
    log.error("first\nsecond")
    [shown] = shown_in(file)
    assert shown.startswith("<3>{")
    assert json.loads(shown.removeprefix("<3>"))["message"] == "first\nsecond"


# Syslog.


class Server:
    """The other end of a syslog socket."""

    def __init__(self, path, kind=socket.SOCK_DGRAM):
        self.path, self._socket = str(path), socket.socket(socket.AF_UNIX, kind)
        self._socket.bind(self.path)
        self._connection = self._socket
        if kind == socket.SOCK_STREAM:
            self._socket.listen(1)
        self._kind = kind

    def read(self):
        """What has come so far; datagrams are put behind each other."""
        if self._kind == socket.SOCK_STREAM and self._connection is self._socket:
            self._connection, _ = self._socket.accept()
        self._connection.settimeout(0)
        found = b""
        try:
            while piece := self._connection.recv(1 << 20):
                found += piece
        except BlockingIOError:
            pass
        return found.decode()

    def close(self):
        self._connection.close()
        self._socket.close()
        os.unlink(self.path)


@pytest.fixture
def start(tmp_path):
    """Starts a syslog of that kind."""
    started = []

    def start(kind=socket.SOCK_DGRAM, name="log"):
        started.append(Server(tmp_path / name, kind))
        return started[-1]

    yield start
    for server in started:
        if os.path.exists(server.path):
            server.close()


def test_syslog_is_sought_where_a_real_agent_seeks_it():
    assert SYSLOG_PATHS == ("/dev/log", "/var/run/syslog", "/var/run/log")
    assert len(SYSLOG_FACILITIES) == 20


@pytest.mark.parametrize(
    ("facility", "level", "pri"),
    [
        ("LOCAL0", TRACE, 135),
        ("LOCAL0", logging.DEBUG, 134),
        ("LOCAL0", logging.INFO, 133),
        ("local0", logging.WARNING, 132),
        ("Local7", logging.ERROR, 187),
        ("KERN", logging.ERROR, 3),
        ("DAEMON", logging.CRITICAL, 27),
    ],
)
@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_a_line_to_syslog_is_as_a_real_agents(start, kind, facility, level, pri):
    server = start(kind)
    syslog = Syslog(facility, [server.path])
    moment = time.mktime((2026, 11, 3, 3, 21, 39, 0, 0, -1))
    syslog.handle(record("%s starts [ERR] x", "é\udcff", level=level, created=moment + 0.5))
    syslog.close()
    assert server.read() == (
        f"<{pri}>Nov  3 03:21:39 serfd[{os.getpid()}]: agent: é\\xff starts [ERR] x\n"
    )


def test_datagrams_are_tried_before_streams_and_paths_in_order(start, tmp_path):
    stream = start(socket.SOCK_STREAM, "first")
    second, third = start(name="second"), start(name="third")
    syslog = Syslog("USER", [str(tmp_path / "none"), stream.path, second.path, third.path])
    syslog.handle(record("x"))
    syslog.close()
    assert second.read().endswith("agent: x\n")
    assert third.read() == ""


def test_without_a_syslog_it_is_said_what_to_do(tmp_path):
    paths = [str(tmp_path / "one"), str(tmp_path / "two")]
    with pytest.raises(ConfigError) as caught:
        Syslog("LOCAL0", paths)
    assert str(caught.value) == (
        f"Syslog setup failed: nobody listens at {paths[0]}, {paths[1]}; start a syslog service, "
        "or set enable_syslog = false"
    )


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_a_syslog_that_is_started_anew_is_found_again(start, kind, console, log):
    server = start(kind)
    syslog = Syslog("LOCAL0", [server.path])
    set_up("INFO", console, syslog=syslog)
    log.info("one")
    assert server.read().endswith("serf.n1: one\n")
    server.close()
    # A stream may take a line that nobody reads any more.
    while not syslog.dropped:
        log.info("lost")
    server = start(kind)
    log.info("two")
    assert re.sub(r"<.*?\]: ", "", server.read()) == (
        "serf.n1: two\nagent: syslog did not take 1 lines\n"
    )
    assert "[WARN] agent: syslog did not take 1 lines" in console.getvalue()
    syslog.close()


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_a_syslog_that_does_not_read_costs_lines_but_no_time(start, kind):
    server = start(kind)
    syslog = Syslog("LOCAL0", [server.path])
    sent = 0
    while not syslog.dropped:
        sent += 1
        syslog.handle(record("line %d %s", sent, "x" * 1000))
    for _ in range(5):
        syslog.handle(record("nor this"))
    lost = syslog.dropped
    lines = server.read()
    syslog.handle(record("the end"))
    lines += server.read()
    syslog.close()
    # No line is torn, and only those counted are missing.
    found = [line.partition("agent: ")[2] for line in lines.splitlines()]
    whole = [f"line {n} " + "x" * 1000 for n in range(1, sent)]
    assert found[-1] == "the end"
    assert found[:-1] == whole
    assert lost == 6
    assert syslog.dropped == lost


def test_a_line_that_is_too_long_is_cut(start):
    server = start()
    syslog = Syslog("LOCAL0", [server.path])
    syslog.handle(record("x" * (1 << 20)))
    syslog.close()
    shown = server.read()
    assert len(shown) == SYSLOG_SIZE_MAX
    assert shown.endswith("xxx\n")


def test_syslog_has_the_consoles_level_and_stays_text(start, console, log):
    server = start()
    set_up("WARN", console, as_json=True, syslog=Syslog("LOCAL0", [server.path]))
    log.info("hidden")
    log.warning("shown")
    set_level("debug")
    log.debug("shown too")
    logging.getLogger("serfd").handlers[-1].close()
    assert [line.partition("]: ")[2] for line in server.read().splitlines()] == [
        "serf.n1: shown",
        "serf.n1: shown too",
    ]


# Others.


def test_warnings_of_other_libraries_are_shown_under_their_loggers_names(console, start):
    server = start()
    syslog = Syslog("LOCAL0", [server.path])
    ring = set_up("TRACE", console, syslog=syslog)
    other = logging.getLogger("urllib3.pool")
    other.setLevel(logging.DEBUG)
    other.info("hidden")
    other.warning("is full")
    syslog.close()
    assert kept(ring)[-1] == "[WARN] urllib3.pool: is full"
    assert console.getvalue().count("urllib3") == 1
    assert console.getvalue().endswith("[WARN] urllib3.pool: is full\n")
    assert server.read().endswith("]: urllib3.pool: is full\n")


def test_set_up_again_shows_warnings_of_others_once(console):
    set_up("INFO", io.StringIO())
    set_up("INFO", console)
    logging.getLogger("other").error("once")
    assert console.getvalue().count("once") == 1


def test_the_level_holds_for_others_too(console):
    ring = set_up("ERR", console)
    logging.getLogger("other").warning("hidden")
    assert console.getvalue() == ""
    assert kept(ring)[-1] == "[WARN] other: hidden"


# Twisted.


def test_twisteds_warnings_and_failures_are_logged_too(console):
    ring = set_up("INFO", console)
    twisted = Logger("twisted.web")
    for level in LogLevel.iterconstants():
        twisted.emit(level, "at {it}", it=level.name)
    assert kept(ring)[-3:] == [
        "[WARN] twisted: at warn",
        "[ERR] twisted: at error",
        "[ERR] twisted: at critical",
    ]
    assert "at info" not in console.getvalue()


def test_an_unhandled_error_in_a_deferred_is_logged_with_its_traceback(console):
    ring = set_up("INFO", console)
    fail(ZeroDivisionError("by zero"))
    told, failure = kept(ring)[-2:]
    assert told == "[ERR] twisted: Unhandled error in Deferred:"
    assert failure.startswith("[ERR] twisted: by zero\n    Traceback")
    assert failure.endswith("builtins.ZeroDivisionError: by zero")


def test_a_failure_that_twisted_only_mentions_is_logged_as_well(console):
    ring = set_up("INFO", console)
    try:
        raise ZeroDivisionError("by zero")
    except ZeroDivisionError:
        Logger("twisted.web").failure("it failed", level=LogLevel.info)
    assert kept(ring)[-1].startswith("[ERR] twisted: it failed\n    Traceback")


def test_python_warnings_reach_the_log(console):
    ring = set_up("INFO", console)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logs.globalLogBeginner.showwarning("old", DeprecationWarning, "x.py", 1)
    assert "old" in kept(ring)[-1]
