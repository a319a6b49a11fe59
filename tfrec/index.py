"""Index: the k items nearest to a query, exactly or by ScaNN, behind one protocol.

Scores are inner products; normalise the vectors for cosine. Equal scores are ordered by id, lower
first, so that the same vectors always give the same list.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from tfrec.artifact import write_json
from tfrec.errors import ArtifactError, InputError, SetupError

EXACT_LIMIT = 100_000
"""Catalogs up to this size are searched exactly where the kind of index is ``auto``."""

# Scores that a thread computes at a time (16 MiB); smaller blocks waste time in starting BLAS.
_BLOCK_CELLS = 1 << 22

_SCANN_LEAST = 16
_SCANN_K = 100


@dataclass(frozen=True, eq=False)
class TopK:
    """Results, best first: the one shape in which they travel.

    Attributes:
      scores: float32 (batch, k), higher is better; -inf where there are fewer than k results.
      ids: int32 (batch, k), catalog rows; 0 where there are fewer than k results.
    """

    scores: NDArray[np.float32]
    ids: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Ragged:
    """A list of ids for each row of a batch: compressed sparse rows without values.

    ``Ragged(interactions.offsets, interactions.item)`` is what each user has seen.

    Attributes:
      offsets: int64 (batch + 1,); the list of row i is ``ids[offsets[i]:offsets[i + 1]]``.
      ids: int32 (total,), catalog rows; may repeat.
    """

    offsets: NDArray[np.int64]
    ids: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64 (batch,): how many ids each row has."""
        return np.diff(self.offsets)

    @classmethod
    def of(cls, lists: Iterable[Sequence[int] | NDArray[np.int32]]) -> Self:
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


class Index(Protocol):
    """Nearest neighbours by inner product among vectors that have ids."""

    @property
    def ids(self) -> NDArray[np.int32]:
        """int32 (n,): the ids held."""

    def search(self, queries: NDArray[np.float32], k: int, exclude: Ragged | None = None) -> TopK:
        """The ``k`` best ids for each query, without those excluded for it.

        Args:
          queries: float32 (batch, dim).
          k: How many, at least 1; may exceed the number of items.
          exclude: One list of ids for each query; ids that are not held are ignored.

        Raises:
          InputError: the shapes do not fit, or a query is not finite.
        """

    def add(self, vectors: NDArray[np.float32], ids: NDArray[np.int32]) -> None:
        """Adds items; one whose id is held already gets the new vector."""

    def remove(self, ids: NDArray[np.int32]) -> None:
        """Takes items out; ids that are not held are ignored."""

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the index as .npy and .json files (and ScaNN's own); never a pickle."""


class ExactIndex:
    """Searches every vector: exact, deterministic, and fast to about 100,000 items.

    The ids are kept sorted, whatever order they come in.
    """

    kind = "exact"

    def __init__(self, vectors: NDArray[np.float32], ids: NDArray[np.int32]) -> None:
        vectors, ids = _checked(vectors, ids)
        order = np.argsort(ids, kind="stable")
        self._ids = ids[order]
        self._vectors = np.ascontiguousarray(vectors[order])

    @classmethod
    def build(cls, vectors: NDArray[np.float32], ids: NDArray[np.int32]) -> Self:
        """Makes an index of ``vectors`` float32 (n, dim) with ``ids`` int32 (n,), all above 0.

        Raises:
          InputError: lengths differ, a vector is not finite, or an id repeats or is below 1.
        """
        return cls(vectors, ids)

    @property
    def ids(self) -> NDArray[np.int32]:
        """int32 (n,): the ids held, ascending."""
        return self._ids

    def search(self, queries: NDArray[np.float32], k: int, exclude: Ragged | None = None) -> TopK:
        """See :meth:`Index.search`."""
        queries = _checked_queries(queries, self._vectors.shape[1], k, exclude)
        return _in_blocks(queries, self._vectors, self._ids, k, exclude)

    def add(self, vectors: NDArray[np.float32], ids: NDArray[np.int32]) -> None:
        """See :meth:`Index.add`."""
        vectors, ids = _checked(vectors, ids, self._vectors.shape[1])
        kept = ~np.isin(self._ids, ids)
        merged = np.concatenate([self._ids[kept], ids])
        order = np.argsort(merged, kind="stable")
        self._vectors = np.concatenate([self._vectors[kept], vectors])[order]
        self._ids = merged[order]

    def remove(self, ids: NDArray[np.int32]) -> None:
        """See :meth:`Index.remove`."""
        kept = ~np.isin(self._ids, ids)
        self._vectors, self._ids = self._vectors[kept], self._ids[kept]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """See :meth:`Index.save`."""
        _save(folder, self.kind, self._vectors, self._ids)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Reads what :meth:`save` wrote.

        Raises:
          ArtifactError: a file is missing or damaged.
        """
        return cls(*_load(Path(folder)))


class ScannIndex:
    """Approximate search by ScaNN (Guo et al. 2020, arXiv:1908.10396), which needs no TensorFlow.

    Our ids stand beside a searcher that knows positions only, since ScaNN would write its own as
    a pickle. The vectors are kept too: a query that comes out short is searched exactly.
    """

    kind = "scann"

    def __init__(self, searcher: Any, vectors: NDArray[np.float32], ids: NDArray[np.int32]) -> None:
        self._searcher = searcher
        self._vectors = vectors
        self._ids = ids

    @classmethod
    def build(cls, vectors: NDArray[np.float32], ids: NDArray[np.int32]) -> Self:
        """Trains a searcher: a tree of about sqrt(n) leaves, 4-bit codes, exact re-scoring.

        Raises:
          InputError: as :meth:`ExactIndex.build`, or fewer than 16 vectors.
          SetupError: ScaNN is not installed.
        """
        vectors, ids = _checked(vectors, ids)
        n = len(ids)
        if n < _SCANN_LEAST:
            raise InputError(f"ScaNN needs {_SCANN_LEAST} vectors and got {n}; use kind='exact'")
        vectors = np.ascontiguousarray(vectors)
        leaves = round(np.sqrt(n))
        builder = _scann().builder(vectors, min(_SCANN_K, n), "dot_product")
        builder = builder.tree(
            num_leaves=leaves,
            num_leaves_to_search=max(min(leaves, 10), leaves // 10),
            training_sample_size=min(n, 250_000),
        )
        builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2)
        return cls(builder.reorder(min(3 * _SCANN_K, n)).build().searcher, vectors, ids)

    @property
    def ids(self) -> NDArray[np.int32]:
        """int32 (n,): the ids held, in no particular order."""
        return self._ids

    def search(self, queries: NDArray[np.float32], k: int, exclude: Ragged | None = None) -> TopK:
        """See :meth:`Index.search`. Fetches as many more as the longest exclusion list has."""
        queries = _checked_queries(queries, self._vectors.shape[1], k, exclude)
        excluded = int(exclude.lengths.max(initial=0)) if exclude is not None else 0
        fetch = min(k + excluded, len(self._ids))
        if fetch == 0 or len(queries) == 0:
            return _in_blocks(queries, self._vectors, self._ids, k, exclude)
        places, scores = self._searcher.search_batched(
            queries, fetch, max(3 * fetch, 3 * _SCANN_K), -1, False, 0
        )
        ids = self._ids[places]
        dropped = np.isnan(scores)
        if exclude is not None:
            dropped |= _is_listed(ids, exclude)
        ids, scores = np.where(dropped, 0, ids), np.where(dropped, -np.inf, scores)
        order = np.lexsort((ids, -scores), axis=1)[:, :k]
        found = _padded(np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1), k)
        return self._completed(found, queries, k, exclude)

    def _completed(
        self, found: TopK, queries: NDArray[np.float32], k: int, exclude: Ragged | None
    ) -> TopK:
        short = np.flatnonzero(found.ids[:, min(k, len(self._ids)) - 1] == 0)
        if len(short):
            left = exclude.take(short) if exclude is not None else None
            exact = _in_blocks(queries[short], self._vectors, self._ids, k, left)
            found.ids[short], found.scores[short] = exact.ids, exact.scores
        return found

    def add(self, vectors: NDArray[np.float32], ids: NDArray[np.int32]) -> None:
        """See :meth:`Index.add`."""
        vectors, ids = _checked(vectors, ids, self._vectors.shape[1])
        place = {int(key): i for i, key in enumerate(self._ids)}
        places = [place.get(int(key)) for key in ids]
        self._searcher.upsert(places, np.ascontiguousarray(vectors), len(ids))
        held = np.array([p is not None for p in places], bool)
        replaced = self._vectors.copy()
        replaced[[p for p in places if p is not None]] = vectors[held]
        self._vectors = np.concatenate([replaced, vectors[~held]])
        self._ids = np.concatenate([self._ids, ids[~held]])

    def remove(self, ids: NDArray[np.int32]) -> None:
        """See :meth:`Index.remove`."""
        for key in np.intersect1d(self._ids, ids):
            at = int(np.flatnonzero(self._ids == key)[0])
            self._searcher.delete([at])
            # ScaNN moves its last point into the gap, so we do the same.
            keep = np.arange(len(self._ids) - 1)
            keep[at:][:1] = len(self._ids) - 1
            self._ids, self._vectors = self._ids[keep], self._vectors[keep]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """See :meth:`Index.save`."""
        _save(folder, self.kind, self._vectors, self._ids)
        self._searcher.serialize(os.fspath(folder), True)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Reads what :meth:`save` wrote.

        Raises:
          ArtifactError: a file is missing or damaged, or the folder holds a pickle.
          SetupError: ScaNN is not installed.
        """
        source = Path(folder)
        if any(source.glob("*.pkl")):
            raise ArtifactError(f"{source} holds a pickle, which could run code; it is not ours")
        vectors, ids = _load(source)
        if not (source / "scann_assets.pbtxt").is_file():
            raise ArtifactError(f"{source} has no scann_assets.pbtxt; build the index again")
        return cls(_scann().load_searcher(os.fspath(source)).searcher, vectors, ids)


def make_index(
    vectors: NDArray[np.float32],
    ids: NDArray[np.int32],
    kind: Literal["auto", "exact", "scann"] = "auto",
) -> ExactIndex | ScannIndex:
    """Builds the index that suits: exact up to :data:`EXACT_LIMIT` items or without ScaNN.

    Args:
      vectors: float32 (n, dim), finite.
      ids: int32 (n,), unique, all above 0.
      kind: ``auto``, ``exact`` or ``scann``.

    Raises:
      InputError: the vectors or ids are not as said.
      SetupError: ``scann`` was asked for and is not installed.
    """
    if kind == "auto":
        kind = "scann" if len(ids) > EXACT_LIMIT and _has_scann() else "exact"
    return ScannIndex.build(vectors, ids) if kind == "scann" else ExactIndex.build(vectors, ids)


def load_index(folder: str | os.PathLike[str]) -> ExactIndex | ScannIndex:
    """Reads the index that lies in ``folder``, of whichever kind.

    Raises:
      ArtifactError: there is none, or it is damaged.
    """
    path = Path(folder) / "index.json"
    try:
        kind = json.loads(path.read_text("utf-8"))["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ArtifactError(f"{path} is missing or damaged; build the index again") from None
    classes: dict[str, type[ExactIndex] | type[ScannIndex]] = {
        "exact": ExactIndex,
        "scann": ScannIndex,
    }
    if kind not in classes:
        raise ArtifactError(f"{path} says kind '{kind}', and this tfrec knows exact and scann")
    return classes[kind].load(folder)


def top_k(
    scores: NDArray[np.float32],
    ids: NDArray[np.int32],
    k: int,
    exclude: Ragged | None = None,
) -> TopK:
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
        rows, columns = _excluded_cells(exclude, _place_of(ids))
        scores[rows, columns] = -np.inf
    columns = _best_columns(scores, min(k, len(ids)))
    best = np.take_along_axis(scores, columns, axis=1)
    return _padded(best, np.where(best > -np.inf, ids[columns], 0), k)


def _best_columns(scores: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """Columns of the k largest scores of each row, best first, the lower column on ties."""
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
            kept[row, equal[len(equal) - (counts[row] - k) :]] = False
        columns = np.flatnonzero(kept).reshape(rows, k) - n * np.arange(rows)[:, None]
    else:
        columns = np.broadcast_to(np.arange(n), (rows, n))
    picked = np.take_along_axis(scores, columns, axis=1)
    if np.isnan(picked).any():
        raise InputError("scores to rank contain NaN; the model or its input is not finite")
    order = np.argsort(-picked, axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1)


def _in_blocks(
    queries: NDArray[np.float32],
    vectors: NDArray[np.float32],
    ids: NDArray[np.int32],
    k: int,
    exclude: Ragged | None,
) -> TopK:
    place = _place_of(ids)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    found = np.zeros((len(queries), k), np.int32)
    size = max(1, _BLOCK_CELLS // max(1, len(ids)))

    def search(start: int) -> None:
        stop = min(start + size, len(queries))
        block = queries[start:stop] @ vectors.T
        if exclude is not None:
            rows, columns = _excluded_cells(exclude.slice(start, stop), place)
            block[rows, columns] = -np.inf
        best = top_k(block, ids, k)
        scores[start:stop], found[start:stop] = best.scores, best.ids

    _each(search, range(0, len(queries), size))
    return TopK(scores, found)


def _each(work: Callable[[int], None], starts: range) -> None:
    threads = min(len(starts), os.cpu_count() or 1)
    if threads <= 1:
        for start in starts:
            work(start)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, starts):
            pass


def _place_of(ids: NDArray[np.int32]) -> NDArray[np.int64]:
    """Table id -> column; -1 for ids that are not held."""
    table = np.full(int(ids.max(initial=0)) + 1, -1, np.int64)
    table[ids] = np.arange(len(ids))
    return table


def _excluded_cells(
    exclude: Ragged, place: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    rows = np.repeat(np.arange(len(exclude)), exclude.lengths)
    inside = (exclude.ids >= 0) & (exclude.ids < len(place))
    columns = place[np.where(inside, exclude.ids, 0)]
    held = inside & (columns >= 0)
    return rows[held], columns[held]


def _is_listed(ids: NDArray[np.int32], lists: Ragged) -> NDArray[np.bool_]:
    """bool like ``ids`` (batch, m): whether each id is in its row's list."""
    base = np.int64(max(ids.max(initial=0), lists.ids.max(initial=0))) + 1
    listed = np.sort(np.repeat(np.arange(len(lists)), lists.lengths) * base + lists.ids)
    wanted = np.arange(len(ids))[:, None] * base + ids
    # Not np.isin: from numpy 2.3 it hashes, and takes over a second for a million such keys.
    place = np.searchsorted(listed, wanted)
    found: NDArray[np.bool_] = np.append(listed, -1)[place] == wanted
    return found


def _padded(scores: NDArray[np.float32], ids: NDArray[np.int32], k: int) -> TopK:
    missing = ((0, 0), (0, k - scores.shape[1]))
    return TopK(
        np.pad(scores, missing, constant_values=-np.inf).astype(np.float32, copy=False),
        np.pad(ids, missing).astype(np.int32, copy=False),
    )


def _checked(
    vectors: NDArray[np.float32], ids: NDArray[np.int32], width: int | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    vectors, ids = np.asarray(vectors, np.float32), np.asarray(ids, np.int32)
    if vectors.ndim != 2 or len(vectors) != len(ids):
        raise InputError(f"an index takes one vector for each id; got {vectors.shape}, {ids.shape}")
    if width is not None and vectors.shape[1] != width:
        raise InputError(f"the index holds vectors of {width} numbers, not {vectors.shape[1]}")
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise InputError(f"the vector of item {ids[row]} has values that are not finite")
    if len(ids) and ids.min() < 1:
        raise InputError(f"ids in an index start at 1, and {ids.min()} was given")
    if len(np.unique(ids)) != len(ids):
        raise InputError("an id is given twice to the index")
    return vectors, ids


def _checked_queries(
    queries: NDArray[np.float32], width: int, k: int, exclude: Ragged | None
) -> NDArray[np.float32]:
    queries = np.ascontiguousarray(queries, np.float32)
    if queries.ndim != 2 or queries.shape[1] != width:
        raise InputError(f"queries are (batch, {width}) for this index, and got {queries.shape}")
    if k < 1:
        raise InputError(f"k is at least 1, and got {k}")
    if exclude is not None and len(exclude) != len(queries):
        raise InputError(f"{len(exclude)} lists to exclude for {len(queries)} queries")
    if not np.isfinite(queries).all():
        raise InputError("a query has values that are not finite")
    return queries


def _save(
    folder: str | os.PathLike[str],
    kind: str,
    vectors: NDArray[np.float32],
    ids: NDArray[np.int32],
) -> None:
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    np.save(target / "vectors.npy", vectors, allow_pickle=False)
    np.save(target / "ids.npy", ids, allow_pickle=False)
    write_json(target / "index.json", {"kind": kind})


def _load(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    try:
        vectors = np.load(folder / "vectors.npy", allow_pickle=False)
        ids = np.load(folder / "ids.npy", allow_pickle=False)
        return _checked(vectors, ids)
    except (OSError, ValueError, EOFError) as error:
        raise ArtifactError(f"the index in {folder} cannot be read: {error}") from None


def _has_scann() -> bool:
    return importlib.util.find_spec("scann") is not None


def _scann() -> Any:
    try:
        from scann.scann_ops.py import scann_ops_pybind
    except ImportError:
        raise SetupError("ScaNN is not installed; use the exact index (kind='exact')") from None
    return scann_ops_pybind
