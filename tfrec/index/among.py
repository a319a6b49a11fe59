"""Among: an index that answers with some of another one's items."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from tfrec.errors import InputError
from tfrec.index.exact import Index
from tfrec.index.results import Floats, Ids, Ragged, TopK


class Among:
    """An :class:`Index` of the items of another that have the given ids; it cannot be changed.

    Args:
      index: Where the items are.
      ids: int32 (m,), unique; those that the index does not hold do not come.
    """

    def __init__(self, index: Index, ids: Ids) -> None:
        self._index = index
        held = index.ids
        ids = np.sort(ids)
        place = np.searchsorted(held, ids)
        self.ids: Ids = ids[np.append(held, -1)[place] == ids]

    def search(
        self,
        queries: Floats,
        k: int,
        exclude: Ragged | None = None,
        allow: NDArray[np.integer] | None = None,
    ) -> TopK:
        """See :meth:`Index.search`; nothing is found where nothing is allowed."""
        ids = self.ids if allow is None else np.intersect1d(self.ids, allow)
        if not len(ids):
            return TopK.nothing(len(np.atleast_2d(queries)), k)
        return self._index.search(queries, k, exclude, ids)

    def add(self, vectors: Floats, ids: Ids) -> None:
        """Refused."""
        raise InputError("some items of an index cannot be changed; change the index itself")

    update = upsert = add

    def remove(self, ids: Ids) -> None:
        """Refused."""
        raise InputError("some items of an index cannot be changed; change the index itself")

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Refused."""
        raise InputError("some items of an index cannot be saved; save the index itself")
