"""Membership, user events and queries share every packet: a flood of one silences no other."""

from collections.abc import Iterable

import pytest
from clusters import agreed, make

from serfd.serf.events import Query, Status, UserEvent
from serfd.sim import checks
from serfd.sim.cluster import Cluster

SEEDS = (1, 2)
LARGE = b"x" * 450
"""With it a message fills what two others as large leave of a packet."""


def all_heard(cluster: Cluster, name: str, keys: Iterable[str]) -> bool:
    """Whether these have got the event or query of that name."""
    return all(
        any(isinstance(e, UserEvent | Query) and e.name == name for _, e in reversed(events))
        for events in (cluster.processes[key].events for key in keys)
    )


class Flood:
    """One node sends events as fast as it may."""

    def __init__(self, cluster: Cluster, key: str) -> None:
        self.cluster = cluster
        self.key = key
        self.sent = 0
        self.go_on()

    def go_on(self) -> None:
        for _ in range(100):
            asked = self.cluster.user_event(self.key, f"e{self.sent}", b"x" * 200)
            self.sent += 1
        asked.then.append(lambda _: self.go_on())


@pytest.mark.parametrize("seed", SEEDS)
def test_while_events_pour_in_a_crash_and_a_join_are_noticed_as_ever(seed: int) -> None:
    cluster = make(8, seed)
    flood = Flood(cluster, "n0")
    cluster.run(seconds=1)
    cluster.kill("n6")
    usual = checks.usual_detection_bound(cluster.config.gossip, 8)
    cluster.run_until(lambda: cluster.statuses("n6") == {Status.FAILED}, usual)
    cluster.start("new")
    cluster.join("new", "n3")
    cluster.run_until(lambda: cluster.statuses("new") == {Status.ALIVE}, 0.5, every=0.01)
    cluster.update_tags("n5", {"role": "database"})
    agreed(cluster, limit=0.5)
    assert flood.sent >= 1000
    assert {happening.about for happening in cluster.happened("suspects")} == {"n6"}


@pytest.mark.parametrize("seed", SEEDS)
def test_while_a_hundred_nodes_join_events_and_queries_arrive_at_once(seed: int) -> None:
    cluster = make(20, seed)
    old = list(cluster.processes)
    for number in range(100):
        cluster.start(f"new-{number}")
        cluster.after(number * 0.005, cluster.join, f"new-{number}", old[number % 20])
    for round_ in range(5):
        cluster.user_event("n3", f"event {round_}", LARGE)
        cluster.query("n4", f"query {round_}", LARGE)
        for name in (f"event {round_}", f"query {round_}"):
            cluster.run_until(
                lambda name=name: all_heard(cluster, name, old),  # type: ignore[misc]
                0.5,
                every=0.01,
            )
        cluster.run(seconds=0.1)


@pytest.mark.parametrize("seed", SEEDS)
def test_while_a_quarter_of_the_cluster_fails_events_and_queries_arrive(seed: int) -> None:
    cluster = make(40, seed)
    for number in range(30, 40):
        cluster.kill(f"n{number}")
    alive = list(cluster.processes)[:30]
    for round_ in range(25):
        cluster.user_event("n3", f"event {round_}", LARGE)
        cluster.query("n4", f"query {round_}", LARGE)
        for name in (f"event {round_}", f"query {round_}"):
            cluster.run_until(
                lambda name=name: all_heard(cluster, name, alive),  # type: ignore[misc]
                1.0,
                every=0.01,
            )
        cluster.run(seconds=1)
    assert cluster.happened("member-failed") != []


def test_while_every_member_changes_its_tags_all_the_time_events_and_queries_arrive() -> None:
    cluster = make(20, 1)
    keys = list(cluster.processes)
    changes = [0]

    def change(key: str) -> None:
        changes[0] += 1
        cluster.update_tags(key, {"x": f"{changes[0]:06}" + "y" * 450})
        cluster.after(0.1, change, key)

    for number, key in enumerate(keys):
        cluster.after(number * 0.005, change, key)
    cluster.run(seconds=1)
    cluster.user_event("n3", "event", LARGE)
    cluster.query("n4", "query", LARGE)
    for name in ("event", "query"):
        cluster.run_until(
            lambda name=name: all_heard(cluster, name, keys),  # type: ignore[misc]
            0.5,
            every=0.01,
        )
    cluster.run(seconds=1)
    assert changes[0] > 400
