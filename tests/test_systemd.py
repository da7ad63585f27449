"""What systemd hears, on a real socket; and what its unit file promises about serfd."""

import configparser
import os
import re
import shlex
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serfd import daemon, options, systemd
from serfd.service import EXIT_NOT_LEFT

UNIT = Path(__file__).parents[1] / "packaging" / "systemd" / "serfd.service"


@pytest.fixture(params=["path", "abstract"])
def notified(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    """systemd's end: a socket in the file system, or one in Linux's abstract namespace."""
    if request.param == "path":
        shown = address = str(tmp_path / "notify")
    else:
        shown, address = f"@serfd-test-{os.getpid()}", f"\0serfd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(address)
        listening.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", shown)
        yield listening


@pytest.mark.parametrize(
    ("lines", "datagram"),
    [
        (("READY=1",), b"READY=1"),
        (("READY=1", "STATUS=n1: 3 members"), b"READY=1\nSTATUS=n1: 3 members"),
        (("STATUS=größer",), "STATUS=größer".encode()),
    ],
)
def test_each_notification_is_one_datagram(
    notified: socket.socket, lines: tuple[str, ...], datagram: bytes
) -> None:
    systemd.notify(*lines)
    systemd.notify("WATCHDOG=1")
    assert [notified.recv(4096), notified.recv(4096)] == [datagram, b"WATCHDOG=1"]


def test_a_reload_is_announced_with_its_time_in_microseconds(notified: socket.socket) -> None:
    before = time.monotonic_ns() // 1000
    systemd.reloading()
    after = time.monotonic_ns() // 1000
    told = re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=(\d+)", notified.recv(4096).decode())
    assert told is not None
    assert before <= int(told[1]) <= after


def test_without_systemd_nothing_is_sent_and_nothing_is_wrong(
    notified: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET")
    systemd.notify("READY=1")
    systemd.reloading()
    notified.setblocking(False)
    with pytest.raises(BlockingIOError):
        notified.recv(4096)
    assert not systemd.is_listening()


def test_a_systemd_that_is_gone_does_not_take_serfd_with_it(
    notified: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", os.environ["NOTIFY_SOCKET"] + "-gone")
    systemd.notify("READY=1")
    assert systemd.is_listening()


@pytest.mark.parametrize(
    ("notify_socket", "usec", "pid", "interval"),
    [
        ("/run/notify", "30000000", None, 15.0),
        ("/run/notify", "30000000", "own", 15.0),
        ("/run/notify", "30000000", "1", None),  # meant for another process
        ("/run/notify", "0", None, None),
        ("/run/notify", None, None, None),
        (None, "30000000", None, None),
    ],
)
def test_serfd_reports_twice_as_often_as_the_watchdog_asks(
    monkeypatch: pytest.MonkeyPatch,
    notify_socket: str | None,
    usec: str | None,
    pid: str | None,
    interval: float | None,
) -> None:
    given = {
        "NOTIFY_SOCKET": notify_socket,
        "WATCHDOG_USEC": usec,
        "WATCHDOG_PID": str(os.getpid()) if pid == "own" else pid,
    }
    for name, value in given.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert systemd.watchdog_interval() == interval


def test_the_unit_agrees_with_the_program() -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNIT, encoding="utf-8")
    service = unit["Service"]
    program, *arguments = shlex.split(service["ExecStart"])
    assert Path(program).name == "serfd"
    given = options.parse(arguments, daemon.OPTIONS)
    assert given.values == {"config": ["/etc/serfd"]}
    assert service["Type"] == "notify"
    assert service["SuccessExitStatus"] == str(EXIT_NOT_LEFT)
