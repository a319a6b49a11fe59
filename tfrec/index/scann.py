"""Scann: an index that looks only where a query points to, by ScaNN, and tunes itself."""

from __future__ import annotations

import atexit
import importlib.machinery
import importlib.util
import logging
import math
import os
import sys
import threading
import types
import weakref
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tfrec.errors import ArtifactError, InputError, SetupError
from tfrec.index import disk
from tfrec.index.exact import StoredIndex, allowed_places, nearest
from tfrec.index.results import Floats, Ids, Ragged, TopK, is_listed, merged
from tfrec.index.store import Metric, Precision, Store, room
from tfrec.index.tuner import ENDING, EndingError, Layout, Plan, Tuned, plan_for, suited, tune

_log = logging.getLogger(__name__)

LEAST = 16
"""Fewer vectors than this ScaNN cannot be trained on."""

# With a filter: comparing with so many vectors takes about as long as one more candidate.
_ROWS_A_CANDIDATE = 100
# Numbers of candidates' vectors that are scored again at a time.
_RESCORED = 1 << 22
# Seconds that a process which ends waits for a training to stop.
_PATIENCE = 3.0
_trainings: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


class ScannIndex(StoredIndex):
    """Approximate search by ScaNN (Guo et al. 2020, arXiv:1908.10396), without TensorFlow.

    A tree of leaves, of which a search opens the nearest; in these, codes of four bits for each one
    or two numbers; the best by code are scored again by their vectors. How many leaves and how many
    to score again is what :meth:`tune` chooses.

    Our ids stand beside a searcher that knows places only, since ScaNN would write its own as a
    pickle. The vectors are kept too: a query that comes out short, or whose filter leaves few,
    is searched exactly.

    Items are found as soon as they are added. After many changes the tree and the codes fit the
    vectors no longer so well: when the changes since the last training exceed the share
    ``rebuild_after`` of the items it was trained on, a thread trains another searcher on a copy,
    brings it up to date and puts it in place, while searches and changes go on. A training that
    fails is logged, and tried again after as many changes more.
    """

    kind = "scann"

    def __init__(
        self,
        store: Store,
        searcher: Any,
        layout: Layout,
        tuned: Tuned,
        *,
        threads: int | None = None,
        changes: int = 0,
        trained_on: int | None = None,
        rebuild_after: float = 0.2,
    ) -> None:
        super().__init__(store, threads)
        self._searcher, self._layout, self._tuned = searcher, layout, tuned
        self._changes = changes
        self._trained_on = len(store) if trained_on is None else trained_on
        self.rebuild_after = rebuild_after
        self._journal: list[tuple[Floats | None, Ids]] | None = None
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._failed_at = 0  # changes

    @classmethod
    def build(
        cls,
        vectors: Floats,
        ids: Ids,
        *,
        metric: Metric = "dot",
        precision: Precision = "float32",
        recall: float = 0.95,
        queries: Floats | None = None,
        threads: int | None = None,
    ) -> Self:
        """Trains a searcher and tunes it.

        Args:
          vectors: float32 (n, dim), finite.
          ids: int32 (n,), unique, all above 0.
          metric: ``dot`` or ``cosine``.
          precision: Of the vectors by which candidates are scored again.
          recall: The share of the exact 100 best (and 10 best) that a search is to find.
          queries: float32 (m, dim), like those that will be asked (users, say); a few hundred are
            enough. None: some of the vectors.
          threads: That search a batch; None: one for each processor core.

        Raises:
          InputError: as :meth:`ExactIndex.build`, fewer than 16 vectors, or a recall that is not
            above 0 and below 1.
          SetupError: ScaNN is not installed.
        """
        store = Store(vectors, ids, metric, precision)
        if len(store) < LEAST:
            raise InputError(f"ScaNN needs {LEAST} vectors and got {len(store)}; use kind='exact'")
        asked = None if queries is None else store.queries(queries, 1, None)
        trained = train(store, recall, asked)
        return cls(store, *trained, threads=threads)

    @property
    def layout(self) -> Layout:
        """What the searcher was trained as."""
        return self._layout

    @property
    def tuned(self) -> Tuned:
        """How it searches, and the recall that was measured when this was chosen."""
        return self._tuned

    def tune(self, recall: float, queries: Floats | None = None) -> Tuned:
        """Chooses anew how many leaves are searched and candidates scored again.

        Args:
          recall: As for :meth:`build`.
          queries: As for :meth:`build`; None: those it was tuned with before, if there are any.

        Raises:
          InputError: the queries or the recall do not fit.
        """
        asked = None if queries is None else self._store.queries(queries, 1, None)
        with self._gate.reading():
            if asked is None:
                asked = self._tuned.queries
            self._tuned = tune(self._searcher, self._store, self._layout, recall, asked)
        return self._tuned

    def search(
        self,
        queries: Floats,
        k: int,
        exclude: Ragged | None = None,
        allow: NDArray[np.integer] | None = None,
    ) -> TopK:
        """See :meth:`Index.search`.

        Fetches as many more as the longest exclusion list and the share of the allowed ids demand;
        where comparing with every allowed vector is faster, does that.
        """
        queries = self._store.queries(queries, k, exclude)
        with self._gate.reading():
            places = allowed_places(self._store, allow)
            n = len(self._store)
            left = n if places is None else len(places)
            fetch = k + (int(exclude.lengths.max(initial=0)) if exclude is not None else 0)
            if places is not None:
                # A quarter more: the share among the best varies.
                fetch = math.ceil(1.25 * fetch * n / left)
                if fetch * _ROWS_A_CANDIDATE > left:
                    return nearest(self._store, queries, k, exclude, places, self.threads)
            if n == 0 or len(queries) == 0:
                return TopK.nothing(len(queries), k)
            found = self._fetched(queries, min(fetch, n))
            dropped = found.ids == 0
            if exclude is not None:
                dropped |= is_listed(found.ids, exclude)
            if places is not None:
                allowed = np.zeros(n, bool)
                allowed[places] = True
                dropped |= ~allowed[self._store.places(found.ids)]
            found.scores[dropped], found.ids[dropped] = -np.inf, 0
            return self._completed(merged([found], k), queries, k, exclude, places)

    def _fetched(self, queries: Floats, fetch: int) -> TopK:
        plan = plan_for(self._tuned, fetch)
        share = -(-len(queries) // self.threads)
        places, scores = self._searcher.search_batched(
            queries,
            fetch,
            min(max(plan.candidates, fetch), len(self._store)),
            min(plan.leaves, self._layout.leaves),
            self.threads > 1 and len(queries) > 1,
            min(share, 256),
        )
        missing = np.isnan(scores)
        if self.precision != "float32":
            # ScaNN's int8 has one scale for each dimension, and cuts off what lies beyond it.
            scores = self._rescored(queries, places)
        ids = self._store.ids[places]
        return TopK(np.where(missing, -np.inf, scores), np.where(missing, 0, ids))

    def _rescored(self, queries: Floats, places: NDArray[np.uint32]) -> Floats:
        scores = np.empty(places.shape, np.float32)
        size = max(1, _RESCORED // (places.shape[1] * self._store.width))
        for start in range(0, len(queries), size):
            block = slice(start, start + size)
            vectors = self._store.rows(places[block].astype(np.int64).ravel())
            vectors = vectors.reshape(*places[block].shape, -1)
            scores[block] = np.matmul(vectors, queries[block, :, None])[:, :, 0]
        return scores

    def _completed(
        self,
        found: TopK,
        queries: Floats,
        k: int,
        exclude: Ragged | None,
        places: NDArray[np.int64] | None,
    ) -> TopK:
        left = len(self._store) if places is None else len(places)
        short = np.flatnonzero(found.ids[:, min(k, left) - 1] == 0)
        if len(short):
            some = exclude.take(short) if exclude is not None else None
            exact = nearest(self._store, queries[short], k, some, places, self.threads)
            found.ids[short], found.scores[short] = exact.ids, exact.scores
        return found

    def _put(self, vectors: Floats, ids: Ids) -> None:
        put(self._store, self._searcher, vectors, ids)
        self._changed(vectors, ids)

    def _drop(self, ids: Ids) -> None:
        drop(self._store, self._searcher, ids)
        self._changed(None, ids)

    def _changed(self, vectors: Floats | None, ids: Ids) -> None:
        self._changes += len(ids)
        if self._journal is not None:
            self._journal.append((None if vectors is None else vectors.copy(), ids.copy()))
        if self._changes - self._failed_at > self.rebuild_after * self._trained_on:
            self._start()

    def rebuild(self) -> None:
        """Starts to train and tune anew in the background, unless that runs already."""
        with self._gate.writing():
            self._start()

    @property
    def rebuilding(self) -> bool:
        """Whether a training runs in the background."""
        return self._thread is not None and self._thread.is_alive()

    def join(self, timeout: float | None = None) -> None:
        """Waits for the training in the background, if there is one.

        Raises:
          Exception: what ended that training; the index goes on as it was.
        """
        if self._thread is not None:
            self._thread.join(timeout)
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _start(self) -> None:
        if not self.rebuilding and len(self._store) >= LEAST:
            self._failure = None
            self._thread = threading.Thread(target=self._rebuild, name="index-rebuild", daemon=True)
            _trainings.add(self._thread)
            self._thread.start()

    def _rebuild(self) -> None:
        try:
            with self._gate.reading():
                store, self._journal = self._store.copy(), []
            known = self._tuned
            searcher, layout, tuned = train(store, known.target, known.queries)
            trained_on, done = len(store), 0
            while True:
                # Most of what happened meanwhile is done beside the searches, the rest at the swap.
                while len(todo := self._journal[done:]) > 1:
                    replay(todo, store, searcher)
                    done += len(todo)
                with self._gate.writing():
                    if self._tuned is known:
                        replay(self._journal[done:], store, searcher)
                        self._changes = sum(len(ids) for _, ids in self._journal)
                        self._store, self._searcher = store, searcher
                        self._layout, self._tuned, self._trained_on = layout, tuned, trained_on
                        self._failed_at = 0
                        return
                # Somebody called tune meanwhile: what was asked for then counts.
                known = self._tuned
                tuned = tune(searcher, store, layout, known.target, known.queries)
        except EndingError:
            pass
        except Exception as failure:  # noqa: BLE001 - join raises it
            self._failure, self._failed_at = failure, self._changes
            _log.warning(
                "training the index anew failed (%s: %s): it goes on as it was, and tries again "
                "after more than %d more changes",
                *(type(failure).__name__, failure, self.rebuild_after * self._trained_on),
            )
        finally:
            self._journal = None

    def save(self, folder: str | os.PathLike[str]) -> None:
        """See :meth:`Index.save`."""

        def files(data: Path) -> None:
            disk.write_store(data, self._store)
            if self._tuned.queries is not None:
                np.save(data / "queries.npy", self._tuned.queries, allow_pickle=False)
            self._searcher.serialize(os.fspath(data), True)

        with self._gate.reading():
            tuned = {
                "recall": self._tuned.target,
                "plans": {str(k): asdict(plan) for k, plan in self._tuned.plans.items()},
            }
            since = {"changes": self._changes, "trained_on": self._trained_on}
            about = {"layout": asdict(self._layout), "tuned": tuned, **since}
            disk.write(folder, {**self._about(), **about}, files)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, mapped: bool = False) -> Self:
        """Reads what :meth:`save` wrote.

        Args:
          folder: Holds a ScaNN index.
          mapped: Whether our copy of the vectors stays on disk until it is asked for or changed,
            and digests of files are not checked; ScaNN's own are in memory.

        Raises:
          ArtifactError: a file is missing or damaged, or the folder holds something else.
          SetupError: ScaNN is not installed.
        """
        about, data = disk.read(folder, check=not mapped)
        disk.expect(folder, about, cls.kind)
        store = disk.read_store(about, data, mapped)
        try:
            layout = Layout(**about["layout"])
            plans = {int(k): Plan(**plan) for k, plan in about["tuned"]["plans"].items()}
            asked = data / "queries.npy"
            queries = np.load(asked, allow_pickle=False) if asked.exists() else None
            tuned = Tuned(float(about["tuned"]["recall"]), plans, queries)
            since = {name: int(about[name]) for name in ("changes", "trained_on")}
            assets = (data / "scann_assets.pbtxt").read_text("utf-8")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"the index in {data} cannot be read: {error}") from None
        native = _native()
        try:
            searcher = native.ScannNumpy(os.fspath(data), assets)
        except RuntimeError as error:
            raise ArtifactError(f"the index in {data} cannot be read: {error}") from None
        if searcher.size() != len(store):
            raise ArtifactError(
                f"{data} holds {searcher.size()} codes for {len(store)} ids; build the index again"
            )
        if not mapped and len(store):
            warm(searcher, store)
        return cls(store, searcher, layout, tuned, **since)


def train(
    store: Store, recall: float, queries: Floats | None, layout: Layout | None = None
) -> tuple[Any, Layout, Tuned]:
    """A searcher of a store's vectors, what it was trained as, and how it is best searched.

    Args:
      store: At least 16 vectors.
      recall: See :meth:`ScannIndex.build`.
      queries: See :meth:`ScannIndex.build`.
      layout: What to train; None: what suits.
    """
    if not 0 < recall < 1:
        raise InputError(f"recall is above 0 and below 1, and got {recall}")
    layout = layout or suited(store, recall, queries, _trained)
    searcher = _trained(store, layout)
    tuned = tune(searcher, store, layout, recall, queries)
    warm(searcher, store)
    return searcher, layout, tuned


def put(store: Store, searcher: Any, vectors: Floats, ids: Ids) -> None:
    """Adds or replaces vectors in a store and its searcher."""
    held = store.put(vectors, ids)
    searcher.upsert(held, np.ascontiguousarray(vectors), len(ids))


def drop(store: Store, searcher: Any, ids: Ids) -> None:
    """Takes items out of a store and its searcher, both of which fill the gap with the last."""
    for id_ in ids.tolist():
        searcher.delete([store.drop(id_)])


def replay(journal: list[tuple[Floats | None, Ids]], store: Store, searcher: Any) -> None:
    """Does what a journal says: vectors to put, or none for ids to drop."""
    for vectors, ids in journal:
        if vectors is None:
            drop(store, searcher, ids)
        else:
            put(store, searcher, vectors, ids)


def warm(searcher: Any, store: Store) -> None:
    """The first change takes ScaNN about half a second for a million vectors; so, before it."""
    searcher.reserve(room(len(store)))
    searcher.upsert([None], store.rows(slice(0, 1)), 1)
    searcher.delete([len(store)])


def _trained(store: Store, layout: Layout) -> Any:
    vectors = np.ascontiguousarray(store.rows(slice(None)))
    return _native().ScannNumpy(vectors, configuration(vectors, layout, store.precision), 0)


def configuration(vectors: Floats, layout: Layout | None, precision: Precision = "float32") -> str:
    """What ScaNN is told of the searcher it is to train.

    Args:
      vectors: float32 (n, dim), at least 16.
      layout: Of the searcher; None: it compares a query with every vector, which may be fewer.
      precision: Of the vectors by which candidates are scored again.

    Raises:
      SetupError: ScaNN is not installed.
    """
    scann = _builder()
    builder = scann.ScannBuilder(vectors, min(100, len(vectors)), "dot_product")
    if layout is None:
        builder.score_brute_force()
    else:
        sample = min(len(vectors), layout.sample)
        opened = max(1, layout.leaves // 10)
        builder.tree(layout.leaves, opened, training_sample_size=sample)
        builder.score_ah(
            layout.numbers_a_code,
            anisotropic_quantization_threshold=0.2,
            training_sample_size=sample,
        )
        builder.reorder(min(300, len(vectors)), scann.ReorderType[precision.upper()])
    told: str = builder.create_config()
    return told


@atexit.register
def _end() -> None:
    """Lets the trainings in the background stop between two searches of ScaNN's.

    A thread that comes back from ScaNN while the interpreter ends aborts the process. One that
    trains a tree for longer than we wait does not come back before the process is gone.
    """
    ENDING.set()
    for thread in list(_trainings):
        thread.join(_PATIENCE)


def installed() -> bool:
    """Whether ScaNN is there."""
    return importlib.util.find_spec("scann") is not None


def _part(name: str, path: str) -> types.ModuleType:
    """A module out of the package ``scann``, whose own ``__init__`` would import TensorFlow."""
    spec = importlib.util.find_spec("scann")
    if spec is None or not spec.submodule_search_locations:
        raise SetupError("ScaNN is not installed; use the exact index (kind='exact')")
    if name in sys.modules:
        return sys.modules[name]
    folder = Path(spec.submodule_search_locations[0], path)
    suffixes = [".py", *importlib.machinery.EXTENSION_SUFFIXES]
    found = [file for suffix in suffixes if (file := folder / f"{name}{suffix}").is_file()]
    part = importlib.util.spec_from_file_location(name, found[0]) if found else None
    if part is None or part.loader is None:
        raise SetupError(f"ScaNN in {folder} lacks {name}; install the version of pyproject.toml")
    module = importlib.util.module_from_spec(part)
    try:
        part.loader.exec_module(module)
    except ImportError as error:
        raise SetupError(f"ScaNN cannot be loaded: {error}; use kind='exact'") from None
    sys.modules[name] = module  # pybind11 types may be registered once in a process
    return module


@cache
def _native() -> Any:
    return _part("scann_pybind", "scann_ops/cc/python")


@cache
def _builder() -> Any:
    return _part("scann_builder", "scann_ops/py")
