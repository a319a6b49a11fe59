"""Raw data: events, items and users as they were read, before any cleaning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tfrec.data.columns import BadCell, Codes, Times, numbers, strings
from tfrec.data.tables import Reader
from tfrec.errors import InputError

REQUIRED = ("user_id", "item_id", "timestamp")
OPTIONAL = ("event", "rating", "weight")
DEFAULT_EVENT = "interaction"


@dataclass(frozen=True, eq=False)
class RawEvents:
    """Events in file order, their ids numbered by first appearance.

    Attributes:
      user: int32 (n,), place in ``user_ids``; -1 where the id is missing.
      item: int32 (n,), place in ``item_ids``; -1 where the id is missing.
      time: int64 (n,), microseconds since 1970.
      event: int8 (n,), place in ``event_names``.
      rating: float32 (n,), NaN where there is none.
      weight: float32 (n,), 1 where there is none.
    """

    user: NDArray[np.int32]
    item: NDArray[np.int32]
    time: NDArray[np.int64]
    event: NDArray[np.int8]
    rating: NDArray[np.float32]
    weight: NDArray[np.float32]
    user_ids: tuple[str, ...]
    item_ids: tuple[str, ...]
    event_names: tuple[str, ...] = (DEFAULT_EVENT,)

    def __len__(self) -> int:
        return len(self.user)

    def take(self, chosen: NDArray[np.bool_] | NDArray[np.intp]) -> RawEvents:
        """The events at the given places, or where a mask is true."""
        columns = {
            f.name: getattr(self, f.name)[chosen]
            for f in fields(self)
            if isinstance(getattr(self, f.name), np.ndarray)
        }
        return RawEvents(
            **columns,
            user_ids=self.user_ids,
            item_ids=self.item_ids,
            event_names=self.event_names,
        )


@dataclass(frozen=True, eq=False)
class RawTable:
    """Items or users, one row each, every cell a string.

    Attributes:
      name: What messages call it.
      ids: Opaque, unique, not empty.
      columns: The other columns, in order of the file; "" where a cell is empty.
    """

    name: str
    ids: tuple[str, ...]
    columns: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class RawData:
    """Everything a source gives.

    Attributes:
      digests: What was read -> SHA-256 of its bytes; equal digests, equal data.
    """

    events: RawEvents
    items: RawTable | None = None
    users: RawTable | None = None
    digests: Mapping[str, str] = field(default_factory=dict)


def read_events(reader: Reader, names: Mapping[str, str], unit: str = "auto") -> RawEvents:
    """Reads a table of events.

    Args:
      reader: The table; columns that are not ours are left alone.
      names: Our column name -> the table's, where they differ.
      unit: Unit of numeric times: auto, s, ms, us or ns.

    Raises:
      InputError: a column is missing, there is no row, or a value cannot be used.
    """
    wanted = {ours: _column(reader, ours, names) for ours in REQUIRED}
    for ours in OPTIONAL:
        if ours in names or ours in reader.columns:
            wanted[ours] = _column(reader, ours, names)
    collected = _Collected(unit)
    for batch in reader.batches(list(dict.fromkeys(wanted.values()))):
        for ours, theirs in wanted.items():
            with located(reader, theirs, collected.rows):
                collected.add(ours, batch.column(theirs))
        collected.rows += batch.num_rows
    if not collected.rows:
        raise InputError(f"{reader.name} is empty: it has no rows")
    with located(reader, wanted["timestamp"], 0):
        return collected.events()


class _Collected:
    """The columns of the batches read so far."""

    def __init__(self, unit: str) -> None:
        self.rows = 0
        self._times = Times(unit)
        self._codes = {"user_id": Codes(), "item_id": Codes(), "event": Codes()}
        self._parts: dict[str, list[NDArray[np.generic]]] = {}

    def add(self, column: str, array: pa.Array) -> None:
        if column == "timestamp":
            self._times.add(array)
            return
        if column in self._codes:
            values: NDArray[np.generic] = self._codes[column].encode(array)
            if column == "event":
                values = self._event_codes(values)
        else:
            values = numbers(array).astype(np.float32)
        if column == "weight":
            values = _checked_weights(values, array)
        self._parts.setdefault(column, []).append(values)

    def _event_codes(self, values: NDArray[np.generic]) -> NDArray[np.int8]:
        codes = np.asarray(values)
        if (codes < 0).any():
            unnamed = self._codes["event"].place
            codes = np.where(codes < 0, unnamed.setdefault(DEFAULT_EVENT, len(unnamed)), codes)
        if len(self._codes["event"].place) > np.iinfo(np.int8).max:
            row = int(np.argmax(codes >= np.iinfo(np.int8).max))
            raise BadCell(row, "is the 128th kind of event, and at most 127 are supported")
        return codes.astype(np.int8)

    def _joined(self, column: str, default: NDArray[np.generic]) -> NDArray[np.generic]:
        parts = self._parts.pop(column, None)
        return default if parts is None else np.concatenate(parts)

    def events(self) -> RawEvents:
        n = self.rows
        return RawEvents(
            user=np.asarray(self._joined("user_id", np.zeros(0)), np.int32),
            item=np.asarray(self._joined("item_id", np.zeros(0)), np.int32),
            time=self._times.microseconds(),
            event=np.asarray(self._joined("event", np.zeros(n, np.int8)), np.int8),
            rating=np.asarray(self._joined("rating", np.full(n, np.nan, np.float32)), np.float32),
            weight=np.asarray(self._joined("weight", np.ones(n, np.float32)), np.float32),
            user_ids=self._codes["user_id"].ids,
            item_ids=self._codes["item_id"].ids,
            event_names=self._codes["event"].ids or (DEFAULT_EVENT,),
        )


def _checked_weights(values: NDArray[np.generic], array: pa.Array) -> NDArray[np.float32]:
    weights = np.asarray(values, np.float32)
    if (weights < 0).any():
        row = int(np.argmax(weights < 0))
        raise BadCell(row, f"is {array[row].as_py()!r}, and a weight is not negative")
    return np.nan_to_num(weights, nan=1.0)


def read_table(
    reader: Reader, key: str, names: Mapping[str, str], separator: str = "|"
) -> RawTable:
    """Reads a table of items or users.

    Args:
      reader: The table; every column of it is kept.
      key: ``item_id`` or ``user_id``: the column that identifies a row.
      names: Our column name -> the table's, where they differ.
      separator: Joins the values of a list cell.

    Raises:
      InputError: the key column is missing, an id is empty or stands there twice, or the table
        has no row.
    """
    theirs = {_column(reader, key, names, needed=True): key}
    if key == "item_id" and "title" in names:
        theirs[_column(reader, "title", names, needed=True)] = "title"
    cells: dict[str, list[str]] = {name: [] for name in reader.columns}
    rows = 0
    for batch in reader.batches(reader.columns):
        for name in reader.columns:
            with located(reader, name, rows):
                cells[name].extend(strings(batch.column(name), separator).to_pylist())
        rows += batch.num_rows
    if not rows:
        raise InputError(f"{reader.name} is empty: it has no rows")
    columns = {theirs.get(name, name): tuple(values) for name, values in cells.items()}
    ids = columns.pop(key)
    _check_unique(reader, key, ids)
    return RawTable(reader.name, ids, columns)


def _check_unique(reader: Reader, key: str, ids: Sequence[str]) -> None:
    first: dict[str, int] = {}
    for row, value in enumerate(ids):
        if value == "":
            raise InputError(f"{reader.name}, {reader.where(row)}: the {key} is empty")
        if value in first:
            raise InputError(
                f"{reader.name}: {key} '{value}' stands there twice, in "
                f"{reader.where(first[value])} and {reader.where(row)}; keep one of them"
            )
        first[value] = row


def _column(reader: Reader, ours: str, names: Mapping[str, str], needed: bool = False) -> str:
    """The table's name of one of our columns; with ``needed`` our own name serves as well."""
    theirs = names.get(ours, ours)
    if theirs in reader.columns:
        return theirs
    if needed and ours in reader.columns:
        return ours
    raise InputError(
        f"{reader.name} has no column '{theirs}'; it has {', '.join(reader.columns)}; name yours "
        f"with --set data.columns.{ours}=NAME"
    )


@contextmanager
def located(reader: Reader, column: str, rows_before: int) -> Iterator[None]:
    """Turns a :class:`~tfrec.data.columns.BadCell` into an InputError that names file and row."""
    try:
        yield
    except BadCell as bad:
        row = reader.where(rows_before + bad.row)
        raise InputError(f"{reader.name}, {row}: column '{column}' {bad}") from None
