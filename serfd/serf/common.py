"""What the parts of one node have in common."""

import logging
from random import Random
from typing import Any

from serfd.config import Config
from serfd.effects import Command, Effect, Finish
from serfd.gossip.memberlist import Memberlist
from serfd.metrics import Metrics
from serfd.serf.members import Members


class Common:
    """One node's identity, clock, effects, members, metrics; each part of it holds the same one."""

    __slots__ = (
        "config", "effects", "log", "memberlist", "members", "metrics", "name", "now", "rng",
        "tags",
    )  # fmt: skip

    memberlist: Memberlist
    """Set before the first input."""

    def __init__(
        self,
        config: Config,
        name: str,
        *,
        now: float,
        rng: Random,
        metrics: Metrics,
        log: logging.Logger,
    ) -> None:
        self.config = config
        self.name = name
        self.now = now
        """Monotonic seconds of the input that is being handled."""
        self.rng = rng
        self.metrics = metrics
        self.log = log
        self.tags = dict(config.tags)
        """This node's own tags."""
        self.members = Members(name)
        self.effects: list[Effect] = []

    def finish(self, command: Command[Any], result: Any) -> None:
        """A command is done; `result` is what it promised, or a CommandError."""
        self.effects.append(Finish(command, result))
