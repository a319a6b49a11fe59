"""Columns of unknown make in, clean arrays out: ids, numbers and times from Arrow arrays.

A value that cannot be used raises :class:`BadCell` with its place in the column; the caller knows
the file and turns it into an :class:`~tfrec.errors.InputError`.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

_UNITS = {"s": 1_000_000, "ms": 1_000, "us": 1}
_LAST_SECOND = 253_402_300_800  # the year 10000
# A median above this is no longer a date of ours in the coarser unit: 1e11 s is the year 5138.
_AUTO_UNITS = ((1e17, "ns"), (1e14, "us"), (1e11, "ms"), (0.0, "s"))
_ZONE = r"(?:Z|z|[+-]\d\d:?\d\d)$"
_NUMBER = r"^\s*[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\s*$"


class BadCell(ValueError):  # noqa: N818  it never leaves tfrec.data
    """A value that cannot be used.

    Attributes:
      row: Its 0-based place in the array that was given.
    """

    def __init__(self, row: int, problem: str) -> None:
        super().__init__(problem)
        self.row = row


def strings(array: pa.Array, separator: str = "|") -> pa.Array:
    """Any column as text: whole numbers in decimal, lists joined by ``separator``, null as "".

    Raises:
      BadCell: the column holds nested values that are no lists of plain ones.
    """
    kind = array.type
    if pa.types.is_dictionary(kind):
        return strings(array.dictionary_decode(), separator)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _joined(array, separator)
    if pa.types.is_nested(kind) or pa.types.is_binary(kind):
        raise BadCell(0, f"is of type {kind}, and a text, number, date or list was expected")
    if pa.types.is_floating(kind):
        array = _whole_if_all_are(array)
    return pc.fill_null(pc.cast(array, pa.string()), "")


def _joined(array: pa.Array, separator: str) -> pa.Array:
    parts = [None if cell is None else [_word(v) for v in cell] for cell in array.to_pylist()]
    return pa.array(["" if p is None else separator.join(p) for p in parts], pa.string())


def _word(value: Any) -> str:
    return "" if value is None else str(value)


def _whole_if_all_are(array: pa.Array) -> pa.Array:
    """Ids that pandas turned into 17.0 because one was missing become 17 again."""
    try:
        return pc.cast(array, pa.int64())
    except pa.ArrowInvalid:
        return array


class Codes:
    """Numbers opaque ids in the order in which they first appear.

    Attributes:
      place: Id -> its number.
    """

    def __init__(self) -> None:
        self.place: dict[str, int] = {}

    def encode(self, array: pa.Array) -> NDArray[np.int32]:
        """int32 numbers of a column of ids; -1 where the id is missing or empty."""
        coded = strings(array).dictionary_encode()
        words = coded.dictionary.to_pylist()
        numbers = [-1 if w == "" else self.place.setdefault(w, len(self.place)) for w in words]
        table = np.array(numbers, np.int32)
        return table[coded.indices.to_numpy(zero_copy_only=False)] if words else table

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids, in order of their numbers."""
        return tuple(self.place)


def numbers(array: pa.Array) -> NDArray[np.float64]:
    """float64 values of a column; NaN where a cell is null or empty.

    Raises:
      BadCell: a cell is no number, or is written as NaN or infinity.
    """
    if pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
        cells = pc.cast(array, pa.float64())
    else:
        text = strings(array)
        filled = pc.if_else(pc.equal(text, ""), None, text)
        try:
            cells = pc.cast(filled, pa.float64())
        except pa.ArrowInvalid:
            cells = pa.array([_number(row, cell) for row, cell in enumerate(filled.to_pylist())])
            cells = pc.cast(cells, pa.float64())
    bad = pc.fill_null(pc.invert(pc.is_finite(cells)), False)
    if pc.any(bad).as_py():
        row = int(np.flatnonzero(bad.to_numpy(zero_copy_only=False))[0])
        raise BadCell(row, f"is {array[row].as_py()!r}, and a finite number was expected")
    return np.asarray(cells.to_numpy(zero_copy_only=False), np.float64)


def _number(row: int, cell: str | None) -> float | None:
    if cell is None or not cell.strip():
        return None
    try:
        return to_number(cell)
    except ValueError:
        raise BadCell(row, f"is {cell!r}, and a finite number was expected") from None


def to_number(cell: str) -> float:
    """Reads a number as people write it: what ``float`` reads, but not Python's 1_000.

    Raises:
      ValueError: it is none.
    """
    if "_" in cell:
        raise ValueError(cell)
    return float(cell)


class Times:
    """Collects a column of times, batch by batch.

    Numbers count from 1970 in ``unit`` (``auto`` judges by their median: seconds, milliseconds,
    microseconds or nanoseconds); text is ISO 8601, in UTC where it names no zone.
    """

    def __init__(self, unit: str = "auto") -> None:
        self._unit = unit
        self._parts: list[NDArray[Any]] = []
        self._kind = ""

    def add(self, array: pa.Array) -> None:
        """Adds the next cells.

        Raises:
          BadCell: a cell is empty or no time.
        """
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        if pa.types.is_null(array.type) and len(array):
            raise BadCell(0, "is empty, and a time was expected")
        if array.null_count:
            row = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
            raise BadCell(row, "is empty, and a time was expected")
        if len(array):
            self._parts.append(self._read(array))

    def _read(self, array: pa.Array) -> NDArray[Any]:
        if pa.types.is_temporal(array.type):
            self._kind = self._kind or "date"
            return _moments(array)
        if pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
            self._kind = self._kind or "number"
            values = array.to_numpy(zero_copy_only=False)
            if not np.isfinite(values).all():
                row = int(np.flatnonzero(~np.isfinite(values))[0])
                raise BadCell(row, f"is {values[row]}, and a time was expected")
            return np.asarray(values, np.int64) if values.dtype.kind in "iu" else values
        text = strings(array)
        if not self._kind:
            looks = pc.match_substring_regex(text.slice(0, 1), _NUMBER)[0].as_py()
            self._kind = "number" if looks else "date"
        return _counted(text) if self._kind == "number" else _dated(text)

    def microseconds(self) -> NDArray[np.int64]:
        """int64 microseconds since 1970 of all cells.

        Raises:
          BadCell: a time lies outside the years -9999 to 9999 in the unit at hand.
        """
        if not self._parts:
            return np.zeros(0, np.int64)
        values = np.concatenate(self._parts)
        if self._kind == "date":
            return values.astype(np.int64)
        unit = self._unit
        if unit == "auto":
            _refuse_calendar_numbers(values)
            middle = float(np.median(np.abs(values)))
            unit = next(name for limit, name in _AUTO_UNITS if middle >= limit)
        per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
        outside = np.abs(values) >= _LAST_SECOND * per_second
        if outside.any():
            row = int(np.flatnonzero(outside)[0])
            raise BadCell(row, f"is {values[row]}, which is no time in {unit} since 1970")
        if unit == "ns":
            return (values // 1000).astype(np.int64)
        if values.dtype.kind == "f":
            return np.round(values * _UNITS[unit]).astype(np.int64)
        return np.asarray(values * _UNITS[unit], np.int64)


def _refuse_calendar_numbers(values: NDArray[Any]) -> None:
    """20240517 is no number of seconds: read as one, every event would be in August 1970."""
    month, day = values // 100 % 100, values % 100
    dated = (values >= 19_000_101) & (values <= 21_001_231) & (month >= 1) & (month <= 12)
    if (dated & (day >= 1) & (day <= 31)).all():
        raise BadCell(
            0,
            f"is {values[0]}, which looks like a date without hyphens; write it as 2024-05-17, or "
            "set data.timestamp_unit if it does count from 1970",
        )


def _moments(array: pa.Array) -> NDArray[np.int64]:
    zone = array.type.tz if pa.types.is_timestamp(array.type) else None
    try:
        return _epoch(pc.cast(array, pa.timestamp("us", zone), safe=False))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise BadCell(0, f"is of type {array.type}, and a time was expected") from None


def _counted(text: pa.Array) -> NDArray[Any]:
    for kind in (pa.int64(), pa.float64()):
        try:
            values = pc.cast(text, kind).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid:
            continue
        if np.isfinite(values).all():
            return np.asarray(values)
    return np.array([_count(row, cell) for row, cell in enumerate(text.to_pylist())])


def _count(row: int, cell: str) -> float:
    try:
        value = to_number(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise BadCell(row, f"is {cell!r}, and a number of seconds since 1970 was expected")
    return value


def _dated(text: pa.Array) -> NDArray[np.int64]:
    zoned = pc.match_substring_regex(text, _ZONE)
    try:
        if not pc.any(zoned).as_py():
            return _epoch(pc.cast(text, pa.timestamp("us")))
        if pc.all(zoned).as_py():
            return _epoch(pc.cast(text, pa.timestamp("us", "UTC")))
    except pa.ArrowInvalid:
        pass
    return np.array([_date(row, cell) for row, cell in enumerate(text.to_pylist())], np.int64)


def _epoch(array: pa.Array) -> NDArray[np.int64]:
    return np.asarray(pc.cast(array, pa.int64()).to_numpy(zero_copy_only=False), np.int64)


def _date(row: int, cell: str) -> int:
    try:
        moment = datetime.fromisoformat(cell.strip())
    except ValueError:
        expected = "seconds since 1970 or ISO 8601, such as 2024-05-17T08:30:00"
        raise BadCell(row, f"is {cell!r}, and a time was expected: {expected}") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds
