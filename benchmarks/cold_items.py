"""Item cold start: a fifth of the items is removed from training altogether, then recommended.

    python benchmarks/cold_items.py [--source movielens-1m] [--abstracts FILE] [--seeds 1 2 3]

Of the items that have events a random 20 % test and 10 % validate (``data.split=item_cold``; the
seed draws them): no event of theirs is in training. Everything is chosen on the validation items;
then every side is fitted again with their events, so that the test items alone are cold. A user's
history is his training and validation events. For every user with a test event are ranked

  (a) the test items alone,
  (b) the whole catalog, without the user's history,

and recall@20 and NDCG@20 are averaged over these users, by the same functions for every row:

  text cosine     an item's BERT vector with the mean of the history's; nothing is trained
  attribute knn   ItemKNN on the items' attributes: the sum of the cosines to the history
  dropoutnet      Volkovs et al. 2017 without a BERT: factors of ALS and TF-IDF of the text through
                  two towers of tf_keras, factors left out at random
  popularity      nothing here: no test item has an event
  two-tower       ours, by `tfrec adapt`: retrieval alone, and the whole chain, in which the linear
                  model knows items by what they read like (`adapt.ranking.linear_of_new`)

Each row with the text "title, genres", and with DBpedia's abstract after it if --abstracts names a
JSON file of them (item id -> text). A row's result is a file in --out, and what is there is not
done again; a training that was killed goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg

from tfrec import metrics
from tfrec.artifact import write_json
from tfrec.baselines import Als, matrix_of, tf_idf
from tfrec.config import Config
from tfrec.data import sources
from tfrec.data.building import build
from tfrec.data.dataset import Dataset
from tfrec.data.interactions import TEST, TRAIN, VALID, Interactions
from tfrec.index import Ragged, top_k

K = 20
OURS = (
    "adapt.retrieval.id_dropout=0.5",
    "adapt.retrieval.text_dropout=0.5",
    "adapt.retrieval.batch_size=32",
    "adapt.retrieval.epochs=12",
    "adapt.retrieval.validate_every=1",
    "adapt.retrieval.patience=2",
    "adapt.refit_epochs=1",
    # The ranker has seen no new item: of its stage, the weights of the score are what counts here.
    "adapt.ranking.epochs=1",
    "adapt.ranking.examples_per_user=2",
    "adapt.ranking.linear_of_new=true",
)
PEERS = ("text cosine", "attribute knn", "dropoutnet")

Scores = Callable[[np.ndarray], np.ndarray]  # int32 (b,) users -> float32 (b, n + 1)
Find = Callable[[np.ndarray, np.ndarray], np.ndarray]  # users, rows to choose among -> int32 (b, K)


# --- the data and the measure ---


def configuration(asked: argparse.Namespace, seed: int, settings: list[str]) -> Config:
    told = [
        f"seed={seed}",
        f"data.data_dir={asked.data_dir}",
        "data.split=item_cold",
        "data.test_fraction=0.2",
        "data.valid_fraction=0.1",
        "adapt.tracking=[]",
    ]
    return Config.load(asked.source, [*told, *settings])


def dataset_of(config: Config, abstracts: Path | None) -> Dataset:
    raw = sources.read(config.data)
    if abstracts:
        text = json.loads(abstracts.read_text("utf-8"))
        assert raw.items is not None
        cells = tuple(text.get(key, "") for key in raw.items.ids)
        items = dataclasses.replace(raw.items, columns={**raw.items.columns, "abstract": cells})
        raw = dataclasses.replace(raw, items=items)
    built = build(raw, config.data, config.seed)
    return Dataset(built.interactions, built.catalog, built.users)


def by_scores(scores: Scores, seen: Ragged) -> Find:
    def find(users: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return top_k(scores(users)[:, rows], rows, K, seen.take(users)).ids

    return find


def judge(find: Find, wanted: Interactions, size: int, which: str) -> dict[str, Any]:
    """recall@20 and NDCG@20 over users with a wanted event, of (a) wanted items and (b) all."""
    users = np.flatnonzero(np.diff(wanted.offsets)).astype(np.int32)
    targets = Ragged(wanted.offsets, wanted.item).take(users)
    cold = np.unique(wanted.item)
    choices = {"a": cold, "b": np.arange(1, size, dtype=np.int32)}
    out: dict[str, Any] = {"users": len(users), "items": len(cold)}
    for name in which:
        blocks = [users[start : start + 512] for start in range(0, len(users), 512)]
        lists = np.concatenate([find(block, choices[name]) for block in blocks])
        each = metrics.ranking(lists, targets.ids, targets.offsets, [K])
        out |= {f"{m}@{K} ({name})": float(each[f"{m}@{K}"].mean()) for m in ("recall", "ndcg")}
    return out


@dataclasses.dataclass(frozen=True)
class Round:
    """What is known, and what is to be foreseen: of the validation, or of the test."""

    dataset: Dataset
    history: Interactions
    wanted: Interactions

    @classmethod
    def of(cls, dataset: Dataset, part: int) -> Round:
        events = dataset.interactions
        known = (TRAIN,) if part == VALID else (TRAIN, VALID)
        return cls(dataset, events.part(*known), events.part(part))

    def judge(self, scores: Scores, which: str = "ab") -> dict[str, Any]:
        seen = Ragged(self.history.offsets, self.history.item)
        return self.judge_lists(by_scores(scores, seen), which)

    def judge_lists(self, find: Find, which: str = "ab") -> dict[str, Any]:
        return judge(find, self.wanted, len(self.dataset.catalog), which)

    @property
    def matrix(self) -> sp.csr_array:
        return matrix_of(self.history, self.dataset.catalog.num_items)


def best_of(grid: list[dict[str, Any]], make: Callable[..., Scores], valid: Round) -> Any:
    """The point of a grid whose NDCG@20 of (a) is best on the validation items, and all tried."""
    tried = [{**point, **valid.judge(make(valid, **point), "a")} for point in grid]
    best = int(np.argmax([one[f"ndcg@{K} (a)"] for one in tried]))
    return grid[best], tried


# --- the peers ---


def text_cosine(vectors: np.ndarray, round_: Round) -> Scores:
    matrix = round_.matrix
    counts = np.maximum(np.asarray(matrix.sum(axis=1)), 1)[:, None]
    return lambda users: (matrix[users] @ vectors) / counts[users] @ vectors.T


def attribute_knn(round_: Round, neighbours: int, idf: bool) -> Scores:
    """Sum over the history of the cosines of attributes, of an item's nearest neighbours in it."""
    features = round_.dataset.catalog.features > 0
    seen = np.asarray(round_.matrix.sum(axis=0)).ravel() > 0
    rarity = np.log(len(features) / np.maximum(features.sum(axis=0), 1)) if idf else 1.0
    weighed = (features * rarity).astype(np.float32)
    unit = weighed / np.maximum(np.linalg.norm(weighed, axis=1, keepdims=True), 1e-9)
    alike = unit @ unit.T * seen[:, None]  # row: item met, column: item scored
    np.fill_diagonal(alike, 0)
    if neighbours:
        least = -np.sort(-alike, axis=0)[neighbours - 1]
        alike *= alike >= least
    matrix = round_.matrix
    return lambda users: matrix[users] @ alike


def leading(texts: tuple[str, ...], width: int) -> np.ndarray:
    """float32 (n, width): leading singular vectors of the texts' TF-IDF."""
    table = tf_idf(texts)
    start = np.random.default_rng(0).normal(size=min(table.shape))
    left, size, _ = scipy.sparse.linalg.svds(table, k=min(width, min(table.shape) - 1), v0=start)
    return np.asarray(left * size, np.float32)


class DropoutNet:
    """Two towers over factors and content that reproduce the factors' products (Volkovs 2017).

    The items' factors are left out of a share of the steps' items, and are zero for cold ones.
    """

    def __init__(self, round_: Round, seed: int, dropout: float, hidden: int, epochs: int) -> None:
        from tfrec.models.keras_bridge import set_seed, tf, tf_keras

        self.round, self.epochs, self.dropout = round_, epochs, dropout
        set_seed(seed)
        self.random = np.random.default_rng(seed)
        matrix = round_.matrix
        als = Als(factors=64, regularization=5.0, alpha=5.0, seed=seed).fit(matrix)
        self.users = np.array(als._model.user_factors)
        self.items = np.array(als._model.item_factors)
        self.known = np.flatnonzero(np.asarray(matrix.sum(axis=0)).ravel() > 0)
        self.items[np.asarray(matrix.sum(axis=0)).ravel() == 0] = 0
        # Inputs of unit spread, as the paper's code makes them.
        self.spread = self.items[self.known].std(), self.users.std()
        catalog = round_.dataset.catalog
        words = leading(catalog.texts, 300)
        content = np.concatenate([words / words.std(), catalog.features], axis=1)
        self.content = content.astype(np.float32)

        def tower(width: int) -> Any:
            dense = tf_keras.layers.Dense
            return tf_keras.Sequential(
                [
                    tf_keras.layers.Input([width]),
                    dense(hidden),
                    tf_keras.layers.BatchNormalization(),
                    tf_keras.layers.Activation("tanh"),
                    dense(hidden // 2),
                    tf_keras.layers.BatchNormalization(),
                    tf_keras.layers.Activation("tanh"),
                    dense(64),
                ]
            )

        factors = self.items.shape[1]
        self.item_tower = tower(factors + self.content.shape[1])
        self.user_tower = tower(factors)
        self.optimizer = tf_keras.optimizers.Adam(1e-3)
        self.tf = tf

        @tf.function
        def step(users: Any, items: Any, wanted: Any) -> Any:
            with tf.GradientTape() as tape:
                u = self.user_tower(users, training=True)
                v = self.item_tower(items, training=True)
                loss = tf.reduce_mean((tf.matmul(u, v, transpose_b=True) - wanted) ** 2)
            weights = self.user_tower.trainable_variables + self.item_tower.trainable_variables
            self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
            return loss

        self.step = step

    def epoch(self) -> None:
        order = self.random.permutation(len(self.users))
        for start in range(0, len(order) - 127, 128):
            users = order[start : start + 128]
            items = self.random.choice(self.known, min(1024, len(self.known)), replace=False)
            wanted = self.users[users] @ self.items[items].T
            preference = self.items[items].copy()
            preference[self.random.random(len(items)) < self.dropout] = 0
            given = np.concatenate([preference / self.spread[0], self.content[items]], axis=1)
            # Scaled so that the squared error is of order one.
            self.step(self.users[users] / self.spread[1], given, 10 * wanted)  # type: ignore[no-untyped-call]

    def scores(self) -> Scores:
        given = np.concatenate([self.items / self.spread[0], self.content], axis=1)
        items = self.item_tower(given, training=False).numpy()
        users = self.user_tower(self.users / self.spread[1], training=False).numpy()
        return lambda rows: users[rows] @ items.T


DROPOUTNET = [{"dropout": d, "hidden": h} for d in (0.5, 0.8) for h in (256,)]


def dropoutnet(valid: Round, test: Round, seed: int, epochs: int) -> tuple[dict[str, Any], Any]:
    """Dropout, width and epoch are chosen on the validation items; then it is fitted again."""
    tried, best = [], (-1.0, {}, 0)
    for point in DROPOUTNET:
        model = DropoutNet(valid, seed, epochs=epochs, **point)
        for done in range(1, epochs + 1):
            model.epoch()
            if done % 3 == 0:
                found = valid.judge(model.scores(), "a")
                tried.append({**point, "epochs": done, **found})
                best = max(best, (found[f"ndcg@{K} (a)"], point, done), key=lambda one: one[0])
    _, point, chosen = best
    model = DropoutNet(test, seed, epochs=chosen, **point)
    for _ in range(chosen):
        model.epoch()
    return test.judge(model.scores()), {"chosen": {**point, "epochs": chosen}, "tried": tried}


# --- ours ---


def ours(config: Config, folder: Path, valid: Round, test: Round) -> dict[str, Any]:
    """The two-tower alone, and the whole chain."""
    from tfrec.models.engine import load_recommender
    from tfrec.stages import adapt

    retrieval = adapt.run(config, folder, "retrieval")
    chain = adapt.run(config, folder, "ranking")
    out: dict[str, Any] = {
        "best_epoch": retrieval.metrics["best_epoch"],
        "train_seconds": retrieval.metrics["train_seconds"],
        "score": chain.metrics["score"],
        "settings": config.adapt.model_dump(mode="json"),
    }
    for part, cut, round_ in (("valid", "select", valid), ("test", "test", test)):
        lists = lists_of(load_recommender(folder, cut))
        out[part] = round_.judge_lists(lambda users, rows, f=lists: f(users, rows)["retrieval"])
        chained = round_.judge_lists(lambda users, rows, f=lists: f(users, rows)["ranking"])
        out[f"{part}, whole chain"] = chained
    return out


def lists_of(recommender: Any) -> Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]:
    """What the chain and retrieval alone recommend; kept, as each is asked for after the other."""
    made: dict[tuple[int, int], dict[str, np.ndarray]] = {}

    def lists(users: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        key = (int(users[0]), len(rows))
        if key not in made:
            found = recommender.lists(recommender.interactions, users, K, among=rows)
            made[key] = {name: one.ids for name, one in found.items()}
        return made[key]

    return lists


# --- rows ---


def text_vectors(config: Config, dataset: Dataset) -> np.ndarray:
    from tfrec.models.text import TextEncoder

    encoder = TextEncoder.load(config.adapt.text, length=config.adapt.text_length, trainable=False)
    vectors = encoder.encode_cached(dataset.catalog.texts, role="passage")
    vectors[0] = 0
    return vectors


def row(name: str, config: Config, dataset: Dataset, folder: Path) -> dict[str, Any]:
    valid, test = Round.of(dataset, VALID), Round.of(dataset, TEST)
    if name == "text cosine":
        vectors = text_vectors(config, dataset)
        return {
            "test": test.judge(text_cosine(vectors, test)),
            "valid": valid.judge(text_cosine(vectors, valid)),
        }
    if name == "attribute knn":
        grid = [{"neighbours": n, "idf": i} for n in (0, 20, 100, 500) for i in (False, True)]
        point, tried = best_of(grid, attribute_knn, valid)
        found = test.judge(attribute_knn(test, **point))
        return {"test": found, "chosen": point, "tried": tried}
    if name == "dropoutnet":
        found, told = dropoutnet(valid, test, config.seed, epochs=30)
        return {"test": found, **told}
    if not (folder / "prepare").exists():
        dataset.save(folder / "prepare")
    return ours(config, folder, valid, test)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", default="movielens-1m")
    parser.add_argument("--data-dir", default="", help="a folder that holds the raw files")
    parser.add_argument("--abstracts", type=Path, help="JSON: item id -> a second text")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("saved_models/cold-items"))
    parser.add_argument("--rows", nargs="+", default=[*PEERS, "two-tower"], metavar="ROW")
    parser.add_argument("--name", default="", help="of a trial with --set, beside the defaults")
    parser.add_argument("--set", action="append", default=[], help="instead of ours: KEY=VALUE")
    return parser.parse_args()


def result(asked: argparse.Namespace, seed: int, name: str, abstracts: Path | None) -> Any:
    """A row's result: read where it is there, else made and kept."""
    parts = [asked.source, str(seed), name, "abstracts" if abstracts else "", asked.name]
    key = "-".join(part for part in parts if part).replace(" ", "-")
    path = asked.out / f"{key}.json"
    if not path.exists():
        began = time.monotonic()
        settings = (asked.set or list(OURS)) if name == "two-tower" else []
        config = configuration(asked, seed, settings)
        found = row(name, config, dataset_of(config, abstracts), asked.out / key)
        write_json(path, {**found, "seconds": round(time.monotonic() - began, 1)})
    return json.loads(path.read_text("utf-8"))


def table(lines: dict[str, list[dict[str, float]]]) -> str:
    """Means over seeds, and what they lie between."""
    names = [f"{m}@{K} ({of})" for of in "ab" for m in ("recall", "ndcg")]
    out = ["| | " + " | ".join(names) + " |", "|---" * 5 + "|"]
    for called, found in lines.items():
        cells = []
        for name in names:
            values = [one[name] for one in found]
            spread = f" ({min(values):.4f}–{max(values):.4f})" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.4f}{spread}")
        out.append(f"| {called} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def main() -> int:
    asked = parse()
    asked.out.mkdir(parents=True, exist_ok=True)
    tables: dict[str, dict[str, list[dict[str, float]]]] = {"valid": {}, "test": {}}
    for seed in asked.seeds:
        for abstracts in (None, asked.abstracts) if asked.abstracts else (None,):
            for name in asked.rows:
                found = result(asked, seed, name, abstracts)
                text = "with abstracts" if abstracts else "title, genres"
                for part, lines in tables.items():
                    for more in ("", ", whole chain"):
                        if found.get(part + more):
                            told = lines.setdefault(f"{name}{more}; {text}", [])
                            told.append(found[part + more])
    items = {line[0]["items"] for line in tables["test"].values()}
    for part, lines in tables.items():
        print(f"\n{part}\n{table(lines)}")
    print(f"\ntest items: {items}; popularity has nothing to go by, and chance is {K} of them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
