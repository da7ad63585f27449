"""Messages of the Serf layer. Bytes of real agents are compared in test_golden.py."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serfd.errors import WireError
from serfd.wire import serf_messages as serf
from serfd.wire.gomsgpack import pack
from serfd.wire.serf_messages import (
    LTIME_MAX,
    ConflictMember,
    ConflictResponse,
    JoinIntent,
    KeyRequest,
    KeyResponse,
    LeaveIntent,
    PushPullState,
    QueryMessage,
    QueryResponse,
    Relay,
    SerfMessage,
    UserEventMessage,
    decode,
    decode_tags,
    encode,
    encode_tags,
)

Peak = Callable[[int], AbstractContextManager[None]]

names = st.binary(max_size=40).map(lambda name: name.decode("utf-8", "surrogateescape"))
raws = st.binary(max_size=40)
u8 = st.integers(0, 2**8 - 1)
u16 = st.integers(0, 2**16 - 1)
u32 = st.integers(0, 2**32 - 1)
ltimes = st.integers(0, LTIME_MAX)
tags = st.dictionaries(names, names, max_size=4)

# Each event in a slot of its own: two in one would be written over each other.
events = st.dictionaries(
    st.integers(0, 511), st.lists(st.tuples(names, raws), max_size=2), max_size=4
).map(lambda slots: sorted(slots.items()))

messages = st.one_of(
    st.builds(LeaveIntent, ltimes, names, st.booleans()),
    st.builds(JoinIntent, ltimes, names),
    st.builds(
        PushPullState,
        ltimes,
        st.dictionaries(names, ltimes, max_size=4),
        st.lists(names, max_size=3),
        ltimes,
        events,
        ltimes,
    ),
    st.builds(UserEventMessage, ltimes, names, raws, st.booleans()),
    st.builds(
        QueryMessage,
        ltimes,
        u32,
        raws,
        u16,
        names,
        st.lists(raws, max_size=3).map(tuple),
        u32,
        u8,
        st.integers(-(2**63), 2**63 - 1),
        names,
        raws,
    ),
    st.builds(QueryResponse, ltimes, u32, names, u32, raws),
    st.builds(
        ConflictResponse,
        st.none()
        | st.builds(
            ConflictMember,
            names,
            raws,
            u16,
            tags,
            st.integers(0, 4),
            st.binary(min_size=6, max_size=6),
        ),
    ),
    st.builds(KeyRequest, raws),
    st.builds(KeyResponse, st.booleans(), names, st.lists(names, max_size=3), names),
    st.builds(Relay, raws, u16, names, raws),
)


@settings(max_examples=100, deadline=None)
@given(messages)
def test_a_message_comes_out_as_it_went_in(message: SerfMessage) -> None:
    again = decode(encode(message))
    assert again == message
    assert type(again) is type(message)


@settings(max_examples=100, deadline=None)
@given(messages)
def test_fields_are_written_sorted_by_name(message: SerfMessage) -> None:
    unpacker = msgpack.Unpacker(raw=True)
    unpacker.feed(encode(message)[1:])
    keys = list(unpacker.unpack() or ())
    assert keys == sorted(keys)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (0, LeaveIntent(0, "", prune=False)),
        (1, JoinIntent(0, "")),
        (2, PushPullState(0, {}, [], 0, [], 0)),
        (3, UserEventMessage(0, "", b"", coalesce=False)),
        (4, QueryMessage(0, 0, b"", 0, "", (), 0, 0, 0, "", b"")),
        (5, QueryResponse(0, 0, "", 0, b"")),
        (6, ConflictResponse(ConflictMember("", b"", 0, {}, 0, bytes(6)))),
        (7, KeyRequest(b"")),
        (8, KeyResponse(False, "", [], "")),
        (9, Relay(b"", 0, "", b"")),
    ],
)
def test_missing_fields_are_zero(number: int, message: SerfMessage) -> None:
    assert decode(bytes((number, 0x80))) == message


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "an empty Serf message"),
        (b"\x0a\x80", "unknown Serf message type 10"),
        (b"\xff\x80", "unknown Serf message type 255"),
        (b"\x00", "leave intent: not msgpack, or not a map"),
        (b"\x00" + pack({"Prune": 1}), "leave intent: Prune is 1, expected true or false"),
        (b"\x01" + pack({"Node": 1}), "join intent: Node is 1, expected text"),
        (b"\x03" + pack({"Name": 1}), "user event: Name is 1, expected text"),
        (
            b"\x04" + pack({"RelayFactor": 256}),
            "query: RelayFactor is 256, expected an unsigned 8 bit number",
        ),
        (b"\x04" + pack({"Filters": b"x"}), "query: Filters is 'x', expected a list"),
        (
            b"\x05" + pack({"ID": -1}),
            "query response: ID is -1, expected an unsigned 32 bit number",
        ),
        (b"\x06" + pack({"Tags": 1}), "conflict response: Tags is something else than a map"),
        (b"\x06" + pack({"Tags": {"a": 1}}), "conflict response: a is 1, expected text"),
        (b"\x07" + pack({"Key": 1}), "key request: Key is 1, expected bytes"),
        (b"\x08" + pack({"Keys": [1]}), "key response: Keys is 1, expected raws only"),
        (b"\x09" + pack({"DestAddr": 1}), "relay: DestAddr is something else than a map"),
        (
            b"\x09" + pack({"DestAddr": {"Port": -1}}),
            "relay: Port is -1, expected an unsigned 16 bit number",
        ),
        (
            b"\x02" + pack({"StatusLTimes": {"a": "x"}}),
            "push/pull state: StatusLTimes is 'x', expected an unsigned 64 bit number",
        ),
        (
            b"\x02" + pack({"StatusLTimes": {5: 5}}),
            "push/pull state: StatusLTimes is 5, expected raws only",
        ),
        (
            b"\x02" + pack({"LeftMembers": [5]}),
            "push/pull state: LeftMembers is 5, expected raws only",
        ),
        (b"\x02" + pack({"Events": [5]}), "push/pull event: not msgpack, or not a map"),
        (
            b"\x02" + pack({"Events": [{"Events": [5]}]}),
            "push/pull event: is 5, expected a map",
        ),
        (
            b"\x02" + pack({"Events": [None] * 65537}),
            "push/pull state: 65537 entries, at most 65536 expected",
        ),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_broken_message_is_a_wire_error_that_says_what_is_wrong(data: bytes, fault: str) -> None:
    with pytest.raises(WireError) as caught:
        decode(data)
    assert str(caught.value) == fault


@pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 5])
def test_a_lamport_time_that_would_wrap_a_clock_is_refused(number: int) -> None:
    head = bytes((number,))
    highest = decode(head + pack({"LTime": LTIME_MAX}))
    assert highest[0] == LTIME_MAX
    with pytest.raises(WireError, match="LTime is 18446744073709551615, expected at most"):
        decode(head + pack({"LTime": LTIME_MAX + 1}))


@pytest.mark.parametrize(
    "fields",
    [
        {"EventLTime": LTIME_MAX + 1},
        {"QueryLTime": LTIME_MAX + 1},
        {"StatusLTimes": {"\udcff": LTIME_MAX + 1}},
        {"Events": [{"LTime": LTIME_MAX + 1}]},
    ],
    ids=str,
)
def test_so_is_one_deep_in_a_push_pull(fields: dict[str, object]) -> None:
    with pytest.raises(WireError, match="is 18446744073709551615, expected at most"):
        decode(b"\x02" + pack(fields))


def test_events_go_to_the_slot_of_their_time_and_only_used_slots_come_back() -> None:
    state = PushPullState(9, {}, [], 600, [(600, [("new", b"1")]), (100, [("old", b"")])], 3)
    encoded = encode(state)
    slots = msgpack.unpackb(encoded[1:])["Events"]
    assert len(slots) == serf.EVENT_SLOTS
    assert slots[600 % 512] == {"Events": [{"Name": "new", "Payload": "1"}], "LTime": 600}
    assert slots[100] == {"Events": [{"Name": "old", "Payload": None}], "LTime": 100}
    again = decode(encoded)
    assert isinstance(again, PushPullState)
    assert again.events == [(600, [("new", b"1")]), (100, [("old", b"")])]


def test_many_large_events_of_one_time_are_read() -> None:
    events = [(7, [(f"event-{number}", b"x" * 9000) for number in range(40)])]
    state = PushPullState(9, {}, [], 8, events, 3)
    assert decode(encode(state)) == state


def test_a_relayed_message_is_left_as_it_is() -> None:
    relay = Relay(b"1234", 7946, "a", b"\x05\x80 whatever")
    assert encode(relay).endswith(b"\x05\x80 whatever")
    assert decode(encode(relay)) == relay


@pytest.mark.parametrize(
    ("tags", "protocol", "meta"),
    [
        ({}, 5, b"\xff\x80"),
        ({"role": "web", "dc": "é"}, 5, b"\xff\x82\xa2dc\xa2\xc3\xa9\xa4role\xa3web"),
        ({"role": "web", "dc": "east"}, 3, b"\xff\x82\xa2dc\xa4east\xa4role\xa3web"),
        ({"role": "web", "dc": "east"}, 2, b"web"),
        ({"role": "\udcfe"}, 2, b"\xfe"),
        ({}, 2, b""),
    ],
)
def test_tags_are_written_as_the_protocol_has_them(
    tags: dict[str, str], protocol: int, meta: bytes
) -> None:
    assert encode_tags(tags, protocol=protocol) == meta


@settings(max_examples=60, deadline=None)
@given(tags)
def test_tags_come_out_as_they_went_in(tags: dict[str, str]) -> None:
    assert decode_tags(encode_tags(tags, protocol=5)) == tags


@pytest.mark.parametrize(
    ("meta", "tags"),
    [
        (b"", {"role": ""}),
        (b"web\xfe", {"role": "web\udcfe"}),
        (b"\xff", {}),
        (b"\xff\x81\xa1a", {}),
        (b"\xff\x81\xa1a\x01", {}),
        (b"\xff\x81\xa1a\xc0", {"a": ""}),
        (b"\xff\x91\x01", {}),
    ],
)
def test_metadata_of_any_kind_is_read(meta: bytes, tags: dict[str, str]) -> None:
    assert decode_tags(meta) == tags


def test_keys_appear_in_no_text() -> None:
    secret = "c2VjcmV0IHNlY3JldCEhIQ=="
    assert repr(KeyRequest(b"secret secret!!!")) == "KeyRequest(<16 bytes>)"
    shown = repr(KeyResponse(True, "fine", [secret, secret], secret))
    assert shown == "KeyResponse(True, 'fine', <2 keys>)"


@settings(max_examples=100, deadline=None)
@given(messages.map(encode) | st.binary(max_size=80), st.integers(0, 80), st.binary(max_size=3))
def test_arbitrary_and_broken_bytes_raise_nothing_but_wire_errors(
    data: bytes, place: int, noise: bytes
) -> None:
    for one in (data, data[:place] + noise + data[place + 1 :]):
        decode_tags(one)
        for number in range(10):
            try:
                decode(bytes((number,)) + one[1:])
            except WireError:
                continue


@pytest.mark.parametrize(
    "fields",
    [
        b"\x81\xa6Events\xdd\xff\xff\xff\xff",
        b"\x81\xabLeftMembers\xdd\x00\x98\x96\x80" + b"\xa0" * 10_000_000,
        b"\x81\xacStatusLTimes\xdf\x00\x4c\x4b\x40" + b"\xa0\x00" * 5_000_000,
        b"\x81\xacStatusLTimes\x81\xa1a" + b"\x81\xa1a" * 3_000_000 + b"\xc0",
        b"\x81\xa5LTime\xdd\x00\x98\x96\x80" + b"\x80" * 10_000_000,
        b"\x81\xa5LTime\x81\xa1a\xdd\x00\x98\x96\x80" + b"\x80" * 10_000_000,
        b"\x81\xa6Events\x91\x81\xa6Events\xdd\x00\x98\x96\x80" + b"\x80" * 10_000_000,
        b"\x81\xa6Events\xdc\x01\x00" + (b"\x81\xa6Events\xdc\xea\x60" + b"\x80" * 60_000) * 256,
        b"\xdf\x00\x4c\x4b\x40" + b"\xa0\x00" * 5_000_000,
    ],
    ids=lambda bomb: bomb[:16].hex(),
)
def test_a_push_pull_state_that_announces_too_much_uses_no_memory(
    fields: bytes, peak_below: Peak
) -> None:
    # A step copies what it looks into, six times in the deepest case; the rest are the events that
    # are allowed.
    with peak_below(7 * len(fields) + (16 << 20)), pytest.raises(WireError):
        decode(b"\x02" + fields)
