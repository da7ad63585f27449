"""`Mailbox`: what waits for one plugin, in order and never too much of it.

Changes of members are merged rather than dropped: each tells how the member is now, so of several
about one member the last says it all. User events cannot be merged; the oldest are lost, and the
plugin is told how many.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from serfd.serf.events import Member, MemberEvent, MemberEventKind, UserEvent

MAILBOX_SIZE = 1024
"""So many events may wait for a plugin."""
CHANGES_MAX = MAILBOX_SIZE // 8
"""With more changes of members than this in a full mailbox, they are all merged."""
TOGETHER_MAX = 64
"""A change is merged into the one before it up to so many members; in a full mailbox, all are."""


@dataclass(frozen=True, slots=True)
class Lost:
    """Where events were dropped, and how many."""

    count: int


Letter: TypeAlias = MemberEvent | UserEvent | Lost


class Journal(Protocol):
    """Keeps what a mailbox holds where it outlives the process."""

    def load(self) -> Mapping[int, Letter]:
        """What waited when the process before this one ended, in order."""

    def write(self, key: int, letter: Letter) -> None:
        """It waits, in place of what had this key before."""

    def remove(self, keys: Iterable[int]) -> None:
        """These do not wait any more."""

    def close(self) -> None:
        """It is not used any more."""


class NoJournal:
    """Keeps nothing."""

    def load(self) -> Mapping[int, Letter]:
        """Nothing was kept."""
        return {}

    def write(self, key: int, letter: Letter) -> None:
        """Forget it."""

    def remove(self, keys: Iterable[int]) -> None:
        """There is nothing to remove."""

    def close(self) -> None:
        """There is nothing to close."""


class Mailbox:
    """Letters by ascending keys, the oldest first."""

    def __init__(self, journal: Journal | None = None) -> None:
        self._journal: Journal = journal or NoJournal()
        self._letters: dict[int, Letter] = dict(self._journal.load())
        self._next_key = max(self._letters, default=0) + 1
        self._taken: tuple[int, Letter] | None = None
        self._changes = sum(isinstance(each, MemberEvent) for each in self._letters.values())
        self.merged = 0
        """Events that were put into one with others."""
        self.lost = 0
        """Events that were dropped because too many waited."""

    def __len__(self) -> int:
        return len(self._letters)

    def put(self, letter: Letter) -> None:
        """Let it wait."""
        if isinstance(letter, MemberEvent):
            if self._merge_into_last(letter):
                return
            self._changes += 1
        if len(self._letters) >= MAILBOX_SIZE:
            self._make_room()
        self._write(self._next_key, letter)
        self._next_key += 1

    def take(self) -> Letter:
        """Take out the oldest. It is kept until `handled`, should the process end before."""
        assert self._taken is None, "what was taken before is not handled"
        key = next(iter(self._letters))
        letter = self._letters.pop(key)
        self._taken = (key, letter)
        self._changes -= isinstance(letter, MemberEvent)
        return letter

    def handled(self) -> None:
        """What was taken need not be kept any more."""
        if self._taken is not None:
            self._journal.remove((self._taken[0],))
            self._taken = None

    def put_back(self) -> None:
        """What was taken waits again, before all others."""
        if self._taken is not None:
            key, letter = self._taken
            self._letters = {key: letter, **self._letters}
            self._changes += isinstance(letter, MemberEvent)
            self._taken = None

    def close(self) -> None:
        """It is not used any more; what waits stays kept."""
        self._journal.close()

    def empty(self) -> list[Letter]:
        """Take out all that wait, for good."""
        letters = list(self._letters.values())
        self._journal.remove(tuple(self._letters))
        self._letters.clear()
        self._changes = 0
        return letters

    def _write(self, key: int, letter: Letter) -> None:
        self._letters[key] = letter
        self._journal.write(key, letter)

    def _merge_into_last(self, new: MemberEvent) -> bool:
        """If it tells the same of other members, let both be one."""
        if not self._letters:
            return False
        key, last = next(reversed(self._letters.items()))
        if not isinstance(last, MemberEvent) or last.kind is not new.kind:
            return False
        names = {member.name for member in last.members}
        if len(names) >= TOGETHER_MAX or any(member.name in names for member in new.members):
            return False
        self._write(key, MemberEvent(new.kind, (*last.members, *new.members)))
        self.merged += 1
        return True

    def _make_room(self) -> None:
        if self._changes > CHANGES_MAX:
            self._merge_all()
        else:
            self._lose_oldest()

    def _merge_all(self) -> None:
        """Keep the last change of each member, and one letter for each kind of change."""
        last: dict[str, tuple[int, MemberEventKind, Member]] = {}
        for key, letter in self._letters.items():
            if isinstance(letter, MemberEvent):
                for member in letter.members:
                    last.pop(member.name, None)
                    last[member.name] = (key, letter.kind, member)
        together: dict[MemberEventKind, list[Member]] = {}
        places: dict[MemberEventKind, int] = {}
        for key, kind, member in last.values():
            together.setdefault(kind, []).append(member)
            # Told late rather than early: what a user event says may rest on a change before it.
            places[kind] = key
        kept = {key: MemberEvent(kind, tuple(together[kind])) for kind, key in places.items()}
        gone = [
            key
            for key, letter in self._letters.items()
            if isinstance(letter, MemberEvent) and key not in kept
        ]
        for key in gone:
            del self._letters[key]
        self._journal.remove(gone)
        for key, event in kept.items():
            self._write(key, event)
        self._changes = len(kept)
        self.merged += len(gone)

    def _lose_oldest(self) -> None:
        """Drop the oldest user event; where the first of several stood there is a `Lost`."""
        waiting = next(
            ((key, each) for key, each in self._letters.items() if isinstance(each, Lost)), None
        )
        oldest = next(key for key, each in self._letters.items() if isinstance(each, UserEvent))
        self.lost += 1
        if waiting is None:
            self._write(oldest, Lost(1))
        else:
            key, lost = waiting
            del self._letters[oldest]
            self._journal.remove((oldest,))
            self._write(key, Lost(lost.count + 1))
