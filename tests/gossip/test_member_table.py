"""Which rumour wins: every rule as a row (gossip.md 5.3 to 5.6, 5.9, 6.1)."""

from itertools import permutations
from random import Random
from typing import Any

import pytest

from serfd.gossip.member_table import (
    META_SIZE_MAX,
    Accused,
    Conflict,
    Gone,
    Ignored,
    MemberTable,
    Peer,
    Refused,
    Refute,
    Revived,
    State,
    Suspected,
    versions_misfit,
)
from serfd.wire.swim_messages import Alive, Dead, Suspect

VSN = bytes((1, 5, 2, 2, 5, 5))
HERE, THERE = b"\x0a\0\0\1", b"\x0a\0\0\2"


def table(*, reclaim_time: float = 0.0) -> MemberTable:
    made = MemberTable(Peer("me", HERE, 7946, b"\xff\x80", VSN), reclaim_time=reclaim_time)
    made.start(0.0)
    return made


def alive(incarnation: int = 1, node: str = "n", addr: bytes = HERE, meta: bytes = b"m",
          vsn: bytes = VSN, port: int = 1) -> Alive:  # fmt: skip
    return Alive(incarnation, node, addr, port, meta, vsn)


def holding(state: State | None, incarnation: int = 5, *, reclaim_time: float = 0.0) -> MemberTable:
    """A table that holds `n` in that state; None: it does not know it."""
    made = table(reclaim_time=reclaim_time)
    if state is not None:
        made.alive(alive(incarnation), 1.0, Random(1))
        if state is State.SUSPECT:
            made.suspect(Suspect(incarnation, "n", "x"), 2.0)
        elif state is State.DEAD:
            made.dead(Dead(incarnation, "n", "x"), 2.0)
        elif state is State.LEFT:
            made.dead(Dead(incarnation, "n", "n"), 2.0)
    return made


def state_of(made: MemberTable) -> State | None:
    peer = made.get("n")
    return peer.state if peer else None


@pytest.mark.parametrize(
    ("held", "incarnation", "becomes", "decision"),
    [
        (None, 1, State.ALIVE, Revived),
        (None, 0, None, Refused),  # incarnation 0 never takes effect
        (State.ALIVE, 4, State.ALIVE, Ignored),
        (State.ALIVE, 5, State.ALIVE, Ignored),
        (State.ALIVE, 6, State.ALIVE, Revived),
        (State.SUSPECT, 5, State.SUSPECT, Ignored),  # only a newer one clears a suspicion
        (State.SUSPECT, 6, State.ALIVE, Revived),
        (State.DEAD, 5, State.DEAD, Ignored),
        (State.DEAD, 6, State.ALIVE, Revived),
        (State.LEFT, 5, State.LEFT, Ignored),
        (State.LEFT, 6, State.ALIVE, Revived),
    ],
)
def test_alive(held: State | None, incarnation: int, becomes: State | None, decision: type) -> None:
    made = holding(held)
    assert isinstance(made.alive(alive(incarnation), 9.0, Random(1)), decision)
    assert state_of(made) is becomes


@pytest.mark.parametrize(
    ("held", "incarnation", "becomes", "decision"),
    [
        (None, 9, None, Ignored),
        (State.ALIVE, 4, State.ALIVE, Ignored),
        (State.ALIVE, 5, State.SUSPECT, Suspected),
        (State.ALIVE, 6, State.SUSPECT, Suspected),
        (State.SUSPECT, 4, State.SUSPECT, Ignored),
        (State.SUSPECT, 5, State.SUSPECT, Accused),
        (State.SUSPECT, 6, State.SUSPECT, Accused),
        (State.DEAD, 6, State.DEAD, Ignored),  # the dead are not suspected
        (State.LEFT, 6, State.LEFT, Ignored),
    ],
)
def test_suspect(
    held: State | None, incarnation: int, becomes: State | None, decision: type
) -> None:
    made = holding(held)
    assert isinstance(made.suspect(Suspect(incarnation, "n", "y"), 9.0), decision)
    assert state_of(made) is becomes


@pytest.mark.parametrize(
    ("held", "incarnation", "accuser", "becomes", "decision"),
    [
        (None, 9, "y", None, Ignored),
        (State.ALIVE, 4, "y", State.ALIVE, Ignored),
        (State.ALIVE, 5, "y", State.DEAD, Gone),
        (State.ALIVE, 5, "n", State.LEFT, Gone),  # it says so itself
        (State.SUSPECT, 5, "y", State.DEAD, Gone),
        (State.SUSPECT, 4, "y", State.SUSPECT, Ignored),
        (State.DEAD, 6, "n", State.DEAD, Ignored),  # dead never becomes left
        (State.LEFT, 6, "y", State.LEFT, Ignored),  # nor the reverse
    ],
)
def test_dead(
    held: State | None, incarnation: int, accuser: str, becomes: State | None, decision: type
) -> None:
    made = holding(held)
    assert isinstance(made.dead(Dead(incarnation, "n", accuser), 9.0), decision)
    assert state_of(made) is becomes


@pytest.mark.parametrize(
    ("held", "reclaim_time", "now", "decision"),
    [
        (State.ALIVE, 0.0, 9.0, Conflict),
        (State.SUSPECT, 0.0, 9.0, Conflict),
        (State.LEFT, 1e9, 9.0, Revived),  # who left has given the name back
        (State.DEAD, 0.0, 2.0, Revived),
        (State.DEAD, 30.0, 31.9, Conflict),
        (State.DEAD, 30.0, 32.0, Revived),
    ],
)
def test_another_address_for_a_known_name(
    held: State, reclaim_time: float, now: float, decision: type
) -> None:
    made = holding(held, reclaim_time=reclaim_time)
    # A lower incarnation: the new owner counts from one.
    found = made.alive(alive(1, addr=THERE), now, Random(1))
    assert isinstance(found, decision)
    peer = made.get("n")
    assert peer is not None
    assert (peer.addr == THERE) == (decision is Revived)


def test_the_same_address_in_other_bytes_is_another_address() -> None:
    made = holding(State.ALIVE)
    mapped = b"\0" * 10 + b"\xff\xff" + HERE
    assert isinstance(made.alive(alive(9, addr=mapped), 9.0, Random(1)), Conflict)


@pytest.mark.parametrize(
    ("rumour", "decision"),
    [
        (Alive(1, "me", HERE, 7946, b"\xff\x80", VSN), Ignored),  # its own words
        (Alive(0, "me", HERE, 7946, b"old", VSN), Ignored),
        (Alive(1, "me", HERE, 7946, b"other", VSN), Refute),
        (Alive(2, "me", HERE, 7946, b"\xff\x80", VSN), Refute),
        (Alive(9, "me", THERE, 7946, b"\xff\x80", VSN), Conflict),
    ],
)
def test_alive_about_this_node_itself(rumour: Alive, decision: type) -> None:
    assert isinstance(table().alive(rumour, 9.0, Random(1)), decision)


def test_every_accusation_of_this_node_is_refuted_past_both_incarnations() -> None:
    made = table()
    assert made.suspect(Suspect(1, "me", "x"), 9.0) == Refute(1)
    assert made.refute(1).incarnation == 2
    assert made.dead(Dead(7, "me", "me"), 9.0) == Refute(7)  # whoever says so
    assert made.refute(7).incarnation == 8
    assert isinstance(made.suspect(Suspect(3, "me", "x"), 9.0), Ignored)


def test_a_node_that_leaves_does_not_refute_and_ignores_that_it_lives() -> None:
    made = table()
    made.leaving = True
    assert isinstance(made.dead(Dead(1, "me", "me"), 9.0), Gone)
    assert isinstance(made.alive(Alive(9, "me", HERE, 7946, b"", VSN), 9.0, Random(1)), Ignored)


def test_new_metadata_is_an_update_and_only_of_who_is_present() -> None:
    made = holding(State.ALIVE)
    decision = made.alive(alive(6, meta=b"new"), 9.0, Random(1))
    assert isinstance(decision, Revived)
    assert (decision.joined, decision.updated) == (False, True)
    made = holding(State.DEAD)
    decision = made.alive(alive(6, meta=b"new"), 9.0, Random(1))
    assert isinstance(decision, Revived)
    assert (decision.joined, decision.updated) == (True, False)


def test_rumours_of_one_incarnation_end_the_same_in_any_order() -> None:
    rumours = [alive(5), Suspect(5, "n", "x"), Dead(5, "n", "x"), alive(5, meta=b"m")]
    ends = set()
    for order in permutations(rumours):
        made = table()
        made.alive(alive(4), 0.0, Random(1))
        for rumour in order:
            match rumour:
                case Alive():
                    made.alive(rumour, 1.0, Random(1))
                case Suspect():
                    made.suspect(rumour, 1.0)
                case Dead():
                    made.dead(rumour, 1.0)
        ends.add(state_of(made))
    assert ends == {State.DEAD}


@pytest.mark.parametrize(
    ("rumour", "why"),
    [
        (alive(addr=b"\1\2\3"), "its address has 3 bytes"),
        (alive(addr=b""), "its address has 0 bytes"),
        (alive(vsn=b""), "it gives 0 version numbers"),
        (alive(vsn=VSN + b"\0"), "it gives 7 version numbers"),
        (alive(vsn=bytes((1, 5, 9, 2, 5, 5))), "protocol version (9)"),
        (alive(vsn=bytes((3, 5, 3, 2, 5, 5))), "protocol version (3)"),  # does not speak our 2
        (alive(vsn=bytes((0, 5, 2, 2, 5, 5))), "protocol version (2)"),
        (alive(vsn=bytes((1, 5, 2, 2, 9, 9))), "delegate protocol version (9)"),
        (alive(meta=bytes(META_SIZE_MAX + 1)), "its tags have 513 bytes, at most 512"),
    ],
)
def test_who_cannot_be_spoken_with_is_left_out_and_never_passed_on(rumour: Alive, why: str) -> None:
    made = table()
    decision = made.alive(rumour, 0.0, Random(1))
    assert isinstance(decision, Refused)
    assert why in decision.why
    assert [state.name for state in made.states()] == ["me"]


@pytest.mark.parametrize("misfit", [{"vsn": b""}, {"meta": bytes(META_SIZE_MAX + 1)}], ids=list)
def test_a_known_member_does_not_turn_into_one_that_cannot_be_spoken_with(
    misfit: dict[str, Any],
) -> None:
    made = holding(State.ALIVE)
    assert isinstance(made.alive(alive(6, **misfit), 9.0, Random(1)), Refused)
    peer = made.get("n")
    assert peer is not None
    assert (peer.versions, peer.meta, peer.incarnation) == (VSN, b"m", 5)


def test_who_cannot_be_spoken_with_claims_no_name() -> None:
    claim = alive(6, addr=b"\1\2\3\5", meta=bytes(META_SIZE_MAX + 1))
    assert isinstance(holding(State.ALIVE).alive(claim, 9.0, Random(1)), Refused)


def test_the_longest_tags_are_taken() -> None:
    assert isinstance(table().alive(alive(meta=bytes(META_SIZE_MAX)), 0.0, Random(1)), Revived)


def test_own_versions_are_no_misfit() -> None:
    assert versions_misfit(VSN, VSN) is None
    assert versions_misfit(bytes((1, 5, 2, 2, 5, 4)), VSN) is None


def test_the_table_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serfd.gossip.member_table.MEMBERS_MAX", 3)
    made = table()
    decisions = [made.alive(alive(node=f"n{i}"), 0.0, Random(1)) for i in range(3)]
    assert [type(decision) for decision in decisions] == [Revived, Revived, Refused]


def test_each_round_probes_everybody_once_and_never_itself() -> None:
    made = table()
    rng = Random(3)
    for i in range(9):
        made.alive(alive(node=f"n{i}"), 0.0, rng)
    made.dead(Dead(1, "n3", "x"), 0.0)
    # The first round begins in the middle of nothing: start at its end.
    while made._probe_index:
        made.next_probed(0.0, rng, forget_after=30.0)
        if made._probe_index >= len(made):
            break
    seen = []
    while len(seen) < 8:
        peer = made.next_probed(0.0, rng, forget_after=30.0)
        if peer is not None:
            seen.append(peer.name)
    assert sorted(seen) == [f"n{i}" for i in range(9) if i != 3]


def test_a_lone_node_probes_nobody() -> None:
    assert table().next_probed(0.0, Random(1), forget_after=30.0) is None


@pytest.mark.parametrize("state", [State.DEAD, State.LEFT])
def test_who_is_gone_for_long_is_forgotten_when_a_round_ends(state: State) -> None:
    made = holding(state)  # since second 2
    for now, known in ((31.9, True), (32.1, False)):
        for _ in range(4):
            made.next_probed(now, Random(1), forget_after=30.0)
        assert (made.get("n") is not None) == known
    assert len(made) == 1


def test_gossip_goes_to_the_present_and_the_recently_dead_never_to_who_left() -> None:
    made = table()
    rng = Random(1)
    for name in ("alive", "suspect", "dead", "long-dead", "left"):
        made.alive(alive(node=name), 0.0, rng)
    made.suspect(Suspect(1, "suspect", "x"), 1.0)
    made.dead(Dead(1, "long-dead", "x"), 1.0)
    made.dead(Dead(1, "dead", "x"), 50.0)
    made.dead(Dead(1, "left", "left"), 50.0)
    chosen = made.next_to_gossip(10, died_after=30.0)
    assert {peer.name for peer in chosen} == {"alive", "suspect", "dead"}
    assert {peer.name for peer in made.choose_alive(10, rng)} == {"alive"}


@pytest.mark.parametrize("size", [3, 5, 40])
def test_choosing_gives_as_many_different_ones_as_there_are(size: int) -> None:
    made = table()
    rng = Random(1)
    for i in range(size):
        made.alive(alive(node=f"n{i}"), 0.0, rng)
    names = [peer.name for peer in made.choose_alive(3, rng, but=made.get("n0"))]
    assert len(set(names)) == len(names) == min(3, size - 1)
    assert "n0" not in names
    assert "me" not in names


@pytest.mark.parametrize("size", [1, 2, 9, 10])
def test_news_goes_to_each_member_in_turn(size: int) -> None:
    made = table()
    rng = Random(1)
    for i in range(size):
        made.alive(alive(node=f"n{i}"), 0.0, rng)
    told = [peer.name for _ in range(4 * size) for peer in made.next_to_gossip(3, died_after=0.0)]
    if size <= 3:
        assert len(told) == 4 * size * size
    # Whenever one begins to count: so many copies reach them all.
    for start in range(len(told) - size):
        assert len(set(told[start : start + size])) == size
    assert "me" not in told


def test_how_many_are_present_is_counted_through_every_change() -> None:
    made = table()
    assert (made.present, made.anyone_else) == (1, False)
    made.alive(alive(), 0.0, Random(1))
    assert (made.present, made.anyone_else) == (2, True)
    made.suspect(Suspect(1, "n", "x"), 0.0)
    assert made.present == 2
    made.dead(Dead(1, "n", "x"), 0.0)
    assert (made.present, made.anyone_else) == (1, False)
