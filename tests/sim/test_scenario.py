"""Random faults, drawn from a seed: whatever goes wrong, the cluster agrees in the end."""

import pytest
from clusters import make

from serfd.serf.events import Status
from serfd.sim.faults import Fault, Kind
from serfd.sim.scenario import inflict, play


@pytest.mark.parametrize(
    ("seed", "nodes", "profile", "loss"),
    [
        *((seed, 10, "lan", 0.0) for seed in range(1, 8)),
        *((seed, 5, "lan", 0.05) for seed in range(1, 5)),
        *((seed, 10, "local", 0.0) for seed in (1, 2, 4, 5)),
        (3, 3, "lan", 0.0),
        (2, 2, "lan", 0.0),
        (2, 8, "wan", 0.0),
        (8, 6, "lan", 0.0),  # sealed
    ],
)
def test_after_random_faults_all_agree_again(
    seed: int, nodes: int, profile: str, loss: float
) -> None:
    outcome = play(seed, nodes=nodes, seconds=60.0, loss=loss, profile=profile)
    assert outcome.failure is None
    assert outcome.cluster.disagreement is None
    assert outcome.agreed_in <= outcome.agreed_bound


def test_a_failed_check_is_in_the_outcome_with_the_command_that_replays_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serfd.gossip.memberlist.RELAYS_MAX", -1)
    outcome = play(1, nodes=3, seconds=10.0, replay="python -m serfd.sim --seed 1")
    assert outcome.failure is not None
    assert "python -m serfd.sim --seed 1" in str(outcome.failure)


SEEN = {
    Kind.CRASH: {Status.FAILED},
    Kind.BOUNCE: {Status.ALIVE},
    Kind.MOVE: {Status.ALIVE},
    Kind.PAUSE: {Status.ALIVE},
    Kind.SLOW: {Status.ALIVE},
    Kind.DEAF: {Status.ALIVE},
    Kind.MUTE: {Status.ALIVE},
    Kind.PARTITION: {Status.ALIVE},
    Kind.LOSS: {Status.ALIVE},
    Kind.LEAVE: {Status.LEFT},
    Kind.RETURN: {Status.ALIVE},
    Kind.TAG: {Status.ALIVE},
}


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name.lower())
def test_every_kind_of_fault_does_what_it_says_and_ends(kind: Kind) -> None:
    cluster = make(5, 1)
    who = () if kind is Kind.LOSS else ("n2",)
    inflict(cluster, Fault(0.0, kind, who, lasts=12.0, much=0.3))
    before = len(cluster.history)
    cluster.run(seconds=60)
    cluster.run(seconds=60)
    assert cluster.statuses("n2") == SEEN[kind]
    assert len(cluster.history) > before
    assert cluster.disagreement is None


def test_a_fault_of_a_process_that_has_ended_is_left_out() -> None:
    cluster = make(3, 1)
    cluster.kill("n1")
    inflict(cluster, Fault(0.0, Kind.PAUSE, ("n1",), lasts=5.0))
    assert cluster.processes["n1"].held is None
