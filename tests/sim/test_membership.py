"""What a cluster as a whole must do: join, leave, notice, refute, heal. A seed is a whole run."""

import pytest
from clusters import agreed, make

from serfd.errors import CommandError
from serfd.serf.events import Status
from serfd.serf.node import Joined
from serfd.sim import checks
from serfd.sim.cluster import Cluster
from serfd.wire.serf_messages import PushPullState, encode

ALIVE, LEAVING, LEFT, FAILED, NONE = (
    {Status.ALIVE}, {Status.LEAVING}, {Status.LEFT}, {Status.FAILED}, {Status.NONE},
)  # fmt: skip
SEEDS = range(3)


def failed_members(cluster: Cluster) -> set[str]:
    """Everybody whom anybody ever saw as failed."""
    return {happening.about for happening in cluster.happened("member-failed")}


def suspected_members(cluster: Cluster) -> set[str]:
    """Everybody whom anybody ever suspected."""
    return {happening.about for happening in cluster.happened("suspects")}


# Joining


@pytest.mark.parametrize("seed", range(20))
def test_thirty_nodes_that_join_one_at_the_same_instant_all_list_all_in_two_seconds(
    seed: int,
) -> None:
    cluster = make(30, seed, joined=False)
    assert cluster.join_all() <= 2.0


def test_two_hundred_nodes_meet_and_notice_one_that_crashes() -> None:
    cluster = make(200, 1, joined=False)
    keys = list(cluster.processes)
    # A node answers 127 at once; whoever it turns away comes again (gossip.md 1).
    for wave in range(1, 200, 40):
        for key in keys[wave : wave + 40]:
            cluster.join(key, "n0")
        cluster.run(seconds=0.5)
    cluster.run_until(cluster.all_list_all, limit=10.0, every=0.5)
    cluster.kill("n77")
    limit = checks.usual_detection_bound(cluster.config.gossip, 200)
    cluster.run_until(lambda: cluster.statuses("n77") == FAILED, limit, every=0.5)
    assert failed_members(cluster) == {"n77"}


@pytest.mark.parametrize("seed", SEEDS)
def test_two_clusters_that_join_become_one(seed: int) -> None:
    cluster = make(20, seed, joined=False)
    for number in range(1, 10):
        cluster.join(f"n{number}", "n0")
        cluster.join(f"n{number + 10}", "n10")
    cluster.run(seconds=5)
    assert cluster.statuses("n3", seen_by={"n13"}) == NONE
    asked = cluster.join("n5", "n15")
    # Who misses the news hears it at the next state exchange.
    cluster.run_until(cluster.all_list_all, limit=2 * cluster.config.gossip.push_pull_interval)
    assert asked.result == Joined(1, ())


# Crashing


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", [2, 3, 4, 5, 10, 30])
def test_a_crashed_node_has_failed_for_all_within_the_usual_bound(size: int, seed: int) -> None:
    cluster = make(size, seed)
    cluster.run(seconds=seed)
    cluster.kill("n1")
    limit = checks.usual_detection_bound(cluster.config.gossip, size)
    cluster.run_until(lambda: cluster.statuses("n1") == FAILED, limit)
    cluster.run(seconds=20)
    assert failed_members(cluster) == {"n1"}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", [2, 4, 10, 30])
def test_a_crashed_node_has_failed_for_all_on_the_local_profile(size: int, seed: int) -> None:
    # In small local clusters each piece of news is sent twice only, so some may miss it and need
    # their own suspicion to end: the bound is the hard one.
    cluster = make(size, seed, "local")
    cluster.kill("n1")
    cluster.run_until(lambda: cluster.statuses("n1") == FAILED, cluster.detection_bound)
    assert failed_members(cluster) == {"n1"}


def test_half_of_a_cluster_may_crash_at_once() -> None:
    cluster = make(20, 5)
    for number in range(10):
        cluster.kill(f"n{number}")
    cluster.run_until(
        lambda: all(cluster.statuses(f"n{number}") == FAILED for number in range(10)),
        cluster.detection_bound,
    )
    assert failed_members(cluster) == {f"n{number}" for number in range(10)}


# Coming back


@pytest.mark.parametrize("new_address", [False, True], ids=["same-address", "new-address"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_failed_node_comes_back_at_once(seed: int, *, new_address: bool) -> None:
    cluster = make(10, seed)
    cluster.kill("n3")
    cluster.run_until(lambda: cluster.statuses("n3") == FAILED, cluster.detection_bound)
    cluster.restart("n3", new_address=new_address)
    assert agreed(cluster, limit=2.0) <= 2.0


@pytest.mark.parametrize("after", [0.05, 1.0, 3.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_node_that_restarts_before_anybody_noticed_never_fails(seed: int, after: float) -> None:
    cluster = make(10, seed)
    cluster.kill("n3")
    cluster.run(seconds=after)
    cluster.restart("n3")
    agreed(cluster, limit=2.0)
    cluster.run(seconds=30)
    assert failed_members(cluster) == set()


@pytest.mark.parametrize("after", [0.05, 1.0, 3.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_new_address_is_believed_once_the_old_holder_of_the_name_is_dead(
    seed: int, after: float
) -> None:
    cluster = make(10, seed)
    cluster.kill("n3")
    cluster.run(seconds=after)
    moved = cluster.restart("n3", new_address=True)
    agreed(cluster, limit=checks.usual_detection_bound(cluster.config.gossip, 10))
    # The old one was declared dead first by nearly all that took the new one, and at once then:
    # nobody waited for the next state exchange.
    failures = cluster.happened("member-failed", about="n3")
    assert len({one.who for one in failures}) >= 8
    assert cluster.now - failures[-1].time <= 1.0
    member = cluster.processes["n0"].node.member("n3")
    assert member is not None
    assert member.address == str(moved.address)


# Leaving


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("profile", "size"),
    [("lan", 1), ("lan", 2), ("lan", 3), ("lan", 5), ("lan", 15), ("local", 2), ("local", 3)],
)
def test_who_leaves_has_left_for_all_and_never_fails(profile: str, size: int, seed: int) -> None:
    cluster = make(size, seed, profile)
    cluster.run(seconds=seed / 3)
    asked = cluster.leave("n0")
    cluster.run(seconds=1.0)
    assert asked.result is None
    assert asked.took <= 1.0
    assert size == 1 or cluster.statuses("n0") == LEFT
    cluster.run(seconds=30)
    assert failed_members(cluster) == set()
    assert suspected_members(cluster) == set()


@pytest.mark.parametrize("seed", SEEDS)
def test_who_left_may_come_back(seed: int) -> None:
    cluster = make(5, seed)
    cluster.leave("n2")
    cluster.run(seconds=5)
    assert cluster.statuses("n2") == LEFT
    cluster.restart("n2", new_address=seed == 1)
    agreed(cluster, limit=2.0)


def stale_claim(name: str) -> bytes:
    """The state of a peer that has not heard that this member came back."""
    return encode(PushPullState(50, {name: 40}, [name], 1, [], 1))


def test_a_peer_that_missed_a_return_makes_nobody_leaving() -> None:
    cluster = make(3, 1)
    n0, n2 = cluster.processes["n0"], cluster.processes["n2"]
    n0.node.merge_remote_state(stale_claim("n1"), n2.address, join=False)
    cluster.run(seconds=60)
    assert cluster.statuses("n1") == ALIVE


def test_a_peer_that_missed_a_return_makes_no_newcomer_leaving() -> None:
    cluster = make(3, 1)
    n0, n2 = cluster.processes["n0"], cluster.processes["n2"]
    n0.node.merge_remote_state(stale_claim("n3"), n2.address, join=False)
    cluster.start("n3")
    cluster.join("n3", "n1")
    cluster.run(seconds=60)
    assert cluster.statuses("n3") == ALIVE


def test_a_node_that_is_leaving_answers_a_second_leave_with_an_error() -> None:
    cluster = make(3, 1)
    cluster.leave("n1")
    again = cluster.leave("n1")
    joined = cluster.join("n1", "n0")
    cluster.run(seconds=2)
    assert isinstance(again.result, CommandError)
    assert isinstance(joined.result, CommandError)
    assert cluster.statuses("n1") == LEFT


# Being told to leave


@pytest.mark.parametrize(("prune", "becomes"), [(False, LEFT), (True, NONE)])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_failed_member_is_forced_out(seed: int, becomes: set[Status], *, prune: bool) -> None:
    cluster = make(5, seed)
    cluster.kill("n3")
    cluster.run_until(lambda: cluster.statuses("n3") == FAILED, cluster.detection_bound)
    asked = cluster.force_leave("n1", "n3", prune=prune)
    cluster.run_until(lambda: cluster.statuses("n3") == becomes, limit=5.0)
    cluster.run(seconds=10)
    assert asked.result is None
    assert cluster.statuses("n3") == becomes
    assert len(cluster.happened("member-reap", about="n3")) == (4 if prune else 0)


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_live_member_that_is_forced_out_refutes_and_stays(seed: int, *, prune: bool) -> None:
    cluster = make(8, seed)
    cluster.force_leave("n1", "n3", prune=prune)
    cluster.run(seconds=15)
    assert cluster.statuses("n3") == ALIVE
    assert cluster.happened("member-reap") == []
    assert cluster.happened("member-leave") == []


def test_forcing_out_somebody_unknown_is_no_error() -> None:
    cluster = make(3, 1)
    asked = cluster.force_leave("n1", "nobody")
    cluster.run(seconds=6)
    assert asked.finished_at is not None
    assert asked.result is None
    assert cluster.statuses("nobody") == NONE


# Telling


@pytest.mark.parametrize("seed", SEEDS)
def test_new_tags_are_seen_by_all(seed: int) -> None:
    cluster = make(20, seed)
    asked = cluster.update_tags("n3", {"role": "database"})
    agreed(cluster, limit=2.0)
    cluster.run(seconds=5)
    assert asked.result is None
    for process in cluster.running:
        member = process.node.member("n3")
        assert member is not None
        assert member.tags == {"role": "database"}
    assert len(cluster.happened("member-update", about="n3")) == 20


def test_tags_that_are_too_long_are_refused_and_change_nothing() -> None:
    cluster = make(3, 1)
    asked = cluster.update_tags("n1", {"role": "x" * 600})
    cluster.run(seconds=5)
    assert isinstance(asked.result, CommandError)
    assert cluster.happened("member-update") == []


# The network


@pytest.mark.parametrize("seed", SEEDS)
def test_a_node_cut_off_is_declared_failed_and_returns_when_the_network_heals(seed: int) -> None:
    cluster = make(20, seed)
    with cluster.partition({"n3"}):
        cluster.run(seconds=60)
        assert cluster.statuses("n3", seen_by="others") == FAILED
        assert cluster.statuses("n3", seen_by={"n3"}) == ALIVE
    agreed(cluster, limit=3 * cluster.config.reconnect_interval)


@pytest.mark.parametrize(("island", "seconds"), [(1, 10), (3, 40), (10, 90), (10, 400)])
def test_both_sides_of_a_partition_find_each_other_again(island: int, seconds: float) -> None:
    cluster = make(20, island)
    with cluster.partition({f"n{number}" for number in range(island)}):
        cluster.run(seconds=seconds)
    agreed(cluster, limit=3 * cluster.config.reconnect_interval)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("deaf", [True, False], ids=["deaf", "mute"])
def test_only_the_node_with_a_one_way_network_fails(seed: int, *, deaf: bool) -> None:
    cluster = make(15, seed)
    rest = [f"n{number}" for number in range(1, 15)]
    with cluster.cut(rest, ["n0"]) if deaf else cluster.cut(["n0"], rest):
        cluster.run(seconds=60)
        assert cluster.statuses("n0", seen_by=rest) == FAILED
        for key in rest:
            assert cluster.statuses(key, seen_by=rest) == ALIVE
    agreed(cluster, limit=3 * cluster.config.reconnect_interval)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_single_broken_link_makes_nobody_suspect(seed: int) -> None:
    cluster = make(12, seed)
    with cluster.cut(["n0"], ["n1"]):
        cluster.run(seconds=60)
    assert suspected_members(cluster) == set()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("profile", ["lan", "local"])
def test_with_five_percent_loss_nobody_healthy_is_declared_failed(profile: str, seed: int) -> None:
    cluster = make(20, seed, profile, loss=0.05)
    cluster.run(seconds=100)
    assert failed_members(cluster) == set()


def test_with_twenty_percent_loss_suspects_refute_in_time() -> None:
    cluster = make(20, 1, loss=0.2)
    cluster.run(seconds=100)
    assert suspected_members(cluster) != set()
    assert failed_members(cluster) == set()
    assert cluster.happened("raises its incarnation") != []


def test_a_slow_node_within_the_probe_timeout_is_left_alone() -> None:
    cluster = make(10, 1)
    with cluster.slow("n3", 0.2):
        cluster.run(seconds=60)
    assert suspected_members(cluster) == set()


# Stalls


@pytest.mark.parametrize("seconds", [0.7, 2.0, 5.0, 12.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_who_was_stalled_accuses_nobody(seed: int, seconds: float) -> None:
    cluster = make(15, seed)
    cluster.run(seconds=seed / 3)
    cluster.pause("n3", seconds)
    cluster.run(seconds=seconds + 40)
    assert suspected_members(cluster) <= {"n3"}
    assert failed_members(cluster) <= ({"n3"} if seconds > 4 else set())
    assert cluster.statuses("n3") == ALIVE


def test_who_stalls_again_and_again_gets_nobody_else_declared_failed() -> None:
    cluster = make(12, 3)
    for _ in range(20):
        cluster.pause("n3", 2.0)
        cluster.run(seconds=2.5)
    assert failed_members(cluster) <= {"n3"}
    assert suspected_members(cluster) <= {"n3"}


def test_a_third_of_the_cluster_stalls_at_once_and_nobody_fails() -> None:
    cluster = make(15, 2)
    for number in range(5):
        cluster.pause(f"n{number}", 4.0)
    cluster.run(seconds=60)
    assert failed_members(cluster) == set()
    assert agreed(cluster, limit=1.0) == 0.0


# Names


@pytest.mark.parametrize("seed", SEEDS)
def test_of_two_with_one_name_the_first_is_believed_until_it_is_gone(seed: int) -> None:
    cluster = make(6, seed)
    first = cluster.processes["n3"]
    twin = cluster.start("twin", name="n3")
    cluster.join("twin", "n1")
    cluster.run(seconds=40)

    def seen_at() -> set[str]:
        seen = [process.node.member("n3") for process in cluster.running]
        return {member.address for member in seen if member is not None} - {str(twin.address)}

    assert seen_at() == {str(first.address)}
    assert failed_members(cluster) == set()
    cluster.kill("n3")
    cluster.run_until(lambda: seen_at() == set(), cluster.detection_bound + 30)
    assert cluster.statuses("n3") == ALIVE
