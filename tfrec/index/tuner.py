"""Tuner: how a ScaNN searcher is trained for a catalog, and how it is searched for a recall."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tfrec.errors import InputError
from tfrec.index.exact import nearest
from tfrec.index.results import Floats
from tfrec.index.store import Store

DEPTHS = (10, 100)
"""The k for which a search is tuned; what lies between is interpolated."""

ENDING = threading.Event()
"""Set when the process ends: who tunes in the background stops."""

_QUERIES = 600
# Vectors on which layouts are compared; below the least, comparing is not worth the time.
_PILOT = 125_000
_LEAST_PILOT = 20_000
# Candidates for each result, from the most: each step is tried while it makes searching faster.
_SHARES = (64, 40, 25, 16, 10, 7, 5, 3.5, 2.5, 1.8, 1.4, 1.15)
_STEP = 1.3


class EndingError(Exception):
    """The process ends, so that nobody will search as is being tuned."""


@dataclass(frozen=True)
class Layout:
    """What a searcher is trained as.

    Attributes:
      leaves: Of the tree; each vector is in one.
      numbers_a_code: How many numbers of a vector share four bits.
      sample: How many vectors the leaves and codes are learned from.
    """

    leaves: int
    numbers_a_code: int = 1
    sample: int = 100_000


@dataclass(frozen=True)
class Plan:
    """How to search.

    Attributes:
      leaves: How many leaves are opened.
      candidates: How many of the best by code are scored again.
      recall: What share of the exact best this found, of queries it was not chosen on.
    """

    leaves: int
    candidates: int
    recall: float


@dataclass(frozen=True, eq=False)
class Tuned:
    """What a search was tuned to.

    Attributes:
      target: The recall asked for.
      plans: k -> plan.
      queries: float32 (m, dim): those the caller gave, for tuning again; None: some vectors.
    """

    target: float
    plans: Mapping[int, Plan]
    queries: Floats | None = None


def plan_for(tuned: Tuned, k: int) -> Plan:
    """The plan for any k: between two that were tuned, interpolated; above them, scaled."""
    depths = sorted(tuned.plans)
    plans = [tuned.plans[depth] for depth in depths]
    beyond = max(1.0, k / depths[-1])
    return Plan(
        math.ceil(np.interp(k, depths, [p.leaves for p in plans]) * math.sqrt(beyond)),
        math.ceil(np.interp(k, depths, [p.candidates for p in plans]) * beyond),
        min(p.recall for p in plans),
    )


def suited(
    store: Store, target: float, queries: Floats | None, build: Callable[[Store, Layout], Any]
) -> Layout:
    """Chooses what to train: about sqrt(n) leaves, and how many numbers share a code.

    Each way is trained on some of the vectors and tuned there, and the faster one taken. The j-th
    best of a share s of the vectors scores about as the j/s-th best of all, so that the k looked
    for and the leaves shrink with the share.

    Args:
      store: The vectors.
      target: As for :func:`tune`.
      queries: As for :func:`tune`.
      build: Trains a searcher.
    """
    n = len(store)
    leaves = max(1, round(math.sqrt(n)))
    if n < _LEAST_PILOT or store.width < 2:
        return Layout(leaves)
    rng = np.random.default_rng(0)
    size = min(n, _PILOT)
    pilot = store.sample(np.sort(rng.choice(n, size, replace=False)))
    asked = _sampled(pilot, queries, rng)
    depths = [max(1, round(depth * size / n)) for depth in DEPTHS]
    truth = pilot.places(nearest(pilot, asked, max(depths), threads=2).ids)

    def seconds(numbers: int) -> float:
        layout = Layout(max(1, round(leaves * size / n)), numbers)
        searcher = build(pilot, layout)
        trials = [Trial(searcher, asked, truth[:, :depth]) for depth in depths]
        return math.prod(_fastest(trial, layout, size, target)[1] for trial in trials)

    with ThreadPoolExecutor(2) as pool:
        took = dict(zip((1, 2), pool.map(seconds, (1, 2)), strict=True))
    return Layout(leaves, min(took, key=lambda numbers: took[numbers]))


def tune(
    searcher: Any, store: Store, layout: Layout, target: float, queries: Floats | None = None
) -> Tuned:
    """Chooses the fastest search that reaches a recall.

    Half of the queries choose; the other half measures the recall that is stored, and opens more
    leaves until the target is reached on them too. Speed is processor time, so that a busy machine
    changes little.

    Args:
      searcher: ScaNN's.
      store: The vectors it was trained on, in the same places.
      layout: What it was trained as.
      target: The recall, above 0 and below 1.
      queries: float32 (m, dim), scaled as the store scales them; None: some of the vectors.

    Raises:
      InputError: the target is not as said.
    """
    if not 0 < target < 1:
        raise InputError(f"recall is above 0 and below 1, and got {target}")
    asked = _sampled(store, queries, np.random.default_rng(0))
    depths = sorted({min(depth, len(store)) for depth in DEPTHS})
    truth = store.places(nearest(store, asked, depths[-1], threads=2).ids)
    half = max(1, len(asked) // 2)
    plans = {}
    for depth in depths:
        choosing = Trial(searcher, asked[:half], truth[:half, :depth])
        judging = Trial(searcher, asked[half:], truth[half:, :depth])
        plan, _ = _fastest(choosing, layout, len(store), target)
        judge = judging if len(asked) > half else choosing
        plans[depth] = _judged(judge, plan, layout, len(store), target)
    return Tuned(target, plans, None if queries is None else asked)


def _sampled(store: Store, queries: Floats | None, rng: np.random.Generator) -> Floats:
    """Some queries: of those given, or else some of the vectors."""
    given = queries if queries is not None and len(queries) else None
    pool = len(store) if given is None else len(given)
    rows = rng.choice(pool, min(_QUERIES, pool), replace=False)
    return store.rows(rows) if given is None else given[rows]


class Trial:
    """Searches the same queries in different ways and says how good and how fast that is.

    Args:
      searcher: ScaNN's.
      queries: float32 (m, dim).
      truth: int64 (m, k): the places of the exact best.
    """

    def __init__(self, searcher: Any, queries: Floats, truth: np.ndarray[Any, Any]) -> None:
        self._searcher, self._queries, self._truth = searcher, queries, np.sort(truth, axis=1)
        self._base = np.arange(len(truth))[:, None] * np.int64(1 << 32)

    @property
    def k(self) -> int:
        """How many are looked for."""
        return int(self._truth.shape[1])

    def run(self, leaves: int, candidates: int) -> tuple[float, float]:
        """Recall, and seconds of one thread.

        Raises:
          EndingError: the process ends.
        """
        if ENDING.is_set():
            raise EndingError
        k = self.k
        began = time.thread_time()
        found, scores = self._searcher.search_batched(
            self._queries, k, max(candidates, k), leaves, False, 0
        )
        took = time.thread_time() - began
        keys = np.where(np.isnan(scores), -1, found.astype(np.int64) + self._base)
        right = np.isin(keys, self._truth + self._base, kind="sort")
        return float(np.count_nonzero(right) / self._truth.size), took


def _fastest(trial: Trial, layout: Layout, n: int, target: float) -> tuple[Plan, float]:
    """Fewer and fewer candidates, each with as few leaves as do, until that is no faster."""
    k = trial.k
    counts = [min(n, math.ceil(k * share)) for share in _SHARES]
    ladder = _ladder(layout.leaves)
    step, best, least = _lowest(trial, ladder, counts[0], target), None, math.inf
    for candidates in dict.fromkeys(counts):
        while step < len(ladder):
            recall, took = trial.run(ladder[step], candidates)
            if recall >= target:
                if took < least:
                    best, least = Plan(ladder[step], candidates, recall), took
                break
            if took > 1.5 * least:
                step = len(ladder)  # more leaves take longer still
            step += 1
        if step >= len(ladder):
            break
    if best is None:  # out of reach for the codes: everything they can give
        recall, took = trial.run(layout.leaves, counts[0])
        return Plan(layout.leaves, counts[0], recall), took
    best = _trimmed(trial, best, ladder, target)
    took = min(trial.run(best.leaves, best.candidates)[1] for _ in range(3))
    return best, took


def _lowest(trial: Trial, ladder: Sequence[int], candidates: int, target: float) -> int:
    """The first step of the ladder that reaches the target, by halving."""
    low, high = 0, len(ladder) - 1
    while low < high:
        middle = (low + high) // 2
        if trial.run(ladder[middle], candidates)[0] >= target:
            high = middle
        else:
            low = middle + 1
    return low


def _trimmed(trial: Trial, plan: Plan, ladder: Sequence[int], target: float) -> Plan:
    """As few leaves as do, between two steps of the ladder."""
    at = ladder.index(plan.leaves)
    low, high = ladder[at - 1] + 1 if at else 1, plan.leaves
    while low < high:
        middle = (low + high) // 2
        recall = trial.run(middle, plan.candidates)[0]
        if recall >= target:
            high, plan = middle, replace(plan, leaves=middle, recall=recall)
        else:
            low = middle + 1
    return plan


def _judged(trial: Trial, plan: Plan, layout: Layout, n: int, target: float) -> Plan:
    leaves, candidates, most = plan.leaves, plan.candidates, min(n, _SHARES[0] * trial.k)
    recall = trial.run(leaves, candidates)[0]
    while recall < target and (leaves < layout.leaves or candidates < most):
        leaves = min(layout.leaves, math.ceil(leaves * 1.05))
        candidates = min(most, math.ceil(candidates * 1.05))
        recall = trial.run(leaves, candidates)[0]
    return Plan(leaves, candidates, recall)


def _ladder(leaves: int) -> list[int]:
    steps = {1, leaves}
    while (step := math.ceil(max(steps - {leaves}) * _STEP)) < leaves:
        steps.add(step)
    return sorted(steps)
