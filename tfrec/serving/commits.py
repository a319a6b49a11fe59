"""Commits: writes of many threads to SQLite, those that wait together in one transaction.

A transaction costs a wait for the disk, whatever it holds. While one is waited for, others gather
and share the next (group commit: DeWitt et al., Implementation techniques for main memory database
systems, SIGMOD 1984).
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from tfrec.errors import StateError

Result = TypeVar("Result")
Work = Callable[[sqlite3.Connection], Result]


def _nothing(result: Any) -> None:
    del result


class Commits:
    """Runs writes one transaction after another.

    A write that finds nobody else is run by its caller, which saves waiting for another thread.
    Those that come meanwhile are run by a thread of this, all that wait in one transaction.
    """

    def __init__(
        self, connection: sqlite3.Connection, explain: Callable[[sqlite3.Error], StateError]
    ) -> None:
        """Starts the thread.

        Args:
          connection: The only one that writes; in autocommit mode, and free for any thread.
          explain: What a caller is told of an error of SQLite.
        """
        self._connection, self._explain = connection, explain
        self._waiting: list[_Write[Any]] = []
        self._busy, self._closed, self._changed = False, False, threading.Condition()
        self._thread = threading.Thread(target=self._run, name="tfrec-commits", daemon=True)
        self._thread.start()

    def run(self, work: Work[Result], then: Callable[[Result], None] = _nothing) -> Result:
        """Runs ``work`` in a transaction and returns once that is committed.

        Args:
          work: Writes by the connection it is given; what it returns is returned. It may be run
            again, after what it did was undone.
          then: Called with the same after the commit, before any caller and any later write.

        Raises:
          StateError: nothing of it was written.
        """
        write = _Write(work, then)
        with self._changed:
            if self._closed:
                raise StateError("the state was closed; open it again")
            alone = not self._busy and not self._waiting
            if alone:
                self._busy = True
            else:
                self._waiting.append(write)
        if alone:
            try:
                self._commit([write])
            finally:
                self._is_free()
        else:
            write.wait()
        return write.result()

    def close(self) -> None:
        """Ends the thread once everything that waits is written."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while writes := self._gather():
            self._commit(writes)
            self._is_free()
            for write in writes:
                write.wake()

    def _gather(self) -> list[_Write[Any]]:
        """All that wait, once there are some and no write runs; none: there will be no more."""
        with self._changed:
            self._changed.wait_for(lambda: not self._busy and (self._waiting or self._closed))
            writes, self._waiting = self._waiting, []
            self._busy = bool(writes)
        return writes

    def _is_free(self) -> None:
        with self._changed:
            self._busy = False
            if self._waiting or self._closed:
                self._changed.notify()

    def _commit(self, writes: Sequence[_Write[Any]]) -> None:
        try:
            self._transaction(writes)
        except Exception as error:  # noqa: BLE001 - whatever it is, its caller must hear of it
            if len(writes) == 1:
                told = self._explain(error) if isinstance(error, sqlite3.Error) else error
                writes[0].failed = told
                return
            for write in writes:  # one that cannot be written must not take others with it
                self._commit([write])

    def _transaction(self, writes: Sequence[_Write[Any]]) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            for write in writes:
                write.work(self._connection)
            self._connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            raise
        for write in writes:
            write.then()


class _Write(Generic[Result]):
    """One caller's write, and what became of it."""

    def __init__(self, work: Work[Result], then: Callable[[Result], None]) -> None:
        self._work, self._then = work, then
        self._done = threading.Lock()
        self._done.acquire()
        self._found: list[Result] = []
        self.failed: Exception | None = None

    def work(self, connection: sqlite3.Connection) -> None:
        self._found = [self._work(connection)]

    def then(self) -> None:
        self._then(self._found[0])

    def wake(self) -> None:
        self._done.release()

    def wait(self) -> None:
        self._done.acquire()

    def result(self) -> Result:
        if self.failed is not None:
            raise self.failed
        return self._found[0]
