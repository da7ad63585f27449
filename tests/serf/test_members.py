"""Alive, leaving, left, failed: the table of serf.md 6.1 as rows."""

import pytest

from serfd.gossip.member_table import Peer, State
from serfd.serf.events import MemberEventKind, Status
from serfd.serf.members import INTENTS_MAX, IntentDecision, Members

VSN = bytes((1, 5, 2, 2, 5, 5))
JOIN, LEAVE, FAILED = MemberEventKind.JOIN, MemberEventKind.LEAVE, MemberEventKind.FAILED


def peer(name: str = "n") -> Peer:
    return Peer(name, b"\x7f\0\0\1", 7946, b"\xff\x80", VSN)


def holding(status: Status, ltime: int = 5) -> Members:
    members = Members("me")
    members.joined(peer("me"))
    members.joined(peer())
    members.join_intent("n", ltime - 1, 0.0)
    if status in (Status.LEAVING, Status.LEFT):
        members.leave_intent("n", ltime, 0.0, own_leave=False)
    else:
        members.join_intent("n", ltime, 0.0)
    if status in (Status.LEFT, Status.FAILED):
        members.gone(peer(), 10.0)
    assert status_of(members) is status
    return members


def status_of(members: Members, name: str = "n") -> Status:
    record = members.get(name)
    assert record is not None
    assert (name in members.failed) == (record.status is Status.FAILED)
    assert (name in members.left) == (record.status is Status.LEFT)
    return record.status


@pytest.mark.parametrize(
    ("held", "ltime", "becomes", "decision"),
    [
        (Status.ALIVE, 5, Status.ALIVE, IntentDecision(spread=False)),
        (Status.ALIVE, 6, Status.LEAVING, IntentDecision(spread=True)),
        (Status.LEAVING, 6, Status.LEAVING, IntentDecision(spread=True)),
        (Status.LEFT, 6, Status.LEFT, IntentDecision(spread=True)),
        (Status.FAILED, 5, Status.FAILED, IntentDecision(spread=False)),
        (Status.FAILED, 6, Status.LEFT, IntentDecision(spread=True, event=LEAVE)),
    ],
)
def test_leave_intent(held: Status, ltime: int, becomes: Status, decision: IntentDecision) -> None:
    members = holding(held)
    assert members.leave_intent("n", ltime, 20.0, own_leave=False) == decision
    assert status_of(members) is becomes


@pytest.mark.parametrize(
    ("held", "ltime", "becomes", "spread"),
    [
        (Status.ALIVE, 5, Status.ALIVE, False),
        (Status.ALIVE, 6, Status.ALIVE, True),
        (Status.LEAVING, 5, Status.LEAVING, False),
        (Status.LEAVING, 6, Status.ALIVE, True),
        (Status.LEFT, 6, Status.LEFT, True),
        (Status.FAILED, 6, Status.FAILED, True),
    ],
)
def test_join_intent(held: Status, ltime: int, becomes: Status, *, spread: bool) -> None:
    members = holding(held)
    assert members.join_intent("n", ltime, 20.0).spread is spread
    assert status_of(members) is becomes


@pytest.mark.parametrize(
    ("held", "becomes", "event"),
    [
        (Status.ALIVE, Status.FAILED, FAILED),  # it never said that it would
        (Status.LEAVING, Status.LEFT, LEAVE),
        (Status.LEFT, Status.LEFT, None),
        (Status.FAILED, Status.FAILED, None),
    ],
)
def test_gossip_loses_a_member(
    held: Status, becomes: Status, event: MemberEventKind | None
) -> None:
    members = holding(held)
    change = members.gone(peer(), 20.0)
    assert (change[1] if change else None) is event
    assert status_of(members) is becomes


@pytest.mark.parametrize("held", [Status.ALIVE, Status.LEAVING])
def test_who_says_farewell_to_gossip_has_left(held: Status) -> None:
    members = holding(held)
    leaver = peer()
    leaver.state = State.LEFT
    change = members.gone(leaver, 20.0)
    assert change is not None
    assert change[1] is LEAVE
    assert status_of(members) is Status.LEFT


@pytest.mark.parametrize("held", [Status.ALIVE, Status.LEAVING, Status.LEFT, Status.FAILED])
def test_gossip_finds_a_known_member_alive(held: Status) -> None:
    members = holding(held)
    record = members.joined(peer())
    assert (record.status, record.left_at, record.status_ltime) == (Status.ALIVE, 0.0, 5)
    assert status_of(members) is Status.ALIVE


def test_gossip_losing_an_unknown_member_is_nothing() -> None:
    assert Members("me").gone(peer(), 1.0) is None


@pytest.mark.parametrize(
    ("intents", "status", "ltime"),
    [
        ([("leave", 7)], Status.LEAVING, 7),
        ([("join", 7)], Status.ALIVE, 7),
        ([("leave", 7), ("join", 7)], Status.LEAVING, 7),  # only a later one replaces
        ([("leave", 7), ("join", 8)], Status.ALIVE, 8),
        ([("join", 8), ("leave", 7)], Status.ALIVE, 8),
    ],
)
def test_an_intent_that_comes_before_its_member_is_kept_for_it(
    intents: list[tuple[str, int]], status: Status, ltime: int
) -> None:
    members = Members("me")
    for kind, at in intents:
        if kind == "leave":
            members.leave_intent("n", at, 0.0, own_leave=False)
        else:
            members.join_intent("n", at, 0.0)
    record = members.joined(peer())
    assert (record.status, record.status_ltime) == (status, ltime)


def test_intents_about_strangers_are_limited_and_forgotten_in_time() -> None:
    members = Members("me")
    spread = sum(members.join_intent(f"n{i}", 1, 0.0).spread for i in range(INTENTS_MAX + 5))
    assert spread == INTENTS_MAX
    members.reap(300.0, failed_after=1.0, left_after=1.0)
    assert not members.join_intent("n0", 1, 300.0).spread
    members.reap(300.1, failed_after=1.0, left_after=1.0)
    assert members.join_intent("n0", 1, 300.1).spread


def test_a_leave_intent_about_a_living_node_is_refuted_by_it() -> None:
    members = Members("me")
    members.joined(peer("me"))
    decision = members.leave_intent("me", 3, 0.0, own_leave=False)
    assert decision == IntentDecision(spread=False, refute=True)
    assert status_of(members, "me") is Status.ALIVE
    assert members.leave_intent("me", 3, 0.0, own_leave=True).spread
    assert status_of(members, "me") is Status.LEAVING


@pytest.mark.parametrize(
    ("held", "now", "erased"),
    [(Status.FAILED, 110.0, False), (Status.FAILED, 110.1, True), (Status.LEFT, 210.0, False),
     (Status.LEFT, 210.1, True), (Status.ALIVE, 1e9, False)],
)  # fmt: skip
def test_who_is_gone_for_long_is_erased(held: Status, now: float, *, erased: bool) -> None:
    members = holding(held)
    gone = members.reap(now, failed_after=100.0, left_after=200.0)
    assert [record.peer.name for record in gone] == (["n"] if erased else [])
    assert (members.get("n") is None) is erased


def test_the_version_grows_with_every_change_that_is_seen_and_with_no_other() -> None:
    members = Members("me")
    members.joined(peer("me"))
    members.joined(peer())
    seen = [members.version]

    def changed() -> bool:
        seen.append(members.version)
        return seen[-1] > seen[-2]

    members.join_intent("n", 5, 0.0)
    members.leave_intent("n", 5, 0.0, own_leave=False)
    members.leave_intent("stranger", 5, 0.0, own_leave=False)
    members.gone(peer("stranger"), 0.0)
    members.reap(0.0, failed_after=1.0, left_after=1.0)
    assert not changed()
    members.leave_intent("n", 6, 0.0, own_leave=False)
    assert changed()
    members.join_intent("n", 7, 0.0)
    assert changed()
    members.gone(peer(), 0.0)
    assert changed()
    members.joined(peer())
    assert changed()
    members.updated()
    assert changed()
    members.gone(peer(), 0.0)
    members.leave_intent("n", 8, 0.0, own_leave=False)
    assert changed()
    members.reap(2.0, failed_after=1.0, left_after=1.0)
    assert changed()


def test_a_snapshot_is_a_copy_of_the_moment() -> None:
    members = holding(Status.ALIVE)
    record = members.get("n")
    assert record is not None
    before = record.snapshot()
    members.gone(peer(), 10.0)
    assert (before.status, record.snapshot().status) == (Status.ALIVE, Status.FAILED)
    assert before.address == "127.0.0.1:7946"
