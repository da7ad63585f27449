"""Lamport clocks and the ring of what was seen."""

import pytest

from serfd.serf.lamport import PER_TIME_MAX, RING_SIZE, LamportClock, RecentRing


@pytest.mark.parametrize(
    ("seen", "time"),
    [(0, 1), (1, 2), (5, 6), (2**64 - 2, 2**64 - 1), (2**64 - 1, 1)],
)
def test_a_clock_goes_past_what_it_sees_but_never_wraps(seen: int, time: int) -> None:
    clock = LamportClock()
    clock.witness(seen)
    assert clock.time == time


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
