import io
import logging
import os
import re
import threading
import time
import warnings

import pytest
from twisted.internet.defer import fail
from twisted.logger import Logger, LogLevel

from serfd import logs
from serfd.config import LOG_LEVELS
from serfd.logs import LEVELS, LINES_KEPT, TRACE, LogRing, line_of, set_level, set_up

LINE = re.compile(r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d \[(TRACE|DEBUG|INFO|WARN|ERR)\] [a-z.0-9]+: .*")


@pytest.fixture(autouse=True)
def logging_as_before():
    root = logging.getLogger("serfd")
    before = root.level, root.propagate, list(root.handlers)
    names = ("logThreads", "logProcesses", "logMultiprocessing", "_srcfile")
    switches = {name: getattr(logging, name) for name in names}
    yield
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


def kept(ring, level=0):
    """What a new listener gets, without the time."""
    lines = []
    ring.attach(level, lines.append)()
    return [line[20:] for line in lines]


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
    assert lines[1] == "Traceback (most recent call last):"
    assert lines[-1] == "KeyError: 'n1'"


def test_a_wrong_format_is_told_and_not_raised():
    assert line_of(record("%d", "x"))[20:] == "[INFO] agent: '%d' does not fit its arguments ('x',)"
    assert "does not fit" in line_of(record("%(name)s", {"other": 1}))


def test_names_that_are_no_utf8_can_be_written():
    line = line_of(record("%s failed: %s", "n\udcff", "é"))
    assert line.encode().endswith(b"n\\udcff failed: \xc3\xa9")


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
    log.error("first\nsecond")
    assert shown_in(file)[-7:] == [
        "<7>[TRACE] serf.n1: x",
        "<7>[DEBUG] serf.n1: x",
        "<6>[INFO] serf.n1: x",
        "<4>[WARN] serf.n1: x",
        "<3>[ERR] serf.n1: x",
        "<3>[ERR] serf.n1: first",
        "<3>second",
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
    told, traceback = kept(ring)[-2:]
    assert told == "[ERR] twisted: Unhandled error in Deferred:"
    assert traceback.startswith("[ERR] twisted: Traceback")
    assert traceback.endswith("ZeroDivisionError: by zero")


def test_a_failure_that_twisted_only_mentions_is_logged_as_well(console):
    ring = set_up("INFO", console)
    try:
        raise ZeroDivisionError("by zero")
    except ZeroDivisionError:
        Logger("twisted.web").failure("it failed", level=LogLevel.info)
    assert kept(ring)[-1].startswith("[ERR] twisted: it failed\nTraceback")


def test_python_warnings_reach_the_log(console):
    ring = set_up("INFO", console)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logs.globalLogBeginner.showwarning("old", DeprecationWarning, "x.py", 1)
    assert "old" in kept(ring)[-1]
