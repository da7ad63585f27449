"""Local health and suspicion timeouts, with the numbers measured on real agents."""

import pytest

from serfd.gossip.lifeguard import Awareness, Suspicion, suspicion_timeout_min


def test_health_stays_between_zero_and_the_maximum() -> None:
    awareness = Awareness(8)
    awareness.apply(-1)
    assert awareness.score == 0
    awareness.apply(100)
    assert awareness.score == 7
    awareness.apply(-2)
    assert awareness.scale(1.0) == 6.0


@pytest.mark.parametrize(
    ("members", "interval", "multiplier", "seconds"),
    [(1, 1.0, 4, 4.0), (10, 1.0, 4, 4.0), (100, 1.0, 4, 8.0), (1000, 5.0, 6, 90.0),
     (50, 1.0, 4, 4 * 1.698), (0, 1.0, 3, 3.0)],
)  # fmt: skip
def test_the_shortest_suspicion_grows_with_the_logarithm_of_the_cluster(
    members: int, interval: float, multiplier: int, seconds: float
) -> None:
    assert suspicion_timeout_min(members, interval, multiplier) == pytest.approx(seconds)


def lan_of_four(accuser: str = "a") -> Suspicion:
    return Suspicion(accuser, 100.0, needed=2, timeout_min=4.0, timeout_max=24.0)


@pytest.mark.parametrize(
    ("confirmations", "seconds"), [((), 24.0), (("b",), 11.38), (("b", "c"), 4.0)]
)
def test_each_confirmation_shortens_the_timeout_as_in_real_agents(
    confirmations: tuple[str, ...], seconds: float
) -> None:
    suspicion = lan_of_four()
    assert all(suspicion.confirm(name) for name in confirmations)
    assert suspicion.deadline - 100.0 == pytest.approx(seconds, abs=0.005)


def test_only_new_accusers_count_and_no_more_than_needed() -> None:
    suspicion = lan_of_four(accuser="a")
    assert not suspicion.confirm("a")
    assert suspicion.confirm("b")
    assert not suspicion.confirm("b")
    assert suspicion.confirm("c")
    assert not suspicion.confirm("d")
    assert suspicion.confirmations == 2


def test_where_nobody_can_confirm_the_timeout_is_the_shortest() -> None:
    suspicion = Suspicion("a", 0.0, needed=0, timeout_min=4.0, timeout_max=24.0)
    assert suspicion.deadline == 4.0
    assert not suspicion.confirm("b")
