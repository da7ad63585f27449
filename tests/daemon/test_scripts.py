"""Scripts that are slow, hang or fail hold up nothing of the daemon that runs them."""

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import AgentProcess, Agents, Records, everyone_sees, until

pytestmark = pytest.mark.daemon

EVENTS, QUERIES = 1500, 20
"""More events than any queue holds, more queries than scripts run at once."""
SOON = 1.0
"""Seconds; nothing that is asked meanwhile takes so long, on the slowest machine."""
TROUBLE = {
    "none": (),
    "hangs": ("*=sleep 1000",) * 6,
    "fails": ("*=exit 1", "*=/no/such/program"),
    "is slow": ("*=sleep 0.5",),
    "writes without end": ("*=yes",),
    "does not read": ("*=exec <&-",),
}


@pytest.fixture
def busy(agents: Agents, request: pytest.FixtureRequest) -> Iterator[AgentProcess]:
    """One whose scripts do what the test says; one that answers is among them."""
    config = {
        "event_handlers": ["query:load=echo fine", *TROUBLE[request.param]],
        "hook_timeout": "500ms",
        "plugins": {"script": {"queue": 100}},
    }
    busy = agents.start("serfd", "busy", config=config)
    yield busy
    busy.signal(signal.SIGTERM)
    assert busy.exit_code() == 1
    until("no script is left", lambda: not scripts_of(busy))


def scripts_of(agent: AgentProcess) -> list[str]:
    """Processes that it has started, known by a variable in their environment."""
    mark = f"SERF_SELF_NAME={agent.name}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_bytes().decode())
        except OSError:  # it has ended meanwhile, or is somebody else's
            continue
    return found


def seconds(call: Callable[[], object]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def answers(asker: AgentProcess, count: int) -> Counter[str]:
    """Who has answered `load`, asked so often at once."""
    heard: Counter[str] = Counter()
    with asker.client() as client:
        asked = {"Name": "load", "Timeout": 10_000_000_000}
        running = {client.start("query", asked) for _ in range(count)}
        for seq, record in client.records():
            if record["Type"] == "response" and record["Payload"] in ("fine\n", b"fine\n"):
                heard[record["From"]] += 1
                running.remove(seq)
            if not running:
                return heard
            assert record["Type"] != "done", "a query was not answered"
    raise AssertionError("the agent is gone")


@pytest.mark.parametrize("busy", TROUBLE, indirect=True, ids=list(TROUBLE))
def test_scripts_hold_up_neither_rpc_nor_joins_nor_events_nor_queries(busy, agents):
    other = agents.start("serfd", "other")
    other.join(busy)
    everyone_sees([busy, other], {"busy": "alive", "other": "alive"})
    heard = Records(busy, "user")
    took: list[float] = []
    with busy.client() as client:
        for number in range(EVENTS):
            client.call("event", {"Name": f"e{number}", "Payload": b"x", "Coalesce": False})
            if number % 100 == 0:
                took += [seconds(client.members), seconds(client.stats)]
    took.append(seconds(lambda: answers(other, 1)))
    third = agents.start("serfd", "third")
    took.append(seconds(lambda: third.join(busy)))
    assert answers(other, QUERIES) == {"busy": QUERIES}
    assert max(took) < SOON
    until("its stream has all events", lambda: len(heard.got) == EVENTS)
    assert [event["Name"] for event in heard.got] == [f"e{n}" for n in range(EVENTS)]
    everyone_sees([busy, other], dict.fromkeys(("busy", "other", "third"), "alive"))
