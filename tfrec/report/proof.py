"""Proof: what a smaller model costs and wins beside the one it was made from, as plain values."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfrec import metrics
from tfrec.bundle import Bundle
from tfrec.data.dataset import Dataset
from tfrec.data.interactions import TEST, TRAIN, VALID
from tfrec.engines import recommender_of
from tfrec.errors import InputError
from tfrec.index import ExactIndex
from tfrec.recommender import Floats, Recommender
from tfrec.report.measures import Round, Row, compare, measure
from tfrec.timing import measured

KNOWN, NEW = "ndcg@10", "new_ndcg@20"
"""The two that a loss is told in: of test events, and where every item is taken for new."""

HITS = "hr@10"
"""Told beside them: of test events."""

_K, _NEW_K, _NEIGHBOURS = 10, 20, 10
_JUDGED, _ASKED = 1000, 20_000  # texts whose vectors are compared, and users with test events


@dataclass(frozen=True, eq=False)
class Trial:
    """What a model was found to be, and what it is compared by.

    Attributes:
      tree: Plain values: ``sizes`` in bytes, ``times`` (see :func:`tfrec.timing.measured`),
        ``fidelity`` and ``metrics`` with their intervals.
      rows: Metric -> the row that holds its resampled means.
      text: float32 (texts, width), vectors of the judged texts.
    """

    tree: dict[str, Any]
    rows: Mapping[str, Row]
    text: Floats


class Court:
    """Judges models on the same users, items and texts.

    Args:
      dataset: Its test events are foreseen; the others are known.
      cold: Whether no event of the test items is known.
      judged: Catalog rows of texts that no smaller model has learned from.
      resamples: Of the bootstrap.
      seed: Of what is drawn.
      exclude_history: Whether items of the history are not recommended.
    """

    def __init__(
        self,
        dataset: Dataset,
        cold: bool,
        judged: NDArray[np.int64],
        resamples: int,
        seed: int,
        exclude_history: bool = True,
    ) -> None:
        self.dataset, self.cold, self.resamples, self.seed = dataset, cold, resamples, seed
        self.exclude_history = exclude_history
        self.judged = judged[:_JUDGED]
        self.history = dataset.interactions.part(TRAIN, VALID)
        held_out = dataset.interactions.part(TEST)
        asked = np.unique(held_out.user)
        if len(asked) > _ASKED:
            asked = np.random.default_rng(seed).choice(asked, _ASKED, replace=False)
            held_out = held_out.select(np.isin(held_out.user, asked))
        self.around = Round.of(self.history, held_out, dataset.catalog.features, seed)
        users = self.around.users
        self.times = held_out.timestamp[held_out.offsets[:-1][users]]

    def judge(self, folder: Path, seconds: float = 2.0) -> Trial:
        """Tries a bundle that was exported from the cut ``test``."""
        bundle = Bundle.load(folder, check=False)
        recommender = recommender_of(bundle)
        texts = [self.dataset.catalog.texts[row] for row in self.judged]
        text = (
            recommender.engine.encode_text(texts)
            if recommender.text.shape[1]
            else np.zeros((len(texts), 0), np.float32)
        )
        rows = {KNOWN: self._known(recommender)}
        new = self._new(recommender)
        if new is not None:
            rows[NEW] = self._row(new, _NEW_K)
        tree = {
            "sizes": _sizes(bundle),
            "times": measured(folder, seconds),
            "metrics": {
                HITS: rows[KNOWN].tree["metrics"][HITS],
                **{name: row.tree["metrics"][_plain(name)] for name, row in rows.items()},
            },
        }
        return Trial(tree, rows, text)

    def _known(self, recommender: Recommender) -> Row:
        lists = recommender.lists(
            self.history, self.around.users, _K, self.exclude_history, self.times
        )
        return self._row(list(lists.values())[-1].ids, _K)

    def _new(self, recommender: Recommender) -> NDArray[np.int32] | None:
        """Lists of retrieval alone, to which every item that may come has no event: by its text as
        the deployed model reads it. None: the model knows no new items."""
        catalog = self.dataset.catalog
        rows = np.arange(1, len(catalog), dtype=np.int32)
        if self.cold:
            rows = np.unique(self.around.targets).astype(np.int32)
        told = [row for row in rows if catalog.texts[row]]
        if not recommender.text.shape[1] or not told:
            return None
        text = np.zeros((len(catalog), recommender.text.shape[1]), np.float32)
        text[told] = recommender.engine.encode_text([catalog.texts[row] for row in told])
        nothing = np.zeros(len(rows), np.int32)
        vectors = recommender.engine.encode_candidate(text[rows], catalog.features[rows], nothing)
        asked = recommender.who(self.history, self.around.users, self.times)
        index = ExactIndex.build(vectors, rows)
        seen = asked.seen if self.exclude_history else None
        return index.search(recommender.queries(asked), _NEW_K, seen).ids

    def _row(self, lists: NDArray[np.int32], k: int) -> Row:
        return measure("", "", lists, self.around, [k], self.resamples, self.seed)


def beside(trial: Trial, reference: Trial) -> dict[str, Any]:
    """What is kept of a reference, and what is won.

    Returns:
      ``kept``: metric -> its share, with the 95% interval of the paired bootstrap; ``cosine`` and
      ``cosine_min`` of the vectors of texts; ``neighbours``, the share of the ten nearest that
      stay; ``loss``, the larger share that is lost of :data:`KNOWN` and :data:`NEW`.

    Raises:
      InputError: the reference finds nothing.
    """
    kept = {
        name: _share(trial.rows[name], row, _plain(name)) for name, row in reference.rows.items()
    }
    out: dict[str, Any] = {"kept": kept}
    shares = [told["mean"] for told in kept.values() if told["mean"] is not None]
    if not shares:
        raise InputError(
            "the model as it was trained finds no test event among its first: there is nothing to "
            "lose, so nothing to judge by; train longer, or hold out more events"
        )
    out["loss"] = max(1 - share for share in shares)
    kept[HITS] = _share(trial.rows[KNOWN], reference.rows[KNOWN], HITS)
    if reference.text.size:
        cosines = _unit(trial.text) * _unit(reference.text)
        found = cosines.sum(axis=1)
        out |= {"cosine": float(found.mean()), "cosine_min": float(found.min())}
        out["neighbours"] = _neighbours(trial.text, reference.text)
    return out


def _share(row: Row, other: Row, metric: str) -> dict[str, Any]:
    told = compare(row, other, metric)
    out = {"mean": told["ratio"]}
    if row.means:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = row.means[metric] / other.means[metric]
        if np.isfinite(ratios).all():
            out["low"], out["high"] = metrics.interval(ratios)
    return out


def _plain(name: str) -> str:
    return name.removeprefix("new_")


def _neighbours(vectors: Floats, reference: Floats) -> float:
    """Share of each text's ten nearest that are so by both."""
    count = min(_NEIGHBOURS, len(vectors) - 1)
    if count < 1:
        return 1.0

    def nearest(values: Floats) -> NDArray[np.int64]:
        near = _unit(values) @ _unit(values).T
        np.fill_diagonal(near, -np.inf)
        return np.argsort(-near, axis=1, kind="stable")[:, :count]

    pairs = zip(nearest(vectors), nearest(reference), strict=True)
    return float(np.mean([len(np.intersect1d(a, b)) / count for a, b in pairs]))


def _unit(vectors: Floats) -> Floats:
    unit: Floats = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit


def _sizes(bundle: Bundle) -> dict[str, int]:
    """Bytes on disk, and of them packed by gzip: of the text encoder and of the whole, but for the
    golden answers, which only `tfrec verify` reads."""
    files = [
        bundle.folder / name for name in bundle.artifact.files if not name.startswith("golden/")
    ]
    text = [path for path in files if path.parent.name == "text"]
    packed = {path: len(gzip.compress(path.read_bytes(), 6)) for path in files}
    return {
        "text": sum(path.stat().st_size for path in text),
        "text_gzip": sum(packed[path] for path in text),
        "bundle": sum(path.stat().st_size for path in files),
        "bundle_gzip": sum(packed.values()),
    }


# --- the choice ---


@dataclass(frozen=True)
class Budget:
    """What a model may cost; None: anything.

    Attributes:
      loss: Share of a metric's value that may be lost.
      size: Bytes of the bundle.
      latency: Milliseconds to read one text.
    """

    loss: float | None = None
    size: int | None = None
    latency: float | None = None

    def misses(self, model: Mapping[str, Any]) -> dict[str, float]:
        """By how much a model is beyond the bounds: name -> found over allowed, above 1."""
        found = {"loss": model["loss"], "size": model["sizes"]["bundle"], "latency": _ms(model)}
        allowed = {"loss": self.loss, "size": self.size, "latency": self.latency}
        return {
            name: found[name] / max(most, 1e-9)
            for name, most in allowed.items()
            if most is not None and found[name] > most
        }


def dominated(models: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Models that are worse than another one on every axis (loss, size, time): key -> whose."""
    axes: tuple[Callable[[Mapping[str, Any]], float], ...] = (
        lambda model: model["loss"],
        lambda model: model["sizes"]["bundle"],
        _ms,
    )
    out = {}
    for model in models:
        for other in models:
            if other is not model and all(axis(other) < axis(model) for axis in axes):
                out[model["key"]] = other["key"]
    return out


def _ms(model: Mapping[str, Any]) -> float:
    times = model["times"]
    return float(times.get("one_ms", times["request_ms"]))


def nearest(models: Sequence[Mapping[str, Any]], budget: Budget) -> tuple[str, dict[str, float]]:
    """The smallest model within the budget, or where no loss is bounded the one that loses least;
    else the one that misses it by the least, and by how much (see :meth:`Budget.misses`)."""
    offered = [model for model in models if model["key"] not in dominated(models)]

    def rank(model: Mapping[str, Any]) -> tuple[float, ...]:
        most = max(budget.misses(model).values(), default=0.0)
        lost = model["loss"] if budget.loss is None else 0.0
        return (most, lost, model["sizes"]["bundle"], _ms(model))

    best = min(offered, key=rank)
    return best["key"], budget.misses(best)
