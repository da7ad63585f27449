"""TCP in a simulated cluster: refused, silent, broken, slow, in pieces."""

from clusters import make

from serfd.serf.events import Status
from serfd.serf.node import Joined
from serfd.sim.streams import SEGMENT_MAX


def test_a_process_that_ended_refuses_connections_at_once() -> None:
    cluster = make(2, 1, joined=False)
    cluster.kill("n1")
    asked = cluster.join("n0", "n1")
    cluster.run(seconds=1)
    assert asked.result == Joined(
        0, ("Failed to join 10.0.0.2: dial tcp 10.0.0.2:7946: connect: connection refused",)
    )
    assert asked.took < 0.01


def test_who_cannot_be_reached_is_silent_and_the_core_gives_up_by_itself() -> None:
    cluster = make(2, 1, joined=False)
    with cluster.partition({"n1"}):
        asked = cluster.join("n0", "n1")
        cluster.run(seconds=11)
    assert asked.result == Joined(0, ("Failed to join 10.0.0.2: i/o timeout",))
    assert asked.took == cluster.config.gossip.tcp_timeout


def test_a_connection_attempt_outlives_a_short_cut() -> None:
    cluster = make(2, 1, joined=False)
    with cluster.partition({"n1"}):
        asked = cluster.join("n0", "n1")
        cluster.run(seconds=2)
    cluster.run(seconds=3)
    assert asked.result == Joined(1, ())
    assert 2 < asked.took < 4


def test_an_exchange_cut_in_the_middle_goes_on_when_the_network_heals() -> None:
    cluster = make(2, 1, joined=False)
    asked = cluster.join("n0", "n1")
    cluster.run(seconds=0.0012)  # The connection is there; what was asked is under way.
    with cluster.partition({"n1"}):
        cluster.run(seconds=3)
        assert asked.finished_at is None
    cluster.run(seconds=5)
    assert asked.result == Joined(1, ())


def test_an_exchange_cut_for_long_ends_on_both_sides() -> None:
    cluster = make(2, 1, joined=False)
    asked = cluster.join("n0", "n1")
    cluster.run(seconds=0.0012)
    with cluster.partition({"n1"}):
        cluster.run(seconds=11)
    cluster.run(seconds=300)
    assert asked.result == Joined(0, ("Failed to join 10.0.0.2: i/o timeout",))
    assert all(process.sockets == {} for process in cluster.running)


def test_a_crash_breaks_the_exchange() -> None:
    cluster = make(2, 1, joined=False)
    cluster.pause("n1", 60.0)
    asked = cluster.join("n0", "n1")
    cluster.run(seconds=0.1)
    # The system has taken the connection, though the process sleeps.
    assert len(cluster.processes["n0"].sockets) == 1
    cluster.run(seconds=12)
    assert asked.result == Joined(0, ("Failed to join 10.0.0.2: i/o timeout",))
    cluster.kill("n1")
    again = cluster.join("n0", "n1")
    cluster.run(seconds=1)
    assert "connection refused" in again.result.failures[0]


def test_a_connection_whose_process_ends_is_reset() -> None:
    cluster = make(2, 1, joined=False)
    with cluster.slow("n1", 0.5):
        asked = cluster.join("n0", "n1")
        cluster.run(seconds=1.2)  # Accepted; the request is still on its way.
        assert len(cluster.processes["n1"].sockets) == 1
        cluster.kill("n1")
        cluster.run(seconds=5)
    assert asked.result == Joined(0, ("Failed to join 10.0.0.2: read: connection reset by peer",))


def test_a_stalled_process_answers_when_it_goes_on() -> None:
    cluster = make(2, 1, joined=False)
    cluster.pause("n1", 4.0)
    asked = cluster.join("n0", "n1")
    cluster.run(seconds=5)
    assert asked.result == Joined(1, ())
    assert 4.0 < asked.took < 4.1


def test_a_large_state_comes_in_pieces_and_in_order() -> None:
    cluster = make(40, 1, joined=False)
    for key in cluster.processes:
        cluster.update_tags(key, {"padding": key * 100})
    cluster.run(seconds=1)
    assert sum(len(p.machine.local.meta) for p in cluster.running) > SEGMENT_MAX / 2
    assert cluster.join_all() < 3.0
    late = cluster.start("late")
    cluster.join("late", "n0")
    cluster.run(seconds=0.1)
    assert late.node.member_count == 41


def test_lost_segments_are_sent_again() -> None:
    cluster = make(2, 1, joined=False)
    with cluster.lossy(0.5):
        asked = cluster.join("n0", "n1")
        cluster.run(seconds=9)
    assert asked.result == Joined(1, ())
    assert asked.took > 0.2
    assert cluster.statuses("n1") == {Status.ALIVE}
