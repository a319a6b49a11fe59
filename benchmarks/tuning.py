"""Tuning methods of the BERT beside each other, where texts decide: on items without an event.

    python benchmarks/tuning.py [--methods head full mlm lora adapter prompt bitfit] [--seeds 1 2 3]

MovieLens-100K, items known by title and genres alone (no ids). Of the items that have events a
random 20 % test and 10 % validate (``data.split=item_cold``); of every user with five training
events or more the last one is taken out as well. First the behaviour encoder is pretrained with the
BERT frozen. From there every method trains for the same number of steps, each in a process of its
own, with the same loss, in which every text of the catalog is read at every step; the validation
items choose the epoch. Measured are

  cold        the test items ranked for every user with an event on one: recall@20 and NDCG@20
  warm        the whole catalog ranked for the event that was taken out: NDCG@10
  neighbours  of a test item with 5 events or more, the share of the 10 items nearest by text that
              are among the 10 that share most users with it (cosine over all events)

with the weights that move in the BERT, the time of a step, and the peak memory of the process.
``head`` leaves the BERT as it comes; ``mlm`` too, after masked language modelling of the catalog's
texts; ``full`` tunes it end to end.
Intervals: paired bootstrap over the users of all seeds. A row's result is a file in
--out, and what is there is not done again; a training that was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from cold_items import Round, configuration
from pretraining import interval

METHODS = ("head", "full", "mlm", "lora", "adapter", "prompt", "bitfit")
PRETRAIN = (
    "pretrain.epochs=40",
    "adapt.retrieval.item_ids=false",
    "adapt.text_length=16",
)
MLM = (
    "pretrain.objectives={masked = 1.0, next_item = 1.0, vae = 0.5, mlm = 1.0}",
    "pretrain.text_epochs=6",
)
TUNE = (
    "adapt.encoder=pretrain",
    "adapt.refit=false",
    "adapt.retrieval.loss=sampled",
    "adapt.retrieval.uniform_negatives=2000",
    "adapt.retrieval.positions=100",
    "adapt.retrieval.epochs=4",
    "adapt.retrieval.learning_rate=1e-3",
    "adapt.retrieval.schedule=linear",
    "adapt.retrieval.warmup_steps=10",
    "adapt.retrieval.validate_every=1",
    "adapt.retrieval.patience=0",
    # 16-bit products are twice as fast on a processor that has them, outside of XLA.
    "adapt.retrieval.precision=mixed_bfloat16",
    "adapt.retrieval.jit_compile=false",
)
# Few steps over all texts at once: four times the usual rates.
RATE = {"full": 0.1}
USUAL_RATE = 1.0
LEAST = 5
COLD, WARM, NEAR = 20, 10, 10


def prepared(config: Any, folder: Path) -> None:
    """Leaves the data set, and the users and items that were taken out, in a folder."""
    from tfrec.artifact import write_json
    from tfrec.data import sources
    from tfrec.data.building import build
    from tfrec.data.dataset import Dataset
    from tfrec.data.interactions import TRAIN

    if (folder / "prepare").exists():
        return
    built = build(sources.read(config.data), config.data, config.seed)
    events = built.interactions
    train = np.flatnonzero(events.split == TRAIN)
    user = events.user[train]
    last = np.append(user[1:] != user[:-1], True)
    many = np.bincount(user, minlength=events.num_users)[user] >= LEAST
    out = train[last & many]
    write_json(
        folder / "warm.json",
        {"user": events.user[out].tolist(), "item": events.item[out].tolist()},
    )
    kept = events.select(~np.isin(np.arange(len(events)), out))
    Dataset(kept, built.catalog, built.users).save(folder / "prepare")


def trained(asked: argparse.Namespace, seed: int, method: str, folder: Path) -> None:
    """Trains by a method, and leaves what was measured."""
    from tfrec import metrics
    from tfrec.artifact import write_json
    from tfrec.data.dataset import Dataset
    from tfrec.data.interactions import TEST
    from tfrec.index import Ragged
    from tfrec.models.engine import recommender_of
    from tfrec.stages import adapt, pretrain

    tuning = "head" if method == "mlm" else method
    told = [*PRETRAIN, *TUNE, f"adapt.tuning.text={tuning}", *(MLM if method == "mlm" else ())]
    told.append(f"adapt.tuning.text_rate={RATE.get(method, USUAL_RATE)}")
    config = configuration(asked, seed, [*told, *asked.set])
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("prepare",) if method == "mlm" else ("prepare", "pretrain"):
        if not (folder / name).exists():
            (folder / name).symlink_to((folder.parent / name).resolve())
    if method == "mlm":
        pretrain.run(config, folder)
    made = adapt.run(config, folder, "retrieval")
    dataset = Dataset.load(folder / "prepare")
    recommender = recommender_of(dataset, made, None, "select")

    def lists(users: np.ndarray, k: int, among: np.ndarray | None) -> np.ndarray:
        found = recommender.lists(recommender.interactions, users, k, among=among)
        ids: np.ndarray = found["retrieval"].ids
        return ids

    wanted = Round.of(dataset, TEST).wanted
    users = np.flatnonzero(np.diff(wanted.offsets)).astype(np.int32)
    targets = Ragged(wanted.offsets, wanted.item).take(users)
    ids = lists(users, COLD, np.unique(wanted.item))
    cold = metrics.ranking(ids, targets.ids, targets.offsets, [COLD])
    out = json.loads((folder.parent / "warm.json").read_text("utf-8"))
    ids = lists(np.array(out["user"], np.int32), WARM, None)
    offsets = np.arange(len(ids) + 1, dtype=np.int64)
    warm = metrics.ranking(ids, np.array(out["item"], np.int32), offsets, [WARM])
    kept = ("text_weights_trained", "text_weights_total", "step_seconds", "peak_memory_mb")
    told = {name: made.metrics[name] for name in (*kept, "best_epoch", "difference_bytes")}
    told |= {
        "users": users.tolist(),
        "recall": cold[f"recall@{COLD}"].tolist(),
        "ndcg": cold[f"ndcg@{COLD}"].tolist(),
        "warm": warm[f"ndcg@{WARM}"].tolist(),
        "neighbours": neighbours(dataset, recommender.text).tolist(),
    }
    write_json(folder / "result.json", told)
    for name in ("adapt", *(("pretrain",) if method == "mlm" else ())):
        shutil.rmtree(folder / name)


def neighbours(dataset: Any, text: np.ndarray) -> np.ndarray:
    """For each test item with enough events: how many of its nearest by text share its users."""
    from tfrec.baselines import matrix_of
    from tfrec.data.interactions import TEST

    events = matrix_of(dataset.interactions, len(text) - 1).T.tocsr()
    counts = np.diff(events.indptr)
    cold = np.unique(dataset.interactions.part(TEST).item)
    cold = cold[counts[cold] >= LEAST]
    size = np.sqrt(np.maximum(counts, 1))
    shared = (events[cold] @ events.T).toarray() / (size[cold, None] * size)
    unit = text / np.maximum(np.linalg.norm(text, axis=1, keepdims=True), 1e-12)
    near = []
    for likeness in (shared, unit[cold] @ unit.T):
        likeness[np.arange(len(cold)), cold] = -np.inf
        likeness[:, counts == 0] = -np.inf
        near.append(np.argpartition(-likeness, NEAR, axis=1)[:, :NEAR])
    found: np.ndarray = (near[0][:, :, None] == near[1][:, None, :]).any(axis=2).mean(axis=1)
    return found


def result(asked: argparse.Namespace, seed: int, method: str) -> dict[str, Any]:
    """What a method measured with a seed; trained in a process of its own if it was not yet."""
    folder = asked.out / f"seed-{seed}" / method
    told = folder / "result.json"
    if not told.exists():
        one = ["--one", method, "--seeds", str(seed), "--out", str(asked.out), "--data-dir"]
        more = [part for setting in asked.set for part in ("--set", setting)]
        subprocess.run([sys.executable, __file__, *one, asked.data_dir, *more], check=True)
    found: dict[str, Any] = json.loads(told.read_text("utf-8"))
    return found


def over_seeds(found: list[dict[str, Any]], name: str) -> tuple[str, np.ndarray]:
    """Mean and spread over the seeds; and a value of each user, one after the other.

    With each seed other items are cold and other users asked, so users are not averaged.
    """
    means = [float(np.mean(one[name])) for one in found]
    spread = f" ({min(means):.4f}-{max(means):.4f})" if len(means) > 1 else ""
    return f"{np.mean(means):.4f}{spread}", np.concatenate([one[name] for one in found])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.set_defaults(source="movielens-100k")
    parser.add_argument("--data-dir", default="", help="a folder that holds the raw files")
    parser.add_argument("--out", type=Path, default=Path("saved_models/benchmarks/tuning"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        from tfrec.stages import pretrain

        seed = asked.seeds[0]
        folder = asked.out / f"seed-{seed}"
        config = configuration(asked, seed, [*PRETRAIN, *asked.set])
        folder.mkdir(parents=True, exist_ok=True)
        prepared(config, folder)
        if asked.one != "mlm":
            pretrain.run(config, folder)
        trained(asked, seed, asked.one, folder / asked.one)
        return
    found = {m: [result(asked, seed, m) for seed in asked.seeds] for m in asked.methods}
    print(
        "| | cold recall@20 | cold NDCG@20 | warm NDCG@10 | neighbours | moves in the BERT "
        "| a step | memory |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for method, ones in found.items():
        cells = [over_seeds(ones, name)[0] for name in ("recall", "ndcg", "warm", "neighbours")]
        share = ones[0]["text_weights_trained"] / ones[0]["text_weights_total"]
        cells.append(f"{ones[0]['text_weights_trained']:,} ({share:.1%})")
        cells.append(f"{np.median([one['step_seconds'] for one in ones]):.2f} s")
        cells.append(f"{max(one['peak_memory_mb'] for one in ones) / 1000:.1f} GB")
        print(f"| {method} | {' | '.join(cells)} |")
    for base in ("head", "full"):
        for method in found if base in found else ():
            if method != base:
                pairs = (over_seeds(found[m], "recall")[1] for m in (base, method))
                more, low, high = interval(*pairs)
                change = f"{more:+.1%} ({low:+.1%} to {high:+.1%})"
                print(f"cold recall@20, {method} against {base}: {change}")


if __name__ == "__main__":
    main()
