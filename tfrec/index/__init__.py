"""Index: the k items nearest to a query, exactly or by ScaNN, behind one protocol.

Scores are inner products or cosines. Equal scores are ordered by id, lower first, so that the same
vectors always give the same list.
"""

from __future__ import annotations

import os
from typing import Literal

from tfrec.errors import ArtifactError
from tfrec.index import disk, scann
from tfrec.index.exact import ExactIndex, Index
from tfrec.index.results import Floats, Ids, Ragged, TopK, top_k
from tfrec.index.scann import ScannIndex
from tfrec.index.shards import ShardedIndex
from tfrec.index.store import Metric, Precision, one_of

__all__ = [
    "EXACT_LIMIT",
    "ExactIndex",
    "Index",
    "Ragged",
    "ScannIndex",
    "ShardedIndex",
    "TopK",
    "load_index",
    "make_index",
    "top_k",
]

EXACT_LIMIT = 100_000
"""Catalogs up to this size are searched exactly where the kind of index is ``auto``."""


def make_index(
    vectors: Floats,
    ids: Ids,
    kind: Literal["auto", "exact", "scann"] = "auto",
    *,
    metric: Metric = "dot",
    precision: Precision = "float32",
    recall: float = 0.95,
    queries: Floats | None = None,
) -> ExactIndex | ScannIndex:
    """Builds the index that suits: exact up to :data:`EXACT_LIMIT` items or without ScaNN.

    Args:
      vectors: float32 (n, dim), finite.
      ids: int32 (n,), unique, all above 0.
      kind: ``auto``, ``exact`` or ``scann``.
      metric: ``dot`` or ``cosine``.
      precision: ``float32``, ``bfloat16`` (half the memory) or ``int8`` (a quarter).
      recall: See :meth:`ScannIndex.build`.
      queries: See :meth:`ScannIndex.build`.

    Raises:
      InputError: the vectors, the ids or the kind are not as said.
      SetupError: ``scann`` was asked for and is not installed.
    """
    one_of("kind", kind, ("auto", "exact", "scann"))
    if kind == "auto":
        kind = "scann" if len(ids) > EXACT_LIMIT and scann.installed() else "exact"
    if kind == "exact":
        return ExactIndex.build(vectors, ids, metric=metric, precision=precision)
    return ScannIndex.build(
        vectors, ids, metric=metric, precision=precision, recall=recall, queries=queries
    )


def load_index(
    folder: str | os.PathLike[str], *, mapped: bool = False
) -> ExactIndex | ScannIndex | ShardedIndex:
    """Reads the index that lies in ``folder``, of whichever kind.

    Args:
      folder: What ``save`` was given.
      mapped: Whether vectors stay on disk until they are asked for or changed, and digests of files
        are not checked. The vectors of a sharded index always stay there, and its digests are
        always checked, see :class:`ShardedIndex`.

    Raises:
      ArtifactError: there is none, or it is damaged.
    """
    kind = disk.read(folder, check=False)[0].get("kind")
    if kind == ShardedIndex.kind:
        return ShardedIndex.load(folder)
    classes: dict[str, type[ExactIndex] | type[ScannIndex]] = {
        "exact": ExactIndex,
        "scann": ScannIndex,
    }
    if kind not in classes:
        known = ", ".join([*classes, ShardedIndex.kind])
        raise ArtifactError(f"{os.fspath(folder)} says kind '{kind}', and this tfrec knows {known}")
    return classes[str(kind)].load(folder, mapped=mapped)
