"""Messages of the gossip layer. Bytes of real agents are compared in test_golden.py."""

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serfd.errors import WireError
from serfd.wire import swim_messages as swim
from serfd.wire.gomsgpack import pack
from serfd.wire.swim_messages import (
    Ack,
    Alive,
    Dead,
    IndirectPing,
    Message,
    Nack,
    NodeState,
    Ping,
    StreamError,
    Suspect,
    User,
    decode,
    decode_node_state,
    decode_push_pull_head,
    decode_user_length,
    encode,
)

# Names are bytes to a peer: any that came in must go out as they were.
names = st.binary(max_size=40).map(lambda name: name.decode("utf-8", "surrogateescape"))
raws = st.binary(max_size=40)
u16 = st.integers(0, 2**16 - 1)
u32 = st.integers(0, 2**32 - 1)

messages = st.one_of(
    st.builds(Ping, u32, names, raws, u16, names),
    st.builds(IndirectPing, u32, raws, u16, names, st.booleans(), raws, u16, names),
    st.builds(Ack, u32, raws),
    st.builds(Nack, u32),
    st.builds(Suspect, u32, names, names),
    st.builds(Alive, u32, names, raws, u16, raws, raws),
    st.builds(Dead, u32, names, names),
    st.builds(User, raws),
)

states = st.builds(NodeState, names, raws, u16, raws, u32, st.integers(0, 3), raws)


@settings(max_examples=100, deadline=None)
@given(messages)
def test_a_message_comes_out_as_it_went_in(message: Message) -> None:
    again = decode(encode(message))
    assert again == message
    assert type(again) is type(message)


@settings(max_examples=100, deadline=None)
@given(messages)
def test_fields_are_written_sorted_by_name(message: Message) -> None:
    if isinstance(message, User):
        return
    keys = list(msgpack.unpackb(encode(message)[1:], raw=True))
    assert keys == sorted(keys)


@pytest.mark.parametrize(
    ("message", "body"),
    [
        (Ping(1, "b"), {"Node": "b", "SeqNo": 1}),
        (Ping(1, "b", source_port=5), {"Node": "b", "SeqNo": 1, "SourcePort": 5}),
        (Ping(1, "b", source_node="a"), {"Node": "b", "SeqNo": 1, "SourceNode": "a"}),
        (Ping(1, "b", source_addr=b"1234"), {"Node": "b", "SeqNo": 1, "SourceAddr": "1234"}),
        (
            IndirectPing(1, b"", 0, "", nack=False),
            {"Nack": False, "Node": "", "Port": 0, "SeqNo": 1, "Target": ""},
        ),
        (Ack(0), {"Payload": None, "SeqNo": 0}),
        (
            Alive(1, "a", b"1234", 0, b"", b""),
            {"Addr": "1234", "Incarnation": 1, "Meta": None, "Node": "a", "Port": 0, "Vsn": ""},
        ),
    ],
    ids=str,
)
def test_an_empty_field_is_left_out_or_written_as_real_agents_do(
    message: Message, body: dict[str, object]
) -> None:
    assert encode(message)[1:] == pack(body)


def test_missing_fields_are_zero() -> None:
    assert decode(b"\x00\x80") == Ping(0, "")
    assert decode(b"\x01\x80") == IndirectPing(0, b"", 0, "", nack=False)
    assert decode(b"\x02\x80") == Ack(0)
    assert decode(b"\x03\x80") == Suspect(0, "", "")
    assert decode(b"\x04\x80") == Alive(0, "", b"", 0, b"", b"")
    assert decode(b"\x05\x80") == Dead(0, "", "")
    assert decode(b"\x0b\x80") == Nack(0)
    assert decode_node_state(b"\x80") == NodeState("", b"", 0, b"", 0, 0, b"")
    assert decode_push_pull_head(b"\x80") == (0, 0, False)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "an empty message"),
        (b"\x06\x80", "message type 6 has no place in a packet"),
        (b"\x07\x00", "message type 7 has no place in a packet"),
        (b"\x0a\x80", "message type 10 has no place in a packet"),
        (b"\x0c\x00\x00\x00\x00", "message type 12 has no place in a packet"),
        (b"\x0d\x80", "message type 13 has no place in a packet"),
        (b"\xf4\x01a", "message type 244 has no place in a packet"),
        (b"\x00", "ping: not msgpack, or not a map"),
        (b"\x00" + pack({"SeqNo": "x"}), "ping: SeqNo is 'x', expected an unsigned 32 bit number"),
        (b"\x01" + pack({"Nack": 1}), "indirect ping: Nack is 1, expected true or false"),
        (b"\x02" + pack({"Payload": 1}), "ack: Payload is 1, expected bytes"),
        (b"\x03" + pack({"From": 1}), "suspect: From is 1, expected text"),
        (
            b"\x04" + pack({"Port": 65536}),
            "alive: Port is 65536, expected an unsigned 16 bit number",
        ),
        (b"\x04" + pack({"Vsn": [1, 5]}), "alive: Vsn is a list, expected bytes"),
        (
            b"\x05" + pack({"Incarnation": -1}),
            "dead: Incarnation is -1, expected an unsigned 32 bit number",
        ),
        (b"\x0b" + pack({"SeqNo": 1.0}), "nack: SeqNo is 1.0, expected an unsigned 32 bit number"),
    ],
)
def test_a_broken_message_is_a_wire_error_that_says_what_is_wrong(data: bytes, fault: str) -> None:
    with pytest.raises(WireError) as caught:
        decode(data)
    assert str(caught.value) == fault


@settings(max_examples=100, deadline=None)
@given(messages.map(encode) | st.binary(max_size=80), st.integers(0, 80), st.binary(max_size=3))
def test_arbitrary_and_broken_bytes_raise_nothing_but_wire_errors(
    data: bytes, place: int, noise: bytes
) -> None:
    broken = data[:place] + noise + data[place + 1 :]
    for one in (data, broken):
        for read in (
            decode,
            decode_node_state,
            decode_push_pull_head,
            decode_user_length,
            swim.decode_stream_error,
        ):
            try:
                read(one)
            except WireError:
                continue


def test_an_err_answer_comes_out_as_it_went_in() -> None:
    error = StreamError("no installed keys could decrypt the message")
    encoded = encode(error)
    assert encoded[0] == swim.ERR
    assert swim.decode_stream_error(encoded[1:]) == error


@settings(max_examples=60, deadline=None)
@given(states)
def test_a_node_state_comes_out_as_it_went_in(state: NodeState) -> None:
    assert decode_node_state(swim.encode_node_state(state)) == state


def test_equal_tags_and_versions_are_kept_once() -> None:
    encoded = [
        swim.encode_node_state(NodeState(f"n{number}", b"1234", 1, b"m" * 300, 1, 0, b"v" * 6))
        for number in range(3)
    ]
    decoded = [decode_node_state(state) for state in encoded]
    alive = decode(encode(Alive(1, "n4", b"1234", 1, b"m" * 300, b"v" * 6)))
    assert isinstance(alive, Alive)
    assert all(one.meta is alive.meta for one in decoded)
    assert all(one.vsn is alive.vsn for one in decoded)


def test_a_push_pull_is_a_head_the_states_and_the_user_state() -> None:
    nodes = [NodeState("a", b"1234", 7946, b"", 1, 0, b"123456")]
    body = swim.encode_push_pull(iter(nodes), b"serf", join=True)
    head = pack({"Join": True, "Nodes": 1, "UserStateLen": 4})
    assert body == b"\x06" + head + swim.encode_node_state(nodes[0]) + b"serf"
    assert decode_push_pull_head(head) == (1, 4, True)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"Nodes": swim.NODES_MAX + 1}, "push/pull announces 1048577 nodes, at most 1048576"),
        ({"Nodes": -1}, "push/pull announces -1 nodes"),
        ({"UserStateLen": swim.USER_BYTES_MAX + 1}, "UserStateLen is 20971521, at most 20971520"),
        ({"UserStateLen": -1}, "UserStateLen is -1"),
        ({"Join": "yes"}, "Join is 'yes', expected true or false"),
    ],
)
def test_a_push_pull_over_its_limits_is_refused(fields: dict[str, object], fault: str) -> None:
    with pytest.raises(WireError, match=fault):
        decode_push_pull_head(pack(fields))


def test_a_push_pull_at_its_limits_is_taken() -> None:
    head = {"Nodes": swim.NODES_MAX, "UserStateLen": swim.USER_BYTES_MAX}
    assert decode_push_pull_head(pack(head)) == (swim.NODES_MAX, swim.USER_BYTES_MAX, False)


def test_a_user_message_on_a_stream_says_its_length() -> None:
    assert swim.encode_user_stream(b"serf") == b"\x08" + pack({"UserMsgLen": 4}) + b"serf"
    assert decode_user_length(pack({"UserMsgLen": 4})) == 4
    with pytest.raises(WireError, match="UserMsgLen is 20971521, at most 20971520 bytes allowed"):
        decode_user_length(pack({"UserMsgLen": swim.USER_BYTES_MAX + 1}))
