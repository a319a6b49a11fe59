"""evaluate: trained models in, a report that sets them beside the baselines out."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
from numpy.typing import NDArray
from tqdm import tqdm

import tfrec
from tfrec import baselines, report
from tfrec.artifact import MANIFEST, Artifact, current, writing
from tfrec.config import Config
from tfrec.data.catalog import Catalog
from tfrec.data.dataset import Dataset
from tfrec.data.interactions import TEST, TRAIN, VALID, Interactions
from tfrec.errors import InputError
from tfrec.index import Ragged, TopK
from tfrec.report.cold import COLD_K, by_events, of_cold_items
from tfrec.report.measures import (
    Round,
    Row,
    are_among,
    classification,
    compare,
    exposure_by_decile,
    headline,
    measure,
    pair_keys,
    regression,
)
from tfrec.report.text import findings, protocol_notes

FOLDER = "evaluate"
KIND = "report"

NAMES = {
    "popular": "most popular",
    "item_knn": "ItemKNN",
    "ease": "EASE",
    "als": "ALS",
    "retrieval": "two-tower",
    "ranking": "two-tower + ranker",
}
"""What people read for each model."""

PURCHASE = "purchase"
"""The event type that counts as a conversion."""

_PREDICTED = 5_000  # held-out events whose predictions are measured, at most
_SHOWN = 10  # titles of an example's history, and of its lists


class Recommends(Protocol):
    """What is evaluated: see :class:`tfrec.recommender.Recommender`."""

    def lists(
        self,
        history: Interactions,
        users: NDArray[np.int32],
        k: int,
        exclude_history: bool = True,
        request_time: NDArray[np.int64] | None = None,
        *,
        exclude: Ragged | None = None,
        among: NDArray[np.int32] | None = None,
        profile: bool = True,
    ) -> dict[str, TopK]:
        """Lists of each part of the chain, the whole chain last."""

    def predictions(
        self, events: Interactions, history: Interactions
    ) -> dict[str, NDArray[np.float32]]:
        """What the ranker says of events."""


def run(config: Config, out: Path, *, force: bool = False) -> Artifact:
    """Measures the models of ``out/adapt`` and the baselines on the test events.

    Models read the training and validation events of each user; every item of the catalog is
    ranked. Leaves report.html, report.json and each model's lists at ``out/evaluate``, and a copy
    of the page at ``out/report.html``.

    Args:
      config: Its ``[evaluate]`` section is read, the seed, and what a like is.
      out: The run's folder.
      force: Measure anew in any case.

    Returns:
      An artifact of the kind ``report``.

    Raises:
      ArtifactError: an earlier stage has not left what is needed.
      InputError: the dataset has no test events.
    """
    out = Path(out)
    parents = _parents(out)
    recipe = {
        "seed": config.seed,
        "evaluate": config.evaluate.model_dump(mode="json"),
        "like_rating": config.adapt.ranking.like_rating,
        "negatives": config.adapt.ranking.negatives,
    }
    folder = out / FOLDER
    found = None if force else current(folder, kind=KIND, config=recipe, parents=parents)
    if found is None:
        work = _Evaluation(config, Dataset.load(parents["dataset"]), parents)
        with writing(folder, kind=KIND, config=recipe, parents=parents) as draft:
            tree = work.tree(_load_recommender(out))
            work.save_lists(draft.path / "recommendations")
            report.write(tree, draft.path)
            draft.metrics.update(_metrics(tree))
    _copy(folder / "report.html", out / "report.html")
    return Artifact.peek(folder, KIND)


def summary(artifact: Artifact) -> str:
    """The table of a finished report and some users with titles, for the terminal."""
    tree = json.loads(artifact.file("report.json").read_text("utf-8"))
    return f"{report.text_examples(tree)}\n\n{report.text_table(tree)}".lstrip()


def _parents(out: Path) -> dict[str, Artifact]:
    parents = {
        "dataset": Artifact.load(out / "prepare", "dataset"),
        "retrieval": Artifact.load(out / "adapt" / "retrieval", "retrieval"),
    }
    ranking = out / "adapt" / "ranking"
    if (ranking / MANIFEST).exists():
        parents["ranking"] = Artifact.load(ranking, "ranking")
    return parents


def _load_recommender(out: Path) -> Recommends:
    # Here and not above: it imports TensorFlow, and all else is checked before.
    from tfrec.models.engine import load_recommender

    return load_recommender(out, cut="test")


@dataclass
class _Model:
    """One model's lists, and what is to be said about it."""

    key: str
    found: TopK
    ours: bool
    settings: Mapping[str, Any] = field(default_factory=dict)
    tried: list[dict[str, Any]] = field(default_factory=list)


def _split(config: Config, dataset: Artifact) -> str:
    """How the data was split when it was prepared, whatever this command's configuration says."""
    split: str = dataset.config.get("data", {}).get("split", config.data.split)
    return split


class _Evaluation:
    """One evaluation at work."""

    def __init__(self, config: Config, dataset: Dataset, parents: Mapping[str, Artifact]) -> None:
        self.config, self.dataset, self.parents = config, dataset, parents
        self.settings = config.evaluate
        self.ks = sorted(set(self.settings.k))
        self.split = _split(config, parents["dataset"])
        self.cold_items = self.split == "item_cold"
        # Cold items are measured at a k of their own, whatever the others are.
        self.depth = max([*self.ks, COLD_K] if self.cold_items else self.ks)
        self.history = dataset.interactions.part(TRAIN, VALID)
        self.held_out = dataset.interactions.part(TEST)
        if not len(self.held_out):
            raise InputError(
                "there are no test events to evaluate on; set data.split to leave_one_out, time, "
                "item_cold or user_cold, and prepare again"
            )
        self.around = Round.of(self.history, self.held_out, dataset.catalog.features, config.seed)
        self.models: list[_Model] = []
        self.skipped: dict[str, str] = {}
        self.seconds = {
            f"adapt {role}": float(parent.metrics["seconds"])
            for role, parent in parents.items()
            if "seconds" in parent.metrics
        }

    def tree(self, recommender: Recommends) -> dict[str, Any]:
        """Everything that report.json holds."""
        began = time.monotonic()
        self._fit_baselines()
        with self._timed("lists of our models"):
            users = self.around.users
            # Of the first held-out event; read by models with request_time alone.
            times = self.held_out.timestamp[self.held_out.offsets[:-1][users]]
            asked = (self.history, users, self.depth, self.settings.exclude_history, times)
            lists = recommender.lists(*asked)
            among = np.unique(self.around.targets[self.around.targets > 0])
            told = recommender.lists(*asked, among=among) if self.cold_items else {}
        self.models += [_Model(key, found, True) for key, found in lists.items()]
        with self._timed("quality by number of events"):
            curve = self._by_events(recommender)
        with self._timed("predictions of the ranker"):
            predictions, note = self._predictions(recommender)
        with self._timed("metrics"):
            rows = [self._row(model) for model in self.models]
        tree: dict[str, Any] = {
            "format": 1,
            "name": self.config.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "tfrec_version": tfrec.__version__,
            "seed": self.config.seed,
            "k": headline(self.ks),
            "ks": self.ks,
            "protocol": self._protocol(),
            "data": dict(self.parents["dataset"].metrics),
            "models": [row.tree for row in rows],
            "skipped": self.skipped,
            "comparisons": self._comparisons(rows),
            "predictions": predictions,
            "predictions_note": note,
            "popularity": self._popularity(),
            "by_events": curve,
            "cold_items": self._of_cold_items(told, len(among)),
            "learning": [
                {"task": role, "history": _history(parent)}
                for role, parent in self.parents.items()
                if "history.json" in parent.files
            ],
            "examples": self._examples(rows),
            "config": self.config.dump(),
        }
        self.seconds["evaluate, all"] = time.monotonic() - began
        seconds = [{"what": what, "seconds": s} for what, s in self.seconds.items()]
        return tree | {"findings": findings(tree), "seconds": seconds}

    def save_lists(self, folder: Path) -> None:
        """Writes each model's lists as ``user_id,item_id,rank,score``, best first."""
        folder.mkdir()
        user_ids = np.array(self.dataset.users.ids, object)[self.around.users]
        item_ids = np.array(self.dataset.catalog.ids, object)
        for model in self.models:
            filled = model.found.ids > 0
            users, places = np.nonzero(filled)
            table = pa.table(
                {
                    "user_id": pa.array(user_ids[users], pa.string()),
                    "item_id": pa.array(item_ids[model.found.ids[filled]], pa.string()),
                    "rank": pa.array(places + 1, pa.int32()),
                    "score": pa.array(model.found.scores[filled], pa.float32()),
                }
            )
            with pa.output_stream(str(folder / f"{model.key}.csv.gz")) as stream:
                pa_csv.write_csv(table, stream)

    def _fit_baselines(self) -> None:
        num_items = self.dataset.catalog.num_items
        select = baselines.matrix_of(self.dataset.interactions.part(TRAIN), num_items)
        before = baselines.matrix_of(self.history, num_items)
        validation = self.dataset.interactions.part(VALID)
        targets = Ragged(validation.offsets, validation.item)
        for key in tqdm(self.settings.baselines, desc="baselines", unit="model"):
            if why := baselines.why_not(key, num_items):
                self.skipped[NAMES[key]] = why
                continue
            with self._timed(NAMES[key]):
                choice = baselines.choose(key, select, targets, before, self.config.seed)
                found = baselines.recommend(
                    choice.model,
                    before,
                    self.around.users,
                    self.depth,
                    self.settings.exclude_history,
                )
            self.models.append(_Model(key, found, False, choice.settings, choice.tried))

    def _row(self, model: _Model) -> Row:
        row = measure(
            model.key,
            NAMES[model.key],
            model.found.ids,
            self.around,
            self.ks,
            self.settings.bootstrap,
            self.config.seed,
        )
        row.tree.update(
            ours=model.ours,
            settings=dict(model.settings),
            tried=model.tried,
            lists=f"recommendations/{model.key}.csv.gz",
        )
        return row

    def _comparisons(self, rows: list[Row]) -> list[dict[str, Any]]:
        metric = f"ndcg@{headline(self.ks)}"
        of = {row.tree["key"]: row for row in rows}
        best, final = self._best_baseline(rows), rows[-1]
        out = []
        if best:
            out.append({"role": "baseline", **compare(final, best, metric)})
        if "ranking" in of and "retrieval" in of:
            told = compare(of["ranking"], of["retrieval"], metric)
            out.append({"role": "retrieval", **told})
        return out

    def _best_baseline(self, rows: list[Row]) -> Row | None:
        # The best on the test events themselves: the comparison errs on the baselines' side.
        metric = f"ndcg@{headline(self.ks)}"
        baseline = [row for row in rows if not row.tree["ours"]]
        return max(baseline, key=lambda row: row.tree["metrics"][metric]["mean"], default=None)

    def _popularity(self) -> dict[str, list[float]]:
        size = len(self.dataset.catalog)
        targets = np.bincount(self.around.targets, minlength=size)
        targets[0] = 0
        return {
            "history": exposure_by_decile(self.around.popularity, self.around),
            "targets": exposure_by_decile(targets, self.around),
        }

    def _by_events(self, recommender: Recommends) -> dict[str, Any] | None:
        """See :func:`tfrec.report.cold.by_events`. Of the whole chain.

        Not of cold items: their events stand anywhere among the others of a user.
        """
        if self.cold_items or not self.settings.by_events:
            return None
        k, everyone = headline(self.ks), self.dataset.users

        def lists(
            history: Interactions,
            users: NDArray[np.int32],
            times: NDArray[np.int64],
            exclude: Ragged,
            profile: bool,
        ) -> NDArray[np.int32]:
            found = recommender.lists(
                history, users, k, request_time=times, exclude=exclude, profile=profile
            )
            return list(found.values())[-1].ids

        return by_events(
            self.dataset.interactions,
            lists,
            k,
            self.settings.by_events,
            self.config.seed,
            profiles=bool(everyone.features.shape[1]) or any(everyone.texts),
        )

    def _of_cold_items(self, among: Mapping[str, TopK], items: int) -> dict[str, Any] | None:
        """What each model makes of cold items, in the whole catalog and, ours, among themselves.

        Baselines do not tell one cold item from another, so they have no list among them.
        """
        if not self.cold_items:
            return None
        models = []
        for model in self.models:
            lists = {"all": model.found.ids}
            if model.key in among:
                lists["among"] = among[model.key].ids
            found = of_cold_items(lists, self.around.targets, self.around.offsets)
            models.append({"key": model.key, "name": NAMES[model.key], **found})
        return {
            "k": COLD_K,
            "items": items,
            "users": len(self.around.users),
            "chance": min(1.0, COLD_K / items),
            "models": models,
        }

    def _predictions(self, recommender: Recommends) -> tuple[dict[str, Any], str]:
        rng = np.random.default_rng(self.config.seed)
        events = _sample(self.held_out, _PREDICTED, rng)
        negatives = self.config.adapt.ranking.negatives
        shown, real = with_unobserved(
            events, self.dataset.interactions, self.dataset.catalog.num_items, negatives, rng
        )
        says = recommender.predictions(shown, self.history)
        rated = real & np.isfinite(shown.rating)
        out: dict[str, Any] = {}
        if "click" in says:
            out["click"] = classification(says["click"], real)
        if "like" in says and rated.any():
            liked = shown.rating[rated] >= self.config.adapt.ranking.like_rating
            out["like"] = classification(says["like"][rated], liked)
        if "conversion" in says and PURCHASE in shown.event_names:
            bought = real & (shown.event == shown.event_names.index(PURCHASE))
            out["conversion"] = classification(says["conversion"], bought)
        if "rating" in says and rated.any():
            usual = float(np.nanmean(self.history.rating))
            out["rating"] = regression(says["rating"][rated], shown.rating[rated], usual)
        note = (
            f"Of {len(events):,} held-out events. For click and conversion each stands beside "
            f"{negatives} items drawn at random from those the user has no event with; like and "
            "rating are of the held-out events alone. Training sees other exposures (the "
            "retriever's), so the calibration of click is that of this mixture."
        )
        return out, note if out else ""

    def _examples(self, rows: list[Row]) -> list[dict[str, Any]]:
        rng = np.random.default_rng(self.config.seed)
        count = min(self.settings.examples, len(self.around.users))
        chosen = np.sort(rng.choice(len(self.around.users), count, replace=False))
        shown = [row.tree["key"] for row in (rows[-1], self._best_baseline(rows)) if row]
        lists = {model.key: model.found.ids for model in self.models}
        return [self._example(int(u), {NAMES[key]: lists[key][u] for key in shown}) for u in chosen]

    def _example(self, place: int, lists: Mapping[str, NDArray[np.int32]]) -> dict[str, Any]:
        user, catalog = int(self.around.users[place]), self.dataset.catalog
        history = self.history.histories([user])[0]
        start, stop = self.around.offsets[place : place + 2]
        wanted = self.around.targets[start:stop]
        return {
            "user": self.dataset.users.ids[user],
            "history_length": len(history),
            "history": [_item(catalog, row) for row in history[::-1][:_SHOWN]],
            "targets": [_item(catalog, row) for row in wanted[:_SHOWN]],
            "lists": [
                {
                    "name": name,
                    "items": [
                        {**_item(catalog, row), "hit": bool(row in wanted)}
                        for row in rows[:_SHOWN]
                        if row
                    ],
                }
                for name, rows in lists.items()
            ],
        }

    def _protocol(self) -> dict[str, Any]:
        around, items = self.around, self.dataset.catalog.num_items
        wanted = self.held_out.user * np.int64(items + 1) + self.held_out.item
        again = are_among(wanted, pair_keys(self.history, items))
        told = {
            "split": self.split,
            "users": len(around.users),
            "targets": len(around.targets),
            "targets_in_history": int(again.sum()),
            "items": items,
            "items_with_events": around.items_with_events,
            "exclude_history": self.settings.exclude_history,
            "refit": self._trained_with("refit"),
            "request_time": self._trained_with("retrieval", "request_time"),
            "diversity_of": around.vectors_of,
            "bootstrap": self.settings.bootstrap,
        }
        return told | {"notes": protocol_notes(told)}

    def _trained_with(self, *keys: str) -> bool:
        """A switch of ``[adapt]`` as the models were trained with it."""
        told: Any = self.parents["retrieval"].config["adapt"]
        for key in keys:
            told = told[key]
        return bool(told)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[what] = time.monotonic() - began


def with_unobserved(
    events: Interactions,
    everything: Interactions,
    num_items: int,
    per_event: int,
    rng: np.random.Generator,
) -> tuple[Interactions, NDArray[np.bool_]]:
    """Puts items beside each event that its user has no event with, drawn uniformly.

    Args:
      events: n events.
      everything: All events that are known.
      num_items: Items of the catalog.
      per_event: How many to draw for each; fewer where a user has met nearly every item.
      rng: Draws.

    Returns:
      The events, each followed by what was drawn for it (without a rating), and bool, True where
      an event is one of those given.
    """
    base = np.int64(num_items + 1)
    met = pair_keys(everything, num_items)
    source = np.repeat(np.arange(len(events)), 1 + per_event)
    real = np.arange(len(source)) % (1 + per_event) == 0
    item = events.item[source]
    open_places = np.flatnonzero(~real)
    for _ in range(20):
        item[open_places] = rng.integers(1, base, len(open_places))
        keys = events.user[source[open_places]] * base + item[open_places]
        open_places = open_places[are_among(keys, met)]
    kept = np.ones(len(source), bool)
    kept[open_places] = False
    shown = Interactions(
        user=events.user[source],
        item=item,
        timestamp=events.timestamp[source],
        event=events.event[source],
        rating=np.where(real, events.rating[source], np.float32(np.nan)),
        weight=events.weight[source],
        split=events.split[source],
        num_users=events.num_users,
        event_names=events.event_names,
    )
    return shown.select(kept), real[kept]


def _sample(events: Interactions, most: int, rng: np.random.Generator) -> Interactions:
    if len(events) <= most:
        return events
    mask = np.zeros(len(events), bool)
    mask[rng.choice(len(events), most, replace=False)] = True
    return events.select(mask)


def _item(catalog: Catalog, row: int) -> dict[str, str]:
    return {"id": catalog.ids[row], "title": catalog.titles[row] or catalog.ids[row]}


def _history(artifact: Artifact) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = json.loads(artifact.file("history.json").read_text("utf-8"))
    return history


def _metrics(tree: Mapping[str, Any]) -> dict[str, Any]:
    k = tree["k"]
    return {
        model["key"]: {
            f"{name}@{k}": round(model["metrics"][f"{name}@{k}"]["mean"], 6)
            for name in ("ndcg", "hr", "mrr")
        }
        for model in tree["models"]
    }


def _copy(source: Path, target: Path) -> None:
    partial = target.with_name(f".{target.name}.partial")
    shutil.copyfile(source, partial)
    os.replace(partial, target)
