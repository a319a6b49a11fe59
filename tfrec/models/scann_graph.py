"""Scann graph: approximate retrieval in a graph, by ScaNN's own TensorFlow operations.

Only a server that has these operations linked can run it. What ScaNN trained is kept in variables,
so that a SavedModel has no files of ScaNN's, and no pickle.
"""

from __future__ import annotations

import hashlib
import uuid
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfrec.errors import SetupError
from tfrec.index.results import Floats
from tfrec.index.scann import LEAST, configuration
from tfrec.index.store import Store
from tfrec.index.tuner import Layout, suited, tune
from tfrec.models.keras_bridge import tf

RECALL = 0.95
"""The share of the exact best that a search is tuned to find."""

_PARTS = (
    "dataset",
    "scann_config",
    "serialized_partitioner",
    "datapoint_to_token",
    "ah_codebook",
    "hashed_dataset",
    "int8_dataset",
    "int8_multipliers",
    "dp_norms",
)


class ScannGraph:
    """The nearest rows of a table of vectors by inner product, as :class:`tfrec.index.ScannIndex`.

    With fewer than 16 vectors ScaNN cannot train codes: then its operation compares them all.

    Args:
      vectors: A variable float32 (n, dim), which is not stored a second time.
      queries: float32 (m, dim), like those that will be asked; None: some of the vectors.

    Raises:
      SetupError: ScaNN or its operations cannot be loaded.
    """

    def __init__(self, vectors: Any, queries: Floats | None = None) -> None:
        self._operations = operations()
        table = np.ascontiguousarray(vectors.numpy())
        self._size = len(table)
        self._layout: Layout | None = None
        if self._size < LEAST:
            parts = self._trained(table, None)
        else:
            store = Store(table, np.arange(1, self._size + 1, dtype=np.int32))
            self._layout = suited(store, RECALL, queries, self._searcher)
            searcher = self._searcher(store, self._layout)
            plans = tune(searcher, store, self._layout, RECALL, queries).plans
            self._plans = [(depth, plans[depth]) for depth in sorted(plans)]
            parts = searcher.handle
        told = self._operations.scann_scann_to_tensors(parts)._asdict()
        self._parts = [
            vectors if name == "dataset" else tf.Variable(_filled(told[name]), trainable=False)
            for name in _PARTS
        ]
        hashed = hashlib.sha256()
        for part in self._parts:
            hashed.update(np.asarray(part.numpy()).tobytes())
        self._name = hashed.hexdigest()

    @property
    def variables(self) -> list[Any]:
        """What was trained, and the vectors."""
        return self._parts

    def search(self, queries: Any, fetch: Any) -> tuple[Any, Any]:
        """The best rows of the table for each query.

        Args:
          queries: float32 (b, dim).
          fetch: int32, how many to look for, at least 1.

        Returns:
          int32 rows and float32 scores (b, f), f being ``fetch`` at most; where there are fewer,
          row 0 and the lowest number that there is.
        """
        # Named by its content: without a name, whatever graph is loaded next has the same searcher.
        searcher = self._operations.scann_tensors_to_scann(*self._parts, shared_name=self._name)
        fetch = tf.minimum(fetch, self._size)
        leaves, candidates = self.plan(fetch)
        count = tf.shape(queries)[0]
        # ScaNN fails on no query at all.
        queries = tf.pad(queries, [[0, tf.cast(count == 0, tf.int32)], [0, 0]])
        rows, scores = self._operations.scann_scann_search_batched(
            searcher, queries, fetch, candidates, leaves, False
        )
        rows, scores = rows[:count], scores[:count]
        there = tf.math.is_finite(scores)
        return tf.where(there, rows, 0), tf.where(there, scores, scores.dtype.min)

    def plan(self, fetch: Any) -> tuple[Any, Any]:
        """How many leaves to open and candidates to score again, as :func:`tuner.plan_for`."""
        if self._layout is None:
            return tf.constant(1), fetch
        (low, few), (high, many) = self._plans
        k = tf.cast(fetch, tf.float32)
        share = tf.clip_by_value((k - low) / (high - low), 0.0, 1.0)
        beyond = tf.maximum(1.0, k / high)
        leaves = (few.leaves + share * (many.leaves - few.leaves)) * tf.sqrt(beyond)
        candidates = (few.candidates + share * (many.candidates - few.candidates)) * beyond
        leaves, candidates = (tf.cast(tf.math.ceil(n), tf.int32) for n in (leaves, candidates))
        return (
            tf.minimum(leaves, self._layout.leaves),
            tf.clip_by_value(candidates, fetch, self._size),
        )

    def _searcher(self, store: Store, layout: Layout) -> _Searcher:
        return _Searcher(self._trained(store.rows(slice(None)), layout))

    def _trained(self, table: Floats, layout: Layout | None) -> Any:
        # Without a name of its own, it would be the searcher that was made before.
        return self._operations.scann_scann_create_searcher(
            x=table,
            scann_config=configuration(table, layout),
            training_threads=0,
            shared_name=str(uuid.uuid4()),
        )


def _filled(part: Any) -> Any:
    """A part; where a searcher has none, ScaNN gives a scalar of memory that nobody wrote."""
    absent = part.shape.rank == 0 and part.dtype != tf.string
    return tf.zeros_like(part) if absent else part


class _Searcher:
    """ScaNN's operations behind the interface of its Python module, for the tuner."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def search_batched(
        self, queries: Floats, k: int, candidates: int, leaves: int, parallel: bool, batch: int
    ) -> tuple[NDArray[np.int32], Floats]:
        """int32 places and float32 scores (b, k at most); where there are fewer, NaN."""
        rows, scores = operations().scann_scann_search_batched(
            self.handle, queries, k, candidates, leaves, parallel
        )
        return rows.numpy(), scores.numpy()


@cache
def operations() -> Any:
    """ScaNN's operations, registered in this process.

    Raises:
      SetupError: they cannot be loaded.
    """
    # By its file: the package itself would import a second copy of what the index has loaded.
    found = find_spec("scann")
    if found is None or not found.submodule_search_locations:
        raise SetupError("ScaNN is not installed; install it with: pip install scann")
    path = Path(found.submodule_search_locations[0], "scann_ops", "cc", "_scann_ops.so")
    try:
        return tf.load_op_library(str(path))
    except (tf.errors.OpError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise SetupError(f"ScaNN's operations for TensorFlow cannot be loaded: {reason}") from None
