"""The values that plugins and RPC clients see."""

import pytest
from one_node import VSN

from serfd.serf.events import Member, MemberEvent, MemberEventKind, Status, ip_text


@pytest.mark.parametrize(
    ("addr", "text"),
    [
        (b"\x7f\0\0\1", "127.0.0.1"),
        (b"\0" * 10 + b"\xff\xff\x0a\0\0\7", "10.0.0.7"),
        (b"\0" * 15 + b"\1", "::1"),
        (b"\xfe\x80" + b"\0" * 13 + b"\1", "fe80::1"),
        (b"\1\2\3", "?010203"),
    ],
)
def test_address_bytes_as_text(addr: bytes, text: str) -> None:
    assert ip_text(addr) == text


@pytest.mark.parametrize(
    ("addr", "text"),
    [(b"\x7f\0\0\1", "127.0.0.1:7946"), (b"\0" * 15 + b"\1", "[::1]:7946")],
)
def test_a_members_address_has_its_port(addr: bytes, text: str) -> None:
    assert Member("n", addr, 7946, {}, Status.ALIVE, VSN).address == text


def test_statuses_and_events_have_serfs_names() -> None:
    assert [status.text for status in Status] == ["none", "alive", "leaving", "left", "failed"]
    assert [MemberEvent(kind, ()).name for kind in MemberEventKind] == [
        "member-join",
        "member-leave",
        "member-failed",
        "member-update",
        "member-reap",
    ]
