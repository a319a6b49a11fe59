"""What the files of a bundle weigh in float32 and in int8, and what int8 changes.

    python benchmarks/bundle_size.py saved_models/movielens-1m
    python benchmarks/bundle_size.py saved_models/movielens-1m --parts lists,models,linear

The run is one that `tfrec adapt --task ranking` finished. The parts:

  files   two exports, without SavedModels: bytes of each file or group of files
  lists   top 10 of everybody by the whole chain, trained on what is known before the test event:
          NDCG@10, and the share of items that the lists of the float32 models have too
  models  query tower, candidate tower and ranker as LiteRT models with int8 weights: bytes,
          answers and times beside float32
  linear  the linear model: milliseconds for a batch of users, and to read it
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tfrec.bundle import load_codes, load_rows, save_codes, save_rows
from tfrec.data.dataset import Dataset
from tfrec.data.interactions import TEST, TRAIN, VALID
from tfrec.engines import LiteRTEngine
from tfrec.index import Ragged, make_index
from tfrec.models import litert
from tfrec.models.engine import load_recommender
from tfrec.recommender import LinearItems, Recommender
from tfrec.rows import int8_rows
from tfrec.stages import export

K = 10
PARTS = ("files", "lists", "models", "linear")
STEPS = (0.0, 1 / 8, 1 / 4, 3 / 8)
SHARES = (0.5, 0.3, 0.1)
Matrix = np.ndarray


def size(folder: Path) -> dict[str, int]:
    """Bytes by array, and by folder or file of everything else."""
    found: dict[str, int] = {}
    for path in folder.rglob("*"):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            if name.startswith("arrays/"):
                name = name.partition(".")[0]
            elif name.startswith(("golden/", "index/")):
                name = name.partition("/")[0]
            elif name.startswith("litert/text/") and not name.endswith((".tflite", "izer.json")):
                name = "litert/text, the rest"
            found[name] = found.get(name, 0) + path.stat().st_size
    return found


def files(run: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        sizes = {}
        for int8 in (False, True):
            made = export.run(run, Path(place, str(int8)), int8=int8, saved_models=False)
            sizes[int8] = size(made.path)
    print("\n| file | float32, MB | default, MB |\n|---|---|---|")
    names = dict.fromkeys([*sizes[False], *sizes[True]])
    for name in sorted(names, key=lambda n: -sizes[False].get(n, 0)):
        print(
            f"| {name} | " + " | ".join(f"{s.get(name, 0) / 1e6:.2f}" for s in sizes.values()), "|"
        )
    print("| all | " + " | ".join(f"{sum(s.values()) / 1e6:.2f}" for s in sizes.values()), "|")


class Judge:
    """Lists of everybody with a test event, beside those of the recommender as it was."""

    def __init__(self, run: Path, recommender: Recommender) -> None:
        events = Dataset.load(run / "prepare").interactions
        test, self.recommender = events.part(TEST), recommender
        self.history = events.part(TRAIN, VALID)
        self.users = np.unique(test.user).astype(np.int32)
        self.target = np.zeros(events.num_users, np.int32)
        self.target[test.user] = test.item
        self.base = self.lists()

    def lists(self) -> Matrix:
        return self.recommender.lists(self.history, self.users, K)["ranking"].ids

    def ndcg(self, ids: Matrix) -> float:
        hits = ids == self.target[self.users][:, None]
        return float((hits / np.log2(np.arange(2, K + 2))).sum(axis=1).mean())

    def tell(self, name: str, bytes_: int) -> None:
        ids, base = self.lists(), self.ndcg(self.base)
        common = [len(set(a) & set(b)) / K for a, b in zip(self.base, ids, strict=True)]
        change = f"{100 * (self.ndcg(ids) / base - 1):+.2f} %"
        print(f"| {name} | {bytes_ / 1e6:.2f} | {change} | {np.mean(common):.4f} |", flush=True)


def packed(codes: Matrix) -> int:
    return len(pa.Codec("zstd", compression_level=1).compress(codes.tobytes()))


def rounded(array: Matrix) -> tuple[Matrix, int]:
    codes, scales = int8_rows(array)
    return codes * scales[:, None], packed(codes)


def lists(run: Path) -> None:
    recommender = load_recommender(run, "test")
    judge, linear = Judge(run, recommender), recommender.linear
    print(f"\nNDCG@{K} in float32: {judge.ndcg(judge.base):.5f}; {recommender.policy.score}")
    print("| | MB | NDCG@10 | common items |\n|---|---|---|---|")

    def try_linear(name: str, weights: Matrix, scales: Matrix | None, bytes_: int) -> None:
        recommender.linear = LinearItems(weights, scales)
        judge.tell(name, bytes_)
        recommender.linear = linear

    if linear is not None:
        weights = linear.weights
        for step in STEPS:
            codes, scales = int8_rows(weights.T, step * float(weights.std()))
            codes = np.ascontiguousarray(codes.T)
            try_linear(f"linear, least step {step}", codes, scales, packed(codes))
        for share in SHARES:
            least = np.quantile(np.abs(weights), 1 - share)
            kept = np.where(np.abs(weights) >= least, weights, 0)
            codes, scales = int8_rows(kept.T)
            bytes_ = 3 * np.count_nonzero(codes)  # the place in two bytes, the code in one
            try_linear(f"linear, {share:.0%} largest", codes.T.copy(), scales, bytes_)
    for name in ("vectors", "text", "profile"):
        array, bytes_ = rounded(getattr(recommender, name))
        setattr(recommender, name, array)
        rows = np.arange(1, len(recommender.vectors), dtype=np.int32)
        recommender.index = make_index(recommender.vectors[1:], rows)
        judge.tell(f"{name} too" if name != "vectors" else name, bytes_)
    if linear is not None:
        recommender.linear = linear.coded()
        judge.tell("all, as exported", packed(recommender.linear.weights))


def least_ms(call: Callable[[], Any], times: int) -> float:
    call()
    found = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return 1000 * min(found)


def ranked(recommender: Recommender, *asked: Any) -> dict[str, Matrix]:
    """What the ranker is given by ``recommender.parts(*asked)``."""
    given: dict[str, Matrix] = {}

    class Recorder:
        def rank(self, inputs: dict[str, Matrix]) -> dict[str, Matrix]:
            given.update(inputs)
            return {}

    engine = recommender.engine
    recommender.engine = Recorder()  # type: ignore[assignment]
    recommender.parts(*asked)
    recommender.engine = engine
    return given


def models(run: Path) -> None:
    recommender = load_recommender(run, "test")
    engine: Any = recommender.engine
    judge, policy = Judge(run, recommender), recommender.policy
    engines = {}
    print("\n| | float32 | int8 |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        sizes: dict[str, list[str]] = {}
        for int8 in (False, True):
            folder = Path(place, str(int8))
            folder.mkdir()
            widths = recommender.text.shape[1], recommender.catalog.features.shape[1]
            blobs = {
                "query": litert.query_model(engine.two_tower, int8),
                "candidate": litert.candidate_model(engine.two_tower, *widths, int8),
                "rank": litert.rank_model(engine.ranker, int8) if engine.ranker else None,
            }
            for name, blob in blobs.items():
                if blob is not None:
                    (folder / f"{name}.tflite").write_bytes(blob)
                    sizes.setdefault(name, []).append(f"{len(blob) / 1e6:.2f}")
            engines[int8] = LiteRTEngine(folder, engine.two_tower.config.history, policy.tasks)
    for name, told in sizes.items():
        print(f"| {name}, MB | {' | '.join(told)} |")
    for users, times in ((1, 50), (256, 5)):
        who = recommender.who(judge.history, judge.users[:users])
        given = (who.histories, recommender.vectors, who.profile, who.attributes)
        told = []
        for one in engines.values():
            took = least_ms(functools.partial(one.encode_query, *given), times)
            told.append(f"{took:.2f}")
        print(f"| query, {users} users, ms | {' | '.join(told)} |")
    who = recommender.who(judge.history, judge.users[:64])
    query = engines[False].encode_query(
        who.histories, recommender.vectors, who.profile, who.attributes
    )
    rows = recommender.candidates(who, query, policy.candidates)
    everything = replace(policy, score=dict.fromkeys(policy.tasks, 1.0))
    given = ranked(recommender, who.take(np.arange(1)), query[:1], rows[:1], everything)
    took = [f"{least_ms(functools.partial(one.rank, given), 50):.2f}" for one in engines.values()]
    print(f"| rank, {rows.shape[1]} candidates of 1 user, ms | {' | '.join(took)} |")
    told_by = {}
    for int8, one in engines.items():
        recommender.engine = one
        told_by[int8] = recommender.parts(who, query, rows, everything)
    for task in policy.tasks:
        apart = np.abs(told_by[False][task] - told_by[True][task]) / told_by[False][task].std()
        told = f"{apart.mean():.4f} / {apart.max():.4f}"
        print(f"| {task}, mean / largest difference in spreads | | {told} |")
    print("\n| | MB | NDCG@10 | common items |\n|---|---|---|---|")
    for int8, one in engines.items():
        recommender.engine = one
        written = sum(float(told[int8]) for told in sizes.values())
        judge.tell(f"lists, {'int8' if int8 else 'float32'} models", int(1e6 * written))


def linear(run: Path) -> None:
    recommender = load_recommender(run, "test")
    if recommender.linear is None:
        return
    sides = {"float32": recommender.linear, "int8": recommender.linear.coded()}
    events, rng = recommender.interactions, np.random.default_rng(0)
    print("\n| | " + " | ".join(sides) + " |\n|---|---|---|")
    for users, times in ((1, 200), (256, 7)):
        chosen = rng.choice(events.num_users, users, replace=False).astype(np.int32)
        histories = Ragged.of(events.histories(chosen))
        told = []
        for side in sides.values():
            took = least_ms(functools.partial(side.scores, histories), times)
            told.append(f"{took:.3f}")
        print(f"| all scores, {users} users, ms | {' | '.join(told)} |")
    with tempfile.TemporaryDirectory() as place:
        exact, small = Path(place, "exact.npy"), Path(place, "small.npy")
        save_rows(exact, sides["float32"].weights)
        coded = sides["int8"]
        assert coded.scales is not None
        save_codes(small, coded.weights, coded.scales)
        told = [f"{least_ms(lambda: load_rows(exact), 9):.1f}"]
        told.append(f"{least_ms(lambda: load_codes(small), 9):.1f}")
        print(f"| reading, ms | {' | '.join(told)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", nargs="?", type=Path, default=Path("saved_models/movielens-100k"))
    parser.add_argument("--parts", default=",".join(PARTS), help="some of: %(default)s")
    asked = parser.parse_args()
    parts = {"files": files, "lists": lists, "models": models, "linear": linear}
    for name in asked.parts.split(","):
        parts[name](asked.run)


if __name__ == "__main__":
    main()
