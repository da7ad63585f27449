import dataclasses
from types import MappingProxyType

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_in import member

from serfd.rpc import messages
from serfd.rpc.messages import (
    I32,
    ITEMS_MAX,
    U64,
    UNDECODABLE,
    UNREAD_MAX,
    BadRequest,
    Header,
    boolean,
    octets,
    read_body,
    read_header,
    text,
    text_map,
    texts,
)
from serfd.serf.events import MemberEvent, MemberEventKind, Status, UserEvent


@pytest.mark.parametrize(
    ("read", "given", "value"),
    [
        (text, "a", "a"),
        (text, b"a\xff", "a\udcff"),
        (text, None, ""),
        (octets, b"\0", b"\0"),
        (octets, "a\udcff", b"a\xff"),
        (octets, None, b""),
        (boolean, True, True),
        (boolean, None, False),
        (I32, -(2**31), -(2**31)),
        (I32, None, 0),
        (U64, 2**64 - 1, 2**64 - 1),
        (texts, ["a", b"b", None], ["a", "b", ""]),
        (texts, None, []),
        (text_map, {"a": "b", b"c": None}, {"a": "b", "c": ""}),
        (text_map, None, {}),
    ],
)
def test_a_value_is_read_as_its_fields_type(read, given, value):
    assert read(given) == value
    assert type(read(given)) is type(value)


@pytest.mark.parametrize(
    ("read", "given", "error"),
    [
        (text, 5, "expected text, found int"),
        (octets, [1], "expected bytes, found list"),
        (boolean, 1, "expected a bool, found int"),
        (I32, True, "expected an integer from -2147483648 to 2147483647, found bool"),
        (I32, 2**31, "expected an integer from -2147483648 to 2147483647, found int"),
        (I32, 1.0, "expected an integer from -2147483648 to 2147483647, found float"),
        (U64, -1, "expected an integer from 0 to 18446744073709551615, found int"),
        (texts, "a", "expected a list of texts, found str"),
        (texts, [["a"]], "expected text, found list"),
        (text_map, ["a"], "expected a map of texts, found list"),
        (text_map, {1: "a"}, "expected text, found int"),
        (text_map, {"a": {}}, "expected text, found dict"),
    ],
)
def test_a_value_of_another_type_is_refused(read, given, error):
    with pytest.raises(BadRequest, match=f"^{error}$"):
        read(given)


FIELDS = (("Name", text), ("Coalesce", boolean), ("Seq", U64))


@pytest.mark.parametrize(
    ("body", "values"),
    [
        ({"Seq": 1, "Name": "a", "Coalesce": True}, ["a", True, 1]),
        ({"Name": "a", "Unknown": [1], "name": "b"}, ["a", False, 0]),
        ({}, ["", False, 0]),
        ({"Name": None}, ["", False, 0]),
        (["a", True, 1], ["a", True, 1]),
        (["a"], ["a", False, 0]),
        (["a", True, 1, "more"], ["a", True, 1]),
        ([], ["", False, 0]),
        (None, ["", False, 0]),
    ],
)
def test_a_body_is_a_map_or_the_list_of_its_fields(body, values):
    assert read_body(FIELDS, body) == values


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("text", "expected a map, found str"),
        (7, "expected a map, found int"),
        ({"Coalesce": 1}, "Coalesce: expected a bool, found int"),
        (["a", True, "b"], "Seq: expected an integer from 0 to 18446744073709551615, found str"),
    ],
)
def test_a_wrong_body_is_refused_by_the_name_of_its_field(body, error):
    with pytest.raises(BadRequest, match=f"^{error}$"):
        read_body(FIELDS, body)


@pytest.mark.parametrize(
    ("value", "header"),
    [
        ({"Command": "join", "Seq": 2}, Header("join", 2)),
        ({"Seq": 2}, Header("stats", 2)),
        ({"Command": "join"}, Header("join", 1)),
        ({"command": "join", "seq": 2}, Header("stats", 1)),
        ({"Command": None, "Seq": None}, Header("", 0)),
        (["join", 2], Header("join", 2)),
        (["join"], Header("join", 1)),
        ([], Header("stats", 1)),
        (["join", 2, "more"], Header("join", 2)),
    ],
)
def test_what_a_header_does_not_say_is_as_in_the_one_before(value, header):
    assert read_header(value, Header("stats", 1)) == header


@pytest.mark.parametrize(
    "value", ["join", 1, None, {"Command": 1}, {"Seq": "1"}, {"Seq": -1}, {"Seq": True}]
)
def test_a_wrong_header_is_refused(value):
    with pytest.raises(BadRequest, match=r"^expected "):
        read_header(value, Header("stats", 1))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.binary(max_size=40)
        | st.recursive(
            st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(0, 300), inner),
        ).map(msgpack.packb)
    )
)
def test_whatever_bytes_come_they_are_decoded_or_undecodable_and_read_or_refused(pieces):
    unpacker = messages.unpacker()
    try:
        for piece in pieces:
            unpacker.feed(piece)
            for value in unpacker:
                for read in (
                    lambda v: read_header(v, Header("", 0)),
                    lambda v: read_body(FIELDS, v),
                ):
                    try:
                        read(value)
                    except BadRequest:
                        continue
    except UNDECODABLE:
        assert any(pieces)


@pytest.mark.parametrize(
    "data",
    [
        b"\xc1",
        b"\x91" * 2000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdc" + (ITEMS_MAX + 1).to_bytes(2, "big"),
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\x81\x90\x01",
        b"\xd7\xff" + b"\xff" * 8,
    ],
    ids=["reserved", "deep", "long list", "list", "long map", "long text", "list as key", "time"],
)
def test_bytes_that_ask_for_too_much_are_undecodable(data):
    unpacker = messages.unpacker()
    unpacker.feed(data)
    with pytest.raises(UNDECODABLE):
        unpacker.unpack()


def test_more_than_the_limit_is_not_taken_in():
    unpacker = messages.unpacker()
    with pytest.raises(UNDECODABLE):
        unpacker.feed(bytes(UNREAD_MAX + 1))


def test_a_member_is_written_with_what_its_node_announced():
    strange = member("n\udcff", port=65535, status=Status.LEFT, addr=bytes(range(16)), tag="\udc80")
    packed = messages.PackedMembers([strange]).body
    assert msgpack.unpackb(packed, raw=True) == {
        b"Members": [
            {
                b"Addr": bytes(range(16)),
                b"DelegateCur": 5,
                b"DelegateMax": 5,
                b"DelegateMin": 2,
                b"Name": b"n\xff",
                b"Port": 65535,
                b"ProtocolCur": 2,
                b"ProtocolMax": 5,
                b"ProtocolMin": 1,
                b"Status": b"left",
                b"Tags": {b"tag": b"\x80"},
            }
        ]
    }
    assert messages.header(5).hex() == "82a54572726f72a0a353657105"


def test_tags_may_be_any_mapping():
    tags = MappingProxyType({"role": "web"})
    body = messages.PackedMembers([dataclasses.replace(member("n1"), tags=tags)]).body
    assert msgpack.unpackb(body)["Members"][0]["Tags"] == {"role": "web"}


@pytest.mark.parametrize(
    ("payload", "packed"), [(b"", "c0"), (b"\0", "c40100"), (b"ab", "c4026162")]
)
def test_an_empty_payload_is_written_as_nil(payload, packed):
    body = messages.event_body(UserEvent(200, "e", payload, coalesce=True))
    assert body.hex() == (
        "85a8436f616c65736365c3a54576656e74a475736572a54c54696d65ccc8a44e616d65a165a75061796c6f6164"
        + packed
    )


def test_an_event_of_members_lists_them_all():
    event = MemberEvent(MemberEventKind.REAP, (member("a"), member("b")))
    body = msgpack.unpackb(messages.event_body(event))
    assert body["Event"] == "member-reap"
    assert [m["Name"] for m in body["Members"]] == ["a", "b"]


@pytest.mark.parametrize("size", [31, 32, 255, 256])
def test_texts_are_written_in_the_shortest_form_that_fits(size):
    prefix = {31: "bf", 32: "d920", 255: "d9ff", 256: "da0100"}[size]
    assert messages.log_body("x" * size).hex() == "81a34c6f67" + prefix + "78" * size
