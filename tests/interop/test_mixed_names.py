"""Two agents of one name: the cluster of real Serf agents and ours decides who stays."""

import pytest
from processes import Agents, all_see

pytestmark = pytest.mark.interop


@pytest.fixture
def impostors(tmp_path):
    """Starts agents that may have names of others."""
    folder = tmp_path / "impostors"
    folder.mkdir()
    running = Agents(folder)
    yield running
    running.end()


@pytest.mark.parametrize("bearer", ["serf", "serfd"])
@pytest.mark.parametrize("claimant", ["serf", "serfd"])
def test_who_takes_a_name_that_others_know_ends_and_its_bearer_stays(
    agents, impostors, bearer, claimant
):
    four = agents.cluster({"s1": "serf", "d1": "serfd", "d2": "serfd", "wanted": bearer})
    impostor = impostors.start(claimant, "wanted")
    assert impostor.join(four["d1"]) == 1
    assert impostor.exit_code() == 0
    assert "minority in name conflict resolution, quitting [0 / 3]" in impostor.log()
    assert four["wanted"].is_running
    all_see(four.values(), wanted="alive")
    for agent in four.values():
        assert agent.members()["wanted"].address == four["wanted"].bind
