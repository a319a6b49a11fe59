"""Exposures: what was shown to whom, in Parquet files that `tfrec prepare` reads again.

With the events that followed, and with the probability of each place (its propensity), a later
model is trained or judged on what this one did.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from tfrec.artifact import disk_errors
from tfrec.errors import InputError, StateError
from tfrec.serving.state import Event, State, check_text

EVENT = "exposure"
COLUMNS = pa.schema(
    [
        ("request_id", pa.string()),
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("position", pa.int32()),
        ("score", pa.float32()),
        ("propensity", pa.float32()),
        ("source", pa.string()),
        ("policy", pa.string()),
        ("model_version", pa.string()),
        ("timestamp", pa.float64()),
        ("event", pa.string()),
    ]
)
_EVENT_COLUMNS = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("timestamp", pa.float64()),
        ("event", pa.string()),
        ("rating", pa.float64()),
    ]
)
_UNFINISHED = ".partial"
_ABANDONED_SECONDS = 3600.0
_EVENTS_AT_ONCE = 10_000
_LISTS_AT_ONCE = 200


@dataclass(frozen=True, slots=True)
class Shown:
    """One list that was answered, best first.

    Attributes:
      request_id: Of the request.
      user_id: Who saw it; empty: nobody known.
      item_ids: The items, (k,).
      scores: What they were ordered by, (k,).
      propensities: Probability with which each was put at its place, (k,).
      sources: Where each came from, (k,).
      policy: Digest of the policy.
      model_version: Of the bundle.
      timestamp: Seconds since 1970.
    """

    request_id: str
    user_id: str
    item_ids: Sequence[str]
    scores: Sequence[float]
    propensities: Sequence[float]
    sources: Sequence[str]
    policy: str
    model_version: str
    timestamp: float

    def __post_init__(self) -> None:
        others = (self.scores, self.propensities, self.sources)
        if any(len(other) != len(self.item_ids) for other in others):
            lengths = [len(self.item_ids), *map(len, others)]
            raise InputError(f"items, scores, propensities and sources differ in length: {lengths}")
        check_text("a list that was shown", self.request_id + self.user_id)


class ExposureLog:
    """Writes what was shown, in a thread of its own, into files that appear whole or not at all.

    What is not yet in a file is lost if the process is killed: at most the last ``seconds`` or
    ``rows``, whichever comes first. What cannot be written is dropped and counted: a log must not
    stop a server.

    Attributes:
      dropped: Rows that were lost since the start.
      written: Rows that are in files since the start.
      problem: Why rows were dropped last; empty: none were.
    """

    def __init__(
        self, folder: str | os.PathLike[str], rows: int = 100_000, seconds: float = 300.0
    ) -> None:
        """Starts the thread.

        Args:
          folder: Of the files, made if it is not there; several processes may share it.
          rows: After which a file is written; at most twice as many are held.
          seconds: After which one is written, if there is anything to write.

        Raises:
          StateError: the folder cannot be made.
        """
        self.folder, self.dropped, self.written, self.problem = Path(folder), 0, 0, ""
        self._limit, self._seconds = rows, seconds
        self._held: list[Shown] = []
        self._rows, self._closed = 0, False
        self._changed, self._writing = threading.Condition(), threading.Lock()
        self._name, self._files = secrets.token_hex(4), 0
        with self._folder_errors():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._remove_abandoned()
        self._thread = threading.Thread(target=self._run, name="tfrec-exposures", daemon=True)
        self._thread.start()

    def record(self, shown: Shown) -> None:
        """Takes a list in; returns at once and raises nothing."""
        rows = len(shown.item_ids)
        with self._changed:
            if self._closed or self._rows + rows > 2 * self._limit:
                self.dropped += rows
                self.problem = "the log is closed" if self._closed else "the disk is too slow"
                return
            self._held.append(shown)
            self._rows += rows
            if self._rows >= self._limit:
                self._changed.notify()

    def flush(self) -> None:
        """Writes what is held now."""
        with self._writing:
            with self._changed:
                held, rows = self._held, self._rows
                self._held, self._rows = [], 0
            if not rows:
                return
            try:
                self._write(_table(held))
            except Exception as error:  # noqa: BLE001 - whatever it is, serving goes on
                self.dropped += rows
                self.problem = str(error)
            else:
                self.written += rows

    def forget(self, user_id: str) -> int:
        """Takes a user out of what is held and out of every file; how many rows there were.

        What another process holds and has not yet written is not reached.

        Raises:
          StateError: a file cannot be read or written; the others were done.
        """
        with self._writing, self._folder_errors(), self._alone():
            with self._changed:
                kept = [shown for shown in self._held if shown.user_id != user_id]
                left = sum(len(shown.item_ids) for shown in kept)
                found, self._held, self._rows = self._rows - left, kept, left
            problems = []
            for path in sorted(self.folder.glob("[!.]*.parquet")):
                try:
                    found += _without(path, user_id)
                except (OSError, pa.ArrowException) as error:
                    problems.append(f"{path}: {error}")
        if problems:
            raise StateError(f"not taken out of every exposure log: {'; '.join(problems)}")
        return found

    def close(self) -> None:
        """Writes what is held and ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        closed = False
        while not closed:
            with self._changed:
                self._changed.wait_for(self._is_due, timeout=self._seconds)
                closed = self._closed
            self.flush()

    def _is_due(self) -> bool:
        return self._closed or self._rows >= self._limit

    def _write(self, table: pa.Table) -> None:
        self._files += 1
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        path = self.folder / f"{now}-{self._name}-{self._files}.parquet"
        _replace(path, lambda stream: pq.write_table(table, stream, compression="zstd"))

    def _remove_abandoned(self) -> None:
        for path in self.folder.glob(f".*{_UNFINISHED}"):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    path.unlink()

    @contextlib.contextmanager
    def _folder_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StateError(f"{self.folder} cannot be written: {error.strerror}") from None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps other processes from rewriting the same files."""
        held = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield
        finally:
            os.close(held)


def export_events(state: State, path: str | os.PathLike[str]) -> int:
    """Writes all events of a state as a file for `tfrec prepare`; how many they are.

    Args:
      state: Its events, in the order in which they were acknowledged.
      path: Ends in ``.parquet`` or ``.csv``; columns ``user_id``, ``item_id``, ``timestamp``
        (seconds), ``event`` and ``rating`` (the value, empty where there is none).

    Raises:
      InputError: the name ends otherwise.
      SetupError: it cannot be written.
      StateError: the state cannot be read.
    """
    file = Path(path)
    open_writer = {".parquet": pq.ParquetWriter, ".csv": pa.csv.CSVWriter}.get(file.suffix)
    if open_writer is None:
        raise InputError(f"{file} ends in '{file.suffix}'; expected .parquet or .csv")
    written = 0

    def write(stream: IO[bytes]) -> None:
        nonlocal written
        events = (event for _, event in state.events())
        with open_writer(stream, _EVENT_COLUMNS) as writer:
            while chunk := list(islice(events, _EVENTS_AT_ONCE)):
                writer.write_table(_event_table(chunk))
                written += len(chunk)

    with disk_errors(file):
        _replace(file, write)
    return written


def _event_table(events: Sequence[Event]) -> pa.Table:
    columns = {
        "user_id": [event.user_id for event in events],
        "item_id": [event.item_id for event in events],
        "timestamp": [event.timestamp for event in events],
        "event": [event.event for event in events],
        "rating": [event.value for event in events],
    }
    return pa.table(columns, schema=_EVENT_COLUMNS)


def _table(held: Sequence[Shown]) -> pa.Table:
    """In pieces, since Arrow keeps other threads waiting while it takes a list in."""
    starts = range(0, len(held), _LISTS_AT_ONCE)
    return pa.concat_tables(_piece(held[start : start + _LISTS_AT_ONCE]) for start in starts)


def _piece(held: Sequence[Shown]) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS.names}
    for shown in held:
        k = len(shown.item_ids)
        columns["item_id"].extend(shown.item_ids)
        columns["position"].extend(range(1, k + 1))
        columns["score"].extend(shown.scores)
        columns["propensity"].extend(shown.propensities)
        columns["source"].extend(shown.sources)
        columns["event"].extend([EVENT] * k)
        for name in ("request_id", "user_id", "policy", "model_version", "timestamp"):
            columns[name].extend([getattr(shown, name)] * k)
    return pa.table(columns, schema=COLUMNS)


def _without(path: Path, user_id: str) -> int:
    """Takes a user out of a file, which goes if nobody else is in it; how many rows he had."""
    with pq.ParquetFile(path) as file:
        his = pc.equal(file.read(columns=["user_id"]).column("user_id"), user_id)
        found = int(pc.sum(his).as_py() or 0)
        if not found:
            return 0
        others = file.read().filter(pc.invert(his))
    if others.num_rows:
        _replace(path, lambda stream: pq.write_table(others, stream, compression="zstd"))
    else:
        path.unlink()
    return found


def _replace(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Writes a file that appears under its name when it is on disk, whole."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_UNFINISHED}")
    try:
        with open(partial, "xb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
