"""Whom a node tries again: who failed, and who is forgotten since."""

from typing import Any

import pytest
from one_node import OneNode

from serfd.config import Seconds
from serfd.serf import reconnecting
from serfd.wire.serf_messages import JoinIntent, LeaveIntent, encode
from serfd.wire.swim_messages import Alive, Dead, User

FORGOTTEN_AT = 70.0


def left_alone(*lost: str, present: str | None = None, **settings: Any) -> OneNode:
    """A node that has forgotten members that failed; `present` is alive and answers."""
    one = OneNode(
        *lost,
        *([present] if present else []),
        reconnect_timeout=Seconds(30.0),
        reconnect_interval=Seconds(10.0),
        **settings,
    )
    for name in lost:
        one.hear(Dead(1, name, "n9"), source=present or name)
    run(one, FORGOTTEN_AT, present)
    assert set(one.statuses()) == {"n1"} | ({present} if present else set())
    one.connects()
    return one


def run(one: OneNode, until: float, present: str | None = None) -> None:
    one.run_until(until, answering=[present] if present else [])


def tried(one: OneNode, seconds: float, present: str | None = None) -> list[str]:
    """Whom it connects to in this time."""
    run(one, one.now + seconds, present)
    return [name for _, name in one.connects() if name != present]


def test_who_is_forgotten_is_tried_at_every_turn_while_nobody_else_is_alive() -> None:
    one = left_alone("n2")
    assert tried(one, 100.0) == ["n2"] * 10


def test_who_is_forgotten_is_tried_now_and_then_while_others_are_alive() -> None:
    one = left_alone("n2", present="n3")
    count = len(tried(one, 30_000.0, "n3"))
    assert 30_000 / reconnecting.LOST_INTERVAL == 100
    assert 60 <= count <= 140


@pytest.mark.parametrize(
    "news",
    [
        OneNode.alive("n2", 2),
        User(encode(LeaveIntent(50, "n2", prune=False))),
        User(encode(LeaveIntent(50, "n2", prune=True))),
    ],
    ids=["it is alive", "forced out", "pruned"],
)
def test_who_is_back_or_told_to_leave_is_sought_no_more(news: Alive | User) -> None:
    one = left_alone("n2", "n4")
    one.hear(news, source="n3")
    # Should it be alive, it fails and is forced out, so that only what was remembered is left.
    one.hear(Dead(2, "n2", "n2"), source="n3")
    run(one, one.now + 60)
    one.connects()
    assert set(tried(one, 300.0)) == {"n4"}


def test_a_join_intent_of_old_ends_no_search() -> None:
    one = left_alone("n2")
    one.hear(User(encode(JoinIntent(50, "n2"))), source="n2")
    assert "n2" in tried(one, 100.0)


def test_an_address_where_another_member_lives_now_is_sought_no_more() -> None:
    one = left_alone("n2", "n4")
    one.hear(OneNode.alive("n3", addr=bytes((10, 0, 0, 2))), source="n2")
    run(one, one.now + 6_000, "n2")
    one.connects()
    one.hear(Dead(1, "n3", "n3"), source="n2")
    assert set(tried(one, 300.0)) == {"n4"}


@pytest.mark.parametrize("prune", [False, True])
def test_who_left_is_not_sought(*, prune: bool) -> None:
    one = OneNode("n2", "n4", reconnect_interval=Seconds(10.0), tombstone_timeout=Seconds(30.0))
    one.hear(Dead(1, "n4", "n4"), Dead(1, "n2", "n9"))
    one.node.force_leave(one.now, "n2", prune=prune)
    run(one, FORGOTTEN_AT)
    assert set(one.statuses()) == {"n1"}
    one.connects()
    assert tried(one, 300.0) == []


def test_so_many_are_remembered_and_the_oldest_are_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reconnecting, "LOST_MAX", 3)
    one = left_alone("n2", "n3", "n4", "n5", "n6")
    assert set(tried(one, 1000.0)) == {"n4", "n5", "n6"}


def test_alone_the_failed_and_the_forgotten_are_tried_alike() -> None:
    one = left_alone("n2")
    names: list[str] = []
    for life in range(1, 11):
        one.hear(OneNode.alive("n3", life), Dead(life, "n3", "n9"), source="n3")
        names += tried(one, 20.0)
    assert len(names) == 20
    assert set(names) == {"n2", "n3"}


def test_who_leaves_tries_nobody() -> None:
    one = left_alone("n2")
    one.node.leave(one.now)
    assert tried(one, 100.0) == []
