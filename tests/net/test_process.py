"""Real programs, run by a real reactor in a child process, which prints what it saw as JSON."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.task import Clock

from serfd.config import Seconds
from serfd.net.process import run_process

CHILD = """
import ctypes, json, os, signal, sys, time
from twisted.internet import epollreactor
epollreactor.install()
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.process import reapProcessHandlers
from twisted.internet.task import LoopingCall, deferLater
from serfd.net import process
from serfd.net.process import run_process

def run(*argv, stdin=b"", env=None, timeout=60.0, output_max=8192):
    env = {"PATH": os.environ["PATH"]} if env is None else env
    return run_process(reactor, argv, stdin=stdin, env=env, timeout=timeout, output_max=output_max)

def sh(script, **options):
    return run("/bin/sh", "-c", script, **options)

def told(result):
    return {
        "status": result.status, "text": result.status_text, "timed_out": result.timed_out,
        "stdout": result.stdout.decode(), "stderr": result.stderr.decode(),
        "seconds": result.seconds,
    }

def lives(signalled, number):
    try:
        signalled(number, 0)
    except ProcessLookupError:
        return False
    return True

def alive(pid):
    return lives(os.kill, pid)

def group_lives(group):
    return lives(os.killpg, group)

# What programs leave behind becomes our child, and is fetched when it ends: an init would do that,
# but not every container has one.
assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER

def fetch_orphans():
    with open(f"/proc/self/task/{os.getpid()}/children") as children:
        for pid in map(int, children.read().split()):
            if pid not in reapProcessHandlers:
                os.waitpid(pid, os.WNOHANG)

async def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "waited for too long"
        await deferLater(reactor, 0.01)

def open_files():
    return len(os.listdir("/proc/self/fd"))

async def main():
%s

def end(result):
    if result is not None:
        print(result, file=sys.stderr)
    reactor.stop()

reactor.callWhenRunning(LoopingCall(fetch_orphans).start, 0.01)
reactor.callWhenRunning(lambda: Deferred.fromCoroutine(main()).addBoth(end))
reactor.run()
"""


def child(body: str) -> Any:
    """Run `body` as a coroutine beside a reactor; what it prints is JSON."""
    program = CHILD % textwrap.indent(textwrap.dedent(body), "    ")
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "SECRET": "x"},
    )
    assert done.stderr == ""
    return json.loads(done.stdout)


def file(path: Path, text: str = "", *, mode: int = 0o755) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def test_status_output_and_input_of_programs_and_no_file_stays_open():
    seen = child(
        """
        before = open_files()
        results = {
            "well": await sh("cat; echo err >&2", stdin=b"a\\nb"),
            "badly": await sh("exit 3"),
            "killed": await sh("kill -9 $$"),
            "reads nothing": await sh("true", stdin=b"x" * 1_000_000),
            "no input": await sh("wc -c"),
            "big input": await sh("wc -c", stdin=b"x" * 3_000_000),
            "environment": await run("env", env={"PATH": os.environ["PATH"], "A": "\\udcff b"}),
            "tail": await sh("seq 1 100000; seq 1 9 >&2", output_max=12),
        }
        for name, value in (("\\0", "x"), ("A", "\\0")):
            try:
                await sh("true", env={name: value})
            except ValueError:
                pass
            else:
                raise AssertionError("a NUL byte was accepted")
        results["environment"] = process.ProcessResult(
            0, results["environment"].stdout.replace(b"\\xff", b"?"), b"", False, 0.0
        )
        print(json.dumps({
            **{name: told(result) for name, result in results.items()},
            "files": open_files() - before,
        }))
        """
    )
    assert (seen["well"]["stdout"], seen["well"]["stderr"]) == ("a\nb", "err\n")
    assert (seen["well"]["status"], seen["well"]["timed_out"]) == (0, False)
    assert seen["badly"]["text"] == "exit status 3"
    assert (seen["killed"]["status"], seen["killed"]["text"]) == (-9, "signal: killed")
    assert seen["reads nothing"]["status"] == 0
    assert seen["no input"]["stdout"].strip() == "0"
    assert seen["big input"]["stdout"].strip() == "3000000"
    assert "A=? b" in seen["environment"]["stdout"].splitlines()
    assert not any(line.startswith("SECRET") for line in seen["environment"]["stdout"].splitlines())
    assert seen["tail"]["stdout"] == "9999\n100000\n"
    assert seen["tail"]["stderr"] == "4\n5\n6\n7\n8\n9\n"
    assert seen["files"] == 0


@pytest.mark.parametrize(
    ("argv", "kind"),
    [
        (["/no/such/program"], FileNotFoundError),
        (["no-such-program", "-x"], FileNotFoundError),
        ([""], FileNotFoundError),
        ([], FileNotFoundError),
        (["{own}/plain"], PermissionError),
        (["plain"], PermissionError),
        (["{own}"], PermissionError),
        (["elsewhere"], FileNotFoundError),  # in the PATH of the caller, not in that of `env`
    ],
)
def test_a_program_that_is_not_there_or_not_executable_is_named_and_nothing_is_started(
    argv, kind, tmp_path, monkeypatch
):
    file(tmp_path / "own" / "plain", mode=0o644)
    file(tmp_path / "callers" / "elsewhere")
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:{tmp_path / 'callers'}")
    argv = [part.format(own=tmp_path / "own") for part in argv]
    failed = run_process(
        Clock(),  # which could start nothing
        argv,
        env={"PATH": str(tmp_path / "own")},
        timeout=Seconds(1),
        output_max=1,
    )
    seen = []
    failed.addErrback(seen.append)
    error = seen[0].value
    assert (type(error), error.filename) == (kind, argv[0] if argv else "")


def test_without_a_path_programs_are_found_where_exec_finds_them():
    seen = child(
        """
        print(json.dumps(told(await run("echo", "found", env={}))))
        """
    )
    assert seen["stdout"] == "found\n"


def test_a_script_without_its_interpreter_ends_as_in_a_shell(tmp_path):
    orphan = file(tmp_path / "orphan", "#!/no/such/interpreter\n")
    seen = child(f"print(json.dumps(told(await run({str(orphan)!r}))))")
    assert seen["status"] == 127


def test_a_program_cannot_be_started_without_setsid():
    seen = child(
        """
        os.environ["PATH"] = "/nonexistent"
        before = open_files()
        try:
            await sh("true")
        except OSError as error:
            print(json.dumps([str(error), open_files() - before]))
        """
    )
    assert seen == ["[Errno 2] No such file or directory: b'setsid'", 0]


def test_a_background_child_that_keeps_the_output_open_holds_nothing_up_and_lives_on():
    seen = child(
        """
        before = open_files()
        result = await sh("sleep 1000 & echo $!")
        pid = int(result.stdout)
        lived = alive(pid)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not alive(pid))
        print(json.dumps({**told(result), "lived": lived, "files": open_files() - before}))
        """
    )
    assert seen["lived"]
    assert (seen["status"], seen["timed_out"], seen["files"]) == (0, False, 0)
    assert seen["seconds"] < 20


@pytest.mark.parametrize(
    ("script", "status", "kill_after"),
    [
        ("sleep 1000 & {ready}; wait", -15, 1000),
        ("trap 'exit 7' TERM; sleep 1000 & {ready}; wait", 7, 1000),
        # Only SIGKILL ends these.
        ("trap '' TERM; sleep 1000 & {ready}; while :; do sleep 1000; done", -9, 0.2),
        ("(trap '' TERM; {ready}; sleep 1000) & wait", -15, 0.5),
    ],
)
def test_a_program_over_its_time_is_ended_with_all_it_has_started(
    script, status, kill_after, tmp_path
):
    seen = child(
        f"""
        process.KILL_AFTER = {kill_after}
        running = sh({script.format(ready=f"touch {tmp_path}/ready")!r}, timeout=5000)
        await until(lambda: os.path.exists("{tmp_path}/ready"))
        (time_is_up,) = [
            call for call in reactor.getDelayedCalls() if call.getTime() > reactor.seconds() + 4000
        ]
        group = next(iter(reapProcessHandlers))
        time_is_up.reset(0)
        result = await running
        await until(lambda: not group_lives(group))
        print(json.dumps(told(result)))
        """
    )
    assert (seen["status"], seen["timed_out"]) == (status, True)


def test_a_cancelled_program_is_ended_with_all_it_has_started(tmp_path):
    seen = child(
        f"""
        process.KILL_AFTER = 1000
        running = sh("sleep 1000 & touch {tmp_path}/ready; wait")
        await until(lambda: os.path.exists("{tmp_path}/ready"))
        group = next(iter(reapProcessHandlers))
        assert group_lives(group)
        running.cancel()
        try:
            await running
        except CancelledError:
            await until(lambda: not group_lives(group))
            # Nor is a timer left for it.
            await until(lambda: all(
                call.getTime() < reactor.seconds() + 10 for call in reactor.getDelayedCalls()
            ))
            print(json.dumps("ended"))
        """
    )
    assert seen == "ended"


def test_a_program_cancelled_at_once_is_ended_too():
    # Its group does not exist yet: setsid has not run.
    seen = child(
        """
        pids = []
        killpg = os.killpg
        def note(pid, number):
            pids.append(pid)
            killpg(pid, number)
        process.os.killpg = note
        running = sh("sleep 1000")
        running.cancel()
        try:
            await running
        except CancelledError:
            await until(lambda: not alive(pids[0]))
            print(json.dumps("ended"))
        """
    )
    assert seen == "ended"
