"""The daemon of a simulated node: its clock, its way to the node, threads and programs."""

import subprocess
import sys
from time import monotonic

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall, deferLater

from serfd.config import Config, Seconds
from serfd.errors import CommandError, JoinFailed
from serfd.serf.events import MemberEvent, Status
from serfd.sim.cluster import Cluster
from serfd.testing_daemon import VirtualDaemon, VirtualReactor


@pytest.fixture
def cluster() -> Cluster:
    return Cluster(3, 1, config=Config(enable_compression=False), first=1)


@pytest.fixture
def reactor(cluster: Cluster) -> VirtualReactor:
    return VirtualReactor(cluster)


@pytest.fixture
def daemon(cluster: Cluster) -> VirtualDaemon:
    return VirtualDaemon(cluster, cluster.processes["n1"], cluster.config)


def result_of(deferred: "Deferred[object]") -> object:
    results: list[object] = []
    deferred.addBoth(results.append)
    (result,) = results
    return getattr(result, "value", result)


# The clock


def test_calls_come_in_virtual_time_and_in_their_order(cluster, reactor):
    began, calls = reactor.seconds(), []
    reactor.callLater(2, calls.append, "b")
    reactor.callLater(1, calls.append, "a")
    reactor.callLater(2, lambda *, word: calls.append(word), word="c")
    cluster.pass_time(1.5)
    assert calls == ["a"]
    cluster.pass_time(1.5)
    assert calls == ["a", "b", "c"]
    assert reactor.seconds() == began + 3
    assert reactor.getDelayedCalls() == ()


def test_a_call_can_be_cancelled_put_off_and_brought_forward(cluster, reactor):
    calls = []
    cancelled, put_off, brought_forward = (
        reactor.callLater(2, calls.append, name) for name in ("cancelled", "put off", "brought")
    )
    assert len(reactor.getDelayedCalls()) == 3
    cancelled.cancel()
    put_off.delay(2)
    brought_forward.reset(1)
    cluster.pass_time(1)
    assert calls == ["brought"]
    cluster.pass_time(2.5)
    assert calls == ["brought"]
    cluster.pass_time(1)
    assert calls == ["brought", "put off"]


def test_twisteds_own_things_run_on_it(cluster, reactor):
    ticks = []
    loop = LoopingCall(lambda: ticks.append(reactor.seconds()))
    loop.clock = reactor
    loop.start(1, now=False)
    waiting = deferLater(reactor, 3, lambda: "done")
    cluster.pass_time(3.5)
    loop.stop()
    cluster.pass_time(3)
    assert len(ticks) == 3
    assert result_of(waiting) == "done"


def test_what_is_due_while_it_is_held_comes_afterwards_in_order(cluster, reactor):
    calls = []
    reactor.hold()
    for name in "ab":
        reactor.callLater(1, calls.append, name)
    cancelled = reactor.callLater(1, calls.append, "c")
    cluster.pass_time(2)
    cancelled.cancel()
    assert calls == []
    reactor.release()
    assert calls == ["a", "b"]


def test_what_a_call_raises_reaches_who_lets_time_pass(cluster, reactor):
    reactor.callLater(1, int, "x")
    with pytest.raises(ValueError, match="invalid literal"):
        cluster.pass_time(2)


def test_all_else_of_a_reactor_is_refused_with_a_reason(reactor):
    with pytest.raises(AttributeError, match=r"agent\.reactor\.listenTCP .*agent\.in_thread"):
        reactor.listenTCP(80, None)


# The node


def test_it_hears_what_happened_before_and_what_happens_now(cluster, daemon):
    heard = []
    daemon.agent.subscribe(heard.append)
    cluster.update_tags("n2", {"role": "db"})
    cluster.pass_time(1)
    assert [(type(event), event.name) for event in heard] == [(MemberEvent, "member-update")]
    late = VirtualDaemon(cluster, cluster.processes["n3"], cluster.config)
    assert late.agent.members() == cluster.processes["n3"].node.members()


def test_commands_are_the_nodes_own(cluster, daemon):
    told = daemon.agent.user_event("deploy", b"1", coalesce=False)
    tagged = daemon.agent.update_tags({"role": "web"})
    cluster.pass_time(1)
    assert result_of(told) is None
    assert result_of(tagged) is None
    member = cluster.processes["n2"].node.member("n1")
    assert member is not None
    assert member.tags == {"role": "web"}
    heard = [event.name for _, event in cluster.processes["n2"].events]
    assert "deploy" in heard


def test_what_the_node_refuses_fails(cluster, daemon):
    refused = daemon.agent.user_event("deploy", b"x" * 10_000)
    cluster.pass_time(1)
    assert isinstance(result_of(refused), CommandError)


def test_a_query_brings_each_answer_when_it_comes(cluster, daemon):
    answers = []
    cluster.processes["n2"].listeners.append(
        lambda event: cluster.respond("n2", event, b"0.5") if event.name == "load" else None
    )
    done = daemon.agent.query("load", answered=answers.append)
    cluster.pass_time(0.2)
    assert [(each.sender, each.payload) for each in answers if not each.is_ack] == [("n2", b"0.5")]
    assert not done.called
    cluster.pass_time(10)
    assert result_of(done).responses == 1


def test_it_joins_by_the_nodes_names(cluster, daemon):
    cluster.start("n4")
    lonely = VirtualDaemon(cluster, cluster.processes["n4"], cluster.config)
    joined = lonely.agent.join(["n1", "10.0.0.2", "[fd00::3]"])
    unknown = lonely.agent.join(["nobody"])
    cluster.pass_time(1)
    assert result_of(joined) == 3
    assert isinstance(result_of(unknown), JoinFailed)
    assert {member.status for member in daemon.agent.members()} == {Status.ALIVE}


def test_at_its_end_nothing_is_called_any_more_and_what_waits_fails(cluster, daemon):
    calls: list[object] = []
    daemon.agent.subscribe(calls.append)
    daemon.reactor.callLater(1, calls.append, "later")
    waiting = daemon.agent.leave()
    daemon.end()
    cluster.kill("n1")
    cluster.pass_time(10)
    assert calls == []
    assert str(result_of(waiting)) == "the agent is shutting down"
    assert str(result_of(daemon.agent.leave())) == "the agent is shutting down"


# The real world


def test_a_thread_is_this_one(daemon):
    assert result_of(daemon.agent.in_thread(int, "7")) == 7
    assert isinstance(result_of(daemon.agent.in_thread(int, "x")), ValueError)


@pytest.mark.parametrize(
    "wait",
    [
        lambda daemon: daemon.agent.in_thread(subprocess.run, ["sleep", "0.2"], check=True),
        lambda daemon: run(daemon, ["sleep", "0.2"]),
    ],
    ids=["thread", "program"],
)
def test_time_that_a_thread_or_program_takes_blocks_nobody(daemon, wait):
    away = monotonic() - daemon.agent.own_seconds()
    result_of(wait(daemon))
    assert monotonic() - daemon.agent.own_seconds() - away >= 0.2


def run(daemon, argv, *, timeout=60.0, **more):
    return daemon.agent.run(argv, env={}, timeout=Seconds(timeout), output_max=100, **more)


def test_a_program_really_runs_and_virtual_time_stands_still(cluster, daemon):
    began = cluster.now
    program = "import sys; print(sys.stdin.read()[::-1]); sys.exit(3)"
    done = result_of(run(daemon, [sys.executable, "-c", program], stdin=b"abc"))
    assert (done.status, done.stdout, done.stderr, done.timed_out) == (3, b"cba\n", b"", False)
    assert cluster.now == began


def test_a_program_has_until_its_limit_in_real_time(daemon):
    done = result_of(run(daemon, ["sleep", "600"], timeout=0.1))
    assert done.timed_out
    assert done.status < 0
    assert done.seconds < 60
