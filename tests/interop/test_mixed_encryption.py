"""Sealed and packed gossip between real Serf agents and ours."""

import base64
import json

import pytest
from processes import everyone_sees, until_is

from serfd.rpc.client import RpcError

pytestmark = pytest.mark.interop

FOUR = {"s1": "serf", "d1": "serfd", "s2": "serf", "d2": "serfd"}
OTHER = {"serf": "serfd", "serfd": "serf"}


def key(size: int, byte: int = 7) -> str:
    return base64.b64encode(bytes([byte]) * size).decode()


@pytest.mark.parametrize("size", [16, 32])
def test_a_cluster_with_a_key_works_as_one_without(agents, size):
    four = agents.cluster(FOUR, f"-encrypt={key(size)}", "-tag=dc=east")
    for name in ("s2", "d2"):
        with four[name].client() as client:
            client.tags({"role": f"of {name}"})
        for agent in four.values():
            until_is(
                f"the role of {name} as {agent.name} sees it",
                lambda agent=agent, name=name: agent.members()[name].tags.get("role"),
                f"of {name}",
            )
    views = [agent.members() for agent in four.values()]
    assert views == [views[0]] * 4
    # The key is on the command lines here, but in no log, whatever is written there.
    assert key(size) not in four["d1"].log() + four["d2"].log()


@pytest.mark.parametrize("joining", ["serf", "serfd"])
@pytest.mark.parametrize(
    ("own", "peers"),
    [(32, 16), (32, 0), (0, 32)],
    ids=["another key", "a key for none", "no key for one"],
)
def test_who_has_not_the_clusters_key_does_not_get_in(agents, joining, own, peers):
    def start(kind, name, size):
        return agents.start(kind, name, *([f"-encrypt={key(size, size)}"] if size else []))

    outside = start(joining, "outside", own)
    inside = start(OTHER[joining], "inside", peers)
    with outside.client() as client, pytest.raises(RpcError, match="1 error occurred:"):
        client.join([inside.bind])
    with inside.client() as client, pytest.raises(RpcError, match="1 error occurred:"):
        client.join([outside.bind])
    everyone_sees([outside], {"outside": "alive"})
    everyone_sees([inside], {"inside": "alive"})


def test_who_is_first_to_get_the_key_of_a_plain_cluster_stays_a_member(agents):
    # The first step of encrypting a living cluster: it has the key, and neither sends nor asks
    # for what is sealed. Real agents cannot take the other steps: they have no such settings.
    waiting = {"encrypt_verify_incoming": False, "encrypt_verify_outgoing": False}
    kinds = {"s1": "serf", "s2": "serf", "d1": "serfd"}
    own = {"d1": [f"-encrypt={key(32)}"]}
    three = agents.cluster(kinds, configs={"serfd": waiting}, own=own)
    for name in three:
        with three[name].client() as client:
            client.tags({"role": f"of {name}"})
        for agent in three.values():
            until_is(
                f"the role of {name} as {agent.name} sees it",
                lambda agent=agent, name=name: agent.members()[name].tags.get("role"),
                f"of {name}",
            )
    stats = three["d1"].stats()["serf"]
    assert (stats["encrypted"], stats["dropped_input"]) == ("true", "0")


def test_who_was_away_while_real_agents_changed_their_key_gets_in_with_the_next_of_its_own(
    agents, tmp_path
):
    ring = tmp_path / "keys.json"
    ring.write_text(json.dumps([key(16), key(24), key(32)]))
    two = agents.cluster({"s1": "serf", "s2": "serf"}, f"-encrypt={key(32)}")
    away = agents.start("serfd", "d1", f"-keyring-file={ring}")
    away.join(two["s1"])
    everyone_sees([*two.values(), away], dict.fromkeys(["s1", "s2", "d1"], "alive"))
    # From now on it speaks as they do, and knows it after a restart too.
    assert json.loads(ring.read_text()) == [key(32), key(16), key(24)]
    with away.client() as client:
        client.tags({"role": "back"})
    for agent in two.values():
        until_is(
            f"the role of d1 as {agent.name} sees it",
            lambda agent=agent: agent.members()["d1"].tags.get("role"),
            "back",
        )


@pytest.mark.parametrize("without", [(), ("serf",), ("serfd",), ("serf", "serfd")])
def test_packing_is_a_matter_of_the_sender(agents, without):
    # Enough of everything that packing makes both packets and streams shorter.
    tag = "-tag=text=" + "all work and no play " * 12
    own = {name: ["-disable-compression"] if kind in without else [] for name, kind in FOUR.items()}
    four = agents.cluster(FOUR, tag, own=own)
    views = [agent.members() for agent in four.values()]
    assert views == [views[0]] * 4
    for agent in (four["d1"], four["d2"]):
        assert agent.stats()["serf"]["dropped_input"] == "0"
