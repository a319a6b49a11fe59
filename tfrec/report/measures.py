"""Measures: lists of recommendations in, rows of the report's table out, as plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfrec import metrics
from tfrec.data.interactions import Interactions

HISTORY_EDGES = (1, 6, 11, 21, 51, 101, 201, 501)
"""Lower bounds of the segments by history length."""

_PROJECTED = 64  # width of item vectors made from who interacted


@dataclass(frozen=True, eq=False)
class Round:
    """What an evaluation is about: users, what they had, and what they did next.

    Attributes:
      users: int32 (U,), rows of the users with a target, ascending.
      lengths: int64 (U,), events in each one's history.
      targets: int32 (T,), items that were held out.
      offsets: int64 (U + 1,); user u has ``targets[offsets[u]:offsets[u + 1]]``.
      popularity: int64 (n + 1,), users who met each item before the held-out events.
      num_users: All users, also those without a target.
      items_with_events: Distinct items of histories and targets: what coverage is a share of, as
        not every catalog row has to be reachable.
      vectors: float32 (n + 1, dim), what diversity is measured on.
      vectors_of: What they are, for people.
    """

    users: NDArray[np.int32]
    lengths: NDArray[np.int64]
    targets: NDArray[np.int32]
    offsets: NDArray[np.int64]
    popularity: NDArray[np.int64]
    num_users: int
    items_with_events: int
    vectors: NDArray[np.float32]
    vectors_of: str

    @classmethod
    def of(
        cls,
        history: Interactions,
        held_out: Interactions,
        features: NDArray[np.float32],
        seed: int,
    ) -> Round:
        """Gathers a round.

        Args:
          history: The events that models may read.
          held_out: The events they should foresee.
          features: float32 (n + 1, width) of item attributes; of width 0 if there are none.
          seed: Of the projection that stands in for absent attributes.
        """
        counts = np.diff(held_out.offsets)
        users = np.flatnonzero(counts).astype(np.int32)
        num_items = len(features) - 1
        user, item = _distinct_pairs(history, num_items)
        popularity = np.bincount(item, minlength=num_items + 1)
        met = np.zeros(num_items + 1, bool)
        met[history.item] = met[held_out.item] = True
        if features.shape[1]:
            vectors, vectors_of = features, "item attributes"
        else:
            vectors = _projection(user, item, history.num_users, num_items, seed)
            vectors_of = "the users who met an item"
        return cls(
            users=users,
            lengths=np.diff(history.offsets)[users],
            targets=held_out.item,
            offsets=np.concatenate([[0], np.cumsum(counts[users])]).astype(np.int64),
            popularity=popularity,
            num_users=history.num_users,
            items_with_events=int(np.count_nonzero(met[1:])),
            vectors=vectors,
            vectors_of=vectors_of,
        )


@dataclass(frozen=True, eq=False)
class Row:
    """One model's line in the table.

    Attributes:
      tree: Plain values, as report.json holds them.
      means: Metric -> float64 (resamples,), bootstrap means; all rows of a round share the draws.
    """

    tree: dict[str, Any]
    means: Mapping[str, NDArray[np.float64]] = field(repr=False)


def headline(ks: Sequence[int]) -> int:
    """The k of the summary: 10 where it is measured, else the largest."""
    return 10 if 10 in ks else max(ks)


def measure(
    key: str,
    name: str,
    lists: NDArray[np.int32],
    around: Round,
    ks: Sequence[int],
    resamples: int,
    seed: int,
) -> Row:
    """Everything the report says about one model's lists.

    Args:
      key: Short name, of files too.
      name: What people read.
      lists: int32 (U, at least max(ks)), best first.
      around: The round; its users are the rows of ``lists``.
      ks: Cut-offs.
      resamples: Bootstrap resamples; 0 for no intervals.
      seed: Of the resamples, the same for every row that is to be compared.
    """
    k = headline(ks)
    users = metrics.ranking(lists, around.targets, around.offsets, ks)
    means = {}
    if resamples:
        drawn = metrics.bootstrap_means(np.stack(list(users.values()), axis=1), resamples, seed)
        means = dict(zip(users, drawn.T, strict=True))
    tree = {
        "key": key,
        "name": name,
        "metrics": {m: _estimate(values, means.get(m)) for m, values in users.items()},
        "beyond": _beyond(lists, around, ks, k),
        "segments": {
            "history": _by_history(users, around, k),
            "popularity": _by_popularity(lists, around, k),
        },
        "exposure": exposure_by_decile(metrics.exposure(lists[:, :k], _items(around)), around),
    }
    return Row(tree, means)


def compare(row: Row, other: Row, metric: str) -> dict[str, Any]:
    """Paired difference of two rows of the same round.

    Returns:
      ``difference``, ``ratio`` (None where the other has 0), and with intervals ``low``, ``high``
      and ``sure``: whether the 95% interval leaves out zero.
    """
    mine, theirs = (r.tree["metrics"][metric]["mean"] for r in (row, other))
    out = {
        "metric": metric,
        "of": row.tree["name"],
        "to": other.tree["name"],
        "difference": mine - theirs,
        "ratio": mine / theirs if theirs else None,
    }
    if row.means:
        low, high = metrics.interval(row.means[metric] - other.means[metric])
        out |= {"low": low, "high": high, "sure": low > 0 or high < 0}
    return out


def exposure_by_decile(counts: NDArray[np.int64], around: Round) -> list[float]:
    """Share of ``counts`` int64 (n + 1,) in each tenth of the items, least popular first."""
    decile = metrics.popularity_decile(around.popularity)
    of = np.bincount(decile[1:], counts[1:], minlength=11)[1:]
    return [float(share) for share in of / max(of.sum(), 1)]


def classification(probabilities: NDArray[np.float32], labels: NDArray[np.bool_]) -> dict[str, Any]:
    """AUC, log-loss and calibration of predicted probabilities float32 (n,)."""
    table = metrics.reliability(probabilities, labels)
    rate = float(np.mean(labels)) if len(labels) else float("nan")
    return {
        "events": len(labels),
        "positives": int(np.count_nonzero(labels)),
        "auc": _finite(metrics.auc(probabilities, labels)),
        "log_loss": _finite(metrics.log_loss(probabilities, labels)),
        "log_loss_of_the_rate": _finite(metrics.log_loss(np.full(len(labels), rate), labels)),
        "calibration_error": _finite(metrics.calibration_error(table)),
        "reliability": table,
    }


def regression(
    predictions: NDArray[np.float32], truth: NDArray[np.float32], usual: float
) -> dict[str, Any]:
    """RMSE and MAE of predictions float32 (n,), beside those of always saying ``usual``."""
    return {
        "events": len(truth),
        "rmse": _finite(metrics.rmse(predictions, truth)),
        "mae": _finite(metrics.mae(predictions, truth)),
        "rmse_of_the_mean": _finite(metrics.rmse(np.full(len(truth), usual), truth)),
    }


def _estimate(values: NDArray[np.float64], means: NDArray[np.float64] | None) -> dict[str, Any]:
    out: dict[str, Any] = {"mean": float(values.mean())}
    if means is not None:
        out["low"], out["high"] = metrics.interval(means)
    return out


def _beyond(lists: NDArray[np.int32], around: Round, ks: Sequence[int], k: int) -> dict[str, float]:
    top = lists[:, :k]
    tail = metrics.long_tail(around.popularity)
    counts = metrics.exposure(top, _items(around))
    coverage = {
        f"coverage@{n}": metrics.coverage(lists[:, :n], around.items_with_events) for n in ks
    }
    return coverage | {
        f"novelty@{k}": float(metrics.novelty(top, around.popularity, around.num_users).mean()),
        f"diversity@{k}": float(metrics.diversity(top, around.vectors).mean()),
        f"gini@{k}": metrics.gini(counts[1:]),
        f"popularity@{k}": float(metrics.popularity_of(top, around.popularity).mean()),
        f"tail_share@{k}": float(metrics.tail_share(top, tail).mean()),
    }


def _by_history(
    users: Mapping[str, NDArray[np.float64]], around: Round, k: int
) -> list[dict[str, Any]]:
    return [
        {
            "segment": name,
            "count": len(rows),
            **{m: float(users[m][rows].mean()) for m in (f"hr@{k}", f"ndcg@{k}")},
        }
        for name, rows in metrics.history_segments(around.lengths, HISTORY_EDGES)
    ]


def _by_popularity(lists: NDArray[np.int32], around: Round, k: int) -> list[dict[str, Any]]:
    place = metrics.positions(lists, around.targets, around.offsets)
    each = metrics.target_metrics(place, k)
    decile = metrics.popularity_decile(around.popularity)[around.targets]
    return [
        {
            "segment": str(d),
            "count": int(np.count_nonzero(decile == d)),
            **{m: float(values[decile == d].mean()) for m, values in each.items()},
        }
        for d in range(1, 11)
        if (decile == d).any()
    ]


def _items(around: Round) -> int:
    return len(around.popularity) - 1


def _distinct_pairs(
    events: Interactions, num_items: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    keys = pair_keys(events.select(events.item > 0), num_items)
    return keys // (num_items + 1), keys % (num_items + 1)


def pair_keys(events: Interactions, num_items: int) -> NDArray[np.int64]:
    """int64, ascending: ``user * (num_items + 1) + item`` of the distinct pairs of the events."""
    # Not np.unique: from numpy 2.3 it hashes, and takes over a second for a million such keys.
    keys = np.sort(events.user.astype(np.int64) * (num_items + 1) + events.item)
    return keys[np.diff(keys, prepend=-1) > 0]


def are_among(keys: NDArray[np.int64], ascending: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each key is in a sorted array of keys that are not negative."""
    found: NDArray[np.bool_] = np.append(ascending, -1)[np.searchsorted(ascending, keys)] == keys
    return found


def _projection(
    user: NDArray[np.int64],
    item: NDArray[np.int64],
    num_users: int,
    num_items: int,
    seed: int,
) -> NDArray[np.float32]:
    """Sums of a random vector for each user who met an item: keeps cosines to about 0.1.

    Random projection: Johnson and Lindenstrauss (1984).
    """
    signs = np.random.default_rng(seed).choice(
        np.array([-1, 1], np.float32), size=(num_users, _PROJECTED)
    )
    out = np.zeros((num_items + 1, _PROJECTED), np.float32)
    for column in range(_PROJECTED):
        out[:, column] = np.bincount(item, signs[user, column], minlength=num_items + 1)
    return out


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
