"""Partitions that last longer than failed members are remembered, and who is left alone."""

import pytest
from clusters import agreed, plain
from msgspec.structs import replace

from serfd.config import Seconds
from serfd.serf.events import Status
from serfd.serf.reconnecting import LOST_INTERVAL
from serfd.sim.cluster import Cluster

FORGETFUL = replace(plain(), reconnect_timeout=Seconds(60.0))


def isolated(cluster: Cluster) -> set[str]:
    return {
        process.key for process in cluster.running if process.node.stats()["isolated"] == "true"
    }


def nobody_remembers(cluster: Cluster, island: set[str]) -> bool:
    """Whether neither side lists anybody of the other."""
    rest = set(cluster.processes) - island
    return all(
        cluster.statuses(one, seen_by=there) == {Status.NONE}
        for here, there in ((island, rest), (rest, island))
        for one in here
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("island", [1, 2, 5])
def test_a_partition_longer_than_the_memory_of_failed_members_heals_by_itself(
    island: int, seed: int
) -> None:
    cluster = Cluster(10, seed, config=FORGETFUL)
    here = {f"n{number}" for number in range(island)}
    with cluster.partition(here):
        cluster.run_until(lambda: nobody_remembers(cluster, here), 300, every=1.0)
    # Each node draws at every turn whether to try one: with near certainty, soon one does.
    cluster.run_until(cluster.all_list_all, 4 * cluster.config.reconnect_interval, every=0.5)
    agreed(cluster, limit=1.0)


def test_two_nodes_that_lost_each_other_meet_at_the_next_turn() -> None:
    cluster = Cluster(2, 1, config=FORGETFUL)
    with cluster.partition({"n0"}):
        cluster.run_until(lambda: nobody_remembers(cluster, {"n0"}), 300, every=1.0)
        assert isolated(cluster) == {"n0", "n1"}
    cluster.run_until(cluster.all_list_all, cluster.config.reconnect_interval + 1.0)
    assert isolated(cluster) == set()


def test_only_who_is_alone_is_isolated() -> None:
    cluster = Cluster(4, 1, config=plain())
    assert isolated(cluster) == set()
    with cluster.partition({"n0"}):
        cluster.run(seconds=60)
        assert isolated(cluster) == {"n0"}
    agreed(cluster, limit=3 * cluster.config.reconnect_interval)
    assert isolated(cluster) == set()


def test_who_is_gone_for_good_is_tried_seldom_and_disturbs_nobody() -> None:
    cluster = Cluster(3, 1, config=FORGETFUL)
    cluster.kill("n2")
    cluster.run(seconds=200)
    tries: list[str] = []
    connect = cluster._streams.connect

    def counting(process, stream, to):  # type: ignore[no-untyped-def]
        if to == cluster.processes["n2"].address:
            tries.append(process.key)
        connect(process, stream, to)

    cluster._streams.connect = counting  # type: ignore[method-assign]
    cluster.run(seconds=20 * LOST_INTERVAL)
    assert 20 <= len(tries) <= 60
    assert set(tries) == {"n0", "n1"}
    assert cluster.statuses("n2") == {Status.NONE}
