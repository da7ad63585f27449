"""One probe round: ping, indirect pings, TCP fallback, verdict (SWIM §3.1; gossip.md 6)."""

from serfd.effects import Address
from serfd.gossip.member_table import Peer


class Probe:
    """One member is being asked whether it lives."""

    __slots__ = (
        "deadline", "incarnation", "nacks", "nacks_expected", "peer", "reached_by_stream", "seq",
        "started",
    )  # fmt: skip

    def __init__(self, peer: Peer, seq: int, now: float, interval: float) -> None:
        """`interval`: seconds for the whole round, already scaled by local health."""
        self.peer = peer
        self.seq = seq
        self.incarnation = peer.incarnation
        """What is suspected if there is no answer: a later incarnation is not accused."""
        self.started = now
        self.deadline = now + interval
        self.nacks_expected = 0
        """Go-betweens that say so if the member does not answer them either."""
        self.nacks = 0
        self.reached_by_stream = False
        """It answered over TCP: it lives, though packets do not get through."""

    @property
    def blame(self) -> int:
        """How much worse this node's own health looks after the probe failed (Lifeguard §IV.A).

        Missing nacks mean that this node hears nobody; without go-betweens it is 1.
        """
        if self.nacks_expected:
            return max(0, self.nacks_expected - self.nacks)
        return 1


class RelayedPing:
    """A ping on behalf of another node, whose answer goes back to it."""

    __slots__ = ("asker", "asker_seq", "nack")

    def __init__(self, asker: Address, asker_seq: int, *, nack: bool) -> None:
        self.asker = asker
        self.asker_seq = asker_seq
        self.nack = nack
        """The asker wants to hear that there was no answer."""
