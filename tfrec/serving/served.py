"""Served: what of a catalog reaches people: how much, how popular, how diverse, from where."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

TENTHS = 10
_TOGETHER = 64  # lists that are counted at once, in a tenth of the time


class Served:
    """Counts of the lists that were answered, by row of the catalog.

    Rows past the end are items that were added since: they belong to the least popular tenth. Any
    number of threads may record and read.

    Args:
      popularity: float or int [rows], events of each item; row 0 is no item, as in a catalog.
    """

    def __init__(self, popularity: ArrayLike) -> None:
        self._tenth = _tenths(np.asarray(popularity)[1:])
        self.catalog = len(self._tenth) - 1
        self._times = np.zeros(len(self._tenth), np.int64)
        self._lock = threading.Lock()
        self._by_tenth = np.zeros(TENTHS, np.int64)
        self._sources: Counter[str] = Counter()
        self._diverse, self._diversity = 0, 0.0
        self._lists = self._distinct = 0
        self._held: list[tuple[ArrayLike, Sequence[str], float | None]] = []

    def record(
        self, rows: ArrayLike, sources: Sequence[str], diversity: float | None = None
    ) -> None:
        """Counts a list.

        Args:
          rows: int [k], each item's row in the catalog; no item twice.
          sources: Where each is from: ``behaviour``, ``text``, ``popular``, ...
          diversity: :func:`diversity` of the list; None: not known.
        """
        with self._lock:
            self._held.append((rows, sources, diversity))
            if len(self._held) >= _TOGETHER:
                self._count()

    def _count(self) -> None:
        """Counts the lists that are held."""
        if not self._held:
            return
        lists, of_sources, diversities = zip(*self._held, strict=True)
        self._held = []
        places = np.concatenate([np.asarray(rows, np.int64) for rows in lists])
        if len(places) and (last := int(places.max())) >= len(self._times):
            self._grow(last + 1)
        self._distinct += len(np.unique(places[self._times[places] == 0]))
        np.add.at(self._times, places, 1)
        self._by_tenth += np.bincount(self._tenth[places], minlength=TENTHS)
        self._sources.update(itertools.chain(*of_sources))
        known = [found for found in diversities if found is not None]
        self._lists += len(lists)
        self._diverse += len(known)
        self._diversity += sum(known)

    def resized(self, items: int) -> None:
        """Says how many items there are now that some were added or deleted."""
        self.catalog = items

    def summary(self) -> dict[str, Any]:
        """``lists``, ``distinct_items``, ``catalog``, ``coverage`` and what else is counted.

        ``popularity_deciles`` are shares of the places of all lists, most popular tenth first;
        ``diversity`` is None as long as there is none.
        """
        with self._lock:
            self._count()
            places = max(1, int(self._by_tenth.sum()))
            return {
                "lists": self._lists,
                "distinct_items": self._distinct,
                "catalog": self.catalog,
                "coverage": round(min(1.0, self._distinct / max(1, self.catalog)), 6),
                "popularity_deciles": [round(n / places, 6) for n in self._by_tenth.tolist()],
                "diversity": round(self._diversity / self._diverse, 6) if self._diverse else None,
                "sources": dict(self._sources),
            }

    def _grow(self, rows: int) -> None:
        added = max(rows, len(self._times) * 5 // 4) - len(self._times)
        self._times = np.concatenate([self._times, np.zeros(added, np.int64)])
        self._tenth = np.concatenate([self._tenth, np.full(added, TENTHS - 1, np.int8)])


def diversity(units: NDArray[np.float32]) -> float | None:
    """Mean of 1 - cosine over the pairs of a list; None: there is no pair.

    Args:
      units: float32 [k, width], of length 1; a vector of zeros is like no other.
    """
    if len(units) < 2:
        return None
    total, alone = units.sum(axis=0), units.ravel()
    pairs = len(units) * (len(units) - 1)
    return 1.0 - float(total @ total - alone @ alone) / pairs


def _tenths(popularity: NDArray[Any]) -> NDArray[np.int8]:
    """int8 [rows]: 0 for the most popular tenth; ties go by row. Row 0 takes no part."""
    found = np.full(len(popularity) + 1, TENTHS - 1, np.int8)
    order = np.argsort(-popularity.astype(np.float64), kind="stable")
    found[1 + order] = np.arange(len(order)) * TENTHS // max(1, len(order))
    return found
