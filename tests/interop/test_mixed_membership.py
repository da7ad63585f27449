"""Two real Serf agents and two of ours are one cluster: whoever looks sees the same."""

import signal

import pytest
from processes import all_see, everyone_sees, free_port, until, until_is

pytestmark = pytest.mark.interop

FOUR = {"s1": "serf", "d1": "serfd", "s2": "serf", "d2": "serfd"}
OTHER = {"serf": "serfd", "serfd": "serf"}
BOTH_KINDS = pytest.mark.parametrize("kind", ["serf", "serfd"])


@BOTH_KINDS
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_an_agent_joins_one_of_the_other_kind(agents, kind, host):
    joins = agents.start(kind, "joins", "-tag=role=web", host=host)
    joined = agents.start(OTHER[kind], "joined", "-tag=role=db", host=host)
    joins.join(joined)
    everyone_sees([joins, joined], {"joins": "alive", "joined": "alive"})
    assert joins.members() == joined.members()
    assert joined.members()["joins"].address == joins.bind
    assert joins.members()["joined"].tags == {"role": "db"}


@BOTH_KINDS
def test_an_agent_is_reached_where_it_advertises(agents, kind):
    # It listens at one address and is told of at another, which leads to the same place.
    port = free_port("0.0.0.0")
    everywhere = agents.prepare(kind, "everywhere", f"-advertise=127.0.0.3:{port}")
    everywhere.launch(f"0.0.0.0:{port}", f"127.0.0.1:{free_port()}")
    until("it answers", everywhere.answers)
    other = agents.start(OTHER[kind], "other")
    assert other.join(everywhere) == 1
    both = {"everywhere": "alive", "other": "alive"}
    everyone_sees([everywhere, other], both)
    assert other.members()["everywhere"].address == f"127.0.0.3:{port}"
    # It is probed there too: somebody else joins over it, and hears of all.
    third = agents.start("serfd", "third")
    with third.client() as client:
        assert client.join([f"127.0.0.3:{port}"]) == 1
    everyone_sees([everywhere, other, third], {**both, "third": "alive"})


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

        # A real agent misses a prune that comes just after a state exchange has told it of the
        # leave, since that counts as later; a user would ask again.
        def is_pruned() -> bool:
            client.force_leave(killed.name, prune=True)
            return all(killed.name not in agent.statuses() for agent in others)

        until(f"{killed.name} is pruned by all", is_pruned)
    everyone_sees(others, {agent.name: "alive" for agent in others})
