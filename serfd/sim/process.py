"""One run of one node, from its start to its end, and what was seen of it."""

from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

from serfd.effects import Address, Command, StreamId
from serfd.serf.events import Event
from serfd.serf.node import Node
from serfd.wire.swim_messages import HAS_LABEL

MET = "list all"
STARTS = "starts again"
EVENTS_MAX = 10_000
"""Events kept per process; older ones are forgotten."""


class End(Enum):
    """How a process ended."""

    CRASHED = "crashed"
    LEFT = "left"
    STOPPED = "stopped"
    """It ended itself: another node bears its name."""


class Happening(NamedTuple):
    """Something worth telling of a run."""

    time: float
    who: str
    """The process that saw it, or that it befell."""
    what: str
    """`suspects`, `clears`, `refutes`, the name of a member event, or a fault in words."""
    about: str
    """The member's name, or more words."""


class Asked:
    """A command somebody gave to a process, and what came of it."""

    __slots__ = (
        "answers", "at", "command", "finished_at", "heard", "process", "result", "then",
    )  # fmt: skip

    def __init__(self, process: "Process", command: Command[Any], now: float) -> None:
        self.process = process
        self.command = command
        self.at = now
        self.finished_at: float | None = None
        self.result: Any = None
        self.answers: list[Any] = []
        """What came in before the result."""
        self.heard: list[Callable[[Any], None]] = []
        """What to do with each answer when it comes."""
        self.then: list[Callable[[Asked], None]] = []
        """What to do when it is finished."""

    @property
    def took(self) -> float:
        """Seconds from the question to the result; only once it is finished."""
        assert self.finished_at is not None, f"{self.command} of {self.process.key} is unfinished"
        return self.finished_at - self.at


class Socket:
    """One side of a connection."""

    __slots__ = ("arrives", "held_until", "is_connected", "is_open", "peer", "process", "stream",
                 "unsent")  # fmt: skip

    def __init__(self, process: "Process", stream: StreamId | None) -> None:
        self.process = process
        self.stream = stream
        """None on the accepting side until the process has accepted it."""
        self.peer: Socket | None = None
        self.is_open = True
        self.is_connected = False
        self.unsent: list[bytes] = []
        """What was written before the connection was there."""
        self.arrives = 0.0
        """When the last thing sent arrives: what is sent later does not overtake it."""
        self.held_until = 0.0
        """What was sent cannot get through before then: it is sent again."""


class Process:
    """One run of one node. A restart is another process under the same key."""

    __slots__ = (
        "addr", "address", "end", "ended_at", "events", "held", "incarnation", "is_joining",
        "is_sealed", "key", "label", "listeners", "machine", "node", "number", "score_max",
        "sockets", "started_at", "suspects", "wake_at",
    )  # fmt: skip

    def __init__(
        self, key: str, node: Node, address: Address, addr: bytes, *, number: int, now: float
    ) -> None:
        """`key` names its place in the cluster; only twins have another `node.name`."""
        self.key = key
        self.node = node
        self.machine = node.memberlist
        self.address = address
        self.addr = addr
        self.number = number
        """Counts all processes of the run."""
        self.started_at = now
        self.end: End | None = None
        self.ended_at = 0.0
        self.is_sealed = False
        """What it sends must be sealed, whatever the node believes."""
        self.label = b""
        """What goes before that in the clear."""
        self.is_joining = False
        """It tries to join until somebody answers, and nobody has."""
        self.held: list[tuple[Callable[..., object], tuple[Any, ...]]] | None = None
        """While it is paused: what waits for it."""
        self.sockets: dict[StreamId, Socket] = {}
        self.events: deque[tuple[float, Event]] = deque(maxlen=EVENTS_MAX)
        self.listeners: list[Callable[[Event], None]] = []
        """Who is told of each event when it happens."""
        self.wake_at: float | None = None
        self.suspects: tuple[str, ...] = ()
        """Whom it suspected after its last input."""
        self.score_max = 0
        """The worst health score it ever had."""
        self.incarnation = self.machine.local.incarnation

    @property
    def name(self) -> str:
        """The node's name."""
        return self.node.name

    def sealed_part(self, data: bytes) -> bytes | None:
        """What must be sealed of something that it sends: all after the label, or nothing."""
        if not self.is_sealed:
            return None
        size = len(self.label)
        return data.removeprefix(bytes((HAS_LABEL, size)) + self.label) if size else data

    @property
    def is_running(self) -> bool:
        """Whether it has not ended; a paused process is running."""
        return self.end is None
