"""Store: vectors that have ids, in memory that grows, and the checks of what comes in."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tfrec.errors import ArtifactError, InputError
from tfrec.index.results import Floats, Ids, Ragged
from tfrec.rows import int8_rows

Metric = Literal["dot", "cosine"]
Precision = Literal["float32", "bfloat16", "int8"]

_TYPES = {"float32": np.float32, "bfloat16": np.uint16, "int8": np.int8}


class Store:
    """Vectors in places 0 to n - 1, each with an id; new ones at the end, gaps filled by the last.

    bfloat16 is kept as its 16 bits in uint16, since numpy has no such type; int8 with one float32
    scale for each vector, the largest of its numbers being 127. Both are rounded to nearest.

    Args:
      vectors: float32 (n, dim), finite.
      ids: int32 (n,), unique, all above 0. A table of four bytes is kept for each number from
        the lowest to the highest, which are few where ids are catalog rows.
      metric: ``cosine`` scales all vectors and queries to length 1.
      precision: What a number is kept in.

    Raises:
      InputError: one of these is not as said.
    """

    def __init__(
        self,
        vectors: Floats,
        ids: Ids,
        metric: Metric = "dot",
        precision: Precision = "float32",
    ) -> None:
        one_of("metric", metric, get_args(Metric))
        one_of("precision", precision, get_args(Precision))
        self.metric, self.precision = metric, precision
        vectors, ids = _checked(vectors, ids)
        if vectors.shape[1] < 1:
            raise InputError("an index takes vectors of at least one number, and got none")
        self._data, self._scales = _encoded(self._scaled(vectors), precision)
        self._take_ids(ids)
        self._reserve(room(self._n))

    @classmethod
    def of_parts(
        cls,
        data: NDArray[Any],
        scales: Floats | None,
        ids: Ids,
        metric: Metric,
        precision: Precision,
    ) -> Store:
        """A store of what :meth:`parts` gave, which may be memory-mapped.

        Raises:
          ArtifactError: the parts do not fit each other.
        """
        store = cls.__new__(cls)
        fits = (
            metric in get_args(Metric)
            and precision in _TYPES
            and data.dtype == _TYPES.get(precision)
            and data.ndim == 2
            and ids.shape == data.shape[:1]
            and (scales is None) == (precision != "int8")
            and (scales is None or scales.shape == ids.shape)
        )
        if not fits or (len(ids) and (ids.min() < 1 or len(np.unique(ids)) != len(ids))):
            raise ArtifactError("the vectors and ids of the index do not fit each other")
        store.metric, store.precision = metric, precision
        store._data, store._scales = data, scales
        store._take_ids(ids)
        if data.flags.writeable:
            store._reserve(room(len(ids)))
        return store

    def _take_ids(self, ids: Ids) -> None:
        self._ids = ids.astype(np.int32)
        self._n = len(ids)
        self._list_places()
        self._ascending: Ids | None = None

    def _list_places(self, *more: int) -> None:
        """Makes the table id - lowest -> place + 1, with room for more ids.

        Zeros, which the system hands out for nothing, say "not held".
        """
        ids = np.append(self.ids, np.array(more, np.int64)).astype(np.int64)
        self._lowest = int(ids.min(initial=np.iinfo(np.int32).max)) if len(ids) else 1
        span = int(ids.max(initial=0)) - self._lowest + 1
        self._table = np.zeros(max(span, 0) + room(self._n) - self._n, np.int32)
        self._table[self.ids - self._lowest] = np.arange(1, self._n + 1)

    def __len__(self) -> int:
        return self._n

    @property
    def width(self) -> int:
        """How many numbers a vector has."""
        return int(self._data.shape[1])

    @property
    def ids(self) -> Ids:
        """int32 (n,): the id of each place."""
        return self._ids[: self._n]

    @property
    def ascending(self) -> Ids:
        """int32 (n,): the ids, ascending; not to be written to."""
        if self._ascending is None:
            self._ascending = np.sort(self.ids)
        return self._ascending

    def places(self, ids: NDArray[np.integer]) -> NDArray[np.int64]:
        """int64 like ``ids``: their places; -1 for ids that are not held."""
        cells = ids.astype(np.int64) - self._lowest
        inside = (cells >= 0) & (cells < len(self._table))
        return np.where(inside, self._table[np.where(inside, cells, 0)].astype(np.int64) - 1, -1)

    def rows(self, places: slice | NDArray[np.int64]) -> Floats:
        """float32 (m, dim): the vectors in these places, as far as their precision tells."""
        data = self._data[: self._n][places]
        if self.precision == "bfloat16":
            return (data.astype(np.uint32) << 16).view(np.float32)
        if self._scales is not None:
            return data * self._scales[: self._n][places][:, None]
        return np.asarray(data, np.float32)

    def parts(self) -> tuple[NDArray[Any], Floats | None, Ids]:
        """Vectors as they are kept, scales where there are some, and ids."""
        scales = None if self._scales is None else self._scales[: self._n]
        return self._data[: self._n], scales, self.ids

    def copy(self) -> Store:
        """Another store of the same."""
        return self.sample(np.arange(self._n))

    def sample(self, places: NDArray[np.int64]) -> Store:
        """Another store of the items in these places."""
        data, scales, ids = self.parts()
        some = None if scales is None else scales[places]
        return Store.of_parts(data[places], some, ids[places], self.metric, self.precision)

    def checked(self, vectors: Floats, ids: Ids) -> tuple[Floats, Ids]:
        """Vectors and ids to put in, once they are known to fit; scaled to length 1 for cosine.

        Raises:
          InputError: they do not fit.
        """
        vectors, ids = _checked(vectors, ids, self.width)
        return self._scaled(vectors), ids

    def queries(self, queries: Floats, k: int, exclude: Ragged | None) -> Floats:
        """float32 (batch, dim): queries that fit; one alone, (dim,), is a batch of one.

        Raises:
          InputError: they, ``k`` or ``exclude`` do not fit.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        if queries.ndim == 1:
            queries = queries[None]
        if queries.ndim != 2 or queries.shape[1] != self.width:
            raise InputError(
                f"queries are (batch, {self.width}) for this index, and got {queries.shape}"
            )
        if k < 1:
            raise InputError(f"k is at least 1, and got {k}")
        if exclude is not None and len(exclude) != len(queries):
            raise InputError(f"{len(exclude)} lists to exclude for {len(queries)} queries")
        if not np.isfinite(queries).all():
            raise InputError("a query has values that are not finite")
        return self._scaled(queries)

    def put(self, vectors: Floats, ids: Ids) -> list[int | None]:
        """Adds or replaces vectors that :meth:`checked` gave; returns the places that were held."""
        places = self.places(ids)
        new = places < 0
        self._make_room(int(np.count_nonzero(new)))
        low, high = int(ids.min()), int(ids.max())
        if low < self._lowest or high - self._lowest >= len(self._table):
            self._list_places(low, high)
        held = [None if place < 0 else int(place) for place in places]
        places[new] = self._n + np.arange(np.count_nonzero(new))
        self._n += int(np.count_nonzero(new))
        self._data[places], scales = _encoded(vectors, self.precision)
        if self._scales is not None:
            self._scales[places] = scales
        self._ids[places[new]] = ids[new]
        self._table[ids - self._lowest] = places + 1
        if new.any():
            self._ascending = None
        return held

    def drop(self, id_: int) -> int:
        """Takes an item out that is held; the last one moves to its place, which is returned."""
        place, last = int(self._table[id_ - self._lowest]) - 1, self._n - 1
        self._make_room(0)
        moved = self._ids[last]
        self._data[place], self._ids[place] = self._data[last], moved
        if self._scales is not None:
            self._scales[place] = self._scales[last]
        self._table[moved - self._lowest] = place + 1
        self._table[id_ - self._lowest] = 0
        self._n -= 1
        self._ascending = None
        return place

    def _scaled(self, vectors: Floats) -> Floats:
        if self.metric == "dot":
            return vectors
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(vectors / np.where(lengths > 0, lengths, 1), np.float32)

    def _make_room(self, more: int) -> None:
        wanted = self._n + more
        if wanted > len(self._data) or not self._data.flags.writeable:
            self._reserve(room(wanted))

    def _reserve(self, size: int) -> None:
        self._data = _longer(self._data, size)
        self._ids = _longer(self._ids, size)
        self._scales = None if self._scales is None else _longer(self._scales, size)


class Gate:
    """Lets many threads read or one write; who wants to write goes before new readers."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._reading = self._wanting = 0
        self._written = False

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Waits while somebody writes."""
        with self._changed:
            while self._written or self._wanting:
                self._changed.wait()
            self._reading += 1
        try:
            yield
        finally:
            with self._changed:
                self._reading -= 1
                self._changed.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Waits while somebody reads or writes."""
        with self._changed:
            self._wanting += 1
            while self._written or self._reading:
                self._changed.wait()
            self._wanting -= 1
            self._written = True
        try:
            yield
        finally:
            with self._changed:
                self._written = False
                self._changed.notify_all()


def room(n: int) -> int:
    """For how many places to make room: adding one by one seldom copies what is there.

    What is not used takes no memory on systems that hand out pages when they are first written.
    """
    return n + n // 2 + 16


def one_of(what: str, given: str, known: Collection[str]) -> None:
    """Refuses a name that is not known.

    Raises:
      InputError: it is not.
    """
    if given not in known:
        raise InputError(f"{what} is one of {', '.join(known)}, not '{given}'")


def whole_numbers(ids: NDArray[np.integer]) -> NDArray[np.integer]:
    """int (m,): ids to look for.

    Raises:
      InputError: they are no list of whole numbers.
    """
    ids = np.asarray(ids)
    if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
        raise InputError(f"ids are a list of whole numbers, and got {ids.dtype} {ids.shape}")
    return ids.astype(np.int64, copy=False)


def checked_ids(ids: NDArray[np.integer]) -> Ids:
    """int32 (n,): ids that an index can hold.

    Raises:
      InputError: they are no list of whole numbers, one is below 1 or too large, or one repeats.
    """
    ids = np.asarray(ids)
    if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
        raise InputError(
            f"ids in an index are a list of whole numbers, and got {ids.dtype} {ids.shape}"
        )
    if len(ids) and (ids.min() < 1 or ids.max() > np.iinfo(np.int32).max):
        raise InputError(
            f"ids in an index are 1 to 2147483647: they start at 1, and {ids.min()} to {ids.max()}"
            " was given"
        )
    if len(np.unique(ids)) != len(ids):
        raise InputError("an id is given twice to the index")
    return ids.astype(np.int32, copy=False)


def _longer(array: NDArray[Any], size: int) -> NDArray[Any]:
    longer = np.zeros((size, *array.shape[1:]), array.dtype)
    longer[: min(len(array), size)] = array[:size]
    return longer


def _encoded(vectors: Floats, precision: Precision) -> tuple[NDArray[Any], Floats | None]:
    if precision == "bfloat16":
        bits = np.ascontiguousarray(vectors).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16), None
    if precision == "int8":
        return int8_rows(vectors)
    return np.array(vectors, np.float32, order="C"), None


def _checked(vectors: Floats, ids: Ids, width: int | None = None) -> tuple[Floats, Ids]:
    vectors, ids = np.asarray(vectors, np.float32), np.asarray(ids)
    if vectors.ndim != 2 or len(vectors) != len(ids):
        raise InputError(f"an index takes one vector for each id; got {vectors.shape}, {ids.shape}")
    if width is not None and vectors.shape[1] != width:
        raise InputError(f"the index holds vectors of {width} numbers, not {vectors.shape[1]}")
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise InputError(f"the vector of item {ids[row]} has values that are not finite")
    return vectors, checked_ids(ids)
