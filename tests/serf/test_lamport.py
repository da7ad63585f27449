"""Lamport clocks and the ring of what was seen."""

import pytest

from serfd.errors import WireError
from serfd.serf.lamport import (
    KEPT_SIZE_MAX,
    LEAP_MAX,
    PER_TIME_MAX,
    RING_SIZE,
    STEP_MAX,
    LamportClock,
    RecentRing,
)


@pytest.mark.parametrize(("seen", "time"), [(0, 1), (1, 2), (5, 6), (LEAP_MAX, LEAP_MAX + 1)])
def test_a_clock_goes_past_what_it_sees(seen: int, time: int) -> None:
    clock = LamportClock()
    clock.witness(seen)
    assert clock.time == time


@pytest.mark.parametrize("seen", [LEAP_MAX + 1, 2**64 - 2])
def test_nobody_makes_a_clock_leap_so_far_that_it_has_no_room_left(seen: int) -> None:
    clock = LamportClock()
    with pytest.raises(WireError, match=f"LTime {seen} is out of reach of the clock, at 1"):
        clock.witness(seen)
    assert clock.time == LEAP_MAX + 1


def test_a_clock_at_its_last_leap_goes_on_in_steps_that_never_fill_it() -> None:
    clock = LamportClock()
    clock.witness(LEAP_MAX)
    here = clock.increment()
    clock.witness(here)
    clock.witness(here + STEP_MAX)
    assert clock.time == here + STEP_MAX + 1
    here = clock.time
    with pytest.raises(WireError, match="out of reach"):
        clock.witness(2**64 - 2)
    # It is on its way, so that who comes later to a cluster that is there gets there too.
    assert clock.time == here + STEP_MAX + 1
    # At a million forged messages a second for seventy years:
    assert (2**64 - 1 - LEAP_MAX) // (STEP_MAX + 1) > 70 * 365 * 86_400 * 1_000_000


def test_a_clock_never_goes_back() -> None:
    clock = LamportClock()
    clock.witness(9)
    clock.witness(3)
    assert clock.time == 10
    assert clock.increment() == 11


def test_the_same_message_is_new_only_once() -> None:
    ring: RecentRing[str] = RecentRing()
    assert ring.is_new(3, "x", clock=4)
    assert not ring.is_new(3, "x", clock=4)
    assert ring.is_new(3, "y", clock=4)
    assert ring.is_new(4, "x", clock=5)
    assert list(ring) == [(3, ["x", "y"]), (4, ["x"])]


@pytest.mark.parametrize(
    ("ltime", "clock", "new"),
    [(1, RING_SIZE, True), (1, RING_SIZE + 1, True), (1, RING_SIZE + 2, False), (88, 600, True),
     (87, 600, False)],
)  # fmt: skip
def test_what_is_too_old_is_not_new(ltime: int, clock: int, *, new: bool) -> None:
    ring: RecentRing[str] = RecentRing()
    assert ring.is_new(ltime, "x", clock=clock) is new


def test_a_later_time_takes_over_the_slot() -> None:
    ring: RecentRing[str] = RecentRing()
    ring.is_new(7, "x", clock=8)
    assert ring.is_new(7 + RING_SIZE, "x", clock=8 + RING_SIZE)
    assert list(ring) == [(7 + RING_SIZE, ["x"])]


def test_one_time_holds_a_limited_number_of_messages() -> None:
    ring: RecentRing[int] = RecentRing()
    assert sum(ring.is_new(1, i, clock=2) for i in range(PER_TIME_MAX + 10)) == PER_TIME_MAX


def test_of_long_messages_the_oldest_are_forgotten_first_and_never_new_again() -> None:
    ring: RecentRing[str] = RecentRing()
    size = KEPT_SIZE_MAX // 3
    for ltime in (5, 3, 9):
        assert ring.is_new(ltime, "x", clock=10, size=size)
    assert ring.is_new(7, "x", clock=10, size=size)
    assert sorted(ring) == [(5, ["x"]), (7, ["x"]), (9, ["x"])]
    assert not ring.is_new(3, "x", clock=10, size=size)
    assert not ring.is_new(2, "y", clock=10)
    # One that is older than all that is kept is heard all the same, once.
    assert ring.is_new(4, "x", clock=10, size=size)
    assert not ring.is_new(4, "x", clock=10, size=size)
    assert sorted(ring) == [(5, ["x"]), (7, ["x"]), (9, ["x"])]


def test_what_a_later_time_took_the_place_of_takes_no_room() -> None:
    ring: RecentRing[str] = RecentRing()
    for turn in range(4):
        assert ring.is_new(7 + turn * RING_SIZE, "x", 8 + turn * RING_SIZE, size=KEPT_SIZE_MAX // 2)
    ring.is_new(8, "y", clock=9, size=KEPT_SIZE_MAX // 2)
    assert len(list(ring)) == 2
