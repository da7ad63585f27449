"""A run in which things go wrong as the seed has it, until the cluster agrees again."""

from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from random import Random

from serfd.config import PROFILES, Config
from serfd.sim.cluster import CheckFailed, Cluster
from serfd.sim.faults import Fault, Kind, draw_faults
from serfd.sim.process import Asked

FAULT_EVERY = 8.0
"""Seconds between two faults, on average."""
FADING = 2.0
"""Seconds in which nothing goes wrong before the run counts as quiet."""
SEALED_EVERY = 8
"""One seed in so many runs with encryption, compression and long names: that is slower."""
KEYS = (bytes(range(32)), bytes(range(16)))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a scenario."""

    cluster: Cluster
    faults: list[Fault]
    joined_in: float
    """Seconds until all listed all."""
    agreed_in: float
    """Seconds from the end of the last fault until all agreed again."""
    agreed_bound: float
    """How many seconds that might have taken."""
    failure: CheckFailed | None
    """Which check failed, if one did."""


def play(
    seed: int,
    *,
    nodes: int,
    seconds: float,
    loss: float = 0.0,
    profile: str = "lan",
    replay: str = "",
) -> Outcome:
    """Let `nodes` join, let things go wrong for so many seconds, then wait until all agree.

    `loss`: the share of packets lost all the time. Raises nothing for a check that fails: it is in
    the outcome.
    """
    sealed = seed % SEALED_EVERY == 0
    cluster = Cluster(
        nodes,
        seed,
        config=Config(gossip=PROFILES[profile], enable_compression=sealed),
        keys=KEYS if sealed else (),
        names="member-{}" if sealed else "n{}",
        loss=loss,
        joined=False,
    )
    cluster.replay = replay or cluster.replay
    joined_in = agreed_in = agreed_bound = 0.0
    failure = None
    faults = draw_faults(
        Random(f"{seed} faults"), list(cluster.processes), seconds=seconds, every=FAULT_EVERY
    )
    try:
        joined_in = cluster.join_all(limit=cluster.convergence_bound)
        for fault in faults:
            cluster.after(fault.at, inflict, cluster, fault)
        cluster.run(seconds)
        # What began last, or waits for its process to leave first, may last a little longer.
        cluster.run_until(lambda: cluster.quiet_for >= FADING, limit=seconds)
        agreed_bound = cluster.convergence_bound
        cluster.run_until(
            lambda: cluster.disagreement is None and cluster.unrest is None,
            limit=agreed_bound,
            every=0.5,
        )
        agreed_in = cluster.quiet_for
        # It stays so.
        cluster.run(2 * cluster.config.gossip.probe_interval)
        cluster.insist(cluster.disagreement)
    except CheckFailed as failed:
        failure = failed
    return Outcome(cluster, faults, joined_in, agreed_in, agreed_bound, failure)


def inflict(cluster: Cluster, fault: Fault) -> None:
    """Let this go wrong from now on; the cluster goes on by itself while it lasts."""
    others = [key for key in cluster.processes if key not in fault.who]
    if any(not cluster.processes[key].is_running for key in fault.who):
        return
    key = fault.who[0] if fault.who else ""
    match fault.kind:
        case Kind.CRASH:
            cluster.kill(key)
        case Kind.BOUNCE | Kind.MOVE:
            cluster.kill(key)
            again = partial(cluster.restart, key, new_address=fault.kind is Kind.MOVE)
            cluster.after(fault.lasts, again)
        case Kind.PAUSE:
            cluster.pause(key, fault.lasts)
        case Kind.SLOW:
            _for_a_time(cluster, fault, cluster.slow(key, fault.much))
        case Kind.DEAF:
            _for_a_time(cluster, fault, cluster.cut(others, fault.who))
        case Kind.MUTE:
            _for_a_time(cluster, fault, cluster.cut(fault.who, others))
        case Kind.PARTITION:
            _for_a_time(cluster, fault, cluster.partition(fault.who))
        case Kind.LOSS:
            _for_a_time(cluster, fault, cluster.lossy(fault.much))
        case Kind.LEAVE:
            cluster.leave(key)
        case Kind.RETURN:

            def left(asked: Asked) -> None:
                cluster.after(fault.lasts, cluster.restart, key)

            cluster.leave(key).then.append(left)
        case Kind.TAG:
            cluster.update_tags(key, {"changed": f"{cluster.now:.3f}"})


def _for_a_time(cluster: Cluster, fault: Fault, disturbance: AbstractContextManager[None]) -> None:
    stack = ExitStack()
    stack.enter_context(disturbance)
    cluster.tell(" ".join(fault.who), fault.kind.value, fault.extent)

    def over() -> None:
        stack.close()
        cluster.tell(" ".join(fault.who), f"no longer {fault.kind.value}")

    cluster.after(fault.lasts, over)
