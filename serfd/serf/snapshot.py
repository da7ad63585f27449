"""The lines a node remembers across a restart: who was there, and how late it was (serf.md 15).

Real agents read the same lines. What they do not know is written as a comment, which they skip.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from serfd.gossip.member_table import MEMBERS_MAX
from serfd.serf.lamport import LEAP_MAX
from serfd.wire.gomsgpack import as_bytes

COMPACTION_SIZE_MIN = 128 * 1024
"""Bytes up to which a snapshot may grow in any case."""
COMPACTION_SIZE_PER_NODE = 2 * 128
"""Bytes up to which it may grow for each node in it."""
NAME_SIZE_MAX = 512
"""Bytes of a name that is remembered."""
WARNINGS_MAX = 10
"""Lines of a broken snapshot that are named one by one."""

_LINE_SHOWN_MAX = 200
_INCARNATION_MAX = 2**32 - 1
_INCARNATION = "#incarnation"
_CLOCKS = {
    "clock": "clock time",
    "event-clock": "event clock time",
    "query-clock": "query clock time",
}
_NUMBER = re.compile("[0-9]{1,20}")
_CONTROL = re.compile("[\x00-\x1f\x7f]")


class Remembered(NamedTuple):
    """What an earlier life left behind."""

    nodes: dict[str, str]
    """Members that were alive: name, and address as text, `10.0.0.1:7946`."""
    clock: int
    """The highest Lamport times that were seen: of members, events and queries."""
    event_clock: int
    query_clock: int
    incarnation: int
    """The own one; 0 in the snapshot of a real agent."""
    leave_ignored: bool
    """Whether the node had left, but its members are remembered all the same."""
    size: int
    """Bytes of the lines read."""
    warnings: list[str]
    """What is wrong with the lines, as texts for the log."""


def replay(lines: Iterable[str], *, rejoin_after_leave: bool) -> Remembered:
    """Read the lines of a snapshot, without their ends. A broken line is only warned of."""
    nodes: dict[str, str] = {}
    clocks = dict.fromkeys(_CLOCKS, 0)
    incarnation = 0
    leave_ignored = False
    size = 0
    warnings = _Warnings()
    for line in lines:
        size += _size(line)
        word, colon, rest = line.partition(": ")
        match word:
            case "alive" if colon and "\0" not in rest:
                name, space, address = rest.rpartition(" ")
                if not space:
                    warnings.add("Failed to parse address", line)
                elif name in nodes or len(nodes) < MEMBERS_MAX:
                    nodes[name] = address
                else:
                    warnings.add(f"More than {MEMBERS_MAX} nodes in the snapshot", line)
            case "not-alive" if colon and "\0" not in rest:
                nodes.pop(rest, None)
            case "clock" | "event-clock" | "query-clock" if colon:
                time = _number(rest, LEAP_MAX)
                if time is not None:
                    clocks[word] = time
                else:
                    warnings.add(f"Failed to convert {_CLOCKS[word]}", line)
            case "#incarnation" if colon:
                number = _number(rest, _INCARNATION_MAX)
                if number is not None:
                    incarnation = number
                else:
                    warnings.add("Failed to convert incarnation", line)
            case "leave" if not colon and rejoin_after_leave:
                leave_ignored = True
            case "leave" if not colon:
                # The own incarnation stays: others go on remembering it.
                nodes.clear()
                clocks = dict.fromkeys(_CLOCKS, 0)
            case "coordinate" if colon:
                # Written by agents of long ago.
                continue
            case _ if line.startswith("#"):
                continue
            case _:
                warnings.add("Unrecognized snapshot line", line)
    return Remembered(
        nodes,
        clocks["clock"],
        clocks["event-clock"],
        clocks["query-clock"],
        incarnation,
        leave_ignored,
        size,
        warnings.texts(),
    )


class Snapshot:
    """Turns what happens into lines that `replay` understands.

    Every method gives the lines to append, often none: what is known already is not said again.
    """

    __slots__ = (
        "_clocks", "_compacted_size", "_has_left", "_incarnation", "_keeps_nodes", "_nodes", "_size"
    )  # fmt: skip

    def __init__(self, remembered: Remembered, *, rejoin_after_leave: bool) -> None:
        """Go on where the file of `remembered` ends."""
        self._nodes = dict(remembered.nodes)
        self._clocks = dict(
            zip(
                _CLOCKS,
                (remembered.clock, remembered.event_clock, remembered.query_clock),
                strict=True,
            )
        )
        self._incarnation = remembered.incarnation
        self._keeps_nodes = rejoin_after_leave
        self._has_left = False
        self._size = remembered.size
        self._compacted_size = 0

    def member_joined(self, name: str, address: str) -> list[str]:
        """A member is alive at `address`, `10.0.0.1:7946` or `[fd00::1]:7946`.

        One whose name is very long or has control characters is not: it could forge lines.
        """
        if (
            self._has_left
            or self._nodes.get(name) == address
            or (name not in self._nodes and len(self._nodes) >= MEMBERS_MAX)
            or len(as_bytes(name)) > NAME_SIZE_MAX
            or _CONTROL.search(name)
        ):
            return []
        self._nodes[name] = address
        return self._written([f"alive: {name} {address}"])

    def member_gone(self, name: str) -> list[str]:
        """A member left or failed."""
        if self._has_left or self._nodes.pop(name, None) is None:
            return []
        return self._written([f"not-alive: {name}"])

    def clocks(self, *, member: int, event: int, query: int) -> list[str]:
        """The highest Lamport times seen so far, which is one less than what the clocks show."""
        lines = []
        for word, seen in zip(_CLOCKS, (member, event, query), strict=True):
            # Of a clock beyond, a start would believe nothing: `replay` takes it for a fault.
            time = min(seen, LEAP_MAX)
            if time > self._clocks[word]:
                self._clocks[word] = time
                lines.append(f"{word}: {time}")
        return self._written(lines)

    def incarnation(self, incarnation: int) -> list[str]:
        """The own incarnation; with it a restarted node is believed at once."""
        if incarnation <= self._incarnation:
            return []
        self._incarnation = incarnation
        return self._written([f"{_INCARNATION}: {incarnation}"])

    def left(self) -> list[str]:
        """The node leaves: of the others, nothing more is said. The line must reach the disk."""
        self._has_left = True
        if not self._keeps_nodes:
            self._nodes.clear()
        return self._written(["leave"])

    @property
    def is_compaction_due(self) -> bool:
        """Whether the file is so long that `compacted` should take its place."""
        # Where names are long the file can be over Serf's limits right after a compaction.
        return self._size > max(
            COMPACTION_SIZE_MIN,
            COMPACTION_SIZE_PER_NODE * len(self._nodes),
            2 * self._compacted_size,
        )

    def compacted(self) -> list[str]:
        """The lines that say as much as all so far; the file is counted as replaced by them."""
        lines = [f"alive: {name} {address}" for name, address in self._nodes.items()]
        lines += [f"{word}: {time}" for word, time in self._clocks.items()]
        lines.append(f"{_INCARNATION}: {self._incarnation}")
        self._size = 0
        self._written(lines)
        self._compacted_size = self._size
        return lines

    def _written(self, lines: list[str]) -> list[str]:
        self._size += sum(map(_size, lines))
        return lines


class _Warnings:
    """Texts about broken lines, and no more of them than somebody would read."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._more = 0

    def add(self, what: str, line: str) -> None:
        if len(self._texts) >= WARNINGS_MAX:
            self._more += 1
            return
        shown = line if len(line) <= _LINE_SHOWN_MAX else f"{line[:_LINE_SHOWN_MAX]}..."
        self._texts.append(f"{what}: {shown if shown.isprintable() else repr(shown)}")

    def texts(self) -> list[str]:
        more = [f"{self._more} more broken snapshot lines"] if self._more else []
        return [*self._texts, *more]


def _number(text: str, highest: int) -> int | None:
    if not _NUMBER.fullmatch(text):
        return None
    number = int(text)
    return number if number <= highest else None


def _size(line: str) -> int:
    """Bytes of a line in the file, its end included."""
    return len(as_bytes(line)) + 1
