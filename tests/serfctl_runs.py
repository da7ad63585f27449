"""Command lines of serfctl: run in this process, or as a process of their own."""

import subprocess
import sys
from contextlib import contextmanager

import pytest
from recorded_agent import RecordedAgent, frames

from serfd import ctl

SERFCTL = [sys.executable, "-c", "import sys; from serfd.ctl import main; sys.exit(main())"]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("SERF_RPC_ADDR", raising=False)
    monkeypatch.delenv("SERF_RPC_AUTH", raising=False)
    for file in ("CA", "CERT", "KEY"):
        monkeypatch.delenv(f"SERFD_RPC_TLS_{file}", raising=False)


@pytest.fixture
def run(capsys):
    """Run a command line; gives exit code, stdout and stderr."""

    def run(*argv):
        code = ctl.main(argv)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@contextmanager
def recorded(name):
    """An agent that answers as a real one once did."""
    with RecordedAgent(frames(name, "server"), hangs_up=True) as agent:
        yield agent


def started(*argv, **how):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    return subprocess.Popen([*SERFCTL, *argv], text=True, **pipes)


def member_map(name, **fields):
    """A member as it comes by RPC (rpc.md 5)."""
    return {"Name": name, "Addr": b"\x0a\0\0\1", "Port": 1, "Status": "alive", "Tags": {}, **fields}
