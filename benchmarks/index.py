"""The vector index beside hnswlib, faiss and numpy, in one run.

    python benchmarks/index.py --raw DIR                       # everything; continues where it was
    python benchmarks/index.py --raw DIR --steps peers         # speed at recall, and build time
    python benchmarks/index.py --raw DIR --steps grid changes  # the tuner; adding until found
    python benchmarks/index.py --raw DIR --steps small         # exact or ScaNN, by catalog size
    python benchmarks/index.py --raw DIR --steps large --large 10000000

What is searched, all of width 64:

- events: item factors of ALS on MovieLens-1M (implicit, alpha 5, regularisation 1), dot product;
  queries are user factors.
- texts: the titles of MovieLens-1M, the texts of Amazon Scientific and the sentences of the DBpedia
  abstracts, encoded by all-MiniLM-L6-v2, their 64 first principal components at length 1; queries
  are 3,000 of them that are not in the catalog.

A million vectors are made of the few thousand real ones: a point on the line between a vector and
one of its 8 nearest neighbours, with noise of .3 of their distance, so that norms, clusters and
directions are the real ones. More users are made in the same way. --sets names `-real` forms too
(`events-real`), which are the vectors as they are.

Every figure that is compared comes from one run: each side is a process of its own that has built
its index and answers batches of 1,000 queries; for each recall the fastest setting of a sweep is
taken that reaches it, and then the sides take turns. We search as the tuner chose, on other queries
than are asked here. Peers live in an environment of their own in the cache folder, where they are
installed if --peer-python names none. Results are kept in --out; what is there is not measured
again (delete results.json to begin anew).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

PEERS = ["hnswlib==0.8.0", "faiss-cpu==1.15.1", "numpy==2.4.6"]
WIDTH, ASKED, KS, RECALLS = 64, 1000, (10, 100), (0.95, 0.99)
SIDES = ("tfrec", "hnswlib", "faiss-ivf", "faiss-hnsw", "numpy")
CORES = 2
EFS = dict.fromkeys(KS, (100, 150, 220, 330, 500, 750, 1100, 1700, 2500, 4000))
LISTS = dict.fromkeys(
    KS, tuple((p, r) for r in (2, 5, 12, 30, 80) for p in (8, 14, 25, 45, 80, 140, 250, 450))
)


# --- what is searched ---


def events(raw: Path) -> tuple[np.ndarray, np.ndarray]:
    """Item and user factors."""
    import gzip

    import scipy.sparse as sp
    from implicit.cpu.als import AlternatingLeastSquares
    from threadpoolctl import threadpool_limits

    from tfrec.data import sources

    films = raw / "ml-1m" if raw.name else sources.fetch("movielens-1m", None)
    plain, packed = films / "ratings.dat", films / "ratings.dat.gz"
    text = plain.read_text() if plain.exists() else gzip.decompress(packed.read_bytes()).decode()
    pairs = np.array([line.split("::")[:2] for line in text.splitlines()], np.int64)
    users, items = (np.unique(column, return_inverse=True)[1] for column in pairs.T)
    with threadpool_limits(1, "blas"):
        model = AlternatingLeastSquares(
            factors=WIDTH, regularization=1.0, alpha=5.0, iterations=15, random_state=1
        )
        ones = np.ones(len(users), np.float32)
        model.fit(sp.csr_matrix((ones, (users, items))), show_progress=False)
    return np.asarray(model.item_factors), np.asarray(model.user_factors)


def texts(raw: Path) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of texts, and of others from among them."""
    import re

    from tfrec.models.text import TextEncoder

    films = (raw / "ml-1m" / "movies.dat").read_text("latin-1").splitlines()
    found = [f"{c[1]}. {c[2].replace('|', ', ')}" for c in (film.split("::") for film in films)]
    shop = (raw / "amazon-scientific" / "Scientific.text").read_text("utf-8").splitlines()[1:]
    found += [line.partition("\t")[2] for line in shop]
    abstracts = json.loads((raw / "ml-1m" / "dbpedia_abstracts.json").read_text("utf-8")).values()
    sentences = (s for text in abstracts if text for s in re.split(r"(?<=[.!?])\s+", text))
    found = list(dict.fromkeys([*found, *(s for s in sentences if len(s) > 20)]))
    vectors = TextEncoder.load(length=48, trainable=False).encode(found)
    vectors = vectors[np.random.default_rng(1).permutation(len(vectors))]
    vectors -= vectors.mean(0)
    vectors = vectors @ np.linalg.svd(vectors, full_matrices=False)[2][:WIDTH].T
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors[3000:], vectors[:3000]


def more_of(real: np.ndarray, n: int, seed: int) -> Iterator[np.ndarray]:
    """n vectors in blocks, each beside the line between a real one and a neighbour of it."""
    from tfrec.index import ExactIndex

    rng = np.random.default_rng(seed)
    # The nearest by Euclid are those of the largest q @ x - |x|^2 / 2.
    longer = np.hstack([real, -0.5 * np.square(real).sum(1, keepdims=True)])
    asked = np.hstack([real, np.ones((len(real), 1), np.float32)])
    index = ExactIndex.build(longer, np.arange(1, len(real) + 1, dtype=np.int32))
    near = index.search(asked, 9).ids[:, 1:] - 1
    for start in range(0, n, 250_000):
        rows = rng.integers(len(real), size=min(250_000, n - start))
        step = real[near[rows, rng.integers(8, size=len(rows))]] - real[rows]
        far = np.linalg.norm(step, axis=1, keepdims=True) / np.sqrt(WIDTH)
        along = rng.random((len(rows), 1), dtype=np.float32)
        noise = rng.standard_normal((len(rows), WIDTH), dtype=np.float32)
        yield real[rows] + along * step + 0.3 * far * noise


def prepared(name: str, told: argparse.Namespace) -> Path:
    """A folder with items, queries to ask, queries to tune by, and the exact 100 best."""
    from tfrec.index import ExactIndex

    folder = Path(told.out) / f"{name}-{told.n}"
    if (folder / "truth.npy").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    base = {"events": events, "texts": texts}[name.removesuffix("-real")]
    kept = Path(told.out) / f"{base.__name__}.npz"
    if not kept.exists():
        items, queries = base(Path(told.raw))
        np.savez(kept, items=items.astype(np.float32), queries=queries.astype(np.float32))
    with np.load(kept) as real:
        items, queries = real["items"], real["queries"]
    if not name.endswith("-real"):
        items = np.concatenate(list(more_of(items, told.n, 1)))
        if name == "events":
            queries = np.concatenate(list(more_of(queries, 3 * ASKED, 2)))
    if name.startswith("texts"):
        items /= np.linalg.norm(items, axis=1, keepdims=True)
    queries = np.ascontiguousarray(queries[np.random.default_rng(3).permutation(len(queries))])
    index = ExactIndex.build(items, np.arange(1, len(items) + 1, dtype=np.int32))
    np.save(folder / "items.npy", items)
    np.save(folder / "asked.npy", queries[:ASKED])
    np.save(folder / "tuning.npy", queries[ASKED : 3 * ASKED])
    np.save(folder / "truth.npy", index.search(queries[:ASKED], min(100, len(items))).ids - 1)
    return folder


# --- the sides; each runs in a process of its own ---


class Ours:
    settings = dict.fromkeys(KS, RECALLS)

    def build(self, folder: Path) -> None:
        from tfrec.index import ScannIndex

        items, self.tuning = np.load(folder / "items.npy"), np.load(folder / "tuning.npy")
        ids = np.arange(1, len(items) + 1, dtype=np.int32)
        began = time.perf_counter()
        self.index = ScannIndex.build(items, ids, queries=self.tuning)
        self.took = time.perf_counter() - began
        self.plans = {0.95: self.index.tuned, 0.99: self.index.tune(0.99, self.tuning)}

    def search(self, queries: np.ndarray, k: int, recall: float, threads: int) -> np.ndarray:
        self.index.threads, self.index._tuned = threads, self.plans[recall]
        return self.index.search(queries, k).ids - 1


class Hnswlib:
    settings = EFS

    def build(self, folder: Path) -> None:
        import hnswlib

        items = np.load(folder / "items.npy")
        self.index = hnswlib.Index("ip", WIDTH)
        began = time.perf_counter()
        self.index.init_index(len(items), M=16, ef_construction=200, random_seed=1)
        self.index.set_num_threads(CORES)
        self.index.add_items(items)
        self.took = time.perf_counter() - began

    def search(self, queries: np.ndarray, k: int, ef: int, threads: int) -> np.ndarray:
        self.index.set_ef(max(ef, k))
        return self.index.knn_query(queries, k, num_threads=threads)[0].astype(np.int64)


class FaissIvf:
    settings = LISTS

    def build(self, folder: Path) -> None:
        import faiss

        items = np.load(folder / "items.npy")
        faiss.omp_set_num_threads(CORES)
        began = time.perf_counter()
        lists = round(len(items) ** 0.5)
        kind = f"IVF{lists},PQ{WIDTH}x4fs,RFlat"
        self.index = faiss.index_factory(WIDTH, kind, faiss.METRIC_INNER_PRODUCT)
        self.index.train(items[np.random.default_rng(1).permutation(len(items))[:100_000]])
        self.index.add(items)
        self.took = time.perf_counter() - began

    def search(self, queries: np.ndarray, k: int, setting: Any, threads: int) -> np.ndarray:
        import faiss

        faiss.omp_set_num_threads(threads)
        faiss.downcast_index(self.index.base_index).nprobe, self.index.k_factor = setting
        return self.index.search(queries, k)[1]


class FaissHnsw:
    settings = EFS

    def build(self, folder: Path) -> None:
        import faiss

        items = np.load(folder / "items.npy")
        faiss.omp_set_num_threads(CORES)
        began = time.perf_counter()
        self.index = faiss.IndexHNSWFlat(WIDTH, 16, faiss.METRIC_INNER_PRODUCT)
        self.index.hnsw.efConstruction = 100
        self.index.add(items)
        self.took = time.perf_counter() - began

    def search(self, queries: np.ndarray, k: int, ef: int, threads: int) -> np.ndarray:
        import faiss

        faiss.omp_set_num_threads(threads)
        self.index.hnsw.efSearch = max(ef, k)
        return self.index.search(queries, k)[1]


class Numpy:
    settings = dict.fromkeys(KS, (None,))

    def build(self, folder: Path) -> None:
        self.items, self.took = np.load(folder / "items.npy"), 0.0

    def search(self, queries: np.ndarray, k: int, setting: str, threads: int) -> np.ndarray:
        found = []
        for start in range(0, len(queries), 50):
            scores = queries[start : start + 50] @ self.items.T
            best = np.argpartition(-scores, k, axis=1)[:, :k]
            order = np.argsort(-np.take_along_axis(scores, best, 1), axis=1)
            found.append(np.take_along_axis(best, order, 1))
        return np.concatenate(found)


def serve(name: str, folder: Path) -> None:
    """Builds, then answers: k, setting, threads and number of queries in, recall and rate out."""
    kinds = dict(zip(SIDES, (Ours, Hnswlib, FaissIvf, FaissHnsw, Numpy), strict=True))
    side = kinds[name]()
    side.build(folder)
    say = lambda **what: print("SAYS", json.dumps(what), flush=True)  # noqa: E731
    say(took=side.took, settings={k: side.settings[k] for k in KS})
    asked, truth = np.load(folder / "asked.npy"), np.load(folder / "truth.npy")
    for line in sys.stdin:
        k, setting, threads, count = json.loads(line)
        began = time.perf_counter()
        found = side.search(asked[:count], k, setting, threads)
        seconds = time.perf_counter() - began
        hits = sum(len(set(f) & set(t)) for f, t in zip(found, truth[:count, :k], strict=True))
        say(recall=hits / (k * count), rate=count / seconds)


# --- the parent ---


class Side:
    def __init__(self, name: str, python: str, folder: Path) -> None:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(CORES))
        if name == "numpy":
            threads = dict.fromkeys(threads, "1")
        self.log = open(folder / f"{name}.log", "w")  # noqa: SIM115 - open as long as the process
        self.process = subprocess.Popen(
            [python, __file__, "--side", name, str(folder)], env={**os.environ, **threads},
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip
        self.name, self.about = name, self._heard()
        print(f"  {name} is built: {self.about['took']:.1f} s", file=sys.stderr)

    def ask(self, k: int, setting: Any, threads: int, count: int) -> dict[str, float]:
        self.process.stdin.write(json.dumps([k, setting, threads, count]) + "\n")
        self.process.stdin.flush()
        return self._heard()

    def _heard(self) -> dict[str, Any]:
        for line in self.process.stdout:
            if line.startswith("SAYS"):
                return json.loads(line[5:])
        raise SystemExit(f"{self.name} failed; see {self.log.name}")

    def best(self, k: int, recall: float) -> Any:
        """The fastest setting that reaches a recall, or None."""
        if self.name == "tfrec":
            return recall  # the tuner's choice
        if self.name == "numpy":
            return "exact"
        if not hasattr(self, "swept"):
            self.swept: dict[int, list[Any]] = {}
        if k not in self.swept:
            self.swept[k] = list(self._sweep(k))
        good = [(found["rate"], s) for s, found in self.swept[k] if found["recall"] >= recall]
        return max(good, key=lambda one: one[0])[1] if good else None

    def _sweep(self, k: int) -> Iterator[tuple[Any, Any]]:
        done: set[Any] = set()
        for setting in self.about["settings"][str(k)]:
            group = setting[1] if isinstance(setting, list) else 0
            if group in done:
                continue
            found = self.ask(k, setting, 1, 200)
            yield setting, found
            if found["recall"] >= max(RECALLS) + 0.002:
                done.add(group)  # a wider search is slower and better than needed

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def peers(name: str, told: argparse.Namespace) -> dict[str, Any]:
    folder = prepared(name, told)
    python = told.peer_python or peer_python()
    sides = [Side(s, sys.executable if s == "tfrec" else python, folder) for s in told.sides]
    built = {side.name: side.about["took"] for side in sides if side.name != "numpy"}
    rows = []
    for k in KS:
        for recall in RECALLS:
            best = {side.name: side.best(k, recall) for side in sides}
            for threads in (1, 2):
                rows.append(turns(sides, best, k, recall, threads, told.turns))
                print(json.dumps(rows[-1]), file=sys.stderr)
    for side in sides:
        side.end()
    return {"build_seconds": built, "search": rows}


def turns(
    sides: list[Side], best: dict[str, Any], k: int, recall: float, threads: int, rounds: int
) -> dict[str, Any]:
    rates: dict[str, list[float]] = {s.name: [] for s in sides if best[s.name] is not None}
    recalls: dict[str, float] = {}
    some = [side for side in sides if side.name in rates]
    # About two seconds of work for each turn of each side.
    first = {side.name: side.ask(k, best[side.name], threads, 100)["rate"] for side in some}
    for _ in range(rounds):
        for side in some:
            count = round(min(ASKED, max(100, 2 * first[side.name])))
            found = side.ask(k, best[side.name], threads, count)
            rates[side.name].append(found["rate"])
            recalls[side.name] = found["recall"]
    medians = {name: statistics.median(found) for name, found in rates.items()}
    others = {name: rate for name, rate in medians.items() if name != "tfrec"}
    fastest = max(others, key=lambda name: others[name])
    return {
        "k": k, "recall": recall, "threads": threads, "rates": medians, "recalls": recalls,
        "settings": best, "best_peer": fastest, "ratio": medians["tfrec"] / others[fastest],
    }  # fmt: skip


def grid(name: str, told: argparse.Namespace) -> dict[str, Any]:
    """The tuner's choice beside the best of every layout and way of searching it, one thread."""
    from tfrec.index import scann, tuner
    from tfrec.index.store import Store

    folder = prepared(name, told)
    items, asked = np.load(folder / "items.npy"), np.load(folder / "asked.npy")[:300]
    truth = np.load(folder / "truth.npy")[:300].astype(np.int64)
    store = Store(items, np.arange(1, len(items) + 1, dtype=np.int32))
    tuning, root = np.load(folder / "tuning.npy"), len(items) ** 0.5
    searcher, layout, tuned = scann.train(store, 0.95, tuning)
    chosen: dict[int, Any] = {}
    best: dict[int, Any] = {}
    for k in KS:
        plan = tuner.plan_for(tuned, k)
        chosen[k] = (searcher, plan.leaves, plan.candidates)
    # As good as the tuner's on these queries, so that only speed differs.
    least = {
        k: min(0.95, tuner.Trial(searcher, asked, truth[:, :k]).run(*chosen[k][1:])[0]) for k in KS
    }
    for leaves in (round(root), round(root / 2), round(root * 2)):
        for numbers in (1, 2):
            other = scann._trained(store, tuner.Layout(leaves, numbers))
            for k in KS:
                trial = tuner.Trial(other, asked, truth[:, :k])
                for share in (60, 40, 26, 17, 11, 7, 4.5, 3, 2, 1.6, 1.2):
                    for opened in tuner._ladder(leaves):
                        recall, took = trial.run(opened, round(k * share))
                        if recall >= least[k]:
                            if k not in best or took < best[k][0]:
                                best[k] = (took, other, opened, round(k * share), leaves, numbers)
                            break
                        if k in best and took > 1.5 * best[k][0]:
                            break
    found = []
    for k in KS:
        ours, theirs = [], []
        for _ in range(7):
            for times, (one, *how) in ((ours, chosen[k]), (theirs, best[k][1:4])):
                times.append(tuner.Trial(one, asked, truth[:, :k]).run(*how)[1])
        found.append(
            {
                "k": k, "share_of_best": statistics.median(theirs) / statistics.median(ours),
                "chosen": [layout.leaves, layout.numbers_a_code, *chosen[k][1:]],
                "best": [*best[k][4:], *best[k][2:4]],
            }
        )  # fmt: skip
    return {"grid": found}


def changes(name: str, told: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds from the call of add to the end of a search that finds what was added."""
    from tfrec.index import ScannIndex

    folder = prepared(name, told)
    items = np.load(folder / "items.npy")
    ids = np.arange(1, len(items) + 1, dtype=np.int32)
    index = ScannIndex.build(items, ids, queries=np.load(folder / "tuning.npy"))
    rng, last, found = np.random.default_rng(5), len(items), {}
    longest = 1.01 * np.linalg.norm(items, axis=1).max()
    for count, rounds in ((1, 100), (1000, 11)):
        took = []
        for _ in range(rounds):
            near = items[rng.integers(len(items), size=count)]
            fresh = (near * rng.uniform(0.99, 1.01, near.shape)).astype(np.float32)
            # What is looked for is longer than all, and so the best for itself.
            fresh[-1] *= longest / np.linalg.norm(fresh[-1])
            longest *= 1.01
            new = np.arange(last + 1, last + count + 1, dtype=np.int32)
            began = time.perf_counter()
            index.add(fresh, new)
            seen = index.search(fresh[-1], 10).ids[0]
            took.append(1000 * (time.perf_counter() - began))
            if new[-1] not in seen:
                raise SystemExit(f"{new[-1]} was added and not found")
            last += count
        found[str(count)] = {"median_ms": statistics.median(took), "most_ms": max(took)}
    return {"until_found": found}


def small(name: str, told: argparse.Namespace) -> dict[str, Any]:
    """Queries a second of both kinds by catalog size, a batch and one at a time, one thread."""
    from tfrec.index import ExactIndex, ScannIndex

    folder = prepared(name, told)
    every, asked = np.load(folder / "items.npy"), np.load(folder / "asked.npy")
    found = []
    for n in (1000, 3000, 10_000, 30_000, 100_000):
        ids = np.arange(1, n + 1, dtype=np.int32)
        rows = np.random.default_rng(1).permutation(len(every))[:n]
        for kind in (ExactIndex, ScannIndex):
            began = time.perf_counter()
            index = kind.build(every[rows], ids, threads=1)
            took = time.perf_counter() - began
            rates = {}
            for size in (1, 100):
                times = []
                for start in range(0, 100 * min(size, 5), size):
                    began = time.perf_counter()
                    index.search(asked[start : start + size], 100)
                    times.append(time.perf_counter() - began)
                rates[size] = size / statistics.median(times)
            found.append({"n": n, "kind": index.kind, "build_s": took, "rates": rates})
    return {"small": found}


def large(name: str, told: argparse.Namespace) -> dict[str, Any]:
    """A catalog in shards: build time, peak memory, recall and speed, int8 vectors."""
    import resource

    from tfrec.index import ShardedIndex

    folder = prepared(name, told)
    asked, tuning = np.load(folder / "asked.npy")[:200], np.load(folder / "tuning.npy")
    with np.load(Path(told.out) / f"{name}.npz") as real:
        items = real["items"]
    best: list[Any] = []

    def blocks() -> Iterator[np.ndarray]:
        start = 0
        for block in more_of(items, told.large, 1):
            if name == "texts":
                block = block / np.linalg.norm(block, axis=1, keepdims=True)
            scores = asked @ block.T
            top = np.argpartition(-scores, 100, axis=1)[:, :100]
            best.append((np.take_along_axis(scores, top, 1), top + start + 1))
            start += len(block)
            yield block

    began = time.perf_counter()
    index = ShardedIndex.build(
        blocks(), folder / f"sharded-{told.large}", precision="int8", queries=tuning,
        shard_rows=told.shard_rows,
    )  # fmt: skip
    built = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    scores, ids = (np.hstack([part[i] for part in best]) for i in (0, 1))
    order = np.argsort(-scores, axis=1)[:, :100]
    truth = np.take_along_axis(ids, order, 1)
    found = index.search(asked, 100).ids
    recall = np.mean([len(set(f) & set(t)) / 100 for f, t in zip(found, truth, strict=True)])
    rates = []
    for _ in range(5):
        began = time.perf_counter()
        index.search(asked, 100)
        rates.append(len(asked) / (time.perf_counter() - began))
    size = sum(path.stat().st_size for path in folder.glob("sharded-*/**/*") if path.is_file())
    return {
        "large": {
            "n": told.large, "shard_rows": told.shard_rows, "seconds_with_making_them": built,
            "peak_gb_building": peak, "on_disk_gb": size / 1e9, "recall_at_100": float(recall),
            "rate": statistics.median(rates),
        }
    }  # fmt: skip


def peer_python() -> str:
    """Makes an environment with the peers, unless it is there."""
    from tfrec.data.sources import cache_folder

    folder = cache_folder() / "index-peers"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"making an environment with {', '.join(PEERS)} in {folder} ...", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PEERS], check=True)
        (folder / "ready").touch()
    return str(python)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "")
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")
    return f"{name}{', AVX-512' if 'avx512f' in flags else ''}, {os.cpu_count()} cores"


STEPS = {"peers": peers, "changes": changes, "grid": grid, "small": small, "large": large}


def main() -> None:
    if sys.argv[1:2] == ["--side"]:
        serve(sys.argv[2], Path(sys.argv[3]))
        return
    about, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--raw", default="", help="holds ml-1m and amazon-scientific; else events alone, fetched"
    )
    parser.add_argument("--out", default="saved_models/benchmarks/index", help="results, vectors")
    parser.add_argument("--sets", nargs="+", default=["events", "texts"])
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=STEPS)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--n", type=int, default=1_000_000, help="vectors of a set")
    parser.add_argument("--large", type=int, default=10_000_000, help="vectors in shards")
    parser.add_argument("--shard-rows", type=int, default=2_000_000, help="vectors of a shard")
    parser.add_argument("--turns", type=int, default=5, help="measurements of each side")
    parser.add_argument("--peer-python", default="", help=f"a Python with {', '.join(PEERS)}")
    told = parser.parse_args()
    results = Path(told.out) / "results.json"
    results.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(results.read_text()) if results.exists() else {}
    print(f"{processor()}; load {os.getloadavg()[0]:.1f} when it began", flush=True)
    for step in told.steps:
        for name in told.sets[: 1 if step == "large" else None]:
            if name.startswith("texts") and not told.raw:
                print(f"{name} left out: its texts are not fetched, and --raw names none")
                continue
            some = told.sides if step == "peers" and told.sides != list(SIDES) else []
            size = told.large if step == "large" else told.n
            key = " ".join([step, *some, name, str(size)])
            if key not in found:
                load = os.getloadavg()[0]
                found[key] = {"processor": processor(), "load": load} | STEPS[step](name, told)
                results.write_text(json.dumps(found, indent=1))
            print(key, json.dumps(found[key]), flush=True)


if __name__ == "__main__":
    main()
