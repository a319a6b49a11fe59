"""User cold start: how good the lists are by the number of events that are known of a user.

    python benchmarks/cold_users.py [--source movielens-100k] [--seeds 1 2 3]

A random 20 % of the users test and 10 % validate (``data.split=user_cold``; the seed draws them):
no event of theirs is in training. Of a test user's first 20 events the model is given the first
0, 1, 2, 3, 5, 10 or 20; what it should find are all his events after the 20th. So every point has
the same users and the same targets, and the items of the 20 are never recommended. NDCG@10 and
HR@10, the whole catalog ranked.

What a user says of himself is made by a fixed rule, for users of every part alike:

  age A, gender G, occupation O, likes X, Y, Z

where X, Y, Z are his favourite genres among his first 20 events: those whose share of these events
is most above their share of all training events (the difference counts), of the genres that two or
more of the 20 have, at most three. So a profile knows something of the first 20 events, as a person
does of himself, and nothing of the targets. The BERT reads it as a text, and the query tower reads
age, gender, occupation and genres as attributes too.

  history only          trained on the same events without the users' table
  profile and history   at 0 the profile alone, as `tfrec recommend` answers it: by likeness of text
  popular               what training users met most, the same for all
  by the query tower    the profile alone too, through the query tower

The first two by the whole chain, and by the two-tower alone.

A row's result is a file in --out, and what is there is not done again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tfrec import metrics
from tfrec.artifact import write_json
from tfrec.config import Config
from tfrec.data import sources
from tfrec.data.building import Built, build
from tfrec.data.dataset import Dataset
from tfrec.data.interactions import TRAIN
from tfrec.data.raw import RawData
from tfrec.report.cold import EVENTS, FirstEvents

K = 10
FAVOURITES, LEAST = 3, 2
ROWS = ("history", "profile")


def configuration(asked: argparse.Namespace, seed: int) -> Config:
    told = [
        f"seed={seed}",
        f"data.data_dir={asked.data_dir}",
        "data.split=user_cold",
        "data.test_fraction=0.2",
        "data.valid_fraction=0.1",
        "adapt.tracking=[]",
    ]
    return Config.load(asked.source, [*told, *asked.set])


def favourites(built: Built) -> dict[str, str]:
    """User id -> his favourite genres, by the rule above."""
    events, genres = built.interactions, built.catalog.attributes["genres"]
    names = sorted({name for cell in genres for name in cell.split("|") if name})
    has = np.array([[name in cell.split("|") for name in names] for cell in genres])
    usual = has[events.part(TRAIN).item].mean(axis=0)
    told = {}
    for user, items in enumerate(events.histories(range(events.num_users))):
        first = has[items[: EVENTS[-1]]]
        above = first.mean(axis=0) - usual if len(first) else np.zeros(len(names))
        able = [g for g in np.argsort(-above, kind="stable") if first[:, g].sum() >= LEAST]
        chosen = [names[g] for g in able if above[g] > 0][:FAVOURITES]
        told[built.users.ids[user]] = "|".join(chosen)
    return told


def dataset_of(config: Config, profiles: bool) -> Dataset:
    raw: RawData = sources.read(config.data)
    assert raw.users is not None
    built = build(raw, config.data, config.seed)
    if profiles:
        likes = favourites(built)
        columns = {**raw.users.columns, "likes": tuple(likes[key] for key in raw.users.ids)}
        users = dataclasses.replace(raw.users, columns=columns)
        raw = dataclasses.replace(raw, users=users)
    else:
        raw = dataclasses.replace(raw, users=dataclasses.replace(raw.users, columns={}))
    built = build(raw, config.data, config.seed)
    return Dataset(built.interactions, built.catalog, built.users)


def row(name: str, config: Config, folder: Path) -> dict[str, Any]:
    from tfrec.models.engine import load_recommender
    from tfrec.stages import adapt

    if not (folder / "prepare").exists():
        dataset_of(config, name == "profile").save(folder / "prepare")
    artifact = adapt.run(config, folder, "retrieval")
    chain = adapt.run(config, folder, "ranking")
    recommender = load_recommender(folder, "test")
    dataset = Dataset.load(folder / "prepare")
    first = FirstEvents.of(dataset.interactions, len(dataset.users), config.seed)

    def judged(ids: np.ndarray) -> dict[str, float]:
        each = metrics.ranking(ids, first.targets.ids, first.targets.offsets, [K])
        return {f"{m}@{K}": float(each[f"{m}@{K}"].mean()) for m in ("ndcg", "hr")}

    def lists(count: int) -> dict[str, Any]:
        history = first.history(count)
        found = recommender.lists(history, first.users, K, exclude=first.known)
        return {key: judged(one.ids) for key, one in found.items()}

    points = {count: lists(count) for count in EVENTS}
    asked = recommender.who(first.history(0), first.users)
    tower = recommender.index.search(recommender.queries(asked), K, first.known).ids
    bare = recommender.lists(first.history(0), first.users, K, exclude=first.known, profile=False)
    return {
        "users": len(first.users),
        "targets": len(first.targets.ids),
        "profiles": recommender.users.texts[:3],
        "chain": {str(count): points[count]["ranking"] for count in EVENTS},
        "two-tower": {str(count): points[count]["retrieval"] for count in EVENTS},
        "tower at 0": judged(tower),
        "popular": judged(bare["retrieval"].ids),
        "best_epoch": artifact.metrics["best_epoch"],
        "score": chain.metrics["score"],
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", default="movielens-100k")
    parser.add_argument("--data-dir", default="", help="a folder that holds the raw files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("saved_models/cold-users"))
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE, for both rows")
    return parser.parse_args()


def result(asked: argparse.Namespace, seed: int, name: str) -> Any:
    """A row's result: read where it is there, else made and kept."""
    key = f"{asked.source}-{seed}-{name}"
    path = asked.out / f"{key}.json"
    if not path.exists():
        began = time.monotonic()
        found = row(name, configuration(asked, seed), asked.out / key)
        write_json(path, {**found, "seconds": round(time.monotonic() - began, 1)})
    return json.loads(path.read_text("utf-8"))


def cell(values: list[float]) -> str:
    spread = f" ({min(values):.4f}–{max(values):.4f})" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{spread}"


def main() -> int:
    asked = parse()
    asked.out.mkdir(parents=True, exist_ok=True)
    found = {name: [result(asked, seed, name) for seed in asked.seeds] for name in ROWS}
    for metric in (f"ndcg@{K}", f"hr@{K}"):
        print(f"\n| {metric} | " + " | ".join(map(str, EVENTS)) + " |")
        print("|---" * (len(EVENTS) + 1) + "|")
        for name, called in (("history", "history only"), ("profile", "profile and history")):
            for key in ("chain", "two-tower"):
                cells = [cell([one[key][str(n)][metric] for one in found[name]]) for n in EVENTS]
                print(f"| {called}, {key} | " + " | ".join(cells) + " |")
        for key, called in (("popular", "popular"), ("tower at 0", "profile, by the query tower")):
            print(f"| {called} | {cell([one[key][metric] for one in found['profile']])} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
