"""Network coordinates: how far apart two members are, learned from the round trips of probes.

Each member has a place in a space of eight dimensions, and a height: its way to the network. Each
round trip pulls or pushes its own place a little. Vivaldi, SIGCOMM 2004; serf.md 14.
"""

from math import inf, sqrt
from random import Random
from typing import Any, NamedTuple

from serfd.errors import WireError
from serfd.gossip.member_table import MEMBERS_MAX
from serfd.wire.gomsgpack import pack, unpack

DIMENSIONS = 8
ERROR_MAX = 1.5
CE = 0.25
"""The most of a new error that is taken over at once."""
CC = 0.25
"""The most of a wrong distance that is corrected at once."""
ADJUSTMENT_WINDOW = 20
"""Round trips that the adjustment is the mean of."""
LATENCY_FILTER_SIZE = 3
"""Round trips to one member whose median is believed."""
GRAVITY_RHO = 150.0
"""Seconds from the origin at which gravity pulls by a second."""
HEIGHT_MIN = 10.0e-6
ZERO_THRESHOLD = 1.0e-6
RTT_MAX = 10.0
"""Seconds; a longer round trip says nothing about the network."""
RADIUS_MAX = 2 * GRAVITY_RHO**2
"""Seconds from the origin. Farther out gravity pulls so hard that a place flies past the origin and
lands still farther out: nobody is there who was not put there on purpose."""
PING_VERSION = 1

_NANOSECONDS = 1_000_000_000


class Coordinate(NamedTuple):
    """A place in the network; all but `error` in seconds."""

    vec: tuple[float, ...]
    """`DIMENSIONS` of them; those of a peer only after `CoordinateClient.update` took them."""
    error: float
    """How much to doubt it: 0 not at all, `ERROR_MAX` altogether."""
    adjustment: float
    """What round trips to it take longer than its place says; may be negative."""
    height: float
    """The way from the member to the network."""


ORIGIN = Coordinate((0.0,) * DIMENSIONS, ERROR_MAX, 0.0, HEIGHT_MIN)
"""Where everybody starts."""


def distance(a: Coordinate, b: Coordinate) -> float:
    """The round trip to expect, in seconds cut to whole nanoseconds (serf.md 14).

    For coordinates that a `CoordinateClient` holds: any others may be infinitely far.
    """
    raw = _raw_distance(a, b)
    adjusted = raw + a.adjustment + b.adjustment
    # As seconds and a rest, since that is how Go rounds a duration.
    seconds, rest = divmod(int((adjusted if adjusted > 0 else raw) * _NANOSECONDS), _NANOSECONDS)
    return seconds + rest / _NANOSECONDS


def encode(coordinate: Coordinate) -> bytes:
    """The payload of an ack that tells where the answering member is (gossip.md 6.4)."""
    return b"\x01" + pack(
        {
            "Adjustment": coordinate.adjustment,
            "Error": coordinate.error,
            "Height": coordinate.height,
            "Vec": coordinate.vec,
        }
    )


def decode(payload: bytes) -> Coordinate | None:
    """Read the payload of an ack; None if the member keeps no coordinate.

    Raises WireError. Whether the coordinate makes sense, its number of dimensions included, is for
    `CoordinateClient.update` to say.
    """
    if not payload:
        return None
    if payload[0] != PING_VERSION:
        raise WireError(f"Unsupported ping version: {payload[0]}")
    try:
        fields = unpack(payload[1:], "coordinate")
        vec = fields.get(b"Vec")
        if vec is not None and type(vec) is not list:
            raise WireError("coordinate: Vec is something else than a list")
        return Coordinate(
            tuple([_number(component, "Vec") for component in vec or ()]),
            _number(fields.get(b"Error"), "Error"),
            _number(fields.get(b"Adjustment"), "Adjustment"),
            _number(fields.get(b"Height"), "Height"),
        )
    except WireError as error:
        raise WireError(f"Failed to decode coordinate from ping: {error}") from None


class _Neighbour(NamedTuple):
    """What is known of another member."""

    coordinate: Coordinate
    rtts: tuple[float, ...]
    """Its last round trips, in seconds."""


class CoordinateClient:
    """This node's place, and those of the members it has probed."""

    __slots__ = ("_name", "_neighbours", "_next_sample", "_rng", "_samples", "own", "resets")

    def __init__(self, name: str, rng: Random) -> None:
        """`name`: this node's."""
        self._name = name
        self._rng = rng
        self._neighbours: dict[str, _Neighbour] = {}
        self._samples = [0.0] * ADJUSTMENT_WINDOW
        self._next_sample = 0
        self.own = ORIGIN
        """This node's place; it only changes in `update`."""
        self.resets = 0
        """How often the own place had become nonsense and was given up."""

    def get(self, node: str) -> Coordinate | None:
        """Where a member is; None if it was never probed."""
        if node == self._name:
            return self.own
        neighbour = self._neighbours.get(node)
        return neighbour.coordinate if neighbour is not None else None

    def forget(self, node: str) -> None:
        """The member is gone."""
        self._neighbours.pop(node, None)

    def update(self, node: str, other: Coordinate, rtt: float) -> str | None:
        """Move after a round trip of `rtt` seconds to a member that is at `other` (serf.md 14).

        Gives the reason if these are not believed; then nothing changes.
        """
        reason = _fault(other, rtt)
        if reason is not None:
            return reason
        believed = self._filtered(node, other, rtt)
        self._move(other, believed)
        self._adjust(other, believed)
        self._fall_back()
        if not _is_sane(self.own):
            self.own = ORIGIN
            self.resets += 1
        return None

    def _filtered(self, node: str, other: Coordinate, rtt: float) -> float:
        """The median of the last round trips to a member; notes this one, and where it is."""
        neighbour = self._neighbours.get(node)
        if neighbour is None:
            if len(self._neighbours) >= MEMBERS_MAX:
                del self._neighbours[next(iter(self._neighbours))]
            rtts: tuple[float, ...] = (rtt,)
        else:
            rtts = (*neighbour.rtts[1 - LATENCY_FILTER_SIZE :], rtt)
        self._neighbours[node] = _Neighbour(other, rtts)
        return sorted(rtts)[len(rtts) // 2]

    def _move(self, other: Coordinate, rtt: float) -> None:
        own = self.own
        rtt = max(rtt, ZERO_THRESHOLD)
        expected = distance(own, other)
        wrong = abs(expected - rtt) / rtt
        weight = own.error / max(own.error + other.error, ZERO_THRESHOLD)
        error = min(CE * weight * wrong + own.error * (1 - CE * weight), ERROR_MAX)
        self.own = own._replace(error=error)
        self._push(CC * weight * (rtt - expected), other)

    def _adjust(self, other: Coordinate, rtt: float) -> None:
        self._samples[self._next_sample] = rtt - _raw_distance(self.own, other)
        self._next_sample = (self._next_sample + 1) % ADJUSTMENT_WINDOW
        # Not sum(): later Pythons round it otherwise, and all members should agree to the last bit.
        total = 0.0
        for sample in self._samples:
            total += sample
        self.own = self.own._replace(adjustment=total / (2 * ADJUSTMENT_WINDOW))

    def _fall_back(self) -> None:
        """Gravity: without it the whole cluster would drift away together."""
        self._push(-((distance(ORIGIN, self.own) / GRAVITY_RHO) ** 2), ORIGIN)

    def _push(self, force: float, other: Coordinate) -> None:
        """Move by `force` seconds away from `other`, in height too."""
        own = self.own
        difference = [mine - theirs for mine, theirs in zip(own.vec, other.vec, strict=True)]
        far = _length(difference)
        height = own.height
        if far > ZERO_THRESHOLD:
            unit = [component / far for component in difference]
            height = max((own.height + other.height) * force / far + own.height, HEIGHT_MIN)
        else:
            unit = self._random_direction()
        vec = tuple([mine + part * force for mine, part in zip(own.vec, unit, strict=True)])
        self.own = Coordinate(vec, own.error, own.adjustment, height)

    def _random_direction(self) -> list[float]:
        """Where to go from somebody at the same place."""
        vec = [self._rng.random() - 0.5 for _ in range(DIMENSIONS)]
        length = _length(vec)
        if length > ZERO_THRESHOLD:
            return [component / length for component in vec]
        return [1.0] + [0.0] * (DIMENSIONS - 1)


def _fault(other: Coordinate, rtt: float) -> str | None:
    """Why a coordinate and a round trip are not to be believed."""
    if len(other.vec) != DIMENSIONS:
        return "dimensions aren't compatible"
    if not _is_sane(other):
        return "coordinate is invalid"
    if not 0 <= rtt <= RTT_MAX:
        return (
            f"round trip time not in valid range, duration {rtt:.9g}s is not a positive value"
            f" less than {RTT_MAX:g}s "
        )
    return None


def _is_sane(coordinate: Coordinate) -> bool:
    """Whether a coordinate can be where a member came to by itself; NaN and infinity cannot.

    Real agents only look for those two. Believed, others would be numbers too large to reckon
    with, or would throw this node out of the space.
    """
    vec, error, adjustment, height = coordinate
    return (
        _length(vec) + height + abs(adjustment) <= RADIUS_MAX and 0 <= error < inf and height >= 0
    )


def _raw_distance(a: Coordinate, b: Coordinate) -> float:
    total = 0.0
    for x, y in zip(a.vec, b.vec, strict=True):
        total += (x - y) * (x - y)
    return sqrt(total) + a.height + b.height


def _length(vec: "tuple[float, ...] | list[float]") -> float:
    total = 0.0
    for component in vec:
        total += component * component
    return sqrt(total)


def _number(value: Any, key: str) -> float:
    """One number of a peer; nil is 0. Raises WireError."""
    if type(value) is float or type(value) is int:
        return float(value)
    if value is None:
        return 0.0
    raise WireError(f"coordinate: {key} holds something else than numbers")
