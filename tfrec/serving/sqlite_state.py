"""SqliteState: the state of one server in a folder, by SQLite with a write-ahead log.

Writes come one after another, and those that wait at the same time share a transaction. Reads run
beside them, from as many threads as like. An acknowledged event survives a kill of the process;
with ``synchronous="full"`` a power cut as well, if the disk keeps what it says it has written.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
from collections import deque
from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import islice
from pathlib import Path
from typing import Any

from tfrec.errors import StateError
from tfrec.serving.commits import Commits
from tfrec.serving.recent import Recent
from tfrec.serving.state import Event, Item, Synchronous, check_events, check_items, check_text

FILE = "state.sqlite"
SCHEMA = 1
_APPLICATION = 0x7466_7263  # "tfrc": tells our file from another's
_LOCK = "lock"
_READERS = 8
_RECENT_EVENTS = 50_000
_AT_ONCE = 500
_TABLES = """
CREATE TABLE events (
    number INTEGER PRIMARY KEY, event_id TEXT NOT NULL UNIQUE, user_id TEXT NOT NULL,
    item_id TEXT NOT NULL, event TEXT NOT NULL, timestamp REAL NOT NULL, value REAL);
CREATE INDEX events_of_users ON events (user_id);
CREATE TABLE forgotten (user_id TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE items (
    change INTEGER PRIMARY KEY, item_id TEXT NOT NULL UNIQUE, title TEXT NOT NULL,
    text TEXT NOT NULL, attributes TEXT NOT NULL, created REAL NOT NULL, deleted INTEGER NOT NULL);
CREATE TABLE vectors (
    item_id TEXT, key TEXT, vector BLOB NOT NULL, PRIMARY KEY (item_id, key)) WITHOUT ROWID;
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE counts (
    last INTEGER NOT NULL, events INTEGER NOT NULL, users INTEGER NOT NULL, items INTEGER NOT NULL);
INSERT INTO counts VALUES (0, 0, 0, 0);
"""


class SqliteState:
    """Implements :class:`~tfrec.serving.state.State` in a folder that one process uses."""

    def __init__(self, folder: str | os.PathLike[str], synchronous: Synchronous = "full") -> None:
        """Opens what is there, or begins anew.

        Args:
          folder: Made if it is not there.
          synchronous: ``full``: each commit waits for the disk; ``normal``: a power cut may cost
            the events since the last checkpoint of the log (about 4 MB), a kill costs none.

        Raises:
          StateError: another process uses the folder, it cannot be written, or the file in it is
            damaged, foreign or newer.
        """
        self.folder, self._synchronous = Path(folder), synchronous
        self._file = self.folder / FILE
        self._readers: deque[sqlite3.Connection] = deque()
        self._closed = False
        self._held = _claim(self.folder)
        with contextlib.ExitStack() as undo, self._explained():
            undo.callback(os.close, self._held)
            self._writer = self._connect()
            undo.callback(self._writer.close)
            self._prepare()
            users = self._writer.execute("SELECT user_id FROM forgotten")
            self._forgotten = {user for (user,) in users}
            undo.pop_all()
        self._recent = Recent(_RECENT_EVENTS)
        self._commits = Commits(self._writer, self._explain)

    def append(self, events: Sequence[Event]) -> list[bool]:
        """See :meth:`State.append`."""
        events = tuple(events)
        check_events(events)
        if not events:
            return []

        def then(numbers: list[int]) -> None:
            self._recent.add((n, e) for n, e in zip(numbers, events, strict=True) if n)

        numbers = self._commits.run(lambda connection: _insert(connection, events), then)
        return [number > 0 for number in numbers]

    def history(self, user_id: str) -> list[Event]:
        """See :meth:`State.history`."""
        return self._recent.get(user_id, self._read_history)

    def histories(self, user_ids: Sequence[str]) -> list[list[Event]]:
        """See :meth:`State.histories`."""
        return [self._recent.get(user_id, self._read_history) for user_id in user_ids]

    def forget(self, user_id: str) -> int:
        """See :meth:`State.forget`. What was deleted is overwritten in the file and the log."""
        check_text("a user id", user_id)

        def then(_: int) -> None:
            self._forgotten.add(user_id)
            self._recent.drop(user_id)
            with contextlib.suppress(sqlite3.Error):  # the next checkpoint does it
                self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")

        return self._commits.run(lambda connection: _forget(connection, user_id), then)

    def forgotten(self, user_ids: Sequence[str]) -> set[str]:
        """See :meth:`State.forgotten`."""
        return {user_id for user_id in user_ids if user_id in self._forgotten}

    def events(self, after: int = 0) -> Iterator[tuple[int, Event]]:
        """See :meth:`State.events`."""
        query = (
            "SELECT number, event_id, user_id, item_id, event, timestamp, value FROM events "
            f"WHERE number > ? ORDER BY number LIMIT {_AT_ONCE}"
        )
        while rows := self._read(query, (after,)):
            for after, *values in rows:
                yield after, Event(*values)

    def put_items(self, items: Sequence[Item]) -> None:
        """See :meth:`State.put_items`."""
        items = tuple(items)
        check_items(items)
        if items:
            self._commits.run(lambda connection: _put_items(connection, items))

    def items(self, after: int = 0) -> Iterator[tuple[int, Item]]:
        """See :meth:`State.items`."""
        query = (
            "SELECT change, item_id, title, text, attributes, created, deleted FROM items "
            f"WHERE change > ? ORDER BY change LIMIT {_AT_ONCE}"
        )
        while rows := self._read(query, (after,)):
            for after, item_id, title, text, attributes, created, deleted in rows:
                cells = json.loads(attributes)
                yield after, Item(item_id, title, text, cells, created, bool(deleted))

    def vectors(self, key: str, item_ids: Sequence[str]) -> dict[str, bytes]:
        """See :meth:`State.vectors`."""
        found: dict[str, bytes] = {}
        rest = iter(item_ids)
        while chunk := list(islice(rest, _AT_ONCE)):
            marks = ", ".join("?" * len(chunk))
            query = f"SELECT item_id, vector FROM vectors WHERE key = ? AND item_id IN ({marks})"
            found.update(self._read(query, (key, *chunk)))
        return found

    def put_vectors(self, key: str, vectors: Mapping[str, bytes]) -> None:
        """See :meth:`State.put_vectors`."""
        rows = [(item_id, key, vector) for item_id, vector in vectors.items()]
        query = "INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)"
        self._commits.run(lambda connection: connection.executemany(query, rows).rowcount)

    def get(self, name: str) -> str:
        """See :meth:`State.get`."""
        rows = self._read("SELECT value FROM settings WHERE name = ?", (name,))
        return str(rows[0][0]) if rows else ""

    def set(self, name: str, value: str) -> None:
        """See :meth:`State.set`."""
        query = "INSERT OR REPLACE INTO settings VALUES (?, ?)"
        self._commits.run(lambda connection: connection.execute(query, (name, value)).rowcount)

    def counts(self) -> dict[str, int]:
        """See :meth:`State.counts`."""
        ((events, users, items),) = self._read("SELECT events, users, items FROM counts", ())
        return {"events": events, "users": users, "items": items}

    def durability(self) -> str:
        """See :meth:`State.durability`."""
        if self._synchronous == "full":
            return f"{self._file}: an acknowledged event survives a kill and a power cut"
        return (
            f"{self._file}: an acknowledged event survives a kill; a power cut may cost the "
            'latest ones (serve.synchronous = "full" waits for the disk)'
        )

    def close(self) -> None:
        """See :meth:`State.close`."""
        if self._closed:
            return
        self._commits.close()
        self._closed = True
        while self._readers:
            self._readers.pop().close()
        with contextlib.suppress(sqlite3.Error):  # everything was committed before
            self._writer.close()
        os.close(self._held)

    def _read_history(self, user_id: str) -> tuple[list[Event], int]:
        query = (
            "SELECT event_id, user_id, item_id, event, timestamp, value, number FROM events "
            "WHERE user_id = ? ORDER BY number"
        )
        rows = self._read(query, (user_id,))
        return [Event(*values) for *values, _ in rows], rows[-1][-1] if rows else 0

    def _read(self, query: str, values: Sequence[str | int]) -> list[Any]:
        """All rows at once, since an open cursor would keep the log from being emptied."""
        with self._explained():
            connection = self._reader()
            try:
                return connection.execute(query, values).fetchall()
            finally:
                if self._closed or len(self._readers) >= _READERS:
                    connection.close()
                else:
                    self._readers.append(connection)

    def _reader(self) -> sqlite3.Connection:
        if self._closed:
            raise StateError("the state was closed; open it again")
        try:
            return self._readers.pop()
        except IndexError:
            connection = self._connect()
            connection.execute("PRAGMA query_only = ON")
            return connection

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._file, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA cache_size = -1024")
        return connection

    def _prepare(self) -> None:
        writer = self._writer
        self._check_whose_it_is()
        if writer.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
            raise StateError(f"{self.folder} is on a file system that SQLite cannot keep a log on")
        writer.execute(f"PRAGMA synchronous = {self._synchronous}")
        writer.execute("PRAGMA secure_delete = ON")
        writer.execute("PRAGMA journal_size_limit = 16777216")
        if not _number(writer, "user_version"):
            names = f"PRAGMA application_id = {_APPLICATION}; PRAGMA user_version = {SCHEMA};"
            writer.executescript(f"BEGIN IMMEDIATE; {_TABLES} {names} COMMIT;")

    def _check_whose_it_is(self) -> None:
        version = _number(self._writer, "user_version")
        tables = _value(self._writer, "SELECT count(*) FROM sqlite_schema")
        if (version or tables) and _number(self._writer, "application_id") != _APPLICATION:
            raise StateError(f"{self._file} is not of tfrec; give another --state")
        if version > SCHEMA:
            raise StateError(
                f"{self._file} has schema {version}, and this tfrec knows {SCHEMA}: a newer one "
                "wrote it; upgrade tfrec, or give another --state"
            )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._explain(error) from None
        except UnicodeEncodeError as error:
            check_text("an id", error.object)

    def _explain(self, error: sqlite3.Error) -> StateError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            return StateError(
                f"the disk of {self._file} is full; nothing was written; make room, and it goes on"
            )
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return StateError(
                f"{self._file} is damaged ({error}); put a copy in its place, save what can be "
                "read by `sqlite3 FILE .recover`, or give another --state"
            )
        return StateError(f"{self._file} cannot be read or written: {error}")


def _claim(folder: Path) -> int:
    """Makes the folder and takes its lock, which the process holds until it ends."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        held = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StateError(f"the state {folder} cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        raise StateError(
            f"another server uses the state {folder}; stop it, give another --state, or let "
            "several share a Redis: --state redis://HOST:PORT/DB"
        ) from None
    return held


def _value(connection: sqlite3.Connection, query: str) -> int:
    (value,) = connection.execute(query).fetchone()
    return int(value)


def _number(connection: sqlite3.Connection, pragma: str) -> int:
    return _value(connection, f"PRAGMA {pragma}")


def _insert(connection: sqlite3.Connection, events: Sequence[Event]) -> list[int]:
    """The number that each event got; 0: it was there before."""
    write = (
        "INSERT INTO events (number, event_id, user_id, item_id, event, timestamp, value) "
        "VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (event_id) DO NOTHING"
    )
    strangers = _without_events(connection, {event.user_id for event in events})
    last = _value(connection, "SELECT last FROM counts")  # the greatest number may be forgotten
    numbers, new = [], []
    for e in events:
        row = (last + 1, e.event_id, e.user_id, e.item_id, e.event, e.timestamp, e.value)
        is_new = connection.execute(write, row).rowcount == 1
        last += is_new
        numbers.append(last if is_new else 0)
        if is_new:
            new.append(e.user_id)
    if new:
        update = "UPDATE counts SET last = ?, events = events + ?, users = users + ?"
        connection.execute(update, (last, len(new), len(strangers.intersection(new))))
    return numbers


def _without_events(connection: sqlite3.Connection, user_ids: Set[str]) -> set[str]:
    query = "SELECT EXISTS (SELECT 1 FROM events WHERE user_id = ?)"
    return {
        user_id for user_id in user_ids if connection.execute(query, (user_id,)).fetchone() == (0,)
    }


def _forget(connection: sqlite3.Connection, user_id: str) -> int:
    found = connection.execute("DELETE FROM events WHERE user_id = ?", (user_id,)).rowcount
    connection.execute("INSERT OR IGNORE INTO forgotten VALUES (?)", (user_id,))
    update = "UPDATE counts SET events = events - ?, users = users - ?"
    connection.execute(update, (found, int(found > 0)))
    return found


def _put_items(connection: sqlite3.Connection, items: Sequence[Item]) -> None:
    last = _value(connection, "SELECT coalesce(max(change), 0) FROM items")
    was, more = "SELECT deleted FROM items WHERE item_id = ?", 0
    for change, item in enumerate(items, start=last + 1):
        before = connection.execute(was, (item.item_id,)).fetchone() or (True,)
        more += before[0] - item.deleted
        cells = json.dumps(dict(item.attributes), ensure_ascii=False)
        row = (change, item.item_id, item.title, item.text, cells, item.created, item.deleted)
        connection.execute("INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        connection.execute("DELETE FROM vectors WHERE item_id = ?", (item.item_id,))
    connection.execute("UPDATE counts SET items = items + ?", (more,))
