"""Tells systemd: ready, reloading, stopping, still alive (sd_notify(3))."""

import os
import socket
import time


def notify(*lines: str) -> None:
    """Send `READY=1`, `STATUS=…` and the like; nothing happens if systemd did not start us."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    if path.startswith("@"):
        path = "\0" + path[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to_systemd:
        try:
            to_systemd.sendto("\n".join(lines).encode(), path)
        except OSError:
            # systemd itself restarting must not take the cluster's agents down with it.
            return


def reloading() -> None:
    """The configuration is being read anew; `READY=1` ends it. For `Type=notify-reload` too."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def watchdog_interval() -> float | None:
    """Seconds between two `WATCHDOG=1`: half of what systemd allows; None if it does not watch.

    sd_watchdog_enabled(3).
    """
    allowed = int(os.environ.get("WATCHDOG_USEC", "0"))
    pid = os.environ.get("WATCHDOG_PID", "")
    if not is_listening() or not allowed or (pid and int(pid) != os.getpid()):
        return None
    return allowed / 2e6


def is_listening() -> bool:
    """Whether systemd started this process and wants to be told."""
    return bool(os.environ.get("NOTIFY_SOCKET"))
