"""The lines of a snapshot: what each means, when each is written, and what cannot break them."""

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serfd.serf import snapshot
from serfd.serf.lamport import LEAP_MAX
from serfd.serf.snapshot import (
    COMPACTION_SIZE_MIN,
    NAME_SIZE_MAX,
    WARNINGS_MAX,
    Remembered,
    Snapshot,
    replay,
)

NOTHING = replay([], rejoin_after_leave=False)


def fresh(*, rejoin_after_leave: bool = False) -> Snapshot:
    return Snapshot(NOTHING, rejoin_after_leave=rejoin_after_leave)


def again(lines: list[str]) -> Remembered:
    return replay(lines, rejoin_after_leave=False)


def state(remembered: Remembered) -> tuple[object, ...]:
    """All of it but how it was written."""
    return remembered._replace(size=0, warnings=[])


def test_without_lines_nothing_is_remembered() -> None:
    assert Remembered({}, 0, 0, 0, 0, leave_ignored=False, size=0, warnings=[]) == NOTHING


@pytest.mark.parametrize(
    ("lines", "nodes"),
    [
        (["alive: n1 10.0.0.1:7946"], {"n1": "10.0.0.1:7946"}),
        (["alive: n1 [fd00::1]:7946"], {"n1": "[fd00::1]:7946"}),
        (["alive: the first one 10.0.0.1:7946"], {"the first one": "10.0.0.1:7946"}),
        (["alive: a: b 10.0.0.1:7946"], {"a: b": "10.0.0.1:7946"}),
        (["alive:  10.0.0.1:7946"], {"": "10.0.0.1:7946"}),
        (["alive: n1 10.0.0.1:1", "alive: n1 10.0.0.1:2"], {"n1": "10.0.0.1:2"}),
        (["alive: n1 10.0.0.1:1", "not-alive: n1"], {}),
        (["alive: n 1 10.0.0.1:1", "not-alive: n 1"], {}),
        (["alive: n1 10.0.0.1:1", "not-alive: n2"], {"n1": "10.0.0.1:1"}),
        (["not-alive: n1", "alive: n1 10.0.0.1:1"], {"n1": "10.0.0.1:1"}),
        (["coordinate: {}", "# n1", "#", "#alive: n1 10.0.0.1:1"], {}),
    ],
)
def test_the_lines_say_who_was_alive(lines: list[str], nodes: dict[str, str]) -> None:
    remembered = again(lines)
    assert remembered.nodes == nodes
    assert remembered.warnings == []


@pytest.mark.parametrize(
    ("lines", "times"),
    [
        (["clock: 7"], (7, 0, 0, 0)),
        (["event-clock: 7"], (0, 7, 0, 0)),
        (["query-clock: 7"], (0, 0, 7, 0)),
        (["#incarnation: 7"], (0, 0, 0, 7)),
        # The last one holds, even if it is lower.
        (["clock: 7", "clock: 3", "event-clock: 2"], (3, 2, 0, 0)),
        ([f"clock: {LEAP_MAX}", f"#incarnation: {2**32 - 1}"], (LEAP_MAX, 0, 0, 2**32 - 1)),
    ],
)
def test_the_lines_say_how_late_it_was(lines: list[str], times: tuple[int, ...]) -> None:
    remembered = again(lines)
    assert (
        remembered.clock,
        remembered.event_clock,
        remembered.query_clock,
        remembered.incarnation,
    ) == times
    assert remembered.warnings == []


LIFE = ["alive: n1 10.0.0.1:1", "clock: 5", "event-clock: 6", "query-clock: 7", "#incarnation: 8"]


@pytest.mark.parametrize(
    ("rejoin_after_leave", "lines", "expected"),
    [
        (False, [*LIFE, "leave"], ({}, 0, 0, 0, 8, False)),
        (False, [*LIFE, "leave", "clock: 9"], ({}, 9, 0, 0, 8, False)),
        (False, [*LIFE, "leave", *LIFE], ({"n1": "10.0.0.1:1"}, 5, 6, 7, 8, False)),
        (True, [*LIFE, "leave", "clock: 9"], ({"n1": "10.0.0.1:1"}, 9, 6, 7, 8, True)),
        (True, LIFE, ({"n1": "10.0.0.1:1"}, 5, 6, 7, 8, False)),
    ],
)
def test_after_a_leave_nobody_is_remembered_unless_the_node_is_to_come_back(
    rejoin_after_leave: bool, lines: list[str], expected: tuple[object, ...]
) -> None:
    remembered = replay(lines, rejoin_after_leave=rejoin_after_leave)
    assert remembered[:6] == expected
    assert remembered.warnings == []


@pytest.mark.parametrize(
    ("line", "warning"),
    [
        ("alive: n1", "Failed to parse address: alive: n1"),
        ("alive: ", "Failed to parse address: alive: "),
        ("clock: ", "Failed to convert clock time: clock: "),
        ("clock: 1.5", "Failed to convert clock time: clock: 1.5"),
        ("clock: -1", "Failed to convert clock time: clock: -1"),
        ("clock: +1", "Failed to convert clock time: clock: +1"),
        ("clock: 1_0", "Failed to convert clock time: clock: 1_0"),
        ("clock:  1", "Failed to convert clock time: clock:  1"),
        ("clock: ٣", "Failed to convert clock time: clock: ٣"),
        (
            "clock: 9223372036854775808",
            "Failed to convert clock time: clock: 9223372036854775808",
        ),
        ("event-clock: x", "Failed to convert event clock time: event-clock: x"),
        ("query-clock: 0x1", "Failed to convert query clock time: query-clock: 0x1"),
        ("#incarnation: 4294967296", "Failed to convert incarnation: #incarnation: 4294967296"),
        ("", "Unrecognized snapshot line: "),
        ("alive", "Unrecognized snapshot line: alive"),
        ("alive:n1 10.0.0.1:1", "Unrecognized snapshot line: alive:n1 10.0.0.1:1"),
        ("clock", "Unrecognized snapshot line: clock"),
        ("leave: ", "Unrecognized snapshot line: leave: "),
        ("leave ", "Unrecognized snapshot line: leave "),
        ("Leave", "Unrecognized snapshot line: Leave"),
        # What was under zero bytes is lost, so the rest of the line means nothing.
        ("\0\0clock: 5", r"Unrecognized snapshot line: '\x00\x00clock: 5'"),
        ("alive: n\0 10.0.0.1:1", r"Unrecognized snapshot line: 'alive: n\x00 10.0.0.1:1'"),
        ("not-alive: n1\0", r"Unrecognized snapshot line: 'not-alive: n1\x00'"),
        ("\x1b[2J\udcff", r"Unrecognized snapshot line: '\x1b[2J\udcff'"),
        ("x" * 5000, f"Unrecognized snapshot line: {'x' * 200}..."),
        ("clock: " + "1" * 5000, f"Failed to convert clock time: clock: {'1' * 193}..."),
    ],
)
def test_a_broken_line_is_told_and_changes_nothing(line: str, warning: str) -> None:
    remembered = again([*LIFE, line])
    assert state(remembered) == state(again(LIFE))
    assert remembered.warnings == [warning]


def test_a_file_of_garbage_does_not_fill_the_log() -> None:
    remembered = again(["garbage"] * 100_000)
    assert len(remembered.warnings) == WARNINGS_MAX + 1
    assert remembered.warnings[-1] == f"{100_000 - WARNINGS_MAX} more broken snapshot lines"


def test_no_more_nodes_are_remembered_than_a_cluster_can_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(snapshot, "MEMBERS_MAX", 2)
    lines = [f"alive: n{number} 10.0.0.{number}:1" for number in (1, 2, 3)]
    remembered = again([*lines, "alive: n1 10.0.0.9:1"])
    assert remembered.nodes == {"n1": "10.0.0.9:1", "n2": "10.0.0.2:1"}
    assert remembered.warnings == ["More than 2 nodes in the snapshot: alive: n3 10.0.0.3:1"]
    written = Snapshot(remembered, rejoin_after_leave=False)
    assert written.member_joined("n3", "10.0.0.3:1") == []
    assert written.member_joined("n2", "10.0.0.8:1") == ["alive: n2 10.0.0.8:1"]


def test_the_size_is_counted_in_bytes_of_the_file() -> None:
    assert again(["#é", "", "\udcff"]).warnings != []
    assert again(["#é", "", "\udcff"]).size == len(b"#\xc3\xa9\n\n\xff\n")


def test_what_happens_becomes_lines() -> None:
    written = fresh()
    assert written.member_joined("n1", "10.0.0.1:7946") == ["alive: n1 10.0.0.1:7946"]
    assert written.member_joined("the n2", "[fd00::2]:7946") == ["alive: the n2 [fd00::2]:7946"]
    assert written.member_gone("n1") == ["not-alive: n1"]
    assert written.clocks(member=1, event=0, query=0) == ["clock: 1"]
    assert written.clocks(member=3, event=5, query=4) == [
        "clock: 3",
        "event-clock: 5",
        "query-clock: 4",
    ]
    assert written.incarnation(2) == ["#incarnation: 2"]
    assert written.left() == ["leave"]


def test_what_is_known_already_is_not_said_again() -> None:
    written = Snapshot(again(LIFE), rejoin_after_leave=False)
    assert written.member_joined("n1", "10.0.0.1:1") == []
    assert written.member_gone("n2") == []
    assert written.clocks(member=5, event=5, query=7) == []
    assert written.incarnation(8) == []
    assert written.member_joined("n1", "10.0.0.1:2") == ["alive: n1 10.0.0.1:2"]
    assert written.clocks(member=5, event=7, query=7) == ["event-clock: 7"]
    assert written.incarnation(9) == ["#incarnation: 9"]


def test_after_the_leave_only_the_time_goes_on() -> None:
    written = Snapshot(again(LIFE), rejoin_after_leave=False)
    written.left()
    assert written.member_joined("n2", "10.0.0.2:1") == []
    assert written.member_gone("n1") == []
    assert written.clocks(member=6, event=6, query=7) == ["clock: 6"]


@pytest.mark.parametrize("rejoin_after_leave", [False, True])
def test_a_compaction_after_the_leave_keeps_the_nodes_only_for_who_comes_back(
    rejoin_after_leave: bool,
) -> None:
    written = Snapshot(again(LIFE), rejoin_after_leave=rejoin_after_leave)
    written.left()
    nodes = {"n1": "10.0.0.1:1"} if rejoin_after_leave else {}
    assert again(written.compacted()).nodes == nodes


@pytest.mark.parametrize("character", ["\n", "\r", "\0", "\t", "\x1b", "\x7f"])
def test_a_name_with_control_characters_is_not_written(character: str) -> None:
    written = fresh()
    name = f"evil{character}alive: forged"
    assert written.member_joined(name, "10.0.0.1:1") == []
    assert written.member_gone(name) == []
    assert again(written.compacted()).nodes == {}


@pytest.mark.parametrize(("size", "fits"), [(NAME_SIZE_MAX, True), (NAME_SIZE_MAX + 2, False)])
def test_a_name_may_be_long_but_not_endless(size: int, fits: bool) -> None:
    assert bool(fresh().member_joined("é" * (size // 2), "10.0.0.1:1")) is fits


ADDRESSES = st.sampled_from(["10.0.0.1:7946", "[fd00::1]:7946", "10.0.0.2:1"])
NAMES = st.one_of(
    st.sampled_from(["n1", "n2", "the n3", "a: b", " n", "n ", "", "leave", "# n", "x\ny", "x\0"]),
    st.binary(max_size=12).map(lambda name: name.decode("utf-8", "surrogateescape")),
)
TIMES = st.integers(0, LEAP_MAX)
HAPPENINGS = st.one_of(
    st.tuples(st.just("joined"), NAMES, ADDRESSES),
    st.tuples(st.just("gone"), NAMES),
    st.tuples(st.just("clocks"), TIMES, TIMES, TIMES),
    st.tuples(st.just("incarnation"), st.integers(0, 2**32 - 1)),
    st.tuples(st.just("compact")),
    st.tuples(st.just("restart")),
)


@given(st.lists(HAPPENINGS, max_size=30), st.booleans())
def test_replay_gives_back_what_was_written(happenings: list[tuple], leaves: bool) -> None:
    written = fresh()
    lines: list[str] = []
    nodes: dict[str, str] = {}
    times = [0, 0, 0]
    incarnation = 0
    for what, *values in happenings:
        match what:
            case "joined":
                name, address = values
                lines += written.member_joined(name, address)
                if not any(character < " " or character == "\x7f" for character in name):
                    nodes[name] = address
            case "gone":
                lines += written.member_gone(*values)
                nodes.pop(values[0], None)
            case "clocks":
                lines += written.clocks(member=values[0], event=values[1], query=values[2])
                times = [max(pair) for pair in zip(times, values, strict=True)]
            case "incarnation":
                lines += written.incarnation(*values)
                incarnation = max(incarnation, *values)
            case "compact":
                lines = written.compacted()
            case "restart":
                written = Snapshot(again(lines), rejoin_after_leave=False)
    if leaves:
        lines += written.left()
        nodes, times = {}, [0, 0, 0]
    # Through a file and back.
    text = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
    read = text.decode("utf-8", "surrogateescape").split("\n")[:-1]
    remembered = again(read)
    assert remembered == Remembered(
        nodes, *times, incarnation, leave_ignored=False, size=len(text), warnings=[]
    )


@given(st.lists(st.text(st.characters(exclude_characters="\n")), max_size=10))
def test_replay_takes_any_lines(lines: list[str]) -> None:
    lines = [line.encode("utf-8", "replace").decode() for line in lines]
    for rejoin_after_leave in (False, True):
        remembered = replay(chain(LIFE, lines), rejoin_after_leave=rejoin_after_leave)
        assert remembered.incarnation == 8
        assert len(remembered.warnings) <= len(lines)


@pytest.mark.parametrize(
    ("nodes", "size", "due"),
    [
        (0, COMPACTION_SIZE_MIN, False),
        (0, COMPACTION_SIZE_MIN + 1, True),
        (512, 2 * 128 * 512, False),
        (512, 2 * 128 * 512 + 1, True),
        (2000, COMPACTION_SIZE_MIN + 1, False),
        (2000, 2 * 128 * 2000, False),
        (2000, 2 * 128 * 2000 + 1, True),
    ],
)
def test_a_file_is_compacted_when_it_is_over_serfs_limits(nodes: int, size: int, due: bool) -> None:
    known = {f"n{number}": "10.0.0.1:1" for number in range(nodes)}
    written = Snapshot(NOTHING._replace(nodes=known, size=size), rejoin_after_leave=False)
    assert written.is_compaction_due is due


def test_what_is_appended_makes_a_compaction_due_and_a_compaction_ends_that() -> None:
    written = fresh()
    size = 0
    for number in range(20_000):
        assert not written.is_compaction_due
        size += sum(len(line) + 1 for line in written.member_joined("n1", f"10.0.0.1:{number}"))
        assert written.is_compaction_due is (size > COMPACTION_SIZE_MIN)
        if written.is_compaction_due:
            break
    assert written.compacted() == [
        f"alive: n1 10.0.0.1:{number}",
        "clock: 0",
        "event-clock: 0",
        "query-clock: 0",
        "#incarnation: 0",
    ]
    assert not written.is_compaction_due


def test_long_names_do_not_make_every_line_a_compaction() -> None:
    written = fresh()
    for number in range(1000):
        written.member_joined(f"{number:0500}", "10.0.0.1:1")
    assert written.is_compaction_due
    lines = written.compacted()
    assert sum(map(len, lines)) > 2 * 128 * 1000
    assert not written.is_compaction_due
    for number in range(900):
        written.member_joined(f"{number:0500}", "10.0.0.1:2")
    assert not written.is_compaction_due
    for number in range(900):
        written.member_joined(f"{number:0500}", "10.0.0.1:3")
    assert written.is_compaction_due
