"""The snapshot on disk: torn and broken files, full disks, sudden deaths, real agents."""

import errno
import logging
import os
import re
import resource
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.task import Clock

from serfd.errors import ConfigError
from serfd.logs import details_of
from serfd.metrics import Metrics
from serfd.net import snapshot_file
from serfd.net.snapshot_file import FLUSH_WITHIN, RETRY_AFTER, SnapshotFile
from serfd.serf.snapshot import Snapshot, replay

LIMIT = 30.0
"""Seconds that another process may take; only waited for in full when something is wrong."""


class Threads:
    """Keeps what is to run in other threads until the test lets it run."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Callable[[], Any], Deferred[Any]]] = []

    def defer(self, function: Callable[[], Any]) -> "Deferred[Any]":
        result: Deferred[Any] = Deferred()
        self.waiting.append((function, result))
        return result

    def run_one(self) -> None:
        function, result = self.waiting.pop(0)
        maybeDeferred(function).chainDeferred(result)

    def run(self) -> None:
        while self.waiting:
            self.run_one()


class Disk:
    """One snapshot file with its time and threads."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "snapshot"
        self.clock = Clock()
        self.threads = Threads()
        self.opened: list[SnapshotFile] = []
        self.metrics = Metrics()

    def open(self) -> SnapshotFile:
        self.opened.append(
            SnapshotFile(str(self.path), self.clock, self.threads.defer, self.metrics)
        )
        return self.opened[-1]

    def read(self) -> str:
        return self.path.read_text()

    @property
    def copy(self) -> Path:
        return self.path.with_name("snapshot.compact")

    @contextmanager
    def full(self, room: int = 0) -> Iterator[None]:
        """No file can get longer than this one is now, and a few bytes."""
        with size_limit(self.path.stat().st_size + room):
            yield


@contextmanager
def size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path)
    files = len(os.listdir("/proc/self/fd"))
    yield disk
    for file in disk.opened:
        file.close()
    disk.threads.run()
    assert disk.clock.getDelayedCalls() == []
    assert len(os.listdir("/proc/self/fd")) == files


def errors_told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# Opening and reading.


def test_a_missing_file_is_an_empty_one(disk: Disk) -> None:
    mask = os.umask(0o027)
    try:
        assert disk.open().lines() == []
    finally:
        os.umask(mask)
    assert stat.S_IMODE(disk.path.stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("content", "lines", "kept"),
    [
        (b"", [], b""),
        (b"clock: 1\n", ["clock: 1"], b"clock: 1\n"),
        (b"clock: 1\nclock: 2", ["clock: 1"], b"clock: 1\n"),
        (b"clock: 1", [], b""),
        (b"clock: 1\n\0\0\0\0", ["clock: 1"], b"clock: 1\n"),
        (b"\0\0\n\0", ["\0\0"], b"\0\0\n"),
        (b"\n\nleave\n", ["", "", "leave"], b"\n\nleave\n"),
        (b"\xff\xc3\n\xff", ["\udcff\udcc3"], b"\xff\xc3\n"),
        # Only newlines end lines, whatever else Python takes for an end.
        (b"a\r\nb\x0bc\x1cd\xc2\x85e\xe2\x80\xa8f\n", ["a\r", "b\x0bc\x1cd\x85e\u2028f"], None),
    ],
)
def test_whole_lines_are_read_and_a_torn_one_is_cut_off(
    disk: Disk, content: bytes, lines: list[str], kept: bytes | None
) -> None:
    disk.path.write_bytes(content)
    file = disk.open()
    assert file.lines() == lines
    file.append(["clock: 9"])
    file.flush()
    assert disk.path.read_bytes() == (content if kept is None else kept) + b"clock: 9\n"
    assert file.lines() == [*lines, "clock: 9"]


def test_it_is_told_that_a_line_was_torn(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    disk.path.write_bytes(b"clock: 1\nclo")
    disk.open()
    assert errors_told(caplog) == [f"Dropped an unfinished line at the end of snapshot {disk.path}"]


def test_a_long_file_is_read_whole(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_file, "_READ_SIZE", 7)
    lines = [f"clock: {number}" for number in range(100)]
    disk.path.write_text("".join(f"{line}\n" for line in lines))
    assert disk.open().lines() == lines


def refused(path: str) -> str:
    clock, threads = Clock(), Threads()
    files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError) as raised:
        SnapshotFile(path, clock, threads.defer, Metrics())
    assert len(os.listdir("/proc/self/fd")) == files
    return str(raised.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    path = f"{tmp_path}/nowhere/snapshot"
    assert refused(path) == f"failed to open snapshot: open {path}: no such file or directory"


def test_a_folder_is_no_snapshot(tmp_path: Path) -> None:
    assert refused(str(tmp_path)) == f"failed to open snapshot: open {tmp_path}: is a directory"


@pytest.mark.parametrize("path", ["/dev/null", "/dev/full", "fifo"])
def test_a_device_or_pipe_is_no_snapshot(tmp_path: Path, path: str) -> None:
    path = path if path.startswith("/") else str(tmp_path / path)
    if not path.startswith("/dev"):
        os.mkfifo(path)
    assert refused(path) == f"failed to open snapshot: {path} is not a regular file"


def test_a_folder_that_may_not_be_entered_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0)
    path = str(folder / "snapshot")
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may enter everything
    try:
        text = refused(path)
    finally:
        os.seteuid(user)
    assert text == f"failed to open snapshot: open {path}: permission denied"


def test_a_file_of_absurd_size_is_not_read(disk: Disk) -> None:
    disk.path.touch()
    os.truncate(disk.path, snapshot_file.SIZE_MAX + 1)
    assert refused(str(disk.path)) == (
        f"failed to open snapshot: {disk.path} has 268435457 bytes, at most 268435456 expected"
    )


def test_a_file_that_cannot_be_read_is_named(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", broken)
    text = f"failed to open snapshot: read {disk.path}: input/output error"
    assert refused(str(disk.path)) == text


def test_a_torn_line_that_cannot_be_cut_off_is_told(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "ftruncate", broken)
    disk.path.write_text("torn")
    text = f"failed to open snapshot: mend {disk.path}: read-only file system"
    assert refused(str(disk.path)) == text


# Appending.


def test_lines_are_in_the_file_in_time_and_in_order(disk: Disk) -> None:
    file = disk.open()
    file.append([])
    assert disk.clock.getDelayedCalls() == []
    file.append(["alive: é \udcff 10.0.0.1:1", "clock: 1"])
    disk.clock.advance(FLUSH_WITHIN * 0.9)
    file.append(["clock: 2"])
    assert disk.path.read_bytes() == b""
    disk.clock.advance(FLUSH_WITHIN * 0.1)
    assert disk.path.read_bytes() == b"alive: \xc3\xa9 \xff 10.0.0.1:1\nclock: 1\nclock: 2\n"
    file.append(["clock: 3"])
    file.flush()
    assert file.lines()[-1] == "clock: 3"
    assert disk.clock.getDelayedCalls() == []


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of these were called, in order."""
    made: list[str] = []
    for name in ("write", "fsync", "rename"):
        original = getattr(os, name)

        def noted(*args: Any, name: str = name, original: Any = original) -> Any:
            made.append(name)
            return original(*args)

        monkeypatch.setattr(os, name, noted)
    return made


def test_only_who_asks_waits_for_the_disk_itself(disk: Disk, calls: list[str]) -> None:
    file = disk.open()
    file.append(["clock: 1"])
    file.flush()
    assert calls == ["write"]
    file.append(["leave"])
    file.flush(sync=True)
    assert calls == ["write", "write", "fsync"]


def test_closing_writes_what_waits_to_the_disk_itself(disk: Disk, calls: list[str]) -> None:
    file = disk.open()
    file.append(["clock: 1"])
    file.close()
    assert calls == ["write", "fsync"]
    assert disk.read() == "clock: 1\n"
    file.append(["clock: 2"])
    file.replace(["clock: 2"])
    file.flush(sync=True)
    file.close()
    assert (disk.read(), file.errors) == ("clock: 1\n", 0)


# Replacing.


def test_a_compaction_replaces_the_file_while_it_is_still_added_to(
    disk: Disk, calls: list[str]
) -> None:
    file = disk.open()
    file.append(["clock: 1", "clock: 2"])
    file.flush()
    disk.path.chmod(0o660)
    file.append(["clock: 3"])
    file.replace(["clock: 3"])
    file.append(["clock: 4"])
    # Should this take long, or the process die: the old file has everything.
    disk.clock.advance(FLUSH_WITHIN)
    assert disk.read() == "clock: 1\nclock: 2\nclock: 3\nclock: 4\n"
    file.append(["clock: 5"])
    calls.clear()
    disk.threads.run()
    # What is in the copy is on the disk before it takes over, and the taking over is afterwards.
    assert calls == ["write", "fsync", "write", "rename", "fsync"]
    assert disk.read() == "clock: 3\nclock: 4\nclock: 5\n"
    assert stat.S_IMODE(disk.path.stat().st_mode) == 0o660
    assert not disk.copy.exists()
    disk.clock.advance(FLUSH_WITHIN)
    file.append(["clock: 6"])
    disk.clock.advance(FLUSH_WITHIN)
    assert disk.read() == "clock: 3\nclock: 4\nclock: 5\nclock: 6\n"
    assert file.errors == 0


def test_it_is_measured_how_long_the_disk_takes(disk: Disk) -> None:
    file = disk.open()
    file.append(["clock: 1"])
    disk.clock.advance(FLUSH_WITHIN)
    file.replace(["clock: 1"])
    disk.clock.advance(0.25)
    disk.threads.run()
    counts = {name: series.count for name, series in disk.metrics.samples.items()}
    assert counts == {"serf.snapshot.appendLine": 1, "serf.snapshot.compact": 1}
    assert disk.metrics.samples["serf.snapshot.compact"].last == pytest.approx(0.25)


def test_a_compaction_that_is_overtaken_by_the_next_gives_way(disk: Disk) -> None:
    file = disk.open()
    file.replace(["clock: 1"])
    file.append(["clock: 2"])
    file.replace(["clock: 2"])
    file.append(["clock: 3"])
    disk.threads.run()
    assert disk.read() == "clock: 2\nclock: 3\n"
    file.replace(["clock: 3"])
    disk.threads.run()
    assert disk.read() == "clock: 3\n"
    assert not disk.copy.exists()


def test_what_a_crash_left_of_a_compaction_is_not_in_the_way(disk: Disk) -> None:
    disk.path.write_text("clock: 5\n")
    disk.copy.write_text("clock: 1\ncl")
    file = disk.open()
    assert file.lines() == ["clock: 5"]
    file.replace(["clock: 6"])
    disk.threads.run()
    assert disk.read() == "clock: 6\n"


def test_a_compaction_that_ends_after_the_file_was_closed_is_dropped(disk: Disk) -> None:
    file = disk.open()
    file.append(["clock: 1", "clock: 2"])
    file.replace(["clock: 2"])
    file.close()
    disk.threads.run()
    assert disk.read() == "clock: 1\nclock: 2\n"
    assert not disk.copy.exists()


def test_a_compaction_that_fails_after_the_file_was_closed_changes_nothing(disk: Disk) -> None:
    file = disk.open()
    file.append(["clock: 1"])
    file.replace(["clock: 1"])
    file.close()
    with size_limit(0):
        disk.threads.run()
    assert disk.read() == "clock: 1\n"
    assert file.errors == 0


def test_a_compaction_that_cannot_be_written_is_retried_and_lines_go_on(
    disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    file = disk.open()
    disk.copy.mkdir()  # cannot be replaced by a file
    file.append(["clock: 1", "clock: 2"])
    file.replace(["clock: 2"])
    disk.threads.run()
    assert file.errors == 1
    file.append(["clock: 3"])
    disk.clock.advance(FLUSH_WITHIN)
    file.replace(["clock: 3"])  # waits for the next try
    file.append(["clock: 4"])
    disk.clock.advance(FLUSH_WITHIN)
    assert disk.threads.waiting == []
    assert disk.read() == "clock: 1\nclock: 2\nclock: 3\nclock: 4\n"
    disk.clock.advance(RETRY_AFTER)
    disk.threads.run()
    assert file.errors == 2
    disk.copy.rmdir()
    disk.clock.advance(RETRY_AFTER)
    disk.threads.run()
    assert disk.read() == "clock: 3\nclock: 4\n"
    assert [record.getMessage() for record in caplog.records] == [
        f"Failed to write snapshot {disk.path}, trying again every 30 s: is a directory",
        f"Snapshot {disk.path} is written again",
    ]


def test_a_copy_that_cannot_take_over_is_retried(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    file = disk.open()
    file.append(["clock: 1"])
    file.flush()
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", broken)
        file.replace(["clock: 2"])
        disk.threads.run()
    assert (disk.read(), file.errors, disk.copy.exists()) == ("clock: 1\n", 1, False)
    disk.clock.advance(RETRY_AFTER)
    disk.threads.run()
    assert disk.read() == "clock: 2\n"


def test_a_folder_that_cannot_be_synced_is_counted(disk: Disk) -> None:
    file = disk.open()
    file.replace(["clock: 1"])
    disk.threads.run_one()
    folder = disk.path.parent
    moved = folder.rename(folder.with_name("moved"))
    disk.threads.run()
    moved.rename(folder)
    assert (file.errors, disk.read()) == (1, "clock: 1\n")


def test_a_mistake_of_ours_is_told_and_not_taken_for_the_disks(
    disk: Disk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> int:
        raise ZeroDivisionError

    file = disk.open()
    with monkeypatch.context() as patch:
        patch.setattr(snapshot_file, "_write_copy", broken)
        file.replace(["clock: 1"])
        disk.threads.run()
    assert errors_told(caplog) == ["A snapshot was not replaced"]
    assert "ZeroDivisionError" in details_of(caplog.records[-1])
    assert file.errors == 0


# Full disks.


def test_a_full_disk_loses_nothing_and_is_told_once(
    disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    file = disk.open()
    file.append(["clock: 1"])
    file.flush()
    with disk.full(room=3):
        file.append(["clock: 2"])
        disk.clock.advance(FLUSH_WITHIN)
        assert file.errors == 1
        for number in range(3, 6):
            file.append([f"clock: {number}"])
            disk.clock.advance(FLUSH_WITHIN)
        assert file.errors == 1  # not tried again yet
        disk.clock.advance(RETRY_AFTER)
        assert file.errors == 2
        assert disk.read() == "clock: 1\nclo"
        assert file.lines() == ["clock: 1"]
    disk.clock.advance(RETRY_AFTER)
    assert disk.read() == "clock: 1\nclock: 2\nclock: 3\nclock: 4\nclock: 5\n"
    file.replace(["clock: 5"])
    file.append(["clock: 6"])
    disk.clock.advance(FLUSH_WITHIN)
    assert file.lines()[-2:] == ["clock: 5", "clock: 6"]
    disk.threads.run()
    assert file.lines() == ["clock: 5", "clock: 6"]
    assert [record.getMessage() for record in caplog.records] == [
        f"Failed to write snapshot {disk.path}, trying again every 30 s: file too large",
        f"Snapshot {disk.path} is written again",
    ]


def test_a_disk_that_fails_to_sync_is_counted(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = disk.open()
    file.append(["leave"])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        file.flush(sync=True)
    assert (file.errors, disk.read()) == (1, "leave\n")
    disk.clock.advance(RETRY_AFTER)
    assert file.errors == 1


def test_on_a_full_disk_a_compaction_takes_the_place_of_all_that_waits(disk: Disk) -> None:
    file = disk.open()
    file.append(["alive: n1 10.0.0.1:1"])
    file.flush()
    with disk.full(room=5):
        file.append(["not-alive: n1", "clock: 1", "clock: 2"])
        disk.clock.advance(FLUSH_WITHIN)
        with size_limit(4):
            file.replace(["clock: 2"])
            file.append(["clock: 3"])
            disk.threads.run()
        assert file.errors == 2
        disk.clock.advance(FLUSH_WITHIN)
        # The old file lacks lines for good: nothing may be added to it any more.
        assert disk.read() == "alive: n1 10.0.0.1:1\nnot-a"
        with size_limit(4):
            disk.clock.advance(RETRY_AFTER)
            disk.threads.run()
        assert not disk.copy.exists()
    # Not even when it could be.
    disk.copy.mkdir()
    file.append(["clock: 4"])
    disk.clock.advance(RETRY_AFTER)
    disk.threads.run()
    assert disk.read() == "alive: n1 10.0.0.1:1\nnot-a"
    disk.copy.rmdir()
    disk.clock.advance(RETRY_AFTER)
    disk.threads.run()
    assert disk.read() == "clock: 2\nclock: 3\nclock: 4\n"
    # From then on all is as it was.
    file.replace(["clock: 4"])
    file.append(["clock: 5"])
    disk.clock.advance(FLUSH_WITHIN)
    assert disk.read() == "clock: 2\nclock: 3\nclock: 4\nclock: 5\n"
    disk.threads.run()
    assert disk.read() == "clock: 4\nclock: 5\n"


def test_what_only_the_compaction_has_is_written_when_the_file_is_closed(disk: Disk) -> None:
    file = disk.open()
    file.append(["clock: 1"])
    file.flush()
    with disk.full():
        file.append(["clock: 2"])
        file.flush()
        with size_limit(4):
            file.replace(["clock: 2"])
            disk.threads.run()
    file.append(["clock: 3"])
    file.close()
    assert disk.read() == "clock: 2\nclock: 3\n"


def test_a_disk_that_stays_full_does_not_hold_up_the_end(disk: Disk) -> None:
    file = disk.open()
    file.append(["clock: 1"])
    file.flush()
    with disk.full():
        file.append(["clock: 2"])
        file.flush()
        with size_limit(4):
            file.replace(["clock: 2"])
            file.close()
            disk.threads.run()
    assert disk.read() == "clock: 1\n"
    assert not disk.copy.exists()


# Sudden death.

CHILD = """
import os, sys
from twisted.internet.defer import maybeDeferred
from twisted.internet.task import Clock
from serfd.metrics import Metrics
from serfd.net.snapshot_file import SnapshotFile
from serfd.serf import snapshot

snapshot.COMPACTION_SIZE_MIN = 3000
snapshot.COMPACTION_SIZE_PER_NODE = 0
file = SnapshotFile(sys.argv[1], Clock(), maybeDeferred, Metrics())
remembered = snapshot.replay(file.lines(), rejoin_after_leave=False)
lines = snapshot.Snapshot(remembered, rejoin_after_leave=False)
step = remembered.clock
while True:
    step += 1
    file.append(lines.member_joined(f"n {step % 20}", f"10.0.0.1:{step}"))
    file.append(lines.member_gone(f"n {(step + 7) % 20}"))
    file.append(lines.clocks(member=step, event=0, query=0))
    if lines.is_compaction_due:
        file.replace(lines.compacted())
    if step % 3 == 0:
        file.flush()
        os.write(1, b"%d\\n" % step)
"""


def nodes_after(step: int) -> dict[str, str]:
    nodes: dict[str, str] = {}
    for one in range(1, step + 1):
        nodes[f"n {one % 20}"] = f"10.0.0.1:{one}"
        nodes.pop(f"n {(one + 7) % 20}", None)
    return nodes


@pytest.mark.parametrize("seed", range(4))
def test_a_sudden_death_leaves_a_file_with_all_that_was_written(disk: Disk, seed: int) -> None:
    rng = Random(seed)
    for _ in range(2):
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(CHILD), str(disk.path)], stdout=subprocess.PIPE
        ) as child:
            assert child.stdout is not None
            written = 0
            for _ in range(rng.randrange(1, 400)):
                written = int(child.stdout.readline())
            child.send_signal(signal.SIGKILL)
            # What it wrote before the signal came.
            for line in child.stdout:
                written = int(line) if line.endswith(b"\n") else written
        assert child.returncode == -signal.SIGKILL
        file = SnapshotFile(str(disk.path), disk.clock, disk.threads.defer, disk.metrics)
        remembered = replay(file.lines(), rejoin_after_leave=False)
        file.close()
        assert remembered.warnings == []
        assert remembered.clock >= written
        joined = remembered.clock + 1
        half = {**nodes_after(joined - 1), f"n {joined % 20}": f"10.0.0.1:{joined}"}
        assert remembered.nodes in (nodes_after(joined - 1), half, nodes_after(joined))


# Real agents.

PORTS = cycle(Random().sample(range(24_000, 24_100), 100))


def free_port() -> int:
    """A port that was free a moment ago, and not the last one."""
    for port in islice(PORTS, 100):
        with (
            socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
            suppress(OSError),
        ):
            tcp.bind(("127.0.0.1", port))
            udp.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port for a real agent")


class RealAgent:
    """A real agent, and what it says."""

    def __init__(self, binary: str, name: str, *options: str) -> None:
        self.bind = f"127.0.0.1:{free_port()}"
        self.said: list[str] = []
        self._process = subprocess.Popen(
            [
                binary, "agent", f"-node={name}", f"-bind={self.bind}", "-profile=local",
                f"-rpc-addr=127.0.0.1:{free_port()}", "-log-level=debug", *options,
            ],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def wait(self, pattern: str) -> str:
        """Read on until it says something like this."""
        assert self._process.stdout is not None
        # Should it never say so, its end ends the waiting.
        alarm = threading.Timer(LIMIT, self._process.kill)
        alarm.start()
        try:
            for line in self._process.stdout:
                self.said.append(line)
                if re.search(pattern, line):
                    return line
        finally:
            alarm.cancel()
        raise AssertionError(f"it never said {pattern!r} but:\n{''.join(self.said)}")

    def end(self, number: signal.Signals) -> None:
        self._process.send_signal(number)
        output, _ = self._process.communicate(timeout=LIMIT)
        self.said += output.splitlines(keepends=True)


@contextmanager
def real_agent(binary: str, name: str, *options: str) -> Iterator[RealAgent]:
    while True:
        agent = RealAgent(binary, name, *options)
        # Between looking and binding somebody else may take the port: then take another.
        if "address already in use" not in agent.wait("Serf agent starting|address already in use"):
            break
        agent.end(signal.SIGKILL)
    try:
        yield agent
    finally:
        agent.end(signal.SIGKILL)


@pytest.mark.interop
@pytest.mark.parametrize("leaves", [False, True])
def test_the_file_of_a_real_agent_is_read(disk: Disk, serf_binary: str, leaves: bool) -> None:
    with real_agent(serf_binary, "other one") as other:
        own = [f"-snapshot={disk.path}", f"-join={other.bind}"]
        with real_agent(serf_binary, "real", *own) as real:
            real.wait("EventMemberJoin: other one")
            real.wait("Received event: member-join")  # only by then does it heed signals
            # An interrupt makes it leave, a termination does not; both write the file out.
            real.end(signal.SIGINT if leaves else signal.SIGTERM)
        lines = disk.open().lines()
    remembered = replay(lines, rejoin_after_leave=False)
    assert remembered.warnings == []
    assert remembered.clock > 0
    both = {"real": real.bind, "other one": other.bind}
    assert remembered.nodes == ({} if leaves else both)
    assert replay(lines, rejoin_after_leave=True).leave_ignored is leaves
    assert replay(lines, rejoin_after_leave=True).nodes.items() >= {"other one": other.bind}.items()


@pytest.mark.interop
@pytest.mark.parametrize("compacted", [False, True])
def test_a_real_agent_reads_our_file(disk: Disk, serf_binary: str, compacted: bool) -> None:
    with real_agent(serf_binary, "other one") as other:
        file = disk.open()
        written = Snapshot(replay([], rejoin_after_leave=False), rejoin_after_leave=False)
        file.append(written.member_joined("gone", "127.0.0.1:1"))
        file.append(written.member_joined("other one", other.bind))
        file.append(written.member_gone("gone"))
        file.append(written.clocks(member=500, event=600, query=700))
        file.append(written.incarnation(3))
        if compacted:
            file.replace(written.compacted())
            disk.threads.run()
        file.close()
        with real_agent(serf_binary, "real", f"-snapshot={disk.path}") as real:
            rejoined = real.wait("Re-joined to previously known node")
            assert rejoined.endswith(f"other one: {other.bind}\n")
            real.wait("Received event: member-join")
            real.end(signal.SIGTERM)
    # It found nothing wrong, and goes on with our clock.
    assert not [line for line in real.said if "snapshot" in line or "gone" in line]
    assert replay(disk.open().lines(), rejoin_after_leave=False).clock >= 500
