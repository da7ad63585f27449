"""What happened in a run, for a person: what many saw is one line, and who was wrong is told."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf

from serfd.serf.events import MemberEventKind
from serfd.sim.faults import Kind
from serfd.sim.process import MET, STARTS, End, Happening

GAP = 5.0
"""Seconds after which seeing the same again is another line."""
AFTERMATH = 30.0
"""Seconds for which a fault that is over still explains what others think."""

_SEEN_BY_MANY = {
    "suspects": "is suspected",
    "clears": "is no longer suspected",
    MemberEventKind.JOIN.value: "is alive",
    MemberEventKind.FAILED.value: "has failed",
    MemberEventKind.LEAVE.value: "has left",
    MemberEventKind.UPDATE.value: "has new tags",
    MemberEventKind.REAP.value: "is forgotten",
}
_ACCUSATIONS = {"suspects": "suspicion", MemberEventKind.FAILED.value: "failure"}
_BEGINS = {*(end.value for end in End), "leaves", "is paused"} | {kind.value for kind in Kind}


@dataclass(slots=True)
class Episode:
    """The same thing, seen by one after the other."""

    first: Happening
    last: float
    seen_by: list[str]
    why: str
    """What was wrong with the member or with who saw it first; empty: nothing."""


@dataclass(slots=True)
class Story:
    """A run's history, read once from the begin."""

    lines: list[tuple[float, str]] = field(default_factory=list)
    refutations: int = 0
    accusations: dict[str, int] = field(default_factory=dict)
    """How many suspicions and failures were seen, each by many counted once."""
    wrong: dict[str, int] = field(default_factory=dict)
    """How many of them were about healthy members."""
    _open: dict[tuple[str, str], Episode] = field(default_factory=dict)
    _learns_until: dict[str, float] = field(default_factory=lambda: defaultdict(lambda: inf))
    """Whoever is new hears of all others: until then that is not worth a line each."""
    _ails: dict[str, tuple[str, float]] = field(default_factory=dict)
    """What is or was wrong with a place, and until when."""

    @classmethod
    def of(cls, history: Iterable[Happening]) -> "Story":
        """Read all of it."""
        story = cls()
        for happening in history:
            story._read(happening)
        for episode in story._open.values():
            story._close(episode)
        story.lines.sort()
        return story

    def _read(self, happening: Happening) -> None:
        time, who, what, about = happening
        if what == MemberEventKind.JOIN.value and time < self._learns_until[who]:
            return
        if what not in _SEEN_BY_MANY:
            self.refutations += what == "raises its incarnation"
            self._note_ailment(happening)
            if what == STARTS:
                self._learns_until[who] = time + GAP
            elif what == MET:
                self._learns_until = defaultdict(float)
            self.lines.append((time, " ".join(filter(None, (who, what, about)))))
            return
        episode = self._open.get((what, about))
        if episode is not None and time - episode.last <= GAP:
            episode.last = time
            episode.seen_by.append(who)
            return
        if episode is not None:
            self._close(episode)
        why = self._ailment(about, time) or self._ailment(who, time)
        self._open[what, about] = Episode(happening, time, [who], why)

    def _note_ailment(self, happening: Happening) -> None:
        time, who, what, _ = happening
        for key in who.split() or [""]:
            if what in _BEGINS:
                self._ails[key] = (f"{key or 'network'} {what}", inf)
            elif what == STARTS or what == "goes on" or what.startswith("no longer"):
                before = self._ails.get(key, ("", 0.0))[0]
                self._ails[key] = (f"{before} before", time + AFTERMATH)

    def _ailment(self, key: str, now: float) -> str:
        for place in (key, ""):
            why, until = self._ails.get(place, ("", 0.0))
            if now <= until:
                return why
        return ""

    def _close(self, episode: Episode) -> None:
        time, who, what, about = episode.first
        line = f"{about} {_SEEN_BY_MANY[what]}, says {who}"
        if len(episode.seen_by) > 1:
            line += f"; {len(episode.seen_by)} say so by {episode.last:.3f}"
        kind = _ACCUSATIONS.get(what)
        if kind is not None:
            self.accusations[kind] = self.accusations.get(kind, 0) + 1
            if not episode.why:
                self.wrong[kind] = self.wrong.get(kind, 0) + 1
            line += f" ({episode.why})" if episode.why else " (WRONGLY)"
        self.lines.append((time, line))
