"""Steps are measured, and one that takes too long is seen where it is."""

import signal
import threading
import time
from collections.abc import Iterator

import pytest

from serfd.config import Seconds
from serfd.hooks.stall import StallWatch


@pytest.fixture(autouse=True)
def _signal_as_it_was() -> Iterator[None]:
    held = signal.getsignal(signal.SIGALRM)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, held)


def spin_until_seen(watch: StallWatch) -> None:
    deadline = time.monotonic() + 30
    while not watch._place and time.monotonic() < deadline:
        pass


def test_a_step_that_takes_too_long_is_seen_where_it_is() -> None:
    watch = StallWatch(Seconds(0.01))
    began = watch.begin()
    spin_until_seen(watch)
    took, place = watch.end(began)
    assert took >= 0.01
    assert "spin_until_seen" in place


def test_a_sleep_is_seen_too_and_is_not_cut_short() -> None:
    watch = StallWatch(Seconds(0.01))
    began = watch.begin()
    time.sleep(0.1)
    took, place = watch.end(began)
    assert took >= 0.1
    assert "time.sleep(0.1)" in place


def test_a_short_step_is_nowhere_and_leaves_no_alarm() -> None:
    watch = StallWatch(Seconds(60))
    assert watch.end(watch.begin())[1] == ""
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_step_within_a_step_leaves_the_outer_one_watched() -> None:
    watch = StallWatch(Seconds(0.01))
    outer = watch.begin()
    watch.end(watch.begin())
    spin_until_seen(watch)
    assert "spin_until_seen" in watch.end(outer)[1]


def test_in_another_thread_or_with_the_signal_taken_steps_are_still_measured() -> None:
    signal.signal(signal.SIGALRM, lambda number, frame: None)
    seen: list[tuple[float, str]] = []

    def measure() -> None:
        clock = iter([1.0, 3.0])
        watch = StallWatch(Seconds(1), lambda: next(clock))
        seen.append(watch.end(watch.begin()))

    measure()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
    assert seen == [(2.0, ""), (2.0, "")]
