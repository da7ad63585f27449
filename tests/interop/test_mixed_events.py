"""User events and queries of real agents travel through ours, which only passes them on."""

import json
import socket
from collections.abc import Iterator

import pytest
from processes import Records, run, until

from serfd.wire.serf_messages import QueryMessage, QueryResponse, UserEventMessage, decode, encode

pytestmark = pytest.mark.interop

FOUR = {"s1": "serf", "d1": "serfd", "s2": "serf", "d2": "serfd"}
PAIR = {"s1": "serf", "d1": "serfd"}
ACK = 1
"""Flag of a query that wants to know who heard it, and of the answer that says so."""
USER = b"\x08"
"""The packet type of what the layer above memberlist says."""


def is_user_event(name: str):
    return lambda record: record["Event"] == "user" and record["Name"] == name


def test_an_event_of_a_real_agent_is_on_the_streams_of_all(agents):
    four = agents.cluster(FOUR)
    streams = {name: Records(agent) for name, agent in four.items()}
    sent = run("serf", "event", f"-rpc-addr={four['s1'].rpc_addr}", "deploy", "v 1.2")
    assert (sent.returncode, sent.stdout) == (
        0,
        "Event 'deploy' dispatched! Coalescing enabled: true\n",
    )
    for name, records in streams.items():
        got = records.wait(f"deploy on {name}", is_user_event("deploy"))
        assert (bytes(got["Payload"]), got["Coalesce"]) == (b"v 1.2", True)


def test_a_query_between_real_agents_is_answered_in_a_cluster_with_ours(agents):
    own = {name: [f"-event-handler=query:load=echo load of {name}"] for name in ("s1", "s2")}
    four = agents.cluster(FOUR, own=own)
    # A query ends with its time, however many answered before.
    asked = run(
        "serf", "query", f"-rpc-addr={four['s1'].rpc_addr}", "-format=json", "-timeout=3s", "load"
    )  # fmt: skip
    answers = json.loads(asked.stdout)
    assert {"s1", "s2"} <= set(answers["Acks"])
    assert answers["Responses"] == {"s1": "load of s1\n", "s2": "load of s2\n"}


@pytest.fixture
def stranger() -> Iterator[socket.socket]:
    """A socket of nobody in the cluster: what it tells one member, others hear from that member."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        udp.settimeout(0.2)
        yield udp


def test_serfd_passes_on_an_event_that_it_alone_was_told(agents, stranger):
    pair = agents.cluster(PAIR)
    streams = [Records(agent) for agent in pair.values()]
    event = UserEventMessage(10, "whispered", b"\0\xff", coalesce=False)
    stranger.sendto(USER + encode(event), ("127.0.0.1", pair["d1"].port))
    for records in streams:
        got = records.wait("the event", is_user_event("whispered"))
        payload = got["Payload"]
        raw = payload.encode("utf-8", "surrogateescape") if isinstance(payload, str) else payload
        assert (raw, got["LTime"]) == (b"\0\xff", 10)


def test_serfd_passes_on_a_query_that_it_alone_was_told(agents, stranger):
    pair = agents.cluster(PAIR, own={"s1": ["-event-handler=query:where=echo here"]})
    query = QueryMessage(
        ltime=10,
        id=4711,
        addr=socket.inet_aton("127.0.0.1"),
        port=stranger.getsockname()[1],
        source_node="stranger",
        filters=(),
        flags=ACK,
        relay_factor=0,
        timeout_ns=60 * 10**9,
        name="where",
        payload=b"",
    )
    stranger.sendto(USER + encode(query), ("127.0.0.1", pair["d1"].port))
    heard: set[tuple[str, bool, bytes]] = set()

    def answered() -> bool:
        try:
            data = stranger.recv(65536)
        except TimeoutError:
            return False
        # Not packed: these are shorter than any packing would make them.
        answer = decode(data.removeprefix(USER))
        assert isinstance(answer, QueryResponse)
        heard.add((answer.sender, bool(answer.flags & ACK), answer.payload))
        return {("s1", True, b""), ("s1", False, b"here\n")} <= heard

    until("the real agent acknowledged and answered", answered)
