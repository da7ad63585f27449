"""Every recorded packet, stream and Serf message decodes to its meaning and is written again."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from serfd.wire import serf_messages as serf
from serfd.wire import swim_messages as swim
from serfd.wire.envelope import Envelope
from serfd.wire.packet import PacketCodec
from serfd.wire.sealing import Keyring
from serfd.wire.stream import StreamReader, UserState, UserStream, seal_stream

GOLDEN = Path(__file__).parents[1] / "golden"

VECTORS = [
    vector
    for path in sorted((GOLDEN / "gossip").glob("*.json"))
    for vector in json.loads(path.read_text())["vectors"]
]
PACKETS = [vector for vector in VECTORS if vector["transport"] == "udp"]
STREAMS = [vector for vector in VECTORS if vector["transport"] == "tcp"]
SERF_VECTORS = json.loads((GOLDEN / "serf.json").read_text())["vectors"]

# The same meaning in other bytes: newer agents write positive numbers of signed fields in signed
# form, and the test peer did not sort its keys. All others must come out byte for byte.
SIGNED_FORMS = {"new-pushpull-join-request", "new-query", "addr-bound-to-any"}
UNSORTED_KEYS = {"enc-v0-packet", "enc-second-key", "enc-v0-stream"}
OTHER_BYTES = SIGNED_FORMS | UNSORTED_KEYS

TYPE_NAMES = {
    swim.Ping: "ping",
    swim.IndirectPing: "indirectPing",
    swim.Ack: "ackResp",
    swim.Nack: "nackResp",
    swim.StreamError: "err",
    swim.Suspect: "suspect",
    swim.Alive: "alive",
    swim.Dead: "dead",
    swim.User: "user",
    UserStream: "user",
    serf.LeaveIntent: "leave",
    serf.JoinIntent: "join",
    serf.UserEventMessage: "userEvent",
    serf.QueryMessage: "query",
    serf.QueryResponse: "queryResponse",
    serf.Relay: "relay",
    serf.PushPullState: "pushPull",
}

WIRE_NAMES = {
    "seq": "SeqNo",
    "node": "Node",
    "source_addr": "SourceAddr",
    "source_port": "SourcePort",
    "source_node": "SourceNode",
    "target": "Target",
    "port": "Port",
    "nack": "Nack",
    "payload": "Payload",
    "text": "Error",
    "incarnation": "Incarnation",
    "accuser": "From",
    "addr": "Addr",
    "meta": "Meta",
    "vsn": "Vsn",
    "name": "Name",
    "state": "State",
    "nodes": "Nodes",
    "user_state_len": "UserStateLen",
    "join": "Join",
    "ltime": "LTime",
    "prune": "Prune",
    "coalesce": "CC",
    "id": "ID",
    "sender": "From",
    "flags": "Flags",
    "filters": "Filters",
    "relay_factor": "RelayFactor",
    "timeout_ns": "Timeout",
    "status_ltimes": "StatusLTimes",
    "left_members": "LeftMembers",
    "event_ltime": "EventLTime",
    "query_ltime": "QueryLTime",
}


def ident(vector: dict[str, Any]) -> str:
    return str(vector["id"])


def meaning(value: Any) -> Any:
    """A value of ours in the form the vectors have it."""
    if isinstance(value, bytes):
        return f"hex:{value.hex()}" if value else None
    if isinstance(value, tuple):
        return [meaning(one) for one in value] or None
    return value


def stated(value: Any) -> Any:
    """A stated value, with empty bytes as nil: the two are the same to a reader."""
    return None if value == "hex:" else value


def check_fields(message: NamedTuple, fields: dict[str, Any]) -> None:
    found = {
        WIRE_NAMES[name]: meaning(value)
        for name, value in message._asdict().items()
        if name in WIRE_NAMES
    }
    for name, value in fields.items():
        assert found.pop(name) == stated(value), name
    assert not any(found.values()), "what was not on the wire is empty"


def check_serf(payload: bytes, tree: dict[str, Any]) -> None:
    message = serf.decode(payload)
    assert TYPE_NAMES[type(message)] == tree["type"]
    match message:
        case serf.Relay(addr, port, name, inner):
            target = {"IP": meaning(addr), "Port": port, "Zone": ""}
            assert tree["fields"] == {"DestAddr": target, "DestName": name}
            check_serf(inner, tree["inner"])
        case serf.PushPullState():
            events = [
                {
                    "Events": [{"Name": name, "Payload": meaning(data)} for name, data in events],
                    "LTime": ltime,
                }
                for ltime, events in message.events
            ]
            fields = dict(tree["fields"])
            assert fields.pop("Events")["used"] == events
            check_fields(message, fields)
        case _:
            check_fields(message, tree["fields"])


def innermost(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages in a decoded tree, without the envelopes around them."""
    if tree["type"] == "compress":
        return innermost(tree["inner"])
    return tree["parts"] if tree["type"] == "compound" else [tree]


def envelope_of(vector: dict[str, Any]) -> Envelope:
    """How the sender wraps: its label, its keys with the one it used first, its compression."""
    layers = {layer["layer"]: layer for layer in vector["decoded"]["layers"]}
    keys = [bytes.fromhex(key) for key in vector.get("keys") or []]
    if "encrypt" in layers:
        keys.insert(0, keys[layers["encrypt"]["key"]])
    label = layers["label"]["label"] if "label" in layers else vector.get("label", "")
    return Envelope(
        label=label.encode(), keyring=Keyring(keys), compress="compress" in vector["types"]
    )


def unlabelled(raw: bytes) -> bytes:
    return raw[2 + raw[1] :] if raw[0] == swim.HAS_LABEL else raw


@pytest.mark.parametrize("vector", PACKETS, ids=ident)
def test_a_recorded_packet_decodes_to_its_meaning_and_is_written_again(
    vector: dict[str, Any],
) -> None:
    envelope = envelope_of(vector)
    raw = bytes.fromhex(vector["raw"])
    messages, faults = PacketCodec(envelope).open(raw)

    assert faults == []
    trees = innermost(vector["decoded"]["message"])
    assert [TYPE_NAMES[type(message)] for message in messages] == [tree["type"] for tree in trees]
    for message, tree in zip(messages, trees, strict=True):
        if isinstance(message, swim.User):
            check_serf(message.payload, tree["serf"])
            if vector["id"] not in OTHER_BYTES:
                assert serf.encode(serf.decode(message.payload)) == message.payload
        else:
            check_fields(message, tree["fields"])

    if vector["id"] in OTHER_BYTES:
        return
    again = PacketCodec(envelope).seal(
        [swim.encode(message) for message in messages],
        crc="crc" in vector["types"],
        nonce=lambda: unlabelled(raw)[1:13],
    )
    assert again == raw


@pytest.mark.parametrize("step", [1, 40, 1 << 20], ids=["bytewise", "in pieces", "at once"])
@pytest.mark.parametrize("vector", STREAMS, ids=ident)
def test_a_recorded_stream_decodes_to_its_meaning_and_is_written_again(
    vector: dict[str, Any], step: int
) -> None:
    envelope = envelope_of(vector)
    raw = bytes.fromhex(vector["raw"])
    calling = raw[0] == swim.HAS_LABEL or not envelope.label
    reader = StreamReader(envelope, accepting=calling)
    items = []
    for start in range(0, len(raw), step):
        reader.feed(raw[start : start + step])
        while reader.pending:
            items += reader.read()

    (tree,) = innermost(vector["decoded"]["message"])
    match items:
        case [swim.PushPullHead() as head, *rest, UserState(user_state)]:
            states = [item for item in rest if isinstance(item, swim.NodeState)]
            assert states == rest
            check_fields(head, tree["fields"])
            for state, stated_node in zip(states, tree["nodes"], strict=True):
                check_fields(state, stated_node["fields"])
            if user_state:
                check_serf(user_state, tree["serf"])
                assert serf.encode(serf.decode(user_state)) == user_state
            body = swim.encode_push_pull(states, user_state, join=head.join)
        case [UserStream(payload)]:
            check_serf(payload, tree["serf"])
            body = swim.encode_user_stream(payload)
        case [swim.Ping() | swim.Ack() | swim.StreamError() as message]:
            assert TYPE_NAMES[type(message)] == tree["type"]
            check_fields(message, tree["fields"])
            body = swim.encode(message)
        case _:
            pytest.fail(f"not what one stream carries: {items}")

    if vector["id"] in OTHER_BYTES:
        return
    nonce = unlabelled(raw)[6:18]
    assert seal_stream(body, envelope, calling=calling, nonce=lambda: nonce) == raw


@pytest.mark.parametrize(
    "vector",
    [vector for vector in SERF_VECTORS if "type" in vector],
    ids=lambda vector: vector["name"],
)
def test_a_recorded_serf_message_decodes_and_is_written_again(vector: dict[str, Any]) -> None:
    raw = bytes.fromhex(vector["hex"])
    message = serf.decode(raw)
    assert serf.encode(message) == raw
    payload = getattr(message, "payload", b"")
    if "payload_type" in vector:
        assert payload[0] == vector["payload_type"]
        assert serf.encode(serf.decode(payload)) == payload


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("join", serf.JoinIntent(1, "n2")),
        ("leave-n2-prune", serf.LeaveIntent(5, "n2", prune=True)),
        ("userEvent-nopay", serf.UserEventMessage(2, "nopay", b"", coalesce=False)),
        ("queryResponse-ack", serf.QueryResponse(1, 2064206229, "n2", serf.IS_ACK, b"")),
        (
            "query-load2",
            serf.QueryMessage(
                ltime=2,
                id=1876730573,
                addr=b"\x7f\0\0\1",
                port=17001,
                source_node="n1",
                filters=(),
                flags=serf.WANTS_ACK,
                relay_factor=1,
                timeout_ns=1_000_000_000,
                name="load2",
                payload=b"",
            ),
        ),
        (
            "relay",
            serf.Relay(
                b"\x7f\0\0\1",
                17001,
                "n1",
                serf.encode(serf.QueryResponse(2, 1876730573, "n1", serf.IS_ACK, b"")),
            ),
        ),
        (
            "pushPull",
            serf.PushPullState(
                ltime=6,
                status_ltimes={"n1": 0, "n3": 3, "n4": 2},
                left_members=["n3"],
                event_ltime=4,
                events=[
                    (1, [("deploy", b"v1.2")]),
                    (2, [("nopay", b"")]),
                    (3, [("a-name-of-more-than-31-characters-x", b"x" * 40)]),
                ],
                query_ltime=4,
            ),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_recorded_serf_messages_mean_what_was_done(name: str, message: serf.SerfMessage) -> None:
    (vector,) = [vector for vector in SERF_VECTORS if vector["name"] == name]
    assert serf.decode(bytes.fromhex(vector["hex"])) == message


@pytest.mark.parametrize("name", ["nodeMeta-n1", "nodeMeta-n3"])
def test_recorded_metadata_reads_as_its_tags(name: str) -> None:
    (vector,) = [vector for vector in SERF_VECTORS if vector["name"] == name]
    meta = bytes.fromhex(vector["hex"])
    tags = serf.decode_tags(meta)
    assert tags == vector["decoded"]
    # Real agents write tags in any order, so only the content can be the same.
    again = serf.encode_tags(tags, protocol=5)
    assert len(again) == len(meta)
    assert serf.decode_tags(again) == tags


@pytest.mark.parametrize(
    "vector",
    [vector for vector in VECTORS if vector["id"] in {"enc-v0-packet", "enc-v0-stream"}],
    ids=ident,
)
def test_a_message_sealed_with_version_0_is_sealed_again(vector: dict[str, Any]) -> None:
    raw = bytes.fromhex(vector["raw"])
    keyring = envelope_of(vector).keyring
    header = raw[:5] if vector["transport"] == "tcp" else b""
    sealed = raw[len(header) :]
    plain = keyring.open(sealed, associated=header)
    assert keyring.seal(plain, associated=header, nonce=sealed[1:13], version=0) == sealed
