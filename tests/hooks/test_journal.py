"""A durable mailbox: what was not handled outlives the process, however that ends."""

import os
import signal
import sqlite3
from pathlib import Path

import pytest

from serfd.errors import ConfigError
from serfd.hooks.journal import SqliteJournal, decode, encode
from serfd.hooks.mailbox import MAILBOX_SIZE, Letter, Lost, Mailbox
from serfd.serf.events import Member, MemberEvent, MemberEventKind, Status, UserEvent

LETTERS = [
    UserEvent(2**63, "déploy", b"\xff\0", coalesce=True),
    UserEvent(1, "\udcff", b"", coalesce=False),
    Lost(7),
    MemberEvent(
        MemberEventKind.FAILED,
        (
            Member("n1", b"\x7f\0\0\1", 7946, {"rôle": "\udcfe"}, Status.FAILED, bytes(range(6))),
            Member("n2", bytes(16), 1, {}, Status.LEFT, b""),
        ),
    ),
]


def told(number: int) -> UserEvent:
    return UserEvent(number, f"e{number}", b"x" * 100, coalesce=False)


@pytest.mark.parametrize("letter", LETTERS, ids=lambda letter: type(letter).__name__)
def test_every_letter_comes_out_as_it_went_in(letter: Letter) -> None:
    assert decode(encode(letter)) == letter


def test_what_waits_is_there_in_order_when_it_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "m.sqlite"
    journal = SqliteJournal(path)
    mailbox = Mailbox(journal)
    for letter in LETTERS:
        mailbox.put(letter)
    mailbox.take()
    mailbox.handled()
    mailbox.close()
    again = Mailbox(SqliteJournal(path))
    assert [again.take() for _ in LETTERS[1:] if again.handled() is None] == LETTERS[1:]
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_overflow_is_kept_too(tmp_path: Path) -> None:
    path = tmp_path / "m.sqlite"
    mailbox = Mailbox(SqliteJournal(path))
    for number in range(MAILBOX_SIZE + 5):
        mailbox.put(told(number))
    mailbox.close()
    again = Mailbox(SqliteJournal(path))
    assert len(again) == MAILBOX_SIZE + 1
    assert again.take() == Lost(5)


def test_a_file_that_is_open_already_or_cannot_be_made_is_an_error_that_names_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "m.sqlite"
    first = SqliteJournal(path)
    first.write(1, told(1))
    with pytest.raises(ConfigError, match=r"m\.sqlite cannot be opened: database is locked"):
        SqliteJournal(path)
    with pytest.raises(ConfigError, match="No such file or directory"):
        SqliteJournal(tmp_path / "nowhere" / "m.sqlite")


def test_a_broken_file_is_put_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "m.sqlite"
    path.write_bytes(b"no database at all" * 1000)
    mailbox = Mailbox(SqliteJournal(path))
    mailbox.put(told(1))
    assert len(mailbox) == 1
    assert (tmp_path / "m.broken").read_bytes().startswith(b"no database")
    assert "is broken" in caplog.text


def test_an_event_that_cannot_be_read_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "m.sqlite"
    journal = SqliteJournal(path)
    for key in (1, 2, 3):
        journal.write(key, told(key))
    journal.close()
    with sqlite3.connect(path) as database:
        database.execute("UPDATE letters SET body = x'93a3' WHERE key = 2")
    database.close()
    assert list(SqliteJournal(path).load()) == [1, 3]
    assert "cannot be read" in caplog.text


def test_a_disk_that_fails_is_told_and_the_events_still_come(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = SqliteJournal(tmp_path / "m.sqlite")
    mailbox = Mailbox(journal)
    journal._database.execute("PRAGMA max_page_count = 1")
    for number in range(200):
        mailbox.put(told(number))
    assert "cannot be written" in caplog.text
    assert mailbox.take() == told(0)


def _live_until_killed(path: Path, notes: int, after: int) -> None:
    """Put, take and handle; be killed at the step of that number, SQLite's or the plugin's."""
    journal = SqliteJournal(path)
    mailbox = Mailbox(journal)
    left = after

    def step() -> int:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    journal._database.set_progress_handler(step, 1)
    for number in range(6):
        mailbox.put(told(number))
        os.write(notes, f"put {number}\n".encode())
        if number % 2:
            taken = mailbox.take()
            assert isinstance(taken, UserEvent)
            for _ in range(3):  # what a hook does
                step()
            os.write(notes, f"ran {taken.ltime}\n".encode())
            mailbox.handled()
    os.write(notes, b"end\n")


def test_whatever_step_it_is_killed_at_nothing_is_lost_that_was_not_handled(tmp_path: Path) -> None:
    lives = 0
    said: list[str] = []
    while "end" not in said:
        path = tmp_path / f"{lives}.sqlite"
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                _live_until_killed(path, writing, after=lives * 3)
            finally:
                os._exit(0)
        os.close(writing)
        os.waitpid(child, 0)
        with os.fdopen(reading) as notes:
            said = notes.read().splitlines()
        put = {int(line[4:]) for line in said if line.startswith("put")}
        ran = {int(line[4:]) for line in said if line.startswith("ran")}
        journal = SqliteJournal(path)
        waiting = {
            letter.ltime for letter in journal.load().values() if isinstance(letter, UserEvent)
        }
        journal.close()
        assert put - ran <= waiting, f"killed at step {lives * 3}"
        assert waiting <= put | {max(put, default=-1) + 1}
        lives += 1
    # It was killed in the middle of everything at least once.
    assert lives > 20
