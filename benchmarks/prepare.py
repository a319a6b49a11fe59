"""Measures `prepare` on made-up events: time, peak memory, and whether both grow linearly.

    python benchmarks/prepare.py [--millions 1 2.5 5 10] [--format csv|tsv|jsonl|parquet] [--gzip]

Each size is prepared in a process of its own, from a file with the columns user_id, item_id,
timestamp, event and rating (ISO times with --iso). The limits of the project are 10 million
interactions in at most 90 s and 4 GiB.
"""

from __future__ import annotations

import argparse
import gzip
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

SECONDS, GIB = 90.0, 4.0


def write_events(path: Path, n: int, kind: str, iso: bool) -> None:
    rng = np.random.default_rng(1)
    users, items = max(n // 50, 3), max(n // 200, 3)
    # Squared: some are much more popular than others, as in life.
    user = (rng.random(n) ** 2 * users).astype(np.int64)
    item = (rng.random(n) ** 3 * items).astype(np.int64)
    stamp = pa.array(np.sort(rng.integers(1_500_000_000, 1_700_000_000, n)))
    if iso:
        stamp = stamp.cast(pa.timestamp("s")).cast(pa.string())
    table = pa.table(
        {
            "user_id": pa.array(user).cast(pa.string()),
            "item_id": pa.array(item).cast(pa.string()),
            "timestamp": stamp,
            "event": pa.array(["view", "cart", "purchase"]).take(pa.array(rng.integers(0, 3, n))),
            "rating": pa.array(rng.integers(1, 11, n) / 2),
        }
    )
    if kind == "parquet":
        pa.parquet.write_table(table, path)
    elif kind == "jsonl":
        with path.open("w") as out:
            for batch in table.to_batches(max_chunksize=100_000):
                out.writelines(json.dumps(row) + "\n" for row in batch.to_pylist())
    else:
        options = pa.csv.WriteOptions(delimiter="\t" if kind == "tsv" else ",")
        pa.csv.write_csv(table, path, options)


def measure(path: Path, out: Path) -> None:
    """Runs in the child: prepares once and prints its figures as JSON."""
    from tfrec.config import Config
    from tfrec.stages import prepare

    config = Config.load("files", [f"data.interactions={path}"])
    start = time.perf_counter()
    artifact = prepare.run(config, out)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": seconds, "gib": peak, "rows": artifact.metrics["rows"]}))


def one_size(n: int, arguments: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=arguments.dir) as scratch:
        path = Path(scratch) / f"events.{arguments.format}"
        write_events(path, n, arguments.format, arguments.iso)
        if arguments.gzip:
            packed = path.with_name(path.name + ".gz")
            with path.open("rb") as source, gzip.open(packed, "wb", compresslevel=1) as target:
                shutil.copyfileobj(source, target)
            path = packed
        command = [sys.executable, __file__, "--child", str(path), str(Path(scratch) / "run")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return {**json.loads(done.stdout), "mib": path.stat().st_size / 2**20}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=float, nargs="+", default=[1, 2.5, 5, 10])
    parser.add_argument("--format", choices=["csv", "tsv", "jsonl", "parquet"], default="csv")
    parser.add_argument("--gzip", action="store_true")
    parser.add_argument("--iso", action="store_true", help="times as ISO 8601 text")
    parser.add_argument("--dir", default=None, help="where the made-up files go")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        measure(Path(arguments.child[0]), Path(arguments.child[1]))
        return 0
    print(f"{'rows':>12} {'file MiB':>9} {'seconds':>8} {'s / million':>11} {'peak GiB':>9}")
    within = True
    for millions in arguments.millions:
        found = one_size(int(millions * 1_000_000), arguments)
        each = found["seconds"] / millions
        print(
            f"{found['rows']:>12,.0f} {found['mib']:>9.0f} {found['seconds']:>8.1f} {each:>11.2f} "
            f"{found['gib']:>9.2f}",
            flush=True,
        )
        within &= found["seconds"] <= SECONDS and found["gib"] <= GIB
    print(f"limits ({SECONDS:.0f} s, {GIB:.0f} GiB): {'kept' if within else 'EXCEEDED'}")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
