"""Network coordinates: one update to the last bit, whole networks, and what is not believed."""

import json
import math
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serfd.errors import WireError
from serfd.serf import coordinates
from serfd.serf.coordinates import (
    ADJUSTMENT_WINDOW,
    DIMENSIONS,
    HEIGHT_MIN,
    ORIGIN,
    RADIUS_MAX,
    Coordinate,
    CoordinateClient,
    decode,
    distance,
    encode,
)
from serfd.wire.gomsgpack import pack

VECTORS = {
    vector["name"]: vector
    for vector in json.loads((Path(__file__).parent.parent / "golden/serf.json").read_text())[
        "vectors"
    ]
}
INF, NAN = math.inf, math.nan
UP = (1.0,) + (0.0,) * (DIMENSIONS - 1)
"""One step in the first dimension."""


def coordinate(fields: dict[str, Any]) -> Coordinate:
    return Coordinate(tuple(fields["Vec"]), fields["Error"], fields["Adjustment"], fields["Height"])


def at(seconds: float, **others: float) -> Coordinate:
    """A place so far from the origin, in the first dimension."""
    return ORIGIN._replace(vec=(seconds, *UP[1:]), **others)


def client(seed: int = 1) -> CoordinateClient:
    return CoordinateClient("own", Random(seed))


def test_one_update_gives_what_a_real_agent_has_to_the_last_bit() -> None:
    vector = VECTORS["coordinateUpdate"]
    own = client()
    assert own.update("peer", coordinate(vector["other"]), vector["rtt_ns"] / 1e9) is None
    assert own.own == coordinate(vector["result"])


def test_the_payload_of_a_real_agent_is_read_and_written_byte_for_byte() -> None:
    vector = VECTORS["ackPayload"]
    payload = bytes.fromhex(vector["hex"])
    assert decode(payload) == coordinate(vector["decoded"])
    assert encode(coordinate(vector["decoded"])) == payload


@pytest.mark.parametrize(
    ("a", "b", "seconds"),
    [
        (ORIGIN, ORIGIN, 0.00002),  # up and down again
        (at(0.003), at(-0.001), 0.00402),
        (at(0.003, height=0.5), at(0.003, height=0.25), 0.75),
        (at(0.003, adjustment=0.25), at(0.003, adjustment=0.5, height=0.0), 0.75001),
        (at(0.003, adjustment=-0.001), at(0.001), 0.00102),
        # An adjustment that would make the way shorter than nothing is left out.
        (at(0.003, adjustment=-0.5), at(0.001), 0.00202),
    ],
)
def test_the_distance_is_that_in_space_with_heights_and_adjustments(
    a: Coordinate, b: Coordinate, seconds: float
) -> None:
    assert distance(a, b) == pytest.approx(seconds, abs=1.5e-9)
    assert distance(b, a) == distance(a, b)


@pytest.mark.parametrize(
    ("apart", "seconds"), [(1.9e-9, 1e-9), (0.5, 0.5), (2.000_000_000_7, 2.0), (3.25e-7, 3.25e-7)]
)
def test_the_distance_is_cut_to_whole_nanoseconds(apart: float, seconds: float) -> None:
    assert distance(at(apart, height=0.0), at(0.0, height=0.0)) == seconds


@pytest.mark.parametrize(
    ("other", "rtt", "reason"),
    [
        (ORIGIN._replace(vec=(0.0,) * 7), 0.1, "dimensions aren't compatible"),
        (ORIGIN._replace(vec=()), 0.1, "dimensions aren't compatible"),
        *[
            (broken, 0.1, "coordinate is invalid")
            for bad in (NAN, INF, -INF)
            for broken in (
                at(bad), at(0, error=bad), at(0, adjustment=bad), at(0, height=bad)
            )
        ],
        # Finite, but nobody comes there, and what follows could not be reckoned.
        (at(1e308), 0.1, "coordinate is invalid"),
        (at(RADIUS_MAX), 0.1, "coordinate is invalid"),
        (at(0, adjustment=1e300), 0.1, "coordinate is invalid"),
        (at(0, adjustment=-1e300), 0.1, "coordinate is invalid"),
        (at(0, height=1e300), 0.1, "coordinate is invalid"),
        (at(0, height=-0.1), 0.1, "coordinate is invalid"),
        (at(0, error=-0.1), 0.1, "coordinate is invalid"),
        *[
            (
                ORIGIN,
                rtt,
                f"round trip time not in valid range, duration {shown} is not a positive value"
                " less than 10s ",
            )
            for rtt, shown in [(-1.5, "-1.5s"), (10.001, "10.001s"), (NAN, "nans"), (INF, "infs")]
        ],
    ],
)  # fmt: skip
def test_what_cannot_be_is_rejected_and_changes_nothing(
    other: Coordinate, rtt: float, reason: str
) -> None:
    own = client()
    assert own.update("peer", at(0.5), 0.1) is None
    before = own.own
    assert own.update("peer", other, rtt) == reason
    assert own.update("new", other, rtt) == reason
    assert (own.own, own.get("peer"), own.get("new")) == (before, at(0.5), None)
    assert own.resets == 0


def test_a_round_trip_of_nothing_or_of_ten_seconds_is_allowed() -> None:
    own = client()
    assert own.update("peer", at(0.001), 0.0) is None
    assert own.update("peer", at(0.001), 10.0) is None


def test_a_node_knows_where_it_is_and_where_those_are_that_it_probed() -> None:
    own = client()
    assert own.get("own") == ORIGIN
    assert own.get("peer") is None
    own.update("peer", at(0.01), 0.02)
    assert own.get("peer") == at(0.01)
    assert own.get("own") == own.own != ORIGIN
    own.forget("peer")
    own.forget("never heard of")
    assert own.get("peer") is None
    assert own.get("own") == own.own


def test_one_slow_answer_is_not_believed() -> None:
    steady, shaken = client(), client()
    for number in range(6):
        steady.update("peer", at(0.01), 0.02)
        shaken.update("peer", at(0.01), 9.0 if number == 3 else 0.02)
    assert shaken.own == steady.own


def test_who_is_forgotten_is_met_as_for_the_first_time() -> None:
    own = client()
    for _ in range(3):
        own.update("peer", at(0.01), 0.001)
    before = own.own
    own.update("peer", at(0.01), 5.0)
    kept = own.own
    assert abs(kept.vec[0] - before.vec[0]) < 0.01
    own.forget("peer")
    own.update("peer", at(0.01), 5.0)
    assert abs(own.own.vec[0] - kept.vec[0]) > 0.1


def test_two_at_the_same_place_part_in_some_direction_that_the_seed_decides() -> None:
    first, again, other = client(1), client(1), client(2)
    for one in (first, again, other):
        one.update("peer", ORIGIN, 0.1)
    assert first.own == again.own != other.own
    assert first.own.height == HEIGHT_MIN
    # Half of the doubt is about each, and CC of what is wrong is made good.
    expected = 0.25 * 0.5 * (0.1 - 0.00002)
    assert math.dist(first.own.vec, ORIGIN.vec) == pytest.approx(expected, rel=1e-6)


def test_chance_without_a_direction_gives_the_first_axis() -> None:
    class Half(Random):
        def random(self) -> float:
            return 0.5

    own = CoordinateClient("own", Half())
    own.update("peer", ORIGIN, 0.1)
    assert own.own.vec[0] > 0
    assert own.own.vec[1:] == ORIGIN.vec[1:]


def test_the_adjustment_is_half_the_mean_of_what_the_space_leaves_out() -> None:
    own = client()
    left_out = []
    for number in range(ADJUSTMENT_WINDOW + 5):
        other = at(0.01 + number / 1000)
        own.update(f"peer {number}", other, 0.05)
        # Gravity pulls after the adjustment is made; here it is next to nothing.
        left_out.append(0.05 - math.dist(own.own.vec, other.vec) - own.own.height - other.height)
        mean = sum(left_out[-ADJUSTMENT_WINDOW:]) / ADJUSTMENT_WINDOW
        assert own.own.adjustment == pytest.approx(mean / 2, abs=1e-7)


def test_gravity_brings_back_who_is_far_out() -> None:
    pulled, far = client(), at(0.0)
    for _ in range(50):
        pulled.update("peer", far, 10.0)
        far = at(pulled.own.vec[0] + 20.0)  # it runs away, and pushes all the time
    assert math.dist(pulled.own.vec, ORIGIN.vec) < RADIUS_MAX


def test_who_is_thrown_out_of_the_space_starts_again() -> None:
    own = client()
    # Next door, where it takes no time to go down 20,000 seconds: that makes our own way as long.
    liar = at(1e-5, height=20_000.0, adjustment=-20_000.0)
    assert own.update("liar", liar, 10.0) is None
    assert own.resets == 1
    assert own.own == ORIGIN
    # The first honest peer is believed as ever.
    assert own.update("peer", at(0.01), 0.02) is None


def test_no_more_members_are_remembered_than_a_cluster_can_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(coordinates, "MEMBERS_MAX", 3)
    own = client()
    for name in "abcd":
        own.update(name, at(0.01), 0.02)
    assert [name for name in "abcd" if own.get(name)] == ["b", "c", "d"]


def test_a_network_is_learned_from_its_round_trips() -> None:
    rng = Random(3)
    places = [(rng.random() * 0.1, rng.random() * 0.1) for _ in range(12)]
    nodes = [CoordinateClient(f"n{i}", Random(i)) for i in range(len(places))]

    def rtt(i: int, j: int) -> float:
        return 0.001 + math.dist(places[i], places[j])

    for _ in range(300):
        for i, node in enumerate(nodes):
            j = rng.randrange(len(nodes) - 1)
            j += j >= i
            assert node.update(f"n{j}", nodes[j].own, rtt(i, j)) is None
    wrong = [
        abs(distance(nodes[i].own, nodes[j].own) - rtt(i, j)) / rtt(i, j)
        for i in range(len(nodes))
        for j in range(i)
    ]
    assert sorted(wrong)[len(wrong) // 2] < 0.1
    assert all(node.own.error < 0.3 for node in nodes)


ANY_FLOAT = st.floats()
SANE = st.floats(-1000, 1000)


@given(
    st.lists(
        st.tuples(
            st.builds(
                Coordinate,
                st.tuples(*[st.one_of(SANE, ANY_FLOAT)] * DIMENSIONS),
                st.one_of(st.floats(0, 2), ANY_FLOAT),
                st.one_of(SANE, ANY_FLOAT),
                st.one_of(st.floats(0, 10), ANY_FLOAT),
            ),
            st.one_of(st.floats(0, 10), ANY_FLOAT),
        ),
        max_size=8,
    )
)
def test_whatever_peers_say_the_own_place_stays_in_the_space(
    told: list[tuple[Coordinate, float]],
) -> None:
    own = client()
    for number, (other, rtt) in enumerate(told):
        own.update(f"n{number % 3}", other, rtt)
        assert math.dist(own.own.vec, ORIGIN.vec) <= RADIUS_MAX
        assert 0 <= own.own.error <= coordinates.ERROR_MAX
        assert own.own.height >= HEIGHT_MIN
        assert distance(own.own, ORIGIN) >= 0


@given(
    st.builds(
        Coordinate,
        st.tuples(*[st.floats(allow_nan=False)] * DIMENSIONS),
        st.floats(allow_nan=False),
        st.floats(allow_nan=False),
        st.floats(allow_nan=False),
    )
)
def test_every_coordinate_survives_its_payload(coordinate: Coordinate) -> None:
    payload = encode(coordinate)
    assert len(payload) == 130
    assert decode(payload) == coordinate


def test_who_keeps_no_coordinate_sends_no_payload() -> None:
    assert decode(b"") is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, Coordinate((), 0.0, 0.0, 0.0)),
        (
            {"Vec": None, "Error": None, "Adjustment": None, "Height": None},
            Coordinate((), 0.0, 0.0, 0.0),
        ),
        (
            {"Height": 1, "Vec": [0, -1, None], "Error": 2**64 - 1, "New": {"a": []}},
            Coordinate((0.0, -1.0, 0.0), float(2**64 - 1), 0.0, 1.0),
        ),
    ],
)
def test_what_is_missing_or_nil_is_nothing_and_whole_numbers_are_numbers(
    fields: dict[str, object], expected: Coordinate
) -> None:
    assert decode(b"\x01" + pack(fields)) == expected


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        (b"\x02\x80", "Unsupported ping version: 2"),
        (b"\xff", "Unsupported ping version: 255"),
        (b"\x01", "not msgpack, or not a map"),
        (b"\x01\xc1", "not msgpack, or not a map"),
        (b"\x01\x93\x01\x02\x03", "not msgpack, or not a map"),
        (encode(ORIGIN)[:-1], "not msgpack, or not a map"),
        (b"\x01" + pack({"Vec": 1.0}), "Vec is something else than a list"),
        (b"\x01" + pack({"Vec": ["1.0"]}), "Vec holds something else than numbers"),
        (b"\x01" + pack({"Vec": [True]}), "Vec holds something else than numbers"),
        (b"\x01" + pack({"Error": b"1"}), "Error holds something else than numbers"),
        (b"\x01" + pack({"Height": [1.0]}), "Height holds something else than numbers"),
        (b"\x01" + pack({"Adjustment": {}}), "Adjustment holds something else than numbers"),
    ],
)
def test_a_payload_that_is_none_is_refused(payload: bytes, error: str) -> None:
    if payload[0] == coordinates.PING_VERSION:
        error = f"Failed to decode coordinate from ping: coordinate: {error}"
    with pytest.raises(WireError) as raised:
        decode(payload)
    assert str(raised.value) == error


@given(st.binary(max_size=200))
def test_a_payload_of_garbage_raises_nothing_else(garbage: bytes) -> None:
    for payload in (garbage, b"\x01" + garbage):
        with suppress(WireError):
            decoded = decode(payload)
            assert decoded is None or type(decoded) is Coordinate
