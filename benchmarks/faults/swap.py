"""Swapping versions under load: no request fails, and each new one is answered by the new version.

    python benchmarks/faults/swap.py BUNDLE [--swaps 50] [--clients 8]

Two versions take each other's place, each loaded and warmed anew; every fifth time the new one gets
half of the users first. A bundle of one version gets a copy of it as the second.
"""

from __future__ import annotations

import shutil
import time

import httpx
from ground import Asking, Server, arguments, served, table, verdict


def activate(server: Server, version: str, share: float = 1.0) -> float:
    begun = time.perf_counter()
    url = f"{server.url}/v1/models/{version}:activate"
    httpx.post(url, json={"share": share}, timeout=120).raise_for_status()
    return time.perf_counter() - begun


def main() -> None:
    asked = arguments(__doc__, swaps=(50, "swaps"), clients=(8, "who ask all the time"))
    with served(asked.bundle, "watch=0") as server:
        versions = [one["version"] for one in server.get("models")["versions"]]
        if len(versions) < 2:
            folder = server.bundle / "versions"
            shutil.copytree(folder / versions[0], folder / "partial", symlinks=True)
            versions.append(str(int(versions[0]) + 1))
            (folder / "partial").rename(folder / versions[1])
        begun, times, wrong = server.memory_mb(), [], 0
        with Asking(server, asked.clients) as asking:
            time.sleep(1)
            for swap in range(asked.swaps):
                version = versions[swap % 2]
                if swap % 5 == 4:
                    times.append(activate(server, version, 0.5))
                times.append(activate(server, version))
                told = httpx.post(f"{server.url}/v1/recommend", json={}, timeout=60).json()
                wrong += told.get("model_version") != version
            time.sleep(1)
        ended, tracebacks = server.memory_mb(), server.tracebacks()
    failed = sum(n for status, n in asking.statuses.items() if status != "200")
    rows = [
        ("swaps", asked.swaps),
        ("activations", len(times)),
        ("answers", asking.statuses["200"]),
        ("answers by version", dict(asking.versions)),
        ("failed requests", failed),
        ("answered by the old version after the swap", wrong),
        ("time of an activation, mean and longest", f"{_mean(times):.2f} s, {max(times):.2f} s"),
        ("p50 and p99 of answers", asking.times()),
        ("memory before and after", f"{begun:.0f} MB, {ended:.0f} MB"),
        ("tracebacks", tracebacks),
    ]
    table("swapping versions under load", ("", "found"), rows)
    verdict(not failed and not wrong and not tracebacks and bool(asking.statuses["200"]))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
