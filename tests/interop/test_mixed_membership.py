"""Two real Serf agents and two of ours are one cluster: whoever looks sees the same."""

import signal

import pytest
from processes import all_see, everyone_sees, until, until_is

pytestmark = pytest.mark.interop

FOUR = {"s1": "serf", "d1": "serfd", "s2": "serf", "d2": "serfd"}
OTHER = {"serf": "serfd", "serfd": "serf"}
# Failed members are looked for more often than every 30 s, or a test would take that long.
QUICK = {"reconnect_interval": "1s"}
BOTH_KINDS = pytest.mark.parametrize("kind", ["serf", "serfd"])


@BOTH_KINDS
def test_an_agent_joins_one_of_the_other_kind(agents, kind):
    joins = agents.start(kind, "joins", "-tag=role=web")
    joined = agents.start(OTHER[kind], "joined", "-tag=role=db")
    joins.join(joined)
    everyone_sees([joins, joined], {"joins": "alive", "joined": "alive"})
    assert joins.members() == joined.members()
    assert joined.members()["joins"].address == joins.bind
    assert joins.members()["joined"].tags == {"role": "db"}


def test_members_and_tags_are_equal_from_all_four_sides(agents):
    tags = {
        "s1": ["-tag=role=web", "-tag=dc=east"],
        "d1": ["-tag=role=web", "-tag=über=größe"],
        "s2": [],
        "d2": ["-tag=empty=", "-tag=a=b=c"],
    }
    four = agents.cluster(FOUR, own=tags)
    views = {name: agent.members() for name, agent in four.items()}
    assert views["s1"] == views["d1"] == views["s2"] == views["d2"]
    assert {name: seen.tags for name, seen in views["s1"].items()} == {
        "s1": {"role": "web", "dc": "east"},
        "d1": {"role": "web", "über": "größe"},
        "s2": {},
        "d2": {"empty": "", "a": "b=c"},
    }


def test_a_change_of_tags_on_either_kind_is_seen_by_all(agents):
    four = agents.cluster(FOUR, "-tag=dc=east", "-tag=role=web")
    for name in ("s2", "d2"):
        with four[name].client() as client:
            client.tags({"role": f"changed on {name}"}, delete=["dc"])
    for agent in four.values():
        for name in ("s2", "d2"):
            until_is(
                f"the tags of {name} as {agent.name} sees them",
                lambda agent=agent, name=name: agent.members()[name].tags,
                {"role": f"changed on {name}"},
            )
        assert agent.members()["s1"].tags == {"dc": "east", "role": "web"}


@pytest.mark.parametrize("how", ["by RPC", "by SIGINT"])
def test_who_leaves_is_seen_as_left_by_all_whatever_kind_it_is(agents, how):
    four = agents.cluster(FOUR)
    for name in ("s2", "d2"):
        if how == "by RPC":
            with four[name].client() as client:
                client.leave()
        else:
            four[name].signal(signal.SIGINT)
        all_see([four["s1"], four["d1"]], **{name: "left"})
    assert four["d2"].exit_code() == 0
    everyone_sees(
        [four["s1"], four["d1"]], {"s1": "alive", "d1": "alive", "s2": "left", "d2": "left"}
    )


@BOTH_KINDS
def test_who_is_killed_is_seen_as_failed_and_is_back_when_it_runs_again(agents, kind):
    four = agents.cluster(FOUR, config=QUICK)
    killed, *others = sorted(four.values(), key=lambda agent: agent.kind != kind)
    killed.kill()
    all_see(others, **{killed.name: "failed"})
    killed.restart()
    # No join command: the others look for it, and it learns of all of them.
    everyone_sees(four.values(), dict.fromkeys(FOUR, "alive"))
    assert [agent.members() for agent in others] == [killed.members()] * 3


@BOTH_KINDS
def test_a_failed_member_of_the_other_kind_is_forced_to_leave_and_pruned(agents, kind):
    four = agents.cluster(FOUR)
    forces, *_ = (agent for agent in four.values() if agent.kind == kind)
    *_, killed = (agent for agent in four.values() if agent.kind != kind)
    others = [agent for agent in four.values() if agent is not killed]
    killed.kill()
    all_see(others, **{killed.name: "failed"})
    with forces.client() as client:
        client.force_leave(killed.name)
        all_see(others, **{killed.name: "left"})
        client.force_leave(killed.name, prune=True)
    everyone_sees(others, {agent.name: "alive" for agent in others})


@BOTH_KINDS
def test_who_left_comes_back_with_a_new_address(agents, kind):
    three = agents.cluster({"s1": "serf", "d1": "serfd", "moves": kind})
    moves, others = three["moves"], [three["s1"], three["d1"]]
    moves.signal(signal.SIGINT)
    all_see(others, moves="left")
    moves.exit_code()
    moves.restart(f"127.0.0.2:{moves.port}")
    moves.join(others[0])
    everyone_sees(three.values(), dict.fromkeys(three, "alive"))
    for agent in three.values():
        assert agent.members()["moves"].address == moves.bind


@BOTH_KINDS
def test_who_failed_comes_back_with_a_new_address(agents, kind):
    three = agents.cluster({"s1": "serf", "d1": "serfd", "moves": kind})
    moves, others = three["moves"], [three["s1"], three["d1"]]
    moves.kill()
    all_see(others, moves="failed")
    moves.restart(f"127.0.0.2:{moves.port}")

    # A real agent holds on to the old address for 15 s (`gossip to the dead`); whoever joins
    # meanwhile is heard, but not yet believed.
    def is_back() -> bool:
        moves.join(others[0])
        return all(
            (seen := agent.members()["moves"]).status == "alive" and seen.address == moves.bind
            for agent in others
        )

    until("all see it at its new address", is_back)
    everyone_sees(three.values(), dict.fromkeys(three, "alive"))
