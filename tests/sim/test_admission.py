"""Who is let in: labels, allow lists, and keys that change while the cluster lives."""

import base64

import pytest
from clusters import agreed, plain
from msgspec.structs import replace

from serfd.serf.events import Status
from serfd.serf.keys import INSTALL, REMOVE, USE
from serfd.sim.cluster import Cluster

SEEDS = (1, 2, 3)
OLD, NEW = bytes(range(16)), bytes(range(32))
NAMES = "member-{}"
"""Long enough to be searched for in what must be sealed."""


def suspected(cluster: Cluster) -> set[str]:
    return {happening.about for happening in cluster.happened("suspects")}


def dropped(cluster: Cluster, key: str) -> int:
    return int(cluster.processes[key].node.stats()["dropped_input"])


# Labels


@pytest.mark.parametrize("keys", [(), (OLD,)], ids=["plain", "sealed"])
@pytest.mark.parametrize("seed", SEEDS)
def test_nodes_of_one_label_meet_and_live_together(seed: int, keys: tuple[bytes, ...]) -> None:
    config = replace(plain(), cluster_label="blau wie der Himmel, grün wie Gras")
    cluster = Cluster(5, seed, config=config, keys=keys, names=NAMES)
    cluster.update_tags("member-2", {"role": "database"})
    cluster.run(seconds=60)
    assert agreed(cluster, limit=1.0) == 0.0
    assert suspected(cluster) == set()
    assert [dropped(cluster, key) for key in cluster.processes] == [0] * 5


@pytest.mark.parametrize("keys", [(), (OLD,)], ids=["plain", "sealed"])
@pytest.mark.parametrize(("own", "theirs"), [("blue", "red"), ("blue", ""), ("", "red")])
def test_nodes_of_two_labels_do_not_meet(own: str, theirs: str, keys: tuple[bytes, ...]) -> None:
    cluster = Cluster(3, 1, config=replace(plain(), cluster_label=own), keys=keys, names=NAMES)
    cluster.config = replace(cluster.config, cluster_label=theirs)
    cluster.start("stranger")
    joins = [cluster.join("stranger", "member-0"), cluster.join("member-1", "stranger")]
    cluster.run(seconds=15)
    assert [join.result.contacted for join in joins] == [0, 0]
    assert cluster.statuses("stranger", seen_by="others") == {Status.NONE}
    assert dropped(cluster, "stranger") == 1
    assert dropped(cluster, "member-0") == 1
    assert agreed(cluster, limit=1.0) == 0.0


# Allow lists


def test_who_is_outside_of_the_allowed_networks_is_let_in_by_nobody_who_has_the_list() -> None:
    # Addresses are 10.0.0.1 on, fd00::1 on, in turn, some IPv4 ones in IPv6 form.
    listed = replace(plain(), cidrs_allowed=["10.0.0.0/29", "fd00::/125"])
    cluster = Cluster(7, 1, config=listed)
    cluster.config = plain()
    cluster.start("outside")
    cluster.join("outside", "n0")
    cluster.run(seconds=60)
    assert cluster.statuses("outside", seen_by="others") == {Status.NONE}
    assert dropped(cluster, "n0") > 0
    inside = {f"n{number}" for number in range(7)}
    assert all(cluster.statuses(key, seen_by=inside) == {Status.ALIVE} for key in inside)


# Encryption of a living cluster

STEPS = (
    {"encrypt_verify_incoming": False, "encrypt_verify_outgoing": False},
    {"encrypt_verify_incoming": False, "encrypt_verify_outgoing": True},
    {"encrypt_verify_incoming": True, "encrypt_verify_outgoing": True},
)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_living_cluster_is_encrypted_in_three_steps_and_nobody_is_accused(seed: int) -> None:
    cluster = Cluster(6, seed, config=plain(), names=NAMES)
    places = list(cluster.processes)
    cluster.keys = (OLD,)
    for step in STEPS:
        cluster.config = replace(cluster.config, **step)
        for key in places:
            cluster.kill(key)
            cluster.run(seconds=0.2)
            cluster.restart(key)
            assert agreed(cluster, limit=2.0) <= 2.0
            cluster.run(seconds=3)
            assert cluster.all_list_all()
    cluster.run(seconds=60)
    assert cluster.all_list_all()
    assert suspected(cluster) == set()
    # Now all is sealed: the simulator looks at every byte (`Process.sealed_part`).
    assert all(process.is_sealed for process in cluster.running)
    assert [dropped(cluster, key) for key in places] == [0] * 6


@pytest.mark.parametrize(
    "step", [STEPS[1], STEPS[2]], ids=["sends sealed at once", "everything at once"]
)
def test_without_the_first_step_the_cluster_falls_apart(step: dict[str, bool]) -> None:
    cluster = Cluster(4, 1, config=plain(), names=NAMES)
    cluster.keys = (OLD,)
    cluster.config = replace(cluster.config, **step)
    cluster.restart("member-1")
    cluster.run(seconds=60)
    assert cluster.statuses("member-1", seen_by="others") == {Status.FAILED}


# Keys that change while somebody is away


def change(cluster: Cluster, by: str, *queries: str, key: bytes = NEW) -> None:
    for query in queries:
        asked = cluster.change_keys(by, query, base64.b64encode(key).decode())
        cluster.run(seconds=1.0)
        assert asked.result.error == ""


def without(cluster: Cluster, key: str) -> None:
    """This node is down, and all have noticed."""
    cluster.kill(key)
    cluster.run_until(
        lambda: cluster.statuses(key) == {Status.FAILED}, cluster.detection_bound, every=0.5
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("removed", [False, True], ids=["old key kept", "old key removed"])
def test_who_was_down_while_the_key_changed_gets_in_with_any_key_in_use(
    seed: int, *, removed: bool
) -> None:
    cluster = Cluster(5, seed, config=plain(), keys=[OLD], names=NAMES)
    change(cluster, "member-0", INSTALL)
    without(cluster, "member-3")
    change(cluster, "member-0", USE)
    if removed:
        change(cluster, "member-0", REMOVE, key=OLD)
    cluster.keys = (OLD, NEW)
    cluster.restart("member-3")
    assert agreed(cluster, limit=2.0) <= 2.0
    cluster.run(seconds=90)
    assert agreed(cluster, limit=1.0) == 0.0
    assert suspected(cluster) == {"member-3"}
    primary = cluster.processes["member-3"].node._keyring.primary
    assert primary == (NEW if removed else OLD)


@pytest.mark.parametrize("seed", SEEDS)
def test_who_was_cut_off_while_the_key_changed_comes_back_by_itself(seed: int) -> None:
    cluster = Cluster(5, seed, config=plain(), keys=[OLD], names=NAMES)
    change(cluster, "member-0", INSTALL)
    with cluster.partition({"member-3"}):
        cluster.run(seconds=60)
        change(cluster, "member-0", USE)
        change(cluster, "member-0", REMOVE, key=OLD)
    agreed(cluster, limit=5 * cluster.config.reconnect_interval)
    cluster.run(seconds=90)
    assert agreed(cluster, limit=1.0) == 0.0


def test_who_has_no_key_in_use_does_not_get_in_and_does_not_try_for_long() -> None:
    cluster = Cluster(4, 1, config=plain(), keys=[NEW], names=NAMES)
    cluster.keys = (OLD, bytes(24))
    cluster.start("stranger")
    join = cluster.join("stranger", "member-0")
    cluster.run(seconds=15)
    assert join.result.contacted == 0
    # The refusal is sealed with a key that the stranger does not have.
    assert join.result.failures[0].endswith("no installed keys could decrypt the message")
    assert dropped(cluster, "member-0") == 1
    assert cluster.statuses("stranger", seen_by="others") == {Status.NONE}
