"""The network's faults, and what a seed draws."""

from random import Random

import pytest

from serfd.sim.faults import Kind, Network, draw_faults

KEYS = [f"n{number}" for number in range(12)]


def network(*, loss: float = 0.0) -> Network:
    return Network(Random(1), latency=0.001, jitter=0.0005, loss=loss)


def test_a_cut_stops_one_way_only_and_ends() -> None:
    net = network()
    with net.cut({"a", "b"}, {"c"}):
        assert not net.passes("a", "c")
        assert not net.passes("b", "c")
        assert net.passes("c", "a")
        assert net.passes("a", "b")
        assert net.is_disturbed
    assert net.passes("a", "c")
    assert not net.is_disturbed


def test_of_several_losses_the_worst_counts_in_whatever_order_they_end() -> None:
    net = network(loss=0.01)
    first, second = net.lossy(0.2), net.lossy(0.1)
    with first:
        second.__enter__()
        assert net.loss == 0.2
    assert net.loss == 0.1
    second.__exit__(None, None, None)
    assert net.loss == 0.01
    assert not net.is_disturbed


def test_the_share_of_lost_packets_is_as_asked() -> None:
    net = network(loss=0.1)
    assert 800 < sum(net.loses() for _ in range(10_000)) < 1200
    assert not any(network().loses() for _ in range(100))


def test_a_slow_place_is_slow_both_ways() -> None:
    net = network()
    assert 0.001 <= net.delay("a", "b") <= 0.0015
    with net.slow("a", 0.3):
        assert 0.301 <= net.delay("a", "b") <= 0.3015
        assert 0.301 <= net.delay("b", "a") <= 0.3015
        assert net.delay("b", "c") <= 0.0015


def test_lost_segments_come_later_instead() -> None:
    net = network(loss=0.5)
    delays = [net.segment_delay("a", "b") for _ in range(200)]
    assert min(delays) < 0.002
    assert max(delays) > 0.5


@pytest.mark.parametrize("seed", range(30))
def test_faults_come_in_order_within_the_run_and_one_at_a_time_per_place(seed: int) -> None:
    faults = draw_faults(Random(seed), KEYS, seconds=200.0, every=5.0)
    assert faults == draw_faults(Random(seed), KEYS, seconds=200.0, every=5.0)
    assert [fault.at for fault in faults] == sorted(fault.at for fault in faults)
    free_at = dict.fromkeys(KEYS, 0.0)
    for fault in faults:
        assert 0 < fault.at < 200
        assert fault.lasts <= max(200 - fault.at, 5.0) + 0.1
        for key in fault.who:
            assert fault.at >= free_at[key]
            free_at[key] = fault.at + fault.lasts
    for_good = [fault for fault in faults if fault.kind in (Kind.CRASH, Kind.LEAVE)]
    assert len(for_good) <= len(KEYS) // 3


def test_every_kind_of_fault_is_drawn() -> None:
    drawn = {
        fault.kind
        for seed in range(20)
        for fault in draw_faults(Random(seed), KEYS, seconds=200.0, every=5.0)
    }
    assert drawn == set(Kind)


def test_a_stream_over_a_network_that_loses_all_ends_some_time() -> None:
    assert network(loss=1.0).segment_delay("a", "b") > 600
