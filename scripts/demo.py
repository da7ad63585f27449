"""Three daemons on loopback: one fails, one leaves. Run by `make demo`; ends by itself."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

BIN = Path(sys.executable).parent
LIMIT = 30.0
"""Seconds anything may take; it takes that long only if something is wrong."""


class Daemon:
    """A serfd on free ports of 127.0.0.1, with quick timings."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        options = ["--node", name, "--profile", "local"]
        command = [str(BIN / "serfd"), *options, "--bind=127.0.0.1:0", "--rpc-addr=127.0.0.1:0"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        print(f"{name} is process {self.process.pid}, ", end="", flush=True)
        banner = self._banner()
        self.bind, self.rpc_addr = banner["Bind addr"], banner["RPC addr"]
        print(f"gossip on {self.bind}, RPC on {self.rpc_addr}")

    def ctl(self, command: str, *arguments: str) -> str:
        """What serfctl prints about this daemon."""
        return subprocess.run(
            [BIN / "serfctl", command, f"-rpc-addr={self.rpc_addr}", *arguments],
            check=True, stdout=subprocess.PIPE, text=True, timeout=LIMIT,
        ).stdout  # fmt: skip

    def statuses(self) -> dict[str, str]:
        """Members by name, as this daemon sees them."""
        members = json.loads(self.ctl("members", "-format=json"))["members"]
        return {member["name"]: member["status"] for member in members}

    def end(self) -> None:
        """End it if it still runs."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(LIMIT)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def _banner(self) -> dict[str, str]:
        """What it says when its sockets are open."""
        assert self.process.stdout is not None
        pipe, said, deadline = self.process.stdout.fileno(), "", time.monotonic() + LIMIT
        while "Plugins:" not in said:
            ready, _, _ = select.select([pipe], [], [], max(0, deadline - time.monotonic()))
            heard = os.read(pipe, 4096).decode() if ready else ""
            if not heard:
                sys.exit(f"did not start:\n{said}{self.log.read_text()}")
            said += heard
        pairs = (line.partition(": ") for line in said.splitlines())
        return {key.strip(): value.strip("'") for key, _, value in pairs}


def wait(what: str, condition: Callable[[], bool], daemon: Daemon) -> None:
    """Wait until the condition holds; gives up, with the daemon's log, after LIMIT."""
    print(f"waiting until {what} ... ", end="", flush=True)
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > LIMIT:
            sys.exit(f"not within {LIMIT:g} s. The log of {daemon.name}:\n{daemon.log.read_text()}")
        time.sleep(0.1)
    print(f"{time.monotonic() - start:.1f} s")


def show(daemon: Daemon) -> None:
    """Print the members as a daemon sees them."""
    print(f"\n$ serfctl members -rpc-addr {daemon.rpc_addr}\n{daemon.ctl('members')}")


def main() -> None:
    """The demo."""
    # So that the daemons are ended as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))
    with ExitStack() as at_end:
        folder = Path(at_end.enter_context(tempfile.TemporaryDirectory(prefix="serfd-demo-")))

        def start(name: str) -> Daemon:
            daemon = Daemon(name, folder)
            at_end.callback(daemon.end)
            return daemon

        one, two, three = start("agent-one"), start("agent-two"), start("agent-three")
        for other in (two, three):
            print(f"\n$ serfctl join -rpc-addr {one.rpc_addr} {other.bind}")
            print(one.ctl("join", other.bind), end="")

        def sees(**others: str) -> Callable[[], bool]:
            wanted = {"agent-one": "alive"} | {f"agent-{k}": v for k, v in others.items()}
            return lambda: one.statuses() == wanted

        print()
        wait("agent-one sees three alive", sees(two="alive", three="alive"), one)
        show(one)

        print(f"kill -9 for agent-three (process {three.process.pid}): it says nothing.")
        three.process.kill()
        wait("agent-one sees it as failed", sees(two="alive", three="failed"), one)
        show(one)

        print(f"Ctrl-C for agent-two (SIGINT to process {two.process.pid}): it leaves.")
        two.process.send_signal(signal.SIGINT)
        wait("agent-two has ended", lambda: two.process.poll() is not None, two)
        wait("agent-one sees it as left", sees(two="left", three="failed"), one)
        show(one)
    print("The daemons are stopped. That was all.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
