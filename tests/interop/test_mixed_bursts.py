"""Bursts of user events in clusters of real Serf agents and ours."""

import socket

import msgpack
import pytest
from processes import Records, until_is

pytestmark = pytest.mark.interop

BURST = 1000


def number(record) -> int:
    """Which event of the burst this is."""
    return int(bytes(record["Payload"])[:4])


def send(agent, *events: dict[str, object]) -> None:
    """Send all these events over one connection without waiting, then see each accepted."""
    requests: list[dict[str, object]] = [{"Command": "handshake", "Seq": 0}, {"Version": 1}]
    for seq, event in enumerate(events, 1):
        requests += [{"Command": "event", "Seq": seq}, {**event, "Coalesce": False}]
    host, _, port = agent.rpc_addr.rpartition(":")
    replies = msgpack.Unpacker()
    with socket.create_connection((host, int(port)), timeout=60.0) as tcp:
        tcp.sendall(b"".join(map(msgpack.packb, requests)))
        for seq in range(len(events) + 1):
            while (reply := next(replies, None)) is None:
                replies.feed(tcp.recv(65536))
            assert reply == {"Error": "", "Seq": seq}


@pytest.mark.parametrize(("ours", "real"), [(3, 3), (1, 5)])
def test_a_burst_through_one_of_ours_is_heard_once_by_all_and_by_ours_in_order(agents, ours, real):
    kinds = dict.fromkeys([f"d{i}" for i in range(ours)], "serfd")
    kinds |= dict.fromkeys([f"s{i}" for i in range(real)], "serf")
    six = agents.cluster(kinds)
    streams = {name: Records(agent, "user") for name, agent in six.items()}
    # A stream is open some time after its request.
    send(six["d0"], {"Name": "first"})
    for records in streams.values():
        records.wait("the first event", lambda record: record["Name"] == "first")
    payloads = [(b"%04d" % i).ljust(100, b".") for i in range(BURST)]
    send(six["d0"], *[{"Name": "burst", "Payload": payload} for payload in payloads])
    for name, records in streams.items():

        def heard(records=records) -> list[int]:
            return [number(record) for record in list(records.got) if record["Name"] == "burst"]

        until_is(f"events at {name}", lambda heard=heard: sorted(heard()), list(range(BURST)))
        if kinds[name] == "serfd":
            # Real agents hand on what comes as it comes.
            assert heard() == list(range(BURST))
