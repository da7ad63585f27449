"""Bursts of user events, and those of before a join, in clusters of real Serf agents and ours."""

import pytest
from processes import SERFCTL, Records, run, until_is

pytestmark = pytest.mark.interop

BURST = 1000
OTHER = {"serf": "serfd", "serfd": "serf"}


def number(record) -> int:
    """Which event of the burst this is."""
    return int(bytes(record["Payload"])[:4])


def test_a_burst_through_one_of_ours_is_heard_once_by_all_and_by_ours_in_order(agents):
    kinds = {"d0": "serfd", "d1": "serfd", "d2": "serfd", "s0": "serf", "s1": "serf", "s2": "serf"}
    six = agents.cluster(kinds)
    streams = {name: Records(agent, "user") for name, agent in six.items()}
    with six["d0"].client() as client:
        # A stream is open some time after its request.
        client.event("first", b"", coalesce=False)
        for records in streams.values():
            records.wait("the first event", lambda record: record["Name"] == "first")
        for i in range(BURST):
            payload = b"%04d" % i
            client.event("burst", payload.ljust(100, b"."), coalesce=False)
    for name, records in streams.items():

        def heard(records=records) -> list[int]:
            return [number(record) for record in list(records.got) if record["Name"] == "burst"]

        until_is(f"events at {name}", lambda heard=heard: sorted(heard()), list(range(BURST)))
        if kinds[name] == "serfd":
            # Real agents hand on what comes as it comes.
            assert heard() == list(range(BURST))


@pytest.mark.parametrize("tool", ["serf", SERFCTL], ids=["serf", "serfctl"])
@pytest.mark.parametrize("kind", ["serf", "serfd"])
def test_who_joins_hears_what_was_before_only_if_it_wants_to(agents, kind, tool):
    old = agents.start(OTHER[kind], "old")
    with old.client() as client:
        for payload in (b"v1", b"v2"):
            client.event("before", payload, coalesce=False)
    heard = {}
    for name, options in (("wants", ["-replay"]), ("not", [])):
        agent = agents.start(kind, name)
        records = Records(agent)
        joined = run(tool, "join", f"-rpc-addr={agent.rpc_addr}", *options, old.bind)
        assert joined.returncode == 0
        with old.client() as client:
            client.event("after", name.encode(), coalesce=False)
        records.wait("an event of after the join", lambda record: record.get("Name") == "after")
        heard[name] = [
            (record["LTime"], bytes(record["Payload"]), record["Coalesce"])
            for record in records.got
            if record.get("Name") == "before"
        ]
    assert heard == {"wants": [(1, b"v1", False), (2, b"v2", False)], "not": []}
