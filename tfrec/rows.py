"""Rows: float32 vectors in a quarter of their memory, and arrays to which rows are added."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfrec.errors import InputError

Floats = NDArray[np.float32]


def int8_rows(vectors: Floats, least: float = 0.0) -> tuple[NDArray[np.int8], Floats]:
    """Vectors rounded to int8, each with a scale of its own.

    Args:
      vectors: float32 (n, dim).
      least: No scale is smaller.

    Returns:
      int8 codes (n, dim), -127 to 127, and the float32 scales (n,) to multiply them by.
    """
    scales = np.maximum(np.abs(vectors).max(axis=1, initial=0) / np.float32(127), least)
    whole = np.rint(vectors / np.where(scales > 0, scales, 1)[:, None])
    return whole.astype(np.int8), scales.astype(np.float32)


class Int8Rows:
    """Stands where an array float32 (n, width) is read by rows: int8 with a scale for each row.

    Args:
      codes: int8 (n, width).
      scales: float32 (n,).

    Raises:
      InputError: they do not fit each other.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, codes: NDArray[np.int8], scales: Floats) -> None:
        if codes.ndim != 2 or scales.shape != codes.shape[:1]:
            raise InputError(f"it has {len(codes)} rows and {len(scales)} scales")
        self.codes, self.scales = codes, scales

    @property
    def shape(self) -> tuple[int, int]:
        """n and width."""
        rows, width = self.codes.shape
        return rows, width

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: Any) -> Floats:
        """float32 (…, width), the rows of a slice or of an integer array (…)."""
        out: Floats = self.codes[rows] * self.scales[rows][..., None]
        return out


Vectors = Floats | Int8Rows
"""float32 (n, width), which is read by rows."""


class Growing:
    """Rows of an array to which rows are added, seldom copying what is there.

    Args:
      array: (n, ...), copied into memory with room for more, of which what is not used takes none.
    """

    def __init__(self, array: NDArray[Any]) -> None:
        self._room: NDArray[Any] = np.zeros(
            (len(array) + len(array) // 2 + 64, *array.shape[1:]), array.dtype
        )
        self._room[: len(array)] = array
        self.array = self._room[: len(array)]

    def put(self, row: int, values: NDArray[Any]) -> None:
        """Replaces a row, or adds the one after the last."""
        if row == len(self._room):
            grown = Growing(self._room)
            self._room = grown._room
        if row == len(self.array):
            self._room[row] = values
            self.array = self._room[: row + 1]
        else:
            self.array[row] = values


class GrowingRows:
    """:class:`Growing` for :class:`Int8Rows`; what is put is rounded.

    Args:
      base: Copied into memory with room for more.
    """

    def __init__(self, base: Int8Rows) -> None:
        self._codes, self._scales = Growing(base.codes), Growing(base.scales)
        self.array = Int8Rows(self._codes.array, self._scales.array)

    def put(self, row: int, values: Floats) -> None:
        """Replaces a row, or adds the one after the last."""
        codes, scales = int8_rows(values[None])
        self._codes.put(row, codes[0])
        self._scales.put(row, scales[0])
        self.array = Int8Rows(self._codes.array, self._scales.array)


def growing(base: Vectors) -> Growing | GrowingRows:
    """The same, to which rows are added."""
    if isinstance(base, Int8Rows):
        return GrowingRows(base)
    return Growing(np.asarray(base, np.float32))
