"""What happened: the values plugins and RPC clients see."""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import TypeAlias


class Status(IntEnum):
    """What Serf says of a member; the numbers are Serf's own (serf.md 6)."""

    NONE = 0
    ALIVE = 1
    LEAVING = 2
    LEFT = 3
    FAILED = 4

    @property
    def text(self) -> str:
        """`alive`, `leaving` …, as RPC and command line print it."""
        return _STATUS_TEXT[self]


_STATUS_TEXT = {status: status.name.lower() for status in Status}


@dataclass(frozen=True, slots=True)
class Member:
    """One member of the cluster, as it was at one moment."""

    name: str
    addr: bytes
    """4 or 16 bytes, exactly as gossiped (gossip.md 13.2)."""
    port: int
    """Its gossip port."""
    tags: Mapping[str, str]
    status: Status
    versions: bytes
    """Six numbers: memberlist protocol min, max, current; Serf protocol min, max, current."""

    @property
    def ip(self) -> str:
        """The address as text; an IPv4 address in IPv6 form is written as IPv4."""
        return ip_text(self.addr)

    @property
    def address(self) -> str:
        """`10.0.0.7:7946`, `[fd00::7]:7946`."""
        ip = self.ip
        return f"[{ip}]:{self.port}" if ":" in ip else f"{ip}:{self.port}"


def ip_text(addr: bytes) -> str:
    """4 or 16 address bytes as text; bytes of any other length as `?` and their hex."""
    if len(addr) == 16 and addr.startswith(b"\0\0\0\0\0\0\0\0\0\0\xff\xff"):
        addr = addr[12:]
    if len(addr) == 4:
        return ".".join(map(str, addr))
    if len(addr) == 16:
        return str(ipaddress.IPv6Address(addr))
    return "?" + addr.hex()


class MemberEventKind(Enum):
    """What can happen to members; the values are Serf's event names."""

    JOIN = "member-join"
    LEAVE = "member-leave"
    FAILED = "member-failed"
    UPDATE = "member-update"
    REAP = "member-reap"


@dataclass(frozen=True, slots=True)
class MemberEvent:
    """Something happened to one or more members at the same moment."""

    kind: MemberEventKind
    members: tuple[Member, ...]

    @property
    def name(self) -> str:
        """`member-join`, `member-failed` …"""
        return self.kind.value


@dataclass(frozen=True, slots=True)
class UserEvent:
    """Somebody told the whole cluster something."""

    ltime: int
    name: str
    payload: bytes
    coalesce: bool


@dataclass(frozen=True, slots=True)
class Query:
    """Somebody asks the cluster something; this node may answer, once."""

    ltime: int
    id: int
    """With the ltime it tells queries apart; for `respond`."""
    name: str
    payload: bytes
    source: str
    """The node that asks."""
    deadline: float
    """Monotonic seconds; later answers are not waited for."""


Event: TypeAlias = MemberEvent | UserEvent | Query
