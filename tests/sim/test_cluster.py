"""The cluster itself: same seed, same run; pauses, secrecy, and what it notes."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from clusters import agreed, make, plain

from serfd.serf.events import Event, MemberEvent, Query, Status
from serfd.serf.queries import QueryAnswer
from serfd.sim.cluster import CheckFailed, Cluster
from serfd.sim.process import EVENTS_MAX, Happening

KEY = bytes(range(32))

ONE_RUN = """
import logging
from serfd.sim.scenario import play
logging.disable()
print(play(16, nodes=8, seconds=30.0).cluster.trace)
"""


def busy_run(seed: int) -> Cluster:
    cluster = make(8, seed, loss=0.05)
    with cluster.partition({"n1", "n2"}):
        cluster.run(seconds=15)
    cluster.restart("n3")
    cluster.run(seconds=15)
    return cluster


def test_the_same_seed_gives_the_same_trace_and_another_seed_another() -> None:
    first, second, other = busy_run(7), busy_run(7), busy_run(8)
    assert (first.trace, first.packets) == (second.trace, second.packets)
    assert list(first.history) == list(second.history)
    assert first.trace != other.trace


def test_processes_with_different_string_hashes_agree_on_the_trace() -> None:
    traces = {
        subprocess.run(
            [sys.executable, "-c", ONE_RUN],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(traces) == 1
    assert len(traces.pop().strip()) == 16


def test_a_sealed_cluster_works_and_tells_no_name() -> None:
    cluster = Cluster(6, 3, keys=[KEY], names="member-{}")
    cluster.update_tags("member-2", {"role": "database"})
    cluster.kill("member-4")
    cluster.run_until(
        lambda: cluster.statuses("member-4") == {Status.FAILED}, cluster.detection_bound
    )
    assert agreed(cluster, limit=5.0) == 0.0


def test_a_packet_that_tells_a_name_ends_a_sealed_run() -> None:
    cluster = Cluster(2, 3, keys=[KEY], names="member-{}")
    process = cluster.processes["member-0"]
    process.machine._envelope.keyring._ciphers.clear()
    with pytest.raises(CheckFailed, match="'member-0' to who has no key") as failed:
        cluster.run(seconds=5)
    assert "Cluster(size=2, seed=3)" in str(failed.value)


def test_a_paused_process_reads_what_came_before_it_looks_at_its_timers() -> None:
    cluster = make(3, 1)
    process = cluster.processes["n1"]
    seen: list[str] = []

    def noting(what: str, step: Callable[..., None]) -> Callable[..., None]:
        def noted(*arguments: object) -> None:
            seen.append(what)
            step(*arguments)

        return noted

    cluster.pause("n1", 5.0)
    process.node.packet_received = noting("packet", process.node.packet_received)  # type: ignore[method-assign]
    process.node.wake = noting("wake", process.node.wake)  # type: ignore[method-assign]
    cluster.run(seconds=4.9)
    assert seen == []
    cluster.run(seconds=0.1)
    assert seen.index("wake") == seen.count("packet") > 5


def test_a_crashed_process_is_never_heard_of_again() -> None:
    cluster = make(3, 1)
    process = cluster.processes["n1"]
    cluster.join("n1", "n2")
    cluster.kill("n1")
    events = len(process.events)
    cluster.run(seconds=60)
    assert len(process.events) == events
    assert process.sockets == {}
    assert cluster.asked == []
    assert {one.who for one in cluster.history if one.time > process.ended_at} == {"n0", "n2"}


def test_a_paused_process_may_crash_and_its_place_be_taken_before_the_pause_is_over() -> None:
    cluster = make(3, 1)
    cluster.pause("n1", 10.0)
    cluster.run(seconds=1)
    cluster.restart("n1")
    cluster.run(seconds=30)
    assert cluster.disagreement is None
    assert cluster.happened("goes on") == []


def test_commands_of_a_paused_process_are_a_mistake_of_the_test() -> None:
    cluster = make(2, 1)
    cluster.pause("n1", 1.0)
    with pytest.raises(AssertionError, match="n1 is paused"):
        cluster.leave("n1")


def test_each_process_keeps_its_events_up_to_a_limit() -> None:
    cluster = make(3, 1)
    process = cluster.processes["n0"]
    assert process.events.maxlen == EVENTS_MAX
    joined = [
        member.name
        for _, event in process.events
        if isinstance(event, MemberEvent)
        for member in event.members
    ]
    assert sorted(joined) == ["n0", "n1", "n2"]


def test_an_idle_cluster_suspects_nobody_and_comes_to_rest() -> None:
    cluster = make(10, 4)
    cluster.run(seconds=cluster.convergence_bound + 10)
    assert cluster.quiet_for > cluster.convergence_bound
    assert cluster.disagreement is None
    assert cluster.unrest is None
    assert cluster.happened("suspects") == []


def test_what_does_not_come_in_time_ends_the_run_with_the_reason() -> None:
    cluster = make(3, 1)
    cluster.update_tags("n1", {"a": "b"})
    with pytest.raises(CheckFailed, match="did not come in 0 s: for n"):
        cluster.run_until(lambda: False, limit=0.0, every=0.0001)


def test_an_exception_in_a_node_says_when_and_in_which_run() -> None:
    cluster = make(2, 1)
    cluster.after(1.0, {}.__getitem__, "missing")
    with pytest.raises(KeyError) as raised:
        cluster.run(seconds=2)
    assert "s of Cluster(size=2, seed=1)" in raised.value.__notes__[0]


def test_addresses_have_every_form_there_is() -> None:
    cluster = Cluster(3, 1, config=plain())
    forms = [(len(p.addr), p.address.host) for p in cluster.processes.values()]
    assert forms == [(4, "10.0.0.1"), (16, "10.0.0.2"), (16, "fd00::3")]


def test_who_listens_is_told_of_events_when_they_happen_and_may_act_on_them() -> None:
    cluster = make(3, 1)
    heard: list[tuple[str, float]] = []

    def listener(event: Event) -> None:
        heard.append((event.name, cluster.now))
        if isinstance(event, Query):
            cluster.respond("n1", event, b"0.5")

    cluster.processes["n1"].listeners.append(listener)
    answers: list[tuple[QueryAnswer, float]] = []
    asked = cluster.query("n0", "load")
    asked.heard.append(lambda answer: answers.append((answer, cluster.now)))
    cluster.run(seconds=1)
    assert [name for name, _ in heard] == ["load"]
    assert [answer for answer, _ in answers] == asked.answers
    (at,) = (at for answer, at in answers if not answer.is_ack)
    assert heard[0][1] < at < cluster.now


def test_who_only_listens_changes_nothing_of_the_run() -> None:
    traces = set()
    for listeners in ([], [repr]):
        cluster = make(4, 5, joined=False)
        for process in cluster.running:
            process.listeners += listeners
        cluster.join_all()
        cluster.user_event("n1", "deploy")
        cluster.run(seconds=5)
        traces.add(cluster.trace)
    assert len(traces) == 1


def test_time_can_pass_without_the_checks() -> None:
    cluster = make(2, 1)
    cluster.processes["n1"].suspects = ("n0",)
    cluster.history.append(Happening(cluster.now, "n1", "suspects", "n0"))
    cluster.pass_time(1)
    with pytest.raises(CheckFailed, match="n1 suspects n0, though nothing was wrong"):
        cluster.run(seconds=1)


def test_events_that_wait_to_be_handed_on_together_are_unrest() -> None:
    cluster = make(3, 1)
    cluster.user_event("n1", "deploy", coalesce=True)
    cluster.run(seconds=0.5)
    assert cluster.unrest == "n0 holds events back, to hand them on together"
    cluster.run(seconds=3)
    assert cluster.unrest is None


def test_places_are_numbered_from_where_one_likes() -> None:
    assert list(make(3, 1, first=1).processes) == ["n1", "n2", "n3"]
