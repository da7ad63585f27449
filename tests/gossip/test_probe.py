"""What a probe round costs the own health."""

import pytest
from one_node import VSN

from serfd.gossip.member_table import Peer
from serfd.gossip.probe import Probe


@pytest.mark.parametrize(
    ("expected", "heard", "blame"), [(0, 0, 1), (3, 3, 0), (3, 1, 2), (3, 0, 3), (2, 5, 0)]
)
def test_missing_nacks_are_the_own_fault_and_without_go_betweens_it_is_one(
    expected: int, heard: int, blame: int
) -> None:
    probe = Probe(Peer("n2", b"\x0a\0\0\2", 1, b"", VSN), 7, now=10.0, interval=3.0)
    probe.nacks_expected, probe.nacks = expected, heard
    assert probe.blame == blame
    assert probe.deadline == 13.0
