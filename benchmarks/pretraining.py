"""What pretraining gives, on the catalog itself and carried over to another one.

    python benchmarks/pretraining.py [TABLE ...] [--seeds 1 2 3 4 5] [--raw NAME=DIR ...]

Without a TABLE all of them are made:

    objectives    MovieLens-100K: no pretraining, each objective alone, and the mixture
    large         MovieLens-1M: no pretraining and the mixture
    labels        10 % and 1 % of the users to adapt with, the others to pretrain on
    transfer      item texts only, 10 % of the users: MovieLens-1M to MovieLens-100K, with all its
                  films and without those that both have; MovieLens-1M to the shop, and back. The
                  encoder is pretrained once, with the first seed

`objectives` and `large` give the side without pretraining as many seconds of training as the
mixture has in all, pretraining counted; a single objective has the epochs of the mixture, whatever
these take. With few labels more training does no good: there the side without pretraining has 600
epochs, of which validation chooses. The seconds of every side are told. Validation chooses the
epoch. No refits. Full ranking
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

MIXTURE = "{masked = 1.0, next_item = 1.0, vae = 0.5}"
PRETRAIN = ("pretrain.epochs=60",)
AS_LONG = (
    "adapt.retrieval.epochs=125",
    "adapt.retrieval.batch_size=32",
    "adapt.retrieval.patience=0",
)
GENTLE = (
    "adapt.encoder=pretrain",
    "adapt.retrieval.epochs=10",
    "adapt.retrieval.schedule=linear",
    "adapt.retrieval.validate_every=1",
    "adapt.retrieval.patience=0",
)
# An objective that does not tell what comes next leaves more to learn.
THOROUGH = (
    "adapt.encoder=pretrain",
    "adapt.tuning.behaviour_rate=1",
    "adapt.retrieval.epochs=40",
    "adapt.retrieval.batch_size=32",
    "adapt.retrieval.patience=0",
)
ALONE = ("next_item", "masked", "denoising", "vae", "contrastive", "text_history", "mlm")


@dataclass(frozen=True)
class Side:
    """One row of a table.

    Attributes:
      name: What it is called.
      settings: Of the run.
      data: Which data set.
      source: What its encoder is pretrained on, if that is another data set.
    """

    name: str
    settings: tuple[str, ...]
    data: str = "movielens-100k"
    source: str = ""

    @property
    def pretrains(self) -> bool:
        return any(setting.startswith("adapt.encoder=") for setting in self.settings)


def mixture(name: str, objectives: str = MIXTURE, *more: str, gentle: bool = True) -> Side:
    tuned = GENTLE if gentle else THOROUGH
    return Side(name, (*PRETRAIN, f"pretrain.objectives={objectives}", *tuned, *more))


def objectives() -> Iterator[Side]:
    yield Side("no pretraining", AS_LONG)
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


def large() -> Iterator[Side]:
    data = "movielens-1m"
    yield Side("no pretraining", ("adapt.retrieval.patience=0",), data)
    shorter = ("pretrain.epochs=14", "pretrain.batch_size=128", "adapt.retrieval.epochs=3")
    yield replace(mixture("masked + next_item + vae", MIXTURE, *shorter), data=data)


# No id is shared, and the shop has no times, types of events or ratings.
BY_TEXT = (
    *(f"adapt.retrieval.{name}=false" for name in ("item_ids", "time_gaps", "events")),
    "adapt.retrieval.text_hidden=1024",
)
FEW = (
    *BY_TEXT,
    "adapt.users=0.1",
    "adapt.retrieval.epochs=300",
    "adapt.retrieval.validate_every=10",
    "adapt.retrieval.patience=8",
)
LINEAR = "adapt.retrieval.text_hidden=0"
SOURCES = {
    "movielens-1m": ("pretrain.epochs=8",),
    "movielens-1m-other": ("pretrain.epochs=10",),
    "amazon": ("pretrain.epochs=40",),
}


def transfer() -> Iterator[Side]:
    for target, sources in (
        ("movielens-100k", ("movielens-1m", "movielens-1m-other", "amazon")),
        ("amazon", ("movielens-1m",)),
    ):
        yield Side(f"{target}, no pretraining, hidden layer too", FEW, target)
        # With so few users less is learned by heart without it.
        yield Side(f"{target}, no pretraining", (*FEW, LINEAR), target)
        for source in sources:
            yield Side(f"{target} from {source}", FEW, target, source)


TABLES: dict[str, Callable[[], Iterator[Side]]] = {
    "objectives": objectives,
    "large": large,
    "labels": labels,
    "transfer": transfer,
}


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
        from tfrec.stages import adapt, pretrain

        found: dict[str, Any] = {"settings": list(side.settings), "pretrain_seconds": 0.0}
        settings = [*side.settings, f"seed={seed}", "adapt.refit=false"]
        if side.source:
            encoder = self._encoder(side.source)
            found["pretrain_seconds"] = encoder.metrics["train_seconds"]
            settings.append(f"adapt.encoder={encoder.path.resolve()}")
        config = self._config(side.data, settings)
        self._prepared(config, side.data, folder)
        if side.pretrains:
            found["pretrain_seconds"] = pretrain.run(config, folder).metrics["train_seconds"]
        made = adapt.run(config, folder, "retrieval")
        found |= {k: made.metrics[k] for k in ("train_seconds", "validation", "best_epoch")}
        hits, ndcg = judged(Dataset.load(folder / "prepare"), made)
        np.save(folder / "ndcg.npy", ndcg)
        write_json(folder / "result.json", found | {"hr@10": hits})
        for name in ("adapt", "pretrain", "logs"):
            shutil.rmtree(folder / name, ignore_errors=True)

    def _encoder(self, source: str) -> Any:
        """The encoder that was pretrained on a data set; made if it was not yet."""
        from tfrec.stages import pretrain

        settings = (*BY_TEXT, *SOURCES[source], f"pretrain.objectives={MIXTURE}")
        config, folder = self._config(source, settings), self.out / source / "encoder"
        self._prepared(config, source, folder)
        return pretrain.run(config, folder)

    def _prepared(self, config: Any, data: str, folder: Path) -> None:
        """Puts the prepared data set into a run's folder; prepared once for all."""
        from tfrec.stages import prepare

        shared = self.out / data / "data"
        if not (shared / "prepare").exists():
            prepare.run(config, shared)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "prepare").exists():
            (folder / "prepare").symlink_to((shared / "prepare").resolve())

    def _config(self, data: str, settings: Sequence[str]) -> Any:
        from tfrec.config import Config

        settings = [*settings, "adapt.tracking=[]"]
        if data in ("amazon", "movielens-1m-other"):
            files = self.out / data / "files"
            if data == "amazon":
                amazon(Path(self.raw["amazon"]), files)
            elif not (files / "items.csv").exists():
                given, other = (self._config(f"movielens-{size}", ()) for size in ("1m", "100k"))
                without_shared(given.data, other.data, files)
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


def amazon(raw: Path, out: Path) -> None:
    """The sequences as CSV files; the place in a sequence stands for the time."""
    if (out / "items.csv").exists():
        return

    def lines(name: str) -> list[list[str]]:
        text = (raw / f"Scientific.{name}").read_text("utf-8")
        return [line.split("\t") for line in text.splitlines()]

    number = dict(lines("item2index"))
    events = [
        (user, item, str(1_000_000_000 + 86_400 * place))
        for user, history, target, *_ in lines("test.inter")[1:]
        for place, item in enumerate([*history.split(" "), target])
    ]
    write_files(out, events, [(number[item], text) for item, text, *_ in lines("text")[1:]])


def without_shared(given: Any, other: Any, out: Path) -> None:
    """A data set without the items whose titles the other has too, as CSV files."""
    from tfrec.data import sources

    raw, theirs = sources.read(given), sources.read(other).items
    assert raw.items is not None
    assert theirs is not None
    shared = {title.casefold() for title in theirs.columns["title"]}
    told = zip(raw.items.ids, *(raw.items.columns[n] for n in ("title", "genres")), strict=True)
    items = [
        (key, f"{title}, {genres.replace('|', ', ')}")
        for key, title, genres in told
        if title.casefold() not in shared
    ]
    events, kept = raw.events, {key for key, _ in items}
    write_files(
        out,
        [
            (events.user_ids[user], events.item_ids[item], str(time))
            for user, item, time in zip(events.user, events.item, events.time, strict=True)
            if events.item_ids[item] in kept
        ],
        items,
    )


def write_files(out: Path, events: Iterable[Sequence[str]], items: Iterable[Sequence[str]]) -> None:
    """events.csv and, last, items.csv."""
    out.mkdir(parents=True, exist_ok=True)
    for name, header, rows in (
        ("events.csv", ("user_id", "item_id", "timestamp"), events),
        ("items.csv", ("item_id", "title"), items),
    ):
        partial = out / f"{name}.partial"
        with open(partial, "w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(header)
            writer.writerows(rows)
        partial.rename(out / name)


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
