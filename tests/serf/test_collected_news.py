"""What a node collects before it tells it: changes of members, user events that may coalesce."""

import pytest
from one_node import OneNode

from serfd.config import Seconds
from serfd.effects import Emit
from serfd.serf.events import UserEvent
from serfd.wire.serf_messages import UserEventMessage, encode
from serfd.wire.swim_messages import Dead, User


def collecting() -> OneNode:
    """A node that has told of itself and n2, and collects for up to 3 s what comes now."""
    one = OneNode(coalesce_period=Seconds(3.0), quiescent_period=Seconds(1.0))
    one.hear(OneNode.alive("n2"))
    one.run_until(2.0, answering=["n2"])
    assert one.events() == [("member-join", ["n1", "n2"])]
    return one


def test_changes_of_members_are_told_together_when_nothing_more_changes() -> None:
    one = collecting()
    for name in ("n3", "n4"):
        one.hear(OneNode.alive(name))
    one.hear(Dead(1, "n4", "n2"))
    one.run_until(2.9, answering=["n2", "n3"])
    assert one.events() == []
    one.run_until(3.1, answering=["n2", "n3"])
    assert one.events() == [("member-join", ["n3"]), ("member-failed", ["n4"])]
    one.run_until(9.0, answering=["n2", "n3"])
    assert one.events() == []


def test_changes_of_members_that_never_end_are_told_at_the_end_of_the_period() -> None:
    one = collecting()
    for number in range(8):  # one every half second
        one.hear(OneNode.alive(f"n{number + 3}"))
        one.run_until(one.now + 0.5, answering=["n2", *(f"n{n}" for n in range(3, 11))])
    ((kind, names),) = one.events()
    assert (kind, names) == ("member-join", [f"n{number}" for number in range(3, 9)])


@pytest.mark.parametrize(
    ("period", "quiet", "told_by"), [(0.0, 1.0, 0.0), (3.0, 0.2, 0.2), (0.5, 1.0, 0.5)]
)
def test_the_times_of_user_events_are_those_of_the_configuration(
    period: float, quiet: float, told_by: float
) -> None:
    one = OneNode("n2", user_coalesce_period=Seconds(period), user_quiescent_period=Seconds(quiet))
    one.effects.clear()
    one.hear(User(encode(UserEventMessage(1, "deploy", b"v1", coalesce=True))))
    if told_by:
        one.run_until(told_by - 0.01, answering=["n2"])
        assert one.take_effects(Emit) == []
        one.run_until(told_by + 0.01, answering=["n2"])
    told = [effect.event for effect in one.take_effects(Emit)]
    assert told == [UserEvent(1, "deploy", b"v1", coalesce=True)]
