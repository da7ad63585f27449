"""The standing checks: their bounds as numbers, and that each of them finds what it is for."""

from random import Random

import pytest
from clusters import make

from serfd.config import PROFILES, Config
from serfd.effects import Command
from serfd.gossip import memberlist
from serfd.serf.events import Status, UserEvent
from serfd.sim import checks
from serfd.sim.process import Asked, Happening
from serfd.wire.envelope import Envelope
from serfd.wire.packet import PacketCodec
from serfd.wire.sealing import Keyring
from serfd.wire.swim_messages import Ping, encode

LAN = PROFILES["lan"]


# The bounds


@pytest.mark.parametrize(
    ("profile", "members", "score", "seconds"),
    [
        # turns · interval · (score + 1) + 6 · multiplier · max(1, log10 members) · interval + 2
        ("lan", 4, 0, 13 * 1 + 24 + 2),
        ("lan", 4, 2, 13 * 3 + 24 + 2),
        ("lan", 100, 0, 205 + 48 + 2),
        ("local", 10, 0, 25 + 18 + 2),
        ("wan", 10, 0, 25 * 5 + 36 * 5 + 2),
    ],
)
def test_the_detection_bound(profile: str, members: int, score: int, seconds: float) -> None:
    bound = checks.detection_bound(PROFILES[profile], members, score=score)
    assert bound == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("members", "seconds"),
    [
        # probe turns + the suspicion's minimum + gossip rounds + slack
        (4, 13 + 4 + (2 * 3 + 4) * 0.2 + 2),
        (10, 25 + 1 + 4 + (2 * 4 + 4) * 0.2 + 2),
        (100, 26 + 8 + (2 * 7 + 4) * 0.2 + 2),
    ],
)
def test_the_usual_detection_bound_does_not_grow_with_the_cluster(
    members: int, seconds: float
) -> None:
    assert checks.usual_detection_bound(LAN, members) == pytest.approx(seconds, abs=1.01)


@pytest.mark.parametrize(("members", "seconds"), [(1, 30), (32, 30), (33, 60), (64, 60), (65, 90)])
def test_large_clusters_exchange_state_less_often(members: int, seconds: float) -> None:
    assert checks.push_pull_interval(LAN, members) == seconds


def test_convergence_takes_longer_than_its_parts() -> None:
    config = Config()
    bound = checks.convergence_bound(config, 10, score=0)
    assert bound > checks.detection_bound(LAN, 10, score=0) + 3 * config.reconnect_interval
    assert bound < 900


# What they find


def test_accuracy_finds_a_suspicion_where_nothing_was_wrong() -> None:
    fine = Happening(1.0, "n1", "member-join", "n2")
    assert checks.accuracy([fine]) is None
    found = checks.accuracy([fine, Happening(2.0, "n1", "suspects", "n2")])
    assert found == "at 2.000 s n1 suspects n2, though nothing was wrong"
    assert checks.accuracy([Happening(2.0, "n1", "member-failed", "n2")]) is not None


def test_completeness_finds_who_still_believes_in_the_dead() -> None:
    cluster = make(3, 1)
    cluster.kill("n1")
    found = checks.completeness(cluster.running, cluster.gone())
    assert found is not None
    assert "for n0 it is still alive" in found
    cluster.run_until(lambda: cluster.statuses("n1") == {Status.FAILED}, cluster.detection_bound)
    assert checks.completeness(cluster.running, cluster.gone()) is None


def test_convergence_finds_tags_that_are_not_known_yet() -> None:
    cluster = make(3, 1)
    assert cluster.disagreement is None
    cluster.update_tags("n1", {"role": "db"})
    assert cluster.disagreement == "for n0, n1 has the tags {}, but they are {'role': 'db'}"


def test_convergence_finds_who_was_not_told_of_somebody() -> None:
    cluster = make(3, 1)
    cluster.start("n9")
    cluster.join("n9", "n1")
    cluster.run(seconds=0.0016)  # n1 has answered, and tells the others next
    assert cluster.disagreement is not None
    assert "does not know" in cluster.disagreement


def test_convergence_finds_an_old_address() -> None:
    cluster = make(3, 1)
    cluster.restart("n1", new_address=True)
    cluster.run(seconds=0.1)
    assert cluster.disagreement is not None
    assert "n1 is at" in cluster.disagreement


def test_convergence_finds_who_is_taken_for_gone_and_who_for_alive() -> None:
    cluster = make(4, 1)
    with cluster.partition({"n1"}):
        cluster.run_until(
            lambda: cluster.statuses("n1", seen_by="others") == {Status.FAILED}, limit=60
        )
        assert cluster.disagreement is not None
        assert "n1 is failed, but it is alive" in cluster.disagreement
    cluster.run(seconds=70)
    cluster.kill("n2")
    assert cluster.disagreement == "for n0, n2 is alive, but it is gone"


def test_convergence_finds_that_two_disagree_on_how_somebody_went() -> None:
    cluster = make(4, 1)
    cluster.kill("n2")
    cluster.run_until(lambda: cluster.statuses("n2") == {Status.FAILED}, limit=60)
    with cluster.partition({"n0"}):
        cluster.force_leave("n1", "n2")
        cluster.run(seconds=1)
    assert cluster.disagreement == "n2 is left for n1, but failed for n0"


def test_those_that_cannot_know_of_each_other_need_not() -> None:
    cluster = make(4, 1, joined=False)
    cluster.join("n1", "n0")
    cluster.join("n3", "n2")
    cluster.run(seconds=1)
    assert cluster.disagreement is None
    cluster.join("n3", "n0")
    cluster.run(seconds=0.002)
    assert cluster.disagreement is not None


def test_who_tries_to_join_has_not_agreed_yet() -> None:
    cluster = make(2, 1)
    with cluster.partition({"n1"}):
        cluster.restart("n1")
        cluster.run(seconds=5)
    assert cluster.disagreement == "n1 has not joined yet"
    cluster.run(seconds=60)
    assert cluster.disagreement is None


def test_rest_finds_news_and_suspicions_that_are_left() -> None:
    cluster = make(3, 1)
    cluster.run(seconds=5)
    at_rest = cluster.unrest
    assert at_rest is None
    cluster.update_tags("n1", {"role": "db"})
    assert cluster.unrest == "n1 has 1 messages left in its gossip_queue"
    cluster.run(seconds=5)
    cluster.kill("n1")
    cluster.run_until(lambda: cluster.happened("suspects"), limit=20)
    assert cluster.unrest is not None
    assert "still suspects n1" in cluster.unrest


def test_bounds_finds_a_table_past_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = make(3, 1)
    process = cluster.processes["n1"]
    assert checks.bounds(process) is None
    monkeypatch.setattr(memberlist, "RELAYS_MAX", -1)
    assert checks.bounds(process) == "n1 holds 0 relayed pings, at most -1 are allowed"


def test_packet_secrecy_finds_a_name_in_whatever_is_not_sealed() -> None:
    names = ["member-1", "n2"]
    ping = encode(Ping(1, "member-1", b"\x0a\0\0\1", 7946, "n2"))
    sealed = PacketCodec(Envelope(keyring=Keyring([bytes(16)]), compress=False))
    packed = PacketCodec(Envelope())
    rng = Random(1)

    def seal(codec: PacketCodec, message: bytes) -> bytes:
        return codec.seal([message], crc=False, nonce=lambda: rng.randbytes(12))

    assert checks.packet_secrecy(seal(sealed, ping), names) is None
    assert checks.packet_secrecy(ping, names) is not None
    assert checks.packet_secrecy(seal(packed, encode(Ping(1, "member-1" * 30))), names) is not None
    assert checks.packet_secrecy(b"\xff member-1", names) is not None


def test_sealed_bytes_that_look_like_an_empty_message_are_no_leak() -> None:
    assert checks.packet_secrecy(b"\x01\x80" + bytes(40), ["member-1"]) is None


def test_stream_secrecy_wants_sealed_streams() -> None:
    assert checks.stream_secrecy(b"\x0a\0\0\0\x05 1234", ["member-1"]) is None
    assert checks.stream_secrecy(b"\x0a\0\0\0\x05 member-1", ["member-1"]) is not None
    assert checks.stream_secrecy(b"\x09\x80", []) is not None


def test_conservation_finds_a_command_that_is_never_finished() -> None:
    cluster = make(2, 1)
    process = cluster.processes["n1"]
    command: Command[None] = Command("test")
    asked = Asked(process, command, 10.0)
    assert checks.conservation([asked], 20.0, 10.0) is None
    found = checks.conservation([asked], 20.1, 10.0)
    assert found is not None
    assert "test" in found
    cluster.kill("n1")
    assert checks.conservation([asked], 100.0, 10.0) is None


def test_a_user_event_delivered_twice_is_found() -> None:
    cluster = make(2, 1)
    process = cluster.processes["n1"]
    event = UserEvent(3, "deploy", b"", coalesce=False)
    process.events.append((5.0, event))
    assert checks.once(process) is None
    process.events.append((6.0, event))
    assert checks.once(process) is not None
