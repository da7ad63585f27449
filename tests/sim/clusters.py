"""How the tests make their clusters."""

from typing import Any

from serfd.config import PROFILES, Config
from serfd.sim.cluster import Cluster


def plain(profile: str = "lan") -> Config:
    """The timings of a profile; nothing is packed, which would take half the time of a run."""
    return Config(gossip=PROFILES[profile], enable_compression=False)


def make(size: int, seed: int, profile: str = "lan", **options: Any) -> Cluster:
    """A cluster whose nodes have all met, unless `joined=False` says otherwise."""
    return Cluster(size, seed, config=plain(profile), **options)


def agreed(cluster: Cluster, limit: float) -> float:
    """Run until all live nodes see the same and the truth; gives the seconds it took."""
    every = 0.05 if limit < 10 else 0.5
    return cluster.run_until(lambda: cluster.disagreement is None, limit, every=every)
