"""`SqliteJournal`: keeps a durable plugin's mailbox in a file.

Each change is committed before the plugin, or anybody else, sees anything that follows from it. In
SQLite's write-ahead log a commit is one write of some hundred bytes; what was committed outlives
the process whatever ends it. Only a power failure can take the last moments: they would need the
disk's answer each time, some milliseconds in which the node answers nobody.
"""

import logging
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgpack

from serfd.errors import ConfigError
from serfd.hooks.mailbox import Letter, Lost
from serfd.serf.events import Member, MemberEvent, MemberEventKind, Status, UserEvent

FILE = "mailbox.sqlite"
"""In the plugin's `state_dir`."""
_VERSION = 1

log = logging.getLogger(__name__)


class SqliteJournal:
    """One table with a row for each letter that waits."""

    def __init__(self, path: Path) -> None:
        """Open or make the file; a broken one is put aside. Raises ConfigError if there is none."""
        self._path = path
        try:
            path.touch(mode=0o600)
            try:
                self._open()
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError as error:
                aside = path.with_suffix(".broken")
                log.error("%s is broken (%s), it is put aside as %s", path, error, aside.name)
                self._database.close()
                path.replace(aside)
                path.touch(mode=0o600)
                self._open()
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"the durable mailbox {path} cannot be opened: {error}") from None

    def load(self) -> Mapping[int, Letter]:
        """What waited; what cannot be read is left out, and the log says so."""
        letters: dict[int, Letter] = {}
        for key, body in self._database.execute("SELECT key, body FROM letters ORDER BY key"):
            try:
                letters[key] = decode(body)
            except (ValueError, TypeError, KeyError, msgpack.exceptions.UnpackException) as error:
                log.error("%s: an event that waited cannot be read: %r", self._path, error)
                self.remove((key,))
        return letters

    def write(self, key: int, letter: Letter) -> None:
        """Keep it; an error of the disk is logged, and the event only waits in memory then."""
        self._do("INSERT OR REPLACE INTO letters VALUES (?, ?)", [(key, encode(letter))])

    def remove(self, keys: Iterable[int]) -> None:
        """Forget them."""
        self._do("DELETE FROM letters WHERE key = ?", [(key,) for key in keys])

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _open(self) -> None:
        # Its one user is the reactor's thread; a second daemon on the same file must not come by.
        self._database = sqlite3.connect(self._path, isolation_level=None, timeout=0.0)
        self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = NORMAL")
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        if version not in (0, _VERSION):
            raise ConfigError(f"{self._path} is of version {version}, expected {_VERSION}")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS letters (key INTEGER PRIMARY KEY, body BLOB NOT NULL)"
        )
        self._database.execute(f"PRAGMA user_version = {_VERSION}")

    def _do(self, statement: str, rows: list[tuple[Any, ...]]) -> None:
        try:
            if len(rows) == 1:
                self._database.execute(statement, rows[0])
                return
            self._database.execute("BEGIN")
            self._database.executemany(statement, rows)
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            if self._database.in_transaction:
                self._database.rollback()
            log.error(
                "%s: cannot be written, events would not outlive serfd: %s", self._path, error
            )


def encode(letter: Letter) -> bytes:
    """A letter as it is kept."""
    fields: list[Any]
    match letter:
        case MemberEvent(kind, members):
            fields = [
                kind.value,
                [
                    [m.name, m.addr, m.port, dict(m.tags), int(m.status), m.versions]
                    for m in members
                ],
            ]
        case UserEvent(ltime, name, payload, coalesce):
            fields = ["user", ltime, name, payload, coalesce]
        case Lost(count):
            fields = ["lost", count]
    # Names from the network may hold bytes that are no UTF-8.
    packed: bytes = msgpack.packb(fields, unicode_errors="surrogateescape")
    return packed


def decode(body: bytes) -> Letter:
    """The letter that was kept. Raises ValueError and its like for anything else."""
    kind, *fields = msgpack.unpackb(body, unicode_errors="surrogateescape")
    match kind:
        case "user":
            ltime, name, payload, coalesce = fields
            return UserEvent(ltime, name, payload, coalesce)
        case "lost":
            (count,) = fields
            return Lost(count)
        case _:
            (rows,) = fields
            members = tuple(
                Member(name, addr, port, tags, Status(status), versions)
                for name, addr, port, tags, status, versions in rows
            )
            return MemberEvent(MemberEventKind(kind), members)
