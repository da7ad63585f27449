"""What the core asks of the world: the types that cross the border.

The core never calls out. Everything it wants leaves as one of these, in one list, in order.
They are named tuples because a busy node makes thousands of them a second.
"""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

T = TypeVar("T")

StreamId: TypeAlias = int
"""A TCP connection's number. The core numbers all streams, opened and accepted."""

NonceSource: TypeAlias = Callable[[], bytes]
"""Gives 12 fresh random bytes at each call."""


class Address(NamedTuple):
    """Where a socket can reach a peer."""

    host: str
    """An IP address as text, never a name; IPv6 without brackets."""
    port: int

    def __str__(self) -> str:
        """`127.0.0.1:7946`, `[::1]:7946`."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Command(Generic[T]):
    """A ticket for something the owner asked; `Finish` brings its result of type T."""

    __slots__ = ("what",)

    def __init__(self, what: str) -> None:
        self.what = what

    def __repr__(self) -> str:
        """Named by what was asked."""
        return f"<Command {self.what}>"


class SendPacket(NamedTuple):
    """Send one datagram."""

    data: bytes
    to: Address


class Connect(NamedTuple):
    """Open a TCP connection. Its end, good or bad, comes back as `stream_closed`."""

    stream: StreamId
    to: Address


class Write(NamedTuple):
    """Write to a stream, once it is open."""

    stream: StreamId
    data: bytes


class Close(NamedTuple):
    """Close a stream after the last write; the core hears no more of it."""

    stream: StreamId


class Emit(NamedTuple):
    """Pass an event to whoever listens."""

    event: Any
    """One of `serfd.serf.events.Event`."""


class Finish(NamedTuple):
    """A command is done."""

    command: Command[Any]
    result: Any
    """What the command promised, or a `CommandError`."""


class Answer(NamedTuple):
    """Something came in for a command that is still under way: for who asked, and nobody else."""

    command: Command[Any]
    answer: Any
    """For a query: `serfd.serf.queries.QueryAnswer`."""


class SaveKeyring(NamedTuple):
    """Replace the keyring file. What came of it comes back as `keyring_saved`."""

    keys: tuple[bytes, ...]

    def __repr__(self) -> str:
        """Without the keys."""
        return f"SaveKeyring({len(self.keys)} keys)"


class Remember(NamedTuple):
    """Write lines to the snapshot file, before anything that comes later is done."""

    lines: tuple[str, ...]
    sync: bool = False
    """They must outlive a power failure."""
    replace: bool = False
    """They say as much as all the file's lines, and take their place."""


class Stop(NamedTuple):
    """This node must not go on: end the process, without leaving."""

    reason: str


Effect: TypeAlias = (
    SendPacket | Connect | Write | Close | Emit | Finish | Answer | SaveKeyring | Remember | Stop
)
