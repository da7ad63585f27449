"""User events, queries and keys among simulated nodes."""

import base64

import pytest
from clusters import make

from serfd.effects import Address
from serfd.errors import CommandError
from serfd.serf.events import Query, UserEvent
from serfd.serf.keys import INSTALL, LIST, REMOVE, USE
from serfd.serf.queries import EVERYBODY, QueryDone, QueryParams
from serfd.sim.cluster import Cluster

SEEDS = (1, 2, 3)


def heard(cluster: Cluster, key: str) -> list[UserEvent]:
    return [e for _, e in cluster.processes[key].events if isinstance(e, UserEvent)]


@pytest.mark.parametrize("loss", [0.0, 0.02])
def test_a_burst_of_a_thousand_events_reaches_everybody_once_and_in_order(loss: float) -> None:
    cluster = make(10, 1)
    asked = [cluster.user_event("n0", f"e{i}", b"x" * 100) for i in range(1000)]
    with cluster.lossy(loss):
        cluster.run_until(
            lambda: all(len(heard(cluster, k)) >= 1000 for k in cluster.processes), 20
        )
    assert all(a.result is None for a in asked)
    for key in cluster.processes:
        events = heard(cluster, key)
        assert len(events) == len({e.name for e in events}) == 1000
        assert [e.ltime for e in events] == sorted(e.ltime for e in events)


def test_one_event_reaches_everybody_within_milliseconds() -> None:
    cluster = make(10, 1)
    start = cluster.now
    cluster.user_event("n3", "deploy")
    cluster.run_until(lambda: all(heard(cluster, k) for k in cluster.processes), 1.0, every=0.001)
    assert cluster.now - start < 0.03


def answering(cluster: Cluster, name: str) -> None:
    """Let everybody answer this query as soon as it is heard."""
    for key, process in cluster.processes.items():
        for _, event in list(process.events):
            if isinstance(event, Query) and event.name == name:
                cluster.respond(key, event, key.encode())


@pytest.mark.parametrize("seed", SEEDS)
def test_a_query_ends_when_everybody_has_answered(seed: int) -> None:
    cluster = make(10, seed)
    start = cluster.now
    asked = cluster.query("n4", "load", params=QueryParams(want_ack=True, relay_factor=2))
    cluster.run(seconds=0.1)
    answering(cluster, "load")
    cluster.run(seconds=0.1)
    assert asked.result == QueryDone(acks=10, responses=10, audience=10)
    assert asked.finished_at is not None
    assert asked.finished_at - start < 0.2
    answers = {a.sender: a.payload for a in asked.answers if not a.is_ack}
    assert answers == {key: key.encode() for key in cluster.processes}


def test_a_query_that_somebody_does_not_answer_waits_for_its_time() -> None:
    cluster = make(5, 1)
    asked = cluster.query("n0", "load", params=QueryParams(timeout=2.0, want_ack=True))
    cluster.run(seconds=1.9)
    assert asked.finished_at is None
    cluster.run(seconds=0.2)
    assert asked.result == QueryDone(acks=5, responses=0, audience=5)


def test_who_crashes_meanwhile_is_not_waited_for() -> None:
    cluster = make(5, 1)
    cluster.kill("n4")
    asked = cluster.query("n0", "load", params=QueryParams(timeout=120.0))
    cluster.run(seconds=0.1)
    answering(cluster, "load")
    cluster.run(seconds=40)
    assert asked.result == QueryDone(acks=0, responses=4, audience=4)


def keys(cluster: Cluster, query: str, key: bytes = b"") -> object:
    asked = cluster.change_keys("n0", query, base64.b64encode(key).decode())
    cluster.run(seconds=1.0)
    assert asked.finished_at is not None
    return asked.result


def test_a_cluster_changes_its_keys_while_it_runs() -> None:
    old, new = bytes(range(16)), bytes(range(32))
    cluster = make(4, 1, keys=[old])
    assert keys(cluster, LIST).keys == {base64.b64encode(old).decode(): 4}
    for query in (INSTALL, USE):
        assert keys(cluster, query, new).error == ""
    assert keys(cluster, REMOVE, old).error == ""
    assert keys(cluster, LIST).keys == {base64.b64encode(new).decode(): 4}
    cluster.run(seconds=30)
    assert cluster.all_list_all()


def test_a_wrong_key_change_is_reported_by_every_node() -> None:
    key = bytes(range(16))
    cluster = make(3, 1, keys=[key])
    result = keys(cluster, REMOVE, key)
    assert result.error == "3/3 nodes reported failure"
    assert set(result.messages.values()) == {"Removing the primary key is not allowed"}
    assert "16, 24 or 32" in next(iter(keys(cluster, INSTALL, b"short").messages.values()))
    error = cluster.change_keys("n0", INSTALL, "!")
    cluster.run(seconds=0.1)
    assert isinstance(error.result, CommandError)
    assert str(error.result) == "illegal base64 data at input byte 0"


def test_key_changes_are_made_one_after_the_other() -> None:
    cluster = make(3, 1, keys=[bytes(16)])
    new = base64.b64encode(bytes(range(32))).decode()
    asked = [cluster.change_keys("n0", query, new) for query in (INSTALL, USE, LIST)]
    cluster.run(seconds=2)
    assert [a.result.error for a in asked] == ["", "", ""]
    assert len(asked[-1].result.keys) == 2


def test_nodes_learn_how_far_they_are_from_each_other() -> None:
    cluster = make(4, 1)
    cluster.run(seconds=120)
    n0 = cluster.processes["n0"].node
    from serfd.serf.coordinates import distance

    own, other = n0.coordinate("n0"), n0.coordinate("n2")
    assert own is not None
    assert other is not None
    assert (
        0.0002 < distance(own, other) < 0.01
    )  # the network takes about a millisecond there and back
    assert n0.coordinate("nobody") is None


def test_of_two_nodes_of_one_name_the_one_that_most_know_stays() -> None:
    cluster = make(5, 1)
    intruder = cluster.start("impostor", name="n1")
    cluster.join("impostor", "n3")
    cluster.run(seconds=60)
    assert not intruder.is_running
    assert cluster.processes["n1"].is_running


def test_a_forged_claim_to_a_lone_nodes_name_does_not_end_it() -> None:
    from serfd.wire.envelope import Envelope
    from serfd.wire.packet import PacketCodec
    from serfd.wire.swim_messages import Alive, encode

    cluster = make(1, 1)
    process = cluster.processes["n0"]
    local = process.node.memberlist.local
    claim = Alive(99, "n0", bytes((10, 9, 9, 9)), 7946, b"", local.versions)
    data = PacketCodec(Envelope()).seal([encode(claim)], crc=False, nonce=bytes)
    process.node.packet_received(cluster.now, data, Address("10.9.9.9", 7946))
    cluster.run(seconds=30)
    assert process.is_running


def test_events_are_ordered_and_queries_open_to_everybody_by_default() -> None:
    assert QueryParams() == EVERYBODY
