"""What waits for a plugin: order, merging, what is lost."""

from collections.abc import Iterable, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serfd.hooks.mailbox import MAILBOX_SIZE, TOGETHER_MAX, Letter, Lost, Mailbox
from serfd.serf.events import Member, MemberEvent, MemberEventKind, Status, UserEvent

JOIN, LEAVE, FAILED, UPDATE, REAP = MemberEventKind


def change(kind: MemberEventKind, *names: str) -> MemberEvent:
    return MemberEvent(
        kind, tuple(Member(name, b"\x7f\0\0\1", 1, {}, Status.ALIVE, bytes(6)) for name in names)
    )


def told(number: int) -> UserEvent:
    return UserEvent(number, f"e{number}", b"", coalesce=False)


class Shelf:
    """A journal that a test can look at."""

    def __init__(self, held: Mapping[int, Letter] | None = None) -> None:
        self.held = dict(held or {})

    def load(self) -> Mapping[int, Letter]:
        return dict(sorted(self.held.items()))

    def write(self, key: int, letter: Letter) -> None:
        self.held[key] = letter

    def remove(self, keys: Iterable[int]) -> None:
        for key in keys:
            del self.held[key]


def shown(letter: Letter) -> str:
    match letter:
        case MemberEvent(kind, members):
            return f"{kind.name.lower()} {' '.join(member.name for member in members)}"
        case UserEvent():
            return letter.name
        case Lost(count):
            return f"lost {count}"


def drained(mailbox: Mailbox) -> list[str]:
    letters = []
    while len(mailbox):
        letters.append(shown(mailbox.take()))
        mailbox.handled()
    return letters


@pytest.mark.parametrize(
    ("put", "taken"),
    [
        ([change(JOIN, "a"), change(JOIN, "b")], ["join a b"]),
        ([change(JOIN, "a"), change(FAILED, "b")], ["join a", "failed b"]),
        ([change(JOIN, "a"), told(1), change(JOIN, "b")], ["join a", "e1", "join b"]),
        # The same member twice: each is told.
        ([change(UPDATE, "a"), change(UPDATE, "b", "a")], ["update a", "update b a"]),
        ([told(1), told(1)], ["e1", "e1"]),
    ],
)
def test_changes_of_one_kind_that_follow_each_other_become_one(put, taken) -> None:
    mailbox = Mailbox()
    for letter in put:
        mailbox.put(letter)
    assert mailbox.merged == len(put) - len(taken)
    assert drained(mailbox) == taken


def test_what_is_being_handled_is_not_merged_into() -> None:
    mailbox = Mailbox()
    mailbox.put(change(JOIN, "a"))
    assert shown(mailbox.take()) == "join a"
    mailbox.put(change(JOIN, "b"))
    mailbox.handled()
    assert drained(mailbox) == ["join b"]


def test_one_letter_does_not_grow_by_merging_without_end() -> None:
    mailbox = Mailbox()
    for number in range(TOGETHER_MAX + 2):
        mailbox.put(change(JOIN, f"n{number}"))
    assert len(mailbox) == 2
    assert drained(mailbox)[1] == f"join n{TOGETHER_MAX} n{TOGETHER_MAX + 1}"


def test_a_full_mailbox_keeps_the_last_change_of_each_member_and_loses_no_event() -> None:
    shelf = Shelf()
    mailbox = Mailbox(shelf)
    mailbox.put(told(1))
    for _ in range(MAILBOX_SIZE):
        mailbox.put(change(FAILED, "a"))
        mailbox.put(change(JOIN, "a"))
        mailbox.put(change(JOIN, "b"))
        mailbox.put(change(LEAVE, "b"))
    mailbox.put(change(UPDATE, "c"))
    assert len(mailbox) <= MAILBOX_SIZE
    assert mailbox.lost == 0
    kept = drained(Mailbox(Shelf(shelf.held)))
    letters = drained(mailbox)
    assert kept == letters
    assert letters[0] == "e1"
    last = {name: line.split()[0] for line in letters[1:] for name in line.split()[1:]}
    assert last == {"a": "join", "b": "leave", "c": "update"}


def test_too_many_user_events_push_the_oldest_out_and_it_is_said_where_and_how_many() -> None:
    shelf = Shelf()
    mailbox = Mailbox(shelf)
    mailbox.put(change(JOIN, "a"))
    for number in range(MAILBOX_SIZE + 9):
        mailbox.put(told(number))
    assert len(mailbox) == MAILBOX_SIZE + 1
    kept = drained(Mailbox(Shelf(shelf.held)))
    letters = drained(mailbox)
    assert kept == letters
    assert letters[:3] == ["join a", "lost 10", "e10"]
    assert letters[-1] == f"e{MAILBOX_SIZE + 8}"
    assert mailbox.lost == 10


def test_a_loss_that_was_told_is_not_told_again() -> None:
    mailbox = Mailbox()
    for number in range(MAILBOX_SIZE + 1):
        mailbox.put(told(number))
    assert shown(mailbox.take()) == "lost 1"
    mailbox.handled()
    for number in range(3):
        mailbox.put(told(number))
    assert shown(mailbox.take()) == "lost 3"


def test_what_was_taken_stays_in_the_journal_until_it_is_handled() -> None:
    shelf = Shelf()
    mailbox = Mailbox(shelf)
    mailbox.put(told(1))
    mailbox.put(told(2))
    mailbox.take()
    assert drained(Mailbox(Shelf(shelf.held))) == ["e1", "e2"]
    mailbox.handled()
    assert drained(Mailbox(Shelf(shelf.held))) == ["e2"]
    mailbox.empty()
    assert not shelf.held


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=3 * MAILBOX_SIZE))
def test_the_journal_holds_what_waits_at_every_step(steps: list[int]) -> None:
    shelf = Shelf()
    mailbox = Mailbox(shelf)
    for number, step in enumerate(steps):
        match step:
            case 0 if len(mailbox):
                mailbox.take()
                mailbox.handled()
            case 1 | 2 | 3:
                mailbox.put(change(list(MemberEventKind)[step], f"n{number % 7}"))
            case _:
                mailbox.put(told(number))
    assert len(mailbox) <= MAILBOX_SIZE + 1
    assert drained(Mailbox(Shelf(shelf.held))) == drained(mailbox)
