"""Exact: an index that compares a query with every vector, and what all indexes share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from tfrec.errors import InputError
from tfrec.index import disk
from tfrec.index.results import Floats, Ids, Ragged, TopK, best_columns, merged, padded
from tfrec.index.store import Gate, Metric, Precision, Store, whole_numbers

# Scores that a thread has at a time: 16 MiB, and vectors that fit the processor's cache.
_QUERIES = 256
_ROWS = 16_384
_ALONE = 1 << 21  # scores that are computed sooner than threads are started


class Index(Protocol):
    """Nearest neighbours by inner product or cosine among vectors that have ids.

    Any number of threads may search and change an index; a change waits for the searches that run,
    and what it added is found by the next.
    """

    @property
    def ids(self) -> Ids:
        """int32 (n,): the ids held, ascending."""

    def search(
        self,
        queries: Floats,
        k: int,
        exclude: Ragged | None = None,
        allow: NDArray[np.integer] | None = None,
    ) -> TopK:
        """The ``k`` best ids for each query: always k of them, whenever k are left to find.

        Args:
          queries: float32 (batch, dim), or (dim,) for one, which gives a batch of one.
          k: How many, at least 1; may exceed the number of items.
          exclude: One list of ids for each query; ids that are not held are ignored.
          allow: The ids that may come, for all queries (``np.flatnonzero(condition)`` where the
            condition is an array over catalog rows); None: all. Ids not held are ignored.

        Raises:
          InputError: the shapes do not fit, a query is not finite, or ``allow`` has no id that is
            held.
        """

    def add(self, vectors: Floats, ids: Ids) -> None:
        """Adds items: float32 (m, dim) and int32 (m,).

        Raises:
          InputError: an id is held already, or the shapes do not fit; then nothing changes.
        """

    def update(self, vectors: Floats, ids: Ids) -> None:
        """Gives items new vectors.

        Raises:
          InputError: an id is not held, or the shapes do not fit; then nothing changes.
        """

    def upsert(self, vectors: Floats, ids: Ids) -> None:
        """Adds the items that are new, and gives the others new vectors.

        Raises:
          InputError: the shapes do not fit; then nothing changes.
        """

    def remove(self, ids: Ids) -> None:
        """Takes items out.

        Raises:
          InputError: an id is not held; then nothing changes.
        """

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the index as .npy and .json files (and ScaNN's own); never a pickle.

        Raises:
          SetupError: the disk is full or cannot be written.
        """


class StoredIndex:
    """What the indexes that hold a :class:`Store` share: checks, locks and changes."""

    kind = ""

    def __init__(self, store: Store, threads: int | None = None) -> None:
        self._store = store
        self._gate = Gate()
        self.threads = threads or cores()

    @property
    def ids(self) -> Ids:
        """int32 (n,): the ids held, ascending."""
        with self._gate.reading():
            return self._store.ascending

    @property
    def metric(self) -> Metric:
        """``dot`` or ``cosine``."""
        return self._store.metric

    @property
    def precision(self) -> Precision:
        """What a number of a vector is kept in."""
        return self._store.precision

    def add(self, vectors: Floats, ids: Ids) -> None:
        """See :meth:`Index.add`."""
        self._change(vectors, ids, held=False)

    def update(self, vectors: Floats, ids: Ids) -> None:
        """See :meth:`Index.update`."""
        self._change(vectors, ids, held=True)

    def upsert(self, vectors: Floats, ids: Ids) -> None:
        """See :meth:`Index.upsert`."""
        self._change(vectors, ids, held=None)

    def remove(self, ids: Ids) -> None:
        """See :meth:`Index.remove`."""
        ids = np.unique(whole_numbers(ids)).astype(np.int32)
        with self._gate.writing():
            refuse(ids[self._store.places(ids) < 0], "is not in the index; nothing was removed")
            self._drop(ids)

    def holds(self, ids: NDArray[np.integer]) -> NDArray[np.bool_]:
        """bool (m,): which of these ids the index holds."""
        with self._gate.reading():
            return self._store.places(whole_numbers(ids)) >= 0

    def check(self, vectors: Floats, ids: Ids) -> None:
        """Refuses vectors and ids that do not fit.

        Raises:
          InputError: they do not.
        """
        self._store.checked(vectors, ids)

    def search(
        self,
        queries: Floats,
        k: int,
        exclude: Ragged | None = None,
        allow: NDArray[np.integer] | None = None,
    ) -> TopK:
        """See :meth:`Index.search`."""
        raise NotImplementedError

    def save(self, folder: str | os.PathLike[str]) -> None:
        """See :meth:`Index.save`."""
        raise NotImplementedError

    def _change(self, vectors: Floats, ids: Ids, held: bool | None) -> None:
        vectors, ids = self._store.checked(vectors, ids)
        with self._gate.writing():
            there = self._store.places(ids) >= 0
            if held is False:
                refuse(ids[there], "is in the index already; use update or upsert")
            if held is True:
                refuse(ids[~there], "is not in the index; use add or upsert")
            if len(ids):
                self._put(vectors, ids)

    def _put(self, vectors: Floats, ids: Ids) -> None:
        self._store.put(vectors, ids)

    def _drop(self, ids: Ids) -> None:
        for id_ in ids.tolist():
            self._store.drop(id_)

    def _about(self) -> dict[str, Any]:
        return {"kind": self.kind, "metric": self.metric, "precision": self.precision}


class ExactIndex(StoredIndex):
    """Searches every vector: exact and deterministic; the faster one for small catalogs.

    In bfloat16 and int8 it is exact for the vectors as they are kept: a score differs from that of
    the float32 vector x by at most ``sum(abs(q * x)) / 256`` in bfloat16, and by
    ``max(abs(x)) / 254 * sum(abs(q))`` in int8. To rank by the float32 vectors, ask for more than
    ``k`` and sort those again.
    """

    kind = "exact"

    @classmethod
    def build(
        cls,
        vectors: Floats,
        ids: Ids,
        *,
        metric: Metric = "dot",
        precision: Precision = "float32",
        threads: int | None = None,
    ) -> Self:
        """Makes an index.

        Args:
          vectors: float32 (n, dim), finite.
          ids: int32 (n,), unique, all above 0.
          metric: ``dot`` or ``cosine``.
          precision: ``float32``, ``bfloat16`` (half the memory) or ``int8`` (a quarter).
          threads: That search a batch; None: one for each processor core.

        Raises:
          InputError: lengths differ, a vector is not finite, or an id repeats or is below 1.
        """
        return cls(Store(vectors, ids, metric, precision), threads)

    def search(
        self,
        queries: Floats,
        k: int,
        exclude: Ragged | None = None,
        allow: NDArray[np.integer] | None = None,
    ) -> TopK:
        """See :meth:`Index.search`."""
        queries = self._store.queries(queries, k, exclude)
        with self._gate.reading():
            places = allowed_places(self._store, allow)
            return nearest(self._store, queries, k, exclude, places, self.threads)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """See :meth:`Index.save`."""
        with self._gate.reading():
            disk.write(folder, self._about(), lambda data: disk.write_store(data, self._store))

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, mapped: bool = False) -> Self:
        """Reads what :meth:`save` wrote.

        Args:
          folder: Holds an exact index.
          mapped: Whether the vectors stay on disk until they are asked for or changed.

        Raises:
          ArtifactError: a file is missing or damaged, or the folder holds something else.
        """
        about, data = disk.read(folder, check=not mapped)
        disk.expect(folder, about, cls.kind)
        return cls(disk.read_store(about, data, mapped))


def allowed_places(
    store: Store, allow: NDArray[np.integer] | None, any_at_all: bool = True
) -> NDArray[np.int64] | None:
    """int64 (m,), ascending: where the allowed ids are; None if all are allowed.

    Raises:
      InputError: none is held (and ``any_at_all`` is said), or they are no ids.
    """
    if allow is None:
        return None
    places = store.places(whole_numbers(allow))
    allowed = np.zeros(len(store), bool)
    allowed[places[places >= 0]] = True
    found = np.flatnonzero(allowed)
    if any_at_all and not len(found):
        raise InputError(f"none of the {len(places)} ids that the filter allows is in the index")
    return None if len(found) == len(store) else found


def nearest(
    store: Store,
    queries: Floats,
    k: int,
    exclude: Ragged | None = None,
    places: NDArray[np.int64] | None = None,
    threads: int = 1,
) -> TopK:
    """The ``k`` best by comparing with everything, equal scores by id, lower first.

    Args:
      store: What to search.
      queries: float32 (batch, dim), as :meth:`Store.queries` gives them.
      k: How many.
      exclude: One list of ids for each query.
      places: int64 (m,), ascending: where to look; None: everywhere.
      threads: That share the queries.
    """
    found = TopK.nothing(len(queries), k)
    if len(queries) * len(store) < _ALONE:
        threads = 1
    size = min(_QUERIES, max(1, -(-len(queries) // max(threads, 1))))

    def search(start: int) -> None:
        rows = slice(start, min(start + size, len(queries)))
        left_out = None if exclude is None else exclude.slice(rows.start, rows.stop)
        best = _nearest(store, queries[rows], k, left_out, places)
        found.scores[rows], found.ids[rows] = best.scores, best.ids

    _each(search, range(0, len(queries), size), threads)
    found.ids[np.isneginf(found.scores)] = 0
    return found


def _nearest(
    store: Store,
    queries: Floats,
    k: int,
    exclude: Ragged | None,
    places: NDArray[np.int64] | None,
) -> TopK:
    best = TopK.nothing(len(queries), k)
    cells = None if exclude is None else _Excluded(store, exclude)
    total = len(store) if places is None else len(places)
    for start in range(0, total, _ROWS):
        at: Any = slice(start, min(start + _ROWS, len(store)))
        if places is not None:
            at = places[start : start + _ROWS]
        scores = queries @ store.rows(at).T
        if cells is not None:
            cells.clear(scores, at)
        if total <= _ROWS:
            columns = best_columns(scores, min(k, scores.shape[1]), store.ids[at])
            picked = scores[np.arange(len(scores))[:, None], columns]
            return padded(picked, store.ids[at][columns], k)
        best = merged([best, _promising(scores, store.ids[at], best.scores[:, -1], k)], k)
    return best


def _promising(scores: Floats, ids: Ids, floor: Floats, k: int) -> TopK:
    """The scores that may be among the k best, given the k-th best so far, in any order."""
    if np.isfinite(floor).all():
        hits = scores >= floor[:, None]
        counts = np.count_nonzero(hits, axis=1)
        if counts.max(initial=0) <= k:
            # Comparing is many times as fast as partitioning, and after the first pieces few pass.
            rows, columns = np.nonzero(hits)
            slots = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
            some = TopK.nothing(len(scores), int(counts.max(initial=0)))
            some.scores[rows, slots], some.ids[rows, slots] = scores[rows, columns], ids[columns]
            return some
    columns = best_columns(scores, min(k, scores.shape[1]), ids)
    return TopK(np.take_along_axis(scores, columns, axis=1), ids[columns])


class _Excluded:
    """Which cells of a block of scores are excluded, by place."""

    def __init__(self, store: Store, exclude: Ragged) -> None:
        rows = np.repeat(np.arange(len(exclude)), exclude.lengths)
        places = store.places(exclude.ids)
        order = np.argsort(places, kind="stable")
        order = order[np.searchsorted(places[order], 0) :]
        self._rows, self._places = rows[order], places[order]

    def clear(self, scores: Floats, at: slice | NDArray[np.int64]) -> None:
        """Sets what is excluded to -inf in the scores of these places."""
        first, last = (at.start, at.stop - 1) if isinstance(at, slice) else (at[0], at[-1])
        some = slice(
            np.searchsorted(self._places, first), np.searchsorted(self._places, last, "right")
        )
        rows, places = self._rows[some], self._places[some]
        if isinstance(at, slice):
            scores[rows, places - first] = -np.inf
            return
        columns = np.searchsorted(at, places)
        among = at[columns] == places
        scores[rows[among], columns[among]] = -np.inf


def _each(work: Callable[[int], None], starts: range, threads: int) -> None:
    if min(len(starts), threads) <= 1:
        for start in starts:
            work(start)
        return
    with ThreadPoolExecutor(min(len(starts), threads)) as pool:
        for _ in pool.map(work, starts):
            pass


def cores() -> int:
    """The cores this process may use, where the system says so."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def refuse(ids: Ids, what: str) -> None:
    """Says what is wrong with these ids, if there are any.

    Raises:
      InputError: there are.
    """
    if len(ids):
        more = f" (and {len(ids) - 1} more)" if len(ids) > 1 else ""
        raise InputError(f"item {ids[0]}{more} {what}")
