"""Metrics: ranking, prediction, beyond accuracy, uncertainty. Arrays in, numbers out; no models.

Words used throughout: U users, K places in a list, T targets (the held-out events), n items.
Lists are int32 (U, K) of catalog rows, best first, without repeats, 0 where a list is short.
Targets are int32 (T,), with ``offsets`` int64 (U + 1,): those of user u are
``targets[offsets[u]:offsets[u + 1]]``. A target given twice for a user counts once, and row 0,
the unknown item, is a target that cannot be met. All numbers are float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tfrec.errors import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RANKING = ("hr", "recall", "precision", "f1", "ndcg", "mrr", "map")
"""Names of the per-user ranking metrics, as :func:`ranking` gives them for each k."""

_CELLS = 1 << 22


def positions(
    lists: NDArray[np.int32], targets: NDArray[np.int32], offsets: NDArray[np.int64]
) -> Ints:
    """Place of each target in its user's list.

    Returns:
      int64 (T,): 1 for the best place, 0 where the target is not in the list or was given twice.

    Raises:
      InputError: ``offsets`` do not fit the lists and targets.
    """
    if len(offsets) != len(lists) + 1 or offsets[-1] != len(targets):
        raise InputError(
            f"{len(lists)} lists need {len(lists) + 1} offsets that end with the number of "
            f"targets, {len(targets)}; got {len(offsets)} that end with {offsets[-1]}"
        )
    owner = _owners(offsets)
    found = np.zeros(len(targets), np.int64)
    block = max(1, _CELLS // max(1, lists.shape[1]))
    for start in range(0, len(targets), block):
        part = slice(start, start + block)
        hit = (lists[owner[part]] == targets[part, None]) & (targets[part, None] != 0)
        found[part] = np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, 0)
    found[_repeated(owner, targets)] = 0
    return found


def ranking(
    lists: NDArray[np.int32],
    targets: NDArray[np.int32],
    offsets: NDArray[np.int64],
    ks: Sequence[int],
) -> dict[str, Floats]:
    """Ranking metrics of each user at each k.

    With h hits among the first k places and t distinct targets: hr = 1 if h > 0, recall = h / t,
    precision = h / k, f1 their harmonic mean, ndcg with the ideal of min(t, k) hits (Järvelin and
    Kekäläinen 2002), mrr = 1 / place of the first hit, map = mean precision at the hits, over
    min(t, k). With one target hr = recall and mrr = map.

    Args:
      lists: int32 (U, K).
      targets: int32 (T,).
      offsets: int64 (U + 1,).
      ks: Cut-offs; one above K measures lists of K.

    Returns:
      ``"ndcg@10"`` and so on -> float64 (U,).

    Raises:
      InputError: a user has no target, a k is below 1, or shapes do not fit.
    """
    owner = _owners(offsets)
    place = positions(lists, targets, offsets)
    users = len(lists)
    distinct = np.bincount(owner[~_repeated(owner, targets)], minlength=users)
    if users and not distinct.all():
        raise InputError(f"user {int(distinct.argmin())} of the lists has no target; leave him out")
    if min(ks, default=1) < 1:
        raise InputError(f"k is at least 1, and got {min(ks)}")
    order = np.lexsort((place, owner))
    order = order[place[order] > 0]
    found = _Hits(owner[order], place[order], distinct)
    return {f"{name}@{k}": value for k in ks for name, value in found.at(k).items()}


@dataclass(frozen=True)
class _Hits:
    """Hits sorted by user and place: their users, places, and each user's number of targets."""

    user: Ints
    place: Ints
    targets: Ints

    def at(self, k: int) -> dict[str, Floats]:
        inside = self.place <= k
        user, place, users = self.user[inside], self.place[inside], len(self.targets)
        hits = np.bincount(user, minlength=users)
        nth = 1 + np.arange(len(user)) - (np.cumsum(hits) - hits)[user]
        ideal = np.minimum(self.targets, k)
        recall, precision = hits / self.targets, hits / k
        gain = np.bincount(user, 1 / np.log2(place + 1), users)
        first = nth == 1
        return {
            "hr": (hits > 0).astype(np.float64),
            "recall": recall,
            "precision": precision,
            "f1": 2 * recall * precision / np.maximum(recall + precision, 1e-300),
            "ndcg": gain / np.cumsum(1 / np.log2(np.arange(2, k + 2)))[ideal - 1],
            "mrr": np.bincount(user[first], 1 / place[first], users),
            "map": np.bincount(user, nth / place, users) / ideal,
        }


def coverage(lists: NDArray[np.int32], catalog: int) -> float:
    """Distinct items recommended to anyone, over the ``catalog`` items there are."""
    return float(len(np.setdiff1d(lists, [0])) / max(catalog, 1))


def novelty(lists: NDArray[np.int32], popularity: NDArray[np.int64], users: int) -> Floats:
    """Mean self-information of each user's list, in bits (Zhou et al. 2010).

    An item known to c of ``users`` users carries -log2(c / users); one known to nobody counts as
    known to one.

    Args:
      lists: int32 (U, K).
      popularity: int64 (n + 1,): how many users know each catalog row; row 0 is ignored.
      users: How many users there are.

    Returns:
      float64 (U,); 0 for an empty list.
    """
    bits = np.log2(users / np.clip(popularity, 1, users))
    return _mean_of_filled(bits[lists], lists)


def popularity_of(lists: NDArray[np.int32], popularity: NDArray[np.int64]) -> Floats:
    """Mean popularity of each user's list, in events an item (ARP: Yin et al. 2012).

    Args:
      lists: int32 (U, K).
      popularity: int64 (n + 1,), events of each catalog row.

    Returns:
      float64 (U,); 0 for an empty list.
    """
    return _mean_of_filled(popularity.astype(np.float64)[lists], lists)


def long_tail(popularity: NDArray[np.int64], head: float = 0.2) -> NDArray[np.bool_]:
    """bool (n + 1,): the catalog rows outside the most popular ``head`` share of items.

    Equal popularity is ordered by row, lower first. Row 0 is no item and False.
    """
    order = np.argsort(-popularity[1:], kind="stable") + 1
    tail = np.zeros(len(popularity), bool)
    tail[order[round(head * len(order)) :]] = True
    return tail


def tail_share(lists: NDArray[np.int32], tail: NDArray[np.bool_]) -> Floats:
    """float64 (U,): the share of each user's list that is in the ``tail`` bool (n + 1,)."""
    return _mean_of_filled(tail.astype(np.float64)[lists], lists)


def diversity(lists: NDArray[np.int32], vectors: NDArray[np.float32]) -> Floats:
    """Intra-list diversity: one minus the mean cosine of the pairs of a list (Ziegler et al. 2005).

    Args:
      lists: int32 (U, K).
      vectors: float32 (n + 1, dim), one for each catalog row; a zero vector is unlike any other.

    Returns:
      float64 (U,); 0 for lists of fewer than two items.
    """
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
    unit[0] = 0
    out = np.zeros(len(lists))
    block = max(1, _CELLS // max(1, lists.shape[1] * vectors.shape[1]))
    for start in range(0, len(lists), block):
        part = lists[start : start + block]
        chosen = unit[part]
        # The sum over all pairs is the square of the sum, less the items with themselves.
        together = (chosen.sum(axis=1, dtype=np.float64) ** 2).sum(axis=1)
        alone = (chosen.astype(np.float64) ** 2).sum(axis=(1, 2))
        filled = (part != 0).sum(axis=1)
        pairs = np.maximum(filled * (filled - 1), 1)
        out[start : start + block] = np.where(filled > 1, 1 - (together - alone) / pairs, 0.0)
    return out


def gini(counts: NDArray[np.int64]) -> float:
    """How unequally recommendations fall on items: 0 all alike, towards 1 all on one item.

    Args:
      counts: int64 (n,), how often each item is recommended, zeros too.
    """
    n, total = len(counts), counts.sum()
    if not total:
        return 0.0
    place = np.arange(1, n + 1)
    return float(2 * (place * np.sort(counts)).sum() / (n * total) - (n + 1) / n)


def exposure(lists: NDArray[np.int32], items: int) -> Ints:
    """int64 (items + 1,): how often each catalog row is recommended; 0 for row 0."""
    counts = np.bincount(lists.ravel(), minlength=items + 1)
    counts[0] = 0
    return counts


def auc(scores: NDArray[np.floating], labels: NDArray[np.bool_]) -> float:
    """Chance that a positive is scored above a negative, ties counting half (Mann-Whitney).

    Returns:
      NaN where there are no positives or no negatives.
    """
    labels = np.asarray(labels, bool)
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if not positives or not negatives:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts - 1) / 2
    return float(
        (middle[inverse][labels].sum() - positives * (positives + 1) / 2) / (positives * negatives)
    )


def log_loss(probabilities: NDArray[np.floating], labels: NDArray[np.bool_]) -> float:
    """Mean negative log-likelihood in nats; probabilities are kept 1e-7 away from 0 and 1."""
    p = np.clip(np.asarray(probabilities, np.float64), 1e-7, 1 - 1e-7)
    return float(-np.log(np.where(labels, p, 1 - p)).mean()) if len(p) else float("nan")


def reliability(
    probabilities: NDArray[np.floating], labels: NDArray[np.bool_], bins: int = 10
) -> list[dict[str, float]]:
    """Reliability table: bins of equal width, the empty ones left out.

    Returns:
      For each bin ``low``, ``high``, ``count``, ``predicted`` (mean probability) and ``observed``
      (share of positives).
    """
    p = np.asarray(probabilities, np.float64)
    of = np.clip((p * bins).astype(np.int64), 0, bins - 1)
    count = np.bincount(of, minlength=bins)
    predicted, observed = np.bincount(of, p, bins), np.bincount(of, labels, bins)
    return [
        {
            "low": b / bins,
            "high": (b + 1) / bins,
            "count": int(count[b]),
            "predicted": float(predicted[b] / count[b]),
            "observed": float(observed[b] / count[b]),
        }
        for b in np.flatnonzero(count).tolist()
    ]


def calibration_error(table: Sequence[Mapping[str, float]]) -> float:
    """Expected calibration error of a reliability table (Guo et al. 2017).

    The mean over events of | predicted - observed | of the event's bin.
    """
    total = sum(row["count"] for row in table)
    if not total:
        return float("nan")
    return sum(row["count"] * abs(row["predicted"] - row["observed"]) for row in table) / total


def rmse(predictions: NDArray[np.floating], truth: NDArray[np.floating]) -> float:
    """Root of the mean squared error, in the unit of the truth; NaN for no values."""
    error = np.asarray(predictions, np.float64) - np.asarray(truth, np.float64)
    return float(np.sqrt((error**2).mean())) if len(error) else float("nan")


def mae(predictions: NDArray[np.floating], truth: NDArray[np.floating]) -> float:
    """Mean absolute error, in the unit of the truth; NaN for no values."""
    error = np.asarray(predictions, np.float64) - np.asarray(truth, np.float64)
    return float(np.abs(error).mean()) if len(error) else float("nan")


def bootstrap_means(values: Floats, resamples: int, seed: int) -> Floats:
    """Means of ``values`` over users drawn with replacement (Efron 1979).

    All columns see the same draws, so the difference of two columns is a *paired* bootstrap.

    Args:
      values: float64 (U, m), m measurements of each user.
      resamples: How often users are drawn.
      seed: Of the draws.

    Returns:
      float64 (resamples, m).
    """
    users = len(values)
    rng = np.random.default_rng(seed)
    out = np.zeros((resamples, values.shape[1]))
    if not users:
        return out
    block = max(1, _CELLS // users)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = rng.integers(users, size=(rows, users), dtype=np.int32)
        counts = np.stack([np.bincount(row, minlength=users) for row in drawn])
        out[start : start + rows] = counts.astype(np.float64) @ values / users
    return out


def interval(means: Floats, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrap means float64 (resamples,)."""
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def history_segments(lengths: NDArray[np.int64], edges: Sequence[int]) -> list[tuple[str, Ints]]:
    """Users by the length of their history.

    Args:
      lengths: int64 (U,), events in each user's history.
      edges: Ascending lower bounds after the first segment, which starts at 0: ``(6, 21)`` makes
        0-5, 6-20 and 21+.

    Returns:
      (name, int64 users) of each segment that has users.
    """
    of = np.searchsorted(np.asarray(edges), lengths, side="right")
    lows = [0, *edges]
    names = [f"{a}-{b - 1}" if b - a > 1 else f"{a}" for a, b in zip(lows, edges, strict=False)]
    names.append(f"{lows[-1]}+")
    pairs = ((name, np.flatnonzero(of == i)) for i, name in enumerate(names))
    return [(name, users) for name, users in pairs if len(users)]


def popularity_decile(popularity: NDArray[np.int64]) -> Ints:
    """Tenth of the items, by popularity, in which each catalog row is.

    Args:
      popularity: int64 (n + 1,), events of each catalog row.

    Returns:
      int64 (n + 1,): 1 for the least popular tenth to 10 for the most popular; 0 for row 0. Equal
      popularity is ordered by row.
    """
    items = len(popularity) - 1
    out = np.zeros(items + 1, np.int64)
    order = np.argsort(popularity[1:], kind="stable") + 1
    out[order] = 1 + np.arange(items) * 10 // max(items, 1)
    return out


def target_metrics(place: Ints, k: int) -> dict[str, Floats]:
    """Of each target alone, whatever else its user held out: ``hr@k`` and ``ndcg@k``.

    Args:
      place: int64 (T,) as :func:`positions` gives it.
      k: Cut-off.
    """
    hit = (place > 0) & (place <= k)
    return {
        f"hr@{k}": hit.astype(np.float64),
        f"ndcg@{k}": np.where(hit, 1 / np.log2(np.maximum(place, 1) + 1), 0.0),
    }


def _owners(offsets: NDArray[np.int64]) -> Ints:
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def _repeated(owner: Ints, targets: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Whether the same user has the same target further up."""
    key = owner * (int(targets.max(initial=0)) + 1) + targets
    first = np.unique(key, return_index=True)[1]
    again = np.ones(len(targets), bool)
    again[first] = False
    return again


def _mean_of_filled(values: Floats, lists: NDArray[np.int32]) -> Floats:
    filled = lists != 0
    means: Floats = (values * filled).sum(axis=1) / np.maximum(filled.sum(axis=1), 1)
    return means
