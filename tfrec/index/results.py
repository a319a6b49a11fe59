"""Results: lists of ids for each query, and the best k of a matrix of scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from tfrec.errors import InputError

Floats = NDArray[np.float32]
Ids = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class TopK:
    """Results, best first: the one shape in which they travel.

    Attributes:
      scores: float32 (batch, k), higher is better; -inf where there are fewer than k results.
      ids: int32 (batch, k), catalog rows; 0 where there are fewer than k results.
    """

    scores: Floats
    ids: Ids

    @classmethod
    def nothing(cls, batch: int, k: int) -> Self:
        """No result in any place."""
        return cls(np.full((batch, k), -np.inf, np.float32), np.zeros((batch, k), np.int32))


@dataclass(frozen=True, eq=False)
class Ragged:
    """A list of ids for each row of a batch: compressed sparse rows without values.

    ``Ragged(interactions.offsets, interactions.item)`` is what each user has seen.

    Attributes:
      offsets: int64 (batch + 1,); the list of row i is ``ids[offsets[i]:offsets[i + 1]]``.
      ids: int32 (total,), catalog rows; may repeat.
    """

    offsets: NDArray[np.int64]
    ids: Ids

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64 (batch,): how many ids each row has."""
        return self.offsets[1:] - self.offsets[:-1]

    @classmethod
    def of(cls, lists: Iterable[Sequence[int] | Ids]) -> Self:
        """Packs one sequence of ids for each row."""
        arrays = [np.asarray(ids, np.int32) for ids in lists]
        offsets = np.cumsum([0, *(len(a) for a in arrays)], dtype=np.int64)
        return cls(offsets, np.concatenate([np.empty(0, np.int32), *arrays]))

    def slice(self, start: int, stop: int) -> Ragged:
        """The lists of rows ``start`` to ``stop``."""
        offsets = self.offsets[start : stop + 1]
        return Ragged(offsets - offsets[0], self.ids[offsets[0] : offsets[-1]])

    def take(self, rows: NDArray[np.integer]) -> Ragged:
        """The lists of the given rows, in their order; a row may be taken more than once."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        source = np.repeat(self.offsets[:-1][rows] - offsets[:-1], lengths)
        return Ragged(offsets, self.ids[source + np.arange(offsets[-1])])


def top_k(scores: Floats, ids: Ids, k: int, exclude: Ragged | None = None) -> TopK:
    """The ``k`` best of each row of a score matrix, equal scores by column, lower first.

    Args:
      scores: float32 (batch, n); overwritten with -inf where excluded.
      ids: int32 (n,): the id of each column.
      k: How many, at least 1; may exceed n.
      exclude: One list of ids for each row; unknown ids are ignored.

    Raises:
      InputError: a score is NaN.
    """
    if exclude is not None:
        rows, columns = _excluded_cells(exclude, ids)
        scores[rows, columns] = -np.inf
    columns = best_columns(scores, min(k, len(ids)), np.arange(len(ids)))
    best = scores[np.arange(len(scores))[:, None], columns]
    return padded(best, np.where(best > -np.inf, ids[columns], 0), k)


def best_columns(scores: Floats, k: int, ranks: NDArray[np.integer]) -> NDArray[np.intp]:
    """Columns of the k largest scores of each row, best first; the lower rank on equal scores.

    Raises:
      InputError: a score is NaN.
    """
    rows, n = scores.shape
    if k < n:
        # Partitioning values and comparing with the k-th is about five times as fast as
        # np.argpartition, and lets us choose among equals.
        threshold = np.partition(scores, n - k, axis=1)[:, n - k, None]
        kept = scores >= threshold
        counts = np.count_nonzero(kept, axis=1)
        if (counts < k).any():
            raise InputError("scores to rank contain NaN; the model or its input is not finite")
        for row in np.flatnonzero(counts > k):
            equal = np.flatnonzero(scores[row] == threshold[row])
            late = np.argsort(ranks[equal], kind="stable")[len(equal) - (counts[row] - k) :]
            kept[row, equal[late]] = False
        columns = np.flatnonzero(kept).reshape(rows, k) - n * np.arange(rows)[:, None]
    else:
        columns = np.broadcast_to(np.arange(n), (rows, n))
    each = np.arange(rows)[:, None]
    picked = scores[each, columns]
    if np.isnan(picked).any():
        raise InputError("scores to rank contain NaN; the model or its input is not finite")
    found: NDArray[np.intp] = columns[each, np.lexsort((ranks[columns], -picked), axis=1)]
    return found


def merged(parts: Sequence[TopK], k: int) -> TopK:
    """The ``k`` best of several results for the same queries, equal scores by id, lower first."""
    scores = np.concatenate([part.scores for part in parts], axis=1)
    ids = np.concatenate([part.ids for part in parts], axis=1)
    order = np.lexsort((ids, -scores), axis=1)[:, :k]
    return padded(np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1), k)


def is_listed(ids: Ids, lists: Ragged) -> NDArray[np.bool_]:
    """bool like ``ids`` (batch, m): whether each id is in its row's list."""
    base = np.int64(max(ids.max(initial=0), lists.ids.max(initial=0))) + 1
    listed = np.sort(np.repeat(np.arange(len(lists)), lists.lengths) * base + lists.ids)
    wanted = np.arange(len(ids))[:, None] * base + ids
    # Not np.isin: from numpy 2.3 it hashes, and takes over a second for a million such keys.
    place = np.searchsorted(listed, wanted)
    found: NDArray[np.bool_] = np.append(listed, -1)[place] == wanted
    return found


def padded(scores: Floats, ids: Ids, k: int) -> TopK:
    """Results of fewer than ``k`` columns with the columns that are missing."""
    if scores.shape[1] == k:
        return TopK(scores.astype(np.float32, copy=False), ids.astype(np.int32, copy=False))
    found = TopK.nothing(len(scores), k)
    found.scores[:, : scores.shape[1]], found.ids[:, : ids.shape[1]] = scores, ids
    return found


def _excluded_cells(exclude: Ragged, ids: Ids) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    rows = np.repeat(np.arange(len(exclude)), exclude.lengths)
    order = np.argsort(ids, kind="stable")
    at = np.searchsorted(ids, exclude.ids, sorter=order)
    columns = np.append(order, 0)[at]
    held = ids[columns] == exclude.ids if len(ids) else np.zeros(len(rows), bool)
    return rows[held], columns[held]
