"""User events: told at a pace others can take, handed on in Lamport order (serf.md 8)."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from serfd.effects import Command, Emit
from serfd.errors import CommandError, WireError
from serfd.serf.coalesce import UserCoalescer
from serfd.serf.common import Common
from serfd.serf.events import UserEvent
from serfd.serf.lamport import LamportClock, RecentRing
from serfd.timers import Timers
from serfd.wire.gomsgpack import as_bytes
from serfd.wire.serf_messages import UserEventMessage, encode

EVENT_SIZE_MAX = 9216
"""Bytes of an event's name and payload: no agent can be set to send more (serf.md 8)."""
HELD_MAX = 4096
"""Events held back at most, until what lies between has come."""
MISSING_WAIT = 0.15
"""Seconds that an event is held back for one before it that is missing."""
ASKED_WAIT = 0.5
"""Seconds that it is then held back while somebody is asked for the missing one."""
ASKED_MAX = 3
"""So many members are asked, one after the other: one of them may have missed it too."""
ON_THE_WAY_MAX = 64
"""User events of this node and others that are being told at once; own ones wait for room."""
WAITING_MAX = 4096
"""Own user events that wait for their turn; more are refused."""


@dataclass(frozen=True, slots=True)
class MissingOverdue:
    """Events are held back for one before them that does not come."""


@dataclass(frozen=True, slots=True)
class EventsDue:
    """Collected user events are to be handed on."""


class EventOrder:
    """Gossip brings events in any order; they are handed on in that of their Lamport times.

    An event is held back only while one before it is missing.
    """

    __slots__ = ("_held", "_last")

    def __init__(self) -> None:
        self._last: int | None = None
        self._held: dict[int, list[UserEvent]] = {}

    @property
    def missing(self) -> int | None:
        """The first Lamport time of which nothing came though events are held back for it."""
        return (self._last or 0) + 1 if self._held else None

    @property
    def newest(self) -> int:
        """The latest Lamport time of those held back; there are some."""
        return max(self._held)

    def start_after(self, ltime: int) -> None:
        """What is up to `ltime` is not waited for: it was before this node's time."""
        self._last = max(self._last or 0, ltime)

    def take(self, event: UserEvent) -> list[UserEvent]:
        """An event came in; those to hand on now, in order."""
        if self._last is not None and event.ltime > self._last + 1:
            self._held.setdefault(event.ltime, []).append(event)
            return self.give_up(self.newest) if len(self._held) >= HELD_MAX else []
        self._last = max(self._last or 0, event.ltime)
        return [event, *self._follow()]

    def give_up(self, ltime: int) -> list[UserEvent]:
        """What is missing up to `ltime` does not come: those held back for it, in order."""
        due: list[UserEvent] = []
        for held in sorted(self._held):
            if held > ltime:
                break
            due += self._held.pop(held)
            self._last = held
        return due + self._follow()

    def _follow(self) -> list[UserEvent]:
        """Those held back that come next."""
        due: list[UserEvent] = []
        while (ltime := (self._last or 0) + 1) in self._held:
            due += self._held.pop(ltime)
            self._last = ltime
        return due


class Hearing:
    """User events on their way to this node's listeners: in order, then coalesced."""

    def __init__(
        self,
        common: Common,
        timers: Timers[Any],
        missing: Callable[[], None],
    ) -> None:
        """`missing` is called when an event did not come in time: others may know it."""
        self._common = common
        self._timers = timers
        self._missing = missing
        self._order = EventOrder()
        config = common.config
        self._coalescer = UserCoalescer(config.user_coalesce_period, config.user_quiescent_period)
        self.clock = LamportClock()
        self.seen: RecentRing[tuple[str, bytes]] = RecentRing()
        self._time_min = 0
        self._missed: int | None = None
        """The first missing event, while others wait for it."""
        self._asked = 0
        self._asked_up_to = 0
        """Whoever was asked for it would have told of what was missing up to then, too."""

    def ignore_before(self, ltime: int) -> None:
        """Events before `ltime` were before this node joined."""
        self._time_min = max(self._time_min, ltime)
        self._order.start_after(ltime - 1)

    def heard(self, event: UserEvent) -> bool:
        """An event came in; whether it is news.

        Raises WireError if it is longer than any may be, or its time out of reach.
        """
        size = len(as_bytes(event.name)) + len(event.payload)
        if size > EVENT_SIZE_MAX:
            raise WireError(f"a user event of {size} bytes, at most {EVENT_SIZE_MAX} are possible")
        self.clock.witness(event.ltime)
        if event.ltime < self._time_min:
            return False
        item = (event.name, event.payload)
        if not self.seen.is_new(event.ltime, item, self.clock.time, size=size):
            return False
        self._common.metrics.count_one_of("serf.events", event.name)
        self._hand_on(self._order.take(event))
        self._watch_gap()
        return True

    def missing_overdue(self) -> None:
        """An event did not come: ask for it some times, then hand on without it."""
        if self._asked >= ASKED_MAX:
            self._hand_on(self._order.give_up(self._asked_up_to))
            self._watch_gap()
            return
        if not self._asked:
            self._asked_up_to = self._order.newest
        self._asked += 1
        self._timers.set(MissingOverdue(), self._common.now + ASKED_WAIT)
        self._missing()

    def events_due(self) -> None:
        """Hand on what was collected."""
        self._common.effects += [Emit(event) for event in self._coalescer.flush()]

    def _watch_gap(self) -> None:
        """Each missing event has its own time to come."""
        if self._missed == self._order.missing:
            return
        self._missed = self._order.missing
        if self._missed is None:
            self._timers.cancel(MissingOverdue())
            self._asked = 0
        elif self._asked and self._missed <= self._asked_up_to:
            pass  # it was asked for together with the one before
        else:
            self._asked = 0
            self._timers.set(MissingOverdue(), self._common.now + MISSING_WAIT)

    def _hand_on(self, events: list[UserEvent]) -> None:
        for event in events:
            if self._coalescer.take(event, self._common.now):
                due = self._coalescer.pace.due
                assert due is not None
                self._timers.set(EventsDue(), due)
            else:
                self._common.effects.append(Emit(event))


class Telling:
    """User events of this node's owner, sent no faster than they can be told.

    Others drop what is 512 Lamport times old (serf.md 8): a burst sent at once overtakes itself,
    and a real agent loses half of a thousand. Here the sender waits.
    """

    def __init__(self, common: Common, hearing: Hearing, spread: Callable[[bytes], None]) -> None:
        """`spread` queues an event for everybody."""
        self._common = common
        self._hearing = hearing
        self._spread = spread
        self._waiting: deque[tuple[Command[None], str, bytes, bool]] = deque()

    def tell(self, name: str, payload: bytes, *, coalesce: bool) -> Command[None]:
        """Done when the event is on its way."""
        command: Command[None] = Command(f"event {name}")
        limit = self._common.config.user_event_size_limit
        size = len(as_bytes(name)) + len(payload)
        message = UserEventMessage(self._hearing.clock.time, name, payload, coalesce)
        error = ""
        if size > limit:
            error = f"user event exceeds configured limit of {limit} bytes before encoding"
        elif len(encode(message)) > limit:
            error = f"encoded user event exceeds configured limit of {limit} bytes after encoding"
        elif len(self._waiting) >= WAITING_MAX:
            error = f"event queue is full: {WAITING_MAX} events wait to be sent; try again later"
        if error:
            self._common.finish(command, CommandError(error))
        else:
            self._waiting.append((command, name, payload, coalesce))
        return command

    def go_on(self, on_the_way: int) -> None:
        """Let those go that have room; `on_the_way`: events that are being told now."""
        while self._waiting and on_the_way < ON_THE_WAY_MAX:
            command, name, payload, coalesce = self._waiting.popleft()
            ltime = self._hearing.clock.time
            encoded = encode(UserEventMessage(ltime, name, payload, coalesce))
            fits = self._common.memberlist.message_max
            if len(encoded) > fits:
                error = f"encoded user event exceeds limit of {fits} bytes after encoding"
                self._common.finish(command, CommandError(f"{error}: it fits no packet"))
                continue
            self._hearing.heard(UserEvent(ltime, name, payload, coalesce))
            # With nobody there to tell, later members are not told either: they come without it.
            if self._common.memberlist.table.anyone_else:
                self._spread(encoded)
                on_the_way += 1
            self._common.finish(command, None)
