"""Acknowledged events a second of the stores of a server's state, beside plain SQLite.

    python benchmarks/state.py [--seconds 3] [--turns 3] [--folder DIR]

The plain side is what one would write first: one connection behind a lock, an insert and a commit
for each event, with the same table, log and level of safety. Each of 1 and 16 threads appends one
event after the other, each for a user of its own out of 1,000; sides take turns, in one process,
on one disk; medians over the turns. After that: what reading a history of 50 events takes, of
users asked for lately and not. Redis runs beside it, on a free port.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import redis

from tfrec.serving.recent import Recent
from tfrec.serving.redis_state import RedisState
from tfrec.serving.sqlite_state import SqliteState
from tfrec.serving.state import Event

USERS = 1000
TABLE = (
    "CREATE TABLE events (number INTEGER PRIMARY KEY, event_id TEXT UNIQUE, user_id TEXT, "
    "item_id TEXT, event TEXT, timestamp REAL, value REAL)"
)


class PlainSqlite:
    """SQLite as one would write it first: a commit for each event."""

    def __init__(self, folder: Path, synchronous: str) -> None:
        folder.mkdir()
        self._base = sqlite3.connect(folder / "plain.sqlite", check_same_thread=False)
        self._lock = threading.Lock()
        self._base.execute("PRAGMA journal_mode = WAL")
        self._base.execute(f"PRAGMA synchronous = {synchronous}")
        self._base.execute(TABLE)
        self._base.execute("CREATE INDEX of_users ON events (user_id)")

    def append(self, events: Sequence[Event]) -> None:
        with self._lock, self._base:
            self._base.executemany(
                "INSERT OR IGNORE INTO events (event_id, user_id, item_id, event, timestamp, value)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                [(e.event_id, e.user_id, e.item_id, e.event, e.timestamp, e.value) for e in events],
            )

    def close(self) -> None:
        self._base.close()


@contextmanager
def redis_server(folder: Path, fsync: str) -> Iterator[str]:
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = f"redis-server --port {port} --bind 127.0.0.1 --appendonly yes --appendfsync {fsync}"
    command = [*words.split(), "--save", "", "--dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        with redis.Redis(port=port) as asked:
            for _ in range(200):
                with suppress(redis.RedisError):
                    asked.ping()
                    break
                time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}/0"
        process.kill()


def appended(append: Callable[[Sequence[Event]], Any], threads: int, seconds: float) -> np.ndarray:
    """Seconds that each acknowledgement took."""
    took: list[list[float]] = [[] for _ in range(threads)]
    numbers, until = count(), time.perf_counter() + seconds
    prefix = os.urandom(8).hex()

    def work(mine: list[float]) -> None:
        while (began := time.perf_counter()) < until:
            number = next(numbers)
            user, item = str(number % USERS), str(number % 3706)
            append([Event(f"{prefix}-{number:012}", user, item, "like", 1.7e9, None)])
            mine.append(time.perf_counter() - began)

    workers = [threading.Thread(target=work, args=(mine,)) for mine in took]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return np.concatenate([np.array(mine) for mine in took])


def reads(state: Any, name: str, times: int = 2000) -> None:
    """Prints what one user's history of 50 events takes, and asking whether he is forgotten."""
    state.append([Event(f"r{n}", "reader", str(n), "like", 1.7e9) for n in range(50)])

    def each(call: Callable[[], Any]) -> str:
        took = []
        for _ in range(times):
            began = time.perf_counter()
            call()
            took.append(time.perf_counter() - began)
        return f"{np.percentile(took, 50) * 1e6:.0f} / {np.percentile(took, 99) * 1e6:.0f}"

    first = "-"
    if isinstance(state, SqliteState):
        state._recent = Recent(0)
        first = each(lambda: state.histories(["reader"]))
        state._recent = Recent(50_000)
    again = each(lambda: state.histories(["reader"]))
    print(f"| {name} | {again} | {first} | {each(lambda: state.forgotten(['reader']))} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--turns", type=int, default=3, help="measurements of each side")
    parser.add_argument("--folder", default="", help="on the disk to measure; else a temporary one")
    told = parser.parse_args()
    if shutil.which("redis-server") is None:
        sys.exit("redis-server is missing: apt-get install redis-server")
    folder = Path(tempfile.mkdtemp(dir=told.folder or None))
    print(f"SQLite {sqlite3.sqlite_version}; load {os.getloadavg()[0]:.1f} when it began\n")
    with (
        redis_server(folder / "always", "always") as always,
        redis_server(folder / "everysec", "everysec") as everysec,
    ):
        sides = {
            "plain SQLite, full": PlainSqlite(folder / "plain_full", "full"),
            "SqliteState, full": SqliteState(folder / "full", "full"),
            "plain SQLite, normal": PlainSqlite(folder / "plain_normal", "normal"),
            "SqliteState, normal": SqliteState(folder / "normal", "normal"),
            "RedisState, always": RedisState(always),
            "RedisState, everysec": RedisState(everysec),
        }
        writes(sides, told.turns, told.seconds)
        print("\n| µs, p50 / p99 | history of 50, again | at first | forgotten |")
        print("|---|---|---|---|")
        for name, side in sides.items():
            if not isinstance(side, PlainSqlite):
                reads(side, name)
            side.close()
    shutil.rmtree(folder)
    return 0


def writes(sides: dict[str, Any], turns: int, seconds: float) -> None:
    """Prints a row for each side and number of threads; ratios are to plain SQLite there."""
    print("| store | threads | events/s | p50 ms | p99 ms | × plain, same safety |")
    print("|---|---|---|---|---|---|")
    for threads in (1, 16):
        rates: dict[str, list[float]] = {name: [] for name in sides}
        took: dict[str, list[np.ndarray]] = {name: [] for name in sides}
        for _ in range(turns):
            for name, side in sides.items():
                began = time.perf_counter()
                took[name].append(appended(side.append, threads, seconds))
                rates[name].append(len(took[name][-1]) / (time.perf_counter() - began))
        rate = {name: statistics.median(found) for name, found in rates.items()}
        for name in sides:
            safe = name.endswith(("full", "always"))
            plain = rate["plain SQLite, full" if safe else "plain SQLite, normal"]
            p50, p99 = np.percentile(np.concatenate(took[name]), [50, 99]) * 1e3
            print(
                f"| {name} | {threads} | {rate[name]:,.0f} | {p50:.2f} | {p99:.2f} "
                f"| {rate[name] / plain:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main())
