"""Who was gone comes back to a cluster of real Serf agents and ours, at its old place or anew."""

import signal
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from processes import LOCAL, AgentProcess, Agents, Kind, all_see, everyone_sees, until

pytestmark = pytest.mark.interop

KINDS: tuple[Kind, ...] = ("serf", "serfd")


# Both would be every 30 s: looking for one that failed; and the exchange of states, by which it
# hears of the others should it have refuted its death before it was looked for.
QUICK = {"reconnect_interval": "1s"}
CONFIGS: Mapping[Kind, Mapping[str, Any]] = {
    "serf": QUICK,
    "serfd": {**QUICK, "gossip": {"push_pull_interval": "1s"}},
}


class Circle:
    """A cluster of both kinds, one of which goes and comes back."""

    def __init__(self, agents: Agents, goes: Kind, others: Sequence[Kind], *options: str) -> None:
        names = [f"{kind}-{number}-in-the-circle-of-{goes}" for number, kind in enumerate(others)]
        kinds: Mapping[str, Kind] = dict(zip(names, others, strict=True))
        self.name = f"{goes}-goes"
        self.all = agents.cluster({**kinds, self.name: goes}, *options, configs=CONFIGS)
        self.goes: AgentProcess = self.all[self.name]
        self.others = [self.all[name] for name in names]

    def is_complete(self) -> None:
        everyone_sees(self.all.values(), dict.fromkeys(self.all, "alive"))
        for agent in self.all.values():
            assert agent.members()[self.name].address == self.goes.bind

    def move(self) -> None:
        """Start the one that was gone again, at another address."""
        self.goes.restart(f"127.0.0.2:{self.goes.port}")


@pytest.fixture
def circles(agents):
    """Both at the same time, since most of the time nothing happens but that it passes."""
    return lambda others, *options: [Circle(agents, goes, others, *options) for goes in KINDS]


def test_who_is_killed_is_seen_as_failed_and_is_back_when_it_runs_again(circles):
    both = circles(["serf", "serfd", "serf"])
    for circle in both:
        circle.goes.kill()
    for circle in both:
        all_see(circle.others, **{circle.name: "failed"})
        circle.goes.restart()
    for circle in both:
        # No join command: the others look for it, and it learns of all of them.
        circle.is_complete()


def test_who_left_comes_back_with_a_new_address(circles):
    for circle in circles(["serf", "serfd"]):
        circle.goes.signal(signal.SIGINT)
        all_see(circle.others, **{circle.name: "left"})
        circle.goes.exit_code()
        circle.move()
        circle.goes.join(circle.others[0])
        circle.is_complete()


def test_who_failed_comes_back_with_a_new_address(circles):
    both = circles(["serf", "serfd"], LOCAL)
    for circle in both:
        circle.goes.kill()
    for circle in both:
        all_see(circle.others, **{circle.name: "failed"})
        circle.move()
    for circle in both:
        # A real agent holds on to the old address for 15 s (this profile's `gossip to the dead`);
        # who joins meanwhile is heard, but not yet believed.
        def is_back(circle: Circle = circle) -> bool:
            circle.goes.join(circle.others[0])
            return all(
                (seen := agent.members()[circle.name]).status == "alive"
                and seen.address == circle.goes.bind
                for agent in circle.others
            )

        until("all see it at its new address", is_back)
        circle.is_complete()
