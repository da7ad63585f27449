"""Many changes in a moment become one event (serf.md 9)."""

from serfd.serf.events import Event, Member, MemberEvent, MemberEventKind, UserEvent


class Pace:
    """When to hand on what was collected: `period` after the first, `quiet` after the last."""

    __slots__ = ("_end", "_period", "_quiet", "due")

    def __init__(self, period: float, quiet: float) -> None:
        self._period = period
        self._quiet = quiet
        self._end: float | None = None
        self.due: float | None = None
        """Monotonic seconds; None while nothing is collected."""

    def collected(self, now: float) -> None:
        """Something more was collected."""
        if self._end is None:
            self._end = now + self._period
        self.due = min(self._end, now + self._quiet)

    def reset(self) -> None:
        """All was handed on."""
        self._end = self.due = None


class UserCoalescer:
    """Of events that may coalesce only the newest of each name is handed on."""

    def __init__(self, period: float, quiet: float) -> None:
        """`period` 0 is off."""
        self._is_on = period > 0
        self._newest: dict[str, list[UserEvent]] = {}
        self.pace = Pace(period, quiet)

    def take(self, event: UserEvent, now: float) -> bool:
        """Whether the event was kept for later; else it is to be handed on now."""
        if not self._is_on or not event.coalesce:
            return False
        held = self._newest.get(event.name)
        if held is None or event.ltime > held[0].ltime:
            self._newest[event.name] = [event]
        elif event.ltime == held[0].ltime:
            held.append(event)
        self.pace.collected(now)
        return True

    def flush(self) -> list[Event]:
        """What was kept, to be handed on now."""
        kept = [event for events in self._newest.values() for event in events]
        self._newest.clear()
        self.pace.reset()
        return list(kept)


class MemberCoalescer:
    """Of the changes of each member only the last is handed on, and not if it is none."""

    def __init__(self, period: float, quiet: float) -> None:
        """`period` 0 is off."""
        self._is_on = period > 0
        self._last: dict[str, tuple[MemberEventKind, Member]] = {}
        self._told: dict[str, MemberEventKind] = {}
        self.pace = Pace(period, quiet)

    def take(self, kind: MemberEventKind, member: Member, now: float) -> bool:
        """Whether the change was kept for later; else it is to be handed on now."""
        if not self._is_on:
            return False
        self._last[member.name] = (kind, member)
        self.pace.collected(now)
        return True

    def flush(self) -> list[Event]:
        """What was kept, as one event of each kind, to be handed on now."""
        grouped: dict[MemberEventKind, list[Member]] = {}
        for name, (kind, member) in self._last.items():
            if kind is not MemberEventKind.UPDATE and self._told.get(name) is kind:
                continue
            if kind is MemberEventKind.REAP:
                self._told.pop(name, None)
            else:
                self._told[name] = kind
            grouped.setdefault(kind, []).append(member)
        # Forgotten at every flush: a real agent repeats updates for ever (serf.md 9).
        self._last.clear()
        self.pace.reset()
        return [MemberEvent(kind, tuple(members)) for kind, members in grouped.items()]
