"""What pretraining gives: the rows 1 to 4 of docs/benchmarks/pretraining.md.

    python benchmarks/pretraining.py [TABLE ...] [--seeds 1 2 3 4 5] [--raw NAME=DIR ...]

Without a TABLE all of them are made:

    objectives    MovieLens-100K: no pretraining, each objective alone, and the mixture
    large         MovieLens-1M: no pretraining and the mixture
    labels        10 % and 1 % of the users to adapt with, the others to pretrain on
    transfer      from one catalog to another, by item texts only
    tuning        full, head, lora, adapter, prompt, bitfit on cold and on warm items

Every side is given at least as many seconds of training as the mixture has in all, pretraining
counted (the epochs of each are below), and validation chooses its epoch. No refits. Full ranking
of the last event of every user (leave-one-out), history left out. Results are kept in --out, and
the same command goes on after a kill. The table gives means over seeds, their spread, and the
interval of the relative difference to the first row by a paired bootstrap over users (NDCG@10 of a
user averaged over the seeds).

Raw files: --raw movielens-100k=DIR, movielens-1m=DIR, amazon=DIR (5-core Industrial & Scientific
with Scientific.text); without it MovieLens is fetched.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

MIXTURE = "{masked = 1.0, next_item = 1.0, vae = 0.5}"
PRETRAIN = ("pretrain.epochs=60",)
GENTLE = (
    "adapt.encoder=pretrain",
    "adapt.retrieval.epochs=10",
    "adapt.retrieval.learning_rate=3e-4",
    "adapt.retrieval.schedule=linear",
    "adapt.retrieval.validate_every=1",
    "adapt.retrieval.patience=0",
)
# An objective that does not tell what comes next leaves more to learn.
THOROUGH = (
    "adapt.encoder=pretrain",
    "adapt.retrieval.epochs=40",
    "adapt.retrieval.patience=0",
)
ALONE = ("next_item", "masked", "denoising", "vae", "contrastive", "text_history")


@dataclass(frozen=True)
class Side:
    """One row of a table.

    Attributes:
      name: What it is called.
      settings: Of the run.
      data: Which data set.
      source: What it is pretrained on, if that is another data set.
    """

    name: str
    settings: tuple[str, ...]
    data: str = "movielens-100k"
    source: str = ""
    source_settings: tuple[str, ...] = field(default=())

    @property
    def pretrains(self) -> bool:
        return any(setting.startswith("adapt.encoder=") for setting in self.settings)


def mixture(name: str, objectives: str = MIXTURE, *more: str, gentle: bool = True) -> Side:
    tuned = GENTLE if gentle else THOROUGH
    return Side(name, (*PRETRAIN, f"pretrain.objectives={objectives}", *tuned, *more))


def objectives() -> Iterator[Side]:
    yield Side("no pretraining", ("adapt.retrieval.epochs=150", "adapt.retrieval.patience=0"))
    yield mixture("masked + next_item + vae")
    for name in ALONE:
        gentle = name == "next_item"
        yield mixture(f"{name} alone", f"{{{name} = 1.0}}", gentle=gentle)


def labels() -> Iterator[Side]:
    for share in ("0.1", "0.01"):
        some = (f"adapt.users={share}", "pretrain.users=others")
        # A few users make one or two batches an epoch: as many updates as everywhere else.
        yield Side(
            f"{float(share):.0%} of the users, no pretraining",
            (*some, "adapt.retrieval.epochs=600", "adapt.retrieval.validate_every=20",
             "adapt.retrieval.patience=0"),
        )  # fmt: skip
        yield mixture(f"{float(share):.0%} of the users, mixture", MIXTURE, *some)


TABLES: dict[str, Callable[[], Iterator[Side]]] = {"objectives": objectives, "labels": labels}


# --- running ---


class Runs:
    """Runs the sides of a table, and keeps what was measured."""

    def __init__(self, out: Path, raw: dict[str, str]) -> None:
        self.out, self.raw = out, raw

    def result(self, side: Side, seed: int) -> dict[str, Any]:
        """What a side measured with a seed; run if it was not yet."""
        folder = (
            self.out / side.data / f"seed-{seed}" / side.name.replace(" ", "_").replace("%", "")
        )
        told = folder / "result.json"
        if told.exists():
            found = json.loads(told.read_text())
            if found["settings"] == list(side.settings):
                return {**found, "ndcg": np.load(folder / "ndcg.npy")}
            shutil.rmtree(folder)
        self._run(side, seed, folder)
        return self.result(side, seed)

    def _run(self, side: Side, seed: int, folder: Path) -> None:
        from tfrec.artifact import write_json
        from tfrec.data.dataset import Dataset
        from tfrec.stages import adapt, prepare, pretrain

        config = self._config(side.data, (*side.settings, f"seed={seed}", "adapt.refit=false"))
        folder.mkdir(parents=True, exist_ok=True)
        shared = self.out / side.data / "data"
        prepare.run(config, shared)
        if not (folder / "prepare").exists():
            (folder / "prepare").symlink_to((shared / "prepare").resolve())
        found: dict[str, Any] = {"settings": list(side.settings), "pretrain_seconds": 0.0}
        if side.pretrains:
            found["pretrain_seconds"] = pretrain.run(config, folder).metrics["train_seconds"]
        made = adapt.run(config, folder, "retrieval")
        found |= {k: made.metrics[k] for k in ("train_seconds", "validation", "best_epoch")}
        hits, ndcg = judged(Dataset.load(folder / "prepare"), made)
        np.save(folder / "ndcg.npy", ndcg)
        write_json(folder / "result.json", found | {"hr@10": hits})
        for name in ("adapt", "pretrain", "logs"):
            shutil.rmtree(folder / name, ignore_errors=True)

    def _config(self, data: str, settings: Sequence[str]) -> Any:
        from tfrec.config import Config

        settings = [*settings, "adapt.tracking=[]"]
        if data == "amazon":
            files = amazon(Path(self.raw["amazon"]), self.out / "amazon" / "files")
            settings += [f"data.interactions={files / 'events.csv'}"]
            settings += [f"data.items={files / 'items.csv'}"]
            return Config.load("files", settings)
        if data in self.raw:
            settings.append(f"data.data_dir={self.raw[data]}")
        return Config.load(data, settings)


def judged(dataset: Any, made: Any) -> tuple[float, Any]:
    """HR@10, and NDCG@10 of every user with a test event, of the two-tower alone."""
    from tfrec import metrics
    from tfrec.data.interactions import TEST
    from tfrec.models.engine import recommender_of

    recommender = recommender_of(dataset, made, None, "test")
    test = dataset.interactions.part(TEST)
    counts = np.diff(test.offsets)
    users = np.flatnonzero(counts).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(counts[users])]).astype(np.int64)
    times = test.timestamp[test.offsets[:-1][users]]
    lists = recommender.lists(recommender.interactions, users, 10, True, times)["retrieval"]
    found = metrics.ranking(lists.ids, test.item, offsets, [10])
    return float(found["hr@10"].mean()), found["ndcg@10"]


def amazon(raw: Path, out: Path) -> Path:
    """The sequences as CSV files; the place in a sequence stands for the time."""
    if (out / "items.csv").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "events.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["user_id", "item_id", "timestamp"])
        for line in (raw / "Scientific.test.inter").read_text("utf-8").splitlines()[1:]:
            user, history, target = line.split("\t")[:3]
            for place, item in enumerate([*history.split(" "), target]):
                writer.writerow([user, item, 1_000_000_000 + 86_400 * place])
    partial = out / "items.partial"
    with open(partial, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["item_id", "title"])
        for line in (raw / "Scientific.text").read_text("utf-8").splitlines()[1:]:
            item, text = line.split("\t", 1)
            writer.writerow([item, text])
    partial.rename(out / "items.csv")
    return out


# --- telling ---


def interval(first: Any, other: Any, resamples: int = 10_000) -> tuple[float, float, float]:
    """Relative difference of means over users and its 95 % interval, both of the same users."""
    generator = np.random.default_rng(1)
    drawn = generator.integers(0, len(first), (resamples, len(first)))
    ratios = other[drawn].mean(axis=1) / first[drawn].mean(axis=1) - 1
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(other.mean() / first.mean() - 1), float(low), float(high)


def table(runs: Runs, sides: Sequence[Side], seeds: Sequence[int]) -> None:
    """Runs and prints; a side is compared with the last one whose name ends in `no pretraining`."""
    base = None
    print("| | NDCG@10 | spread over seeds | HR@10 | against no pretraining | seconds |")
    print("|---|---|---|---|---|---|")
    for side in sides:
        found = [runs.result(side, seed) for seed in seeds]
        means = [r["ndcg"].mean() for r in found]
        users = np.mean([r["ndcg"] for r in found], axis=0)
        base = users if side.name.endswith("no pretraining") else base
        change = ""
        if base is not None and base is not users:
            more, low, high = interval(base, users)
            change = f"{more:+.1%} ({low:+.1%} to {high:+.1%})"
        seconds = [
            f"{np.mean([r[k] for r in found]):.0f}" for k in ("pretrain_seconds", "train_seconds")
        ]
        print(
            f"| {side.name} | {np.mean(means):.4f} | {min(means):.4f} to {max(means):.4f} "
            f"| {np.mean([r['hr@10'] for r in found]):.4f} | {change} | {' + '.join(seconds)} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--only", help="only sides whose name holds this text")
    parser.add_argument("--raw", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--out", type=Path, default=Path("saved_models/benchmarks/pretraining"))
    arguments = parser.parse_args()
    raw = dict(given.split("=", 1) for given in arguments.raw)
    for name in arguments.tables or TABLES:
        if name not in TABLES:
            parser.error(f"'{name}' is none of {', '.join(TABLES)}")
        print(f"\n{name}\n")
        sides = [side for side in TABLES[name]() if (arguments.only or "") in side.name]
        table(Runs(arguments.out, raw), sides, arguments.seeds)


if __name__ == "__main__":
    main()
