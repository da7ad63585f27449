"""Events of before a join, between real Serf agents and ours."""

import pytest
from processes import SERFCTL, Records, run

pytestmark = pytest.mark.interop

OTHER = {"serf": "serfd", "serfd": "serf"}


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
