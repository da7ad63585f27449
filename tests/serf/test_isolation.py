"""A node that sees nobody says so: once, then every ten minutes, and when it is over."""

import logging
from collections.abc import Callable

import pytest
from one_node import OneNode

from serfd.config import Seconds
from serfd.serf.isolation import TOLD_INTERVAL
from serfd.wire.swim_messages import Dead

REMEMBERED = ("alive: n2 10.0.0.2:7946", "alive: n3 10.0.0.3:7946")


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[tuple[str, str]]]:
    """What the log has said of isolation since last asked, each with its level."""
    logging.getLogger("serfd").propagate = True
    caplog.set_level(logging.INFO, "serfd")

    def told() -> list[tuple[str, str]]:
        records = [(r.levelname, r.getMessage()) for r in caplog.records]
        caplog.clear()
        return [(level, text) for level, text in records if "solated" in text]

    return told


def isolated(one: OneNode) -> str:
    return one.node.stats()["isolated"]


def test_who_never_saw_anybody_is_alone_but_not_isolated(told) -> None:
    one = OneNode()
    one.run_until(3600)
    assert isolated(one) == "false"
    assert told() == []


def test_who_sees_the_last_one_fail_is_isolated_until_somebody_is_back(told) -> None:
    one = OneNode("n2", "n3")
    one.hear(Dead(1, "n2", "n9"))
    assert isolated(one) == "false"
    assert told() == []
    one.hear(Dead(1, "n3", "n9"))
    assert isolated(one) == "true"
    assert told() == [
        ("WARNING", "Isolated: no other member is alive; 2 that failed are tried again")
    ]
    one.now = 90.0
    one.hear(OneNode.alive("n3", 2))
    assert isolated(one) == "false"
    assert told() == [("INFO", "No longer isolated, after 90 s")]
    one.run_until(3600, answering=["n3"])
    assert told() == []


def test_while_it_lasts_the_log_says_so_every_ten_minutes_and_names_the_forgotten_too(told) -> None:
    one = OneNode("n2", reconnect_timeout=Seconds(60.0))
    one.hear(Dead(1, "n2", "n9"))
    one.run_until(3.5 * TOLD_INTERVAL)
    assert one.statuses() == {"n1": "alive"}
    assert isolated(one) == "true"
    once = ("WARNING", "Isolated: no other member is alive; 1 that failed are tried again")
    assert told() == [once] * 4


def test_when_all_others_left_it_is_isolated_too(told) -> None:
    one = OneNode("n2")
    one.hear(Dead(1, "n2", "n2"))
    assert isolated(one) == "true"
    assert told() == [
        ("WARNING", "Isolated: no other member is alive; 0 that failed are tried again")
    ]


def test_who_comes_back_after_a_restart_is_isolated_and_says_so_when_nobody_answers(told) -> None:
    one = OneNode(remembered=REMEMBERED)
    one.run_until(0.0)
    assert isolated(one) == "true"
    for _ in REMEMBERED:
        [(stream, _)] = one.connects()
        assert told() == []
        one.node.stream_closed(one.now, stream, "connection refused")
    assert [level for level, _ in told()] == ["WARNING"]
    one.hear(OneNode.alive("n2"))
    assert isolated(one) == "false"


def test_who_comes_back_after_a_restart_and_is_let_in_says_nothing(told) -> None:
    one = OneNode(remembered=REMEMBERED)
    one.hear(OneNode.alive("n2"))
    one.run_until(3600, answering=["n2"])
    assert isolated(one) == "false"
    assert told() == []


def test_who_leaves_is_not_isolated(told) -> None:
    one = OneNode("n2")
    one.node.leave(one.now)
    one.hear(Dead(1, "n2", "n9"))
    one.run_until(2 * TOLD_INTERVAL)
    assert isolated(one) == "false"
    assert told() == []


def test_who_leaves_while_isolated_says_so_no_more(told) -> None:
    one = OneNode("n2")
    one.hear(Dead(1, "n2", "n9"))
    one.node.leave(one.now)
    told()
    one.run_until(2 * TOLD_INTERVAL)
    assert isolated(one) == "false"
    assert told() == []
