"""A clock that jumps: histories keep the order of arrival, and lists stay lists.

    python benchmarks/faults/clock.py BUNDLE

The server's calendar is set back and forth while it runs, by libfaketime where that is installed
(`apt-get install faketime`), else by a `time.time` that reads how far it is off. As with a real
clock, the monotonic one goes on. At each time somebody tells an event, an item is put, lists are
asked for by a policy that reads the age of items, and a client sends times of its own, out of
order. In the end the server is killed and started again in the past.
"""

from __future__ import annotations

import math
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import httpx
from ground import Server, arguments, event, items, served, table, verdict

HOUR, DAY, YEAR = 3600, 86_400, 31_557_600
JUMPS = {
    "as it is": 0,
    "an hour back": -HOUR,
    "a day back": -DAY,
    "a year ahead": YEAR,
    "ten years back": -10 * YEAR,
    "before 1980": -47 * YEAR,
    "as it was": 0,
}
POLICY = '[steps]\nfreshness = 1.0\nhalf_life_days = 1.0\nrerank = ["freshness", "diversity"]\n'
PATCH = """
import os, time
real = time.time
def told():
    with open(os.environ["TFREC_CLOCK"]) as file:
        return real() + float(file.read().strip().rstrip("s") or 0)
time.time = told
"""


def environment(folder: Path) -> tuple[str, dict[str, str]]:
    """How the clock is faked, and what the server must be started with."""
    clock = folder / "clock"
    clock.write_text("+0s")
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if found:
        return "libfaketime", {
            "LD_PRELOAD": str(found[0]),
            "FAKETIME_TIMESTAMP_FILE": str(clock),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_DONT_RESET": "1",
        }
    (folder / "sitecustomize.py").write_text(PATCH)
    path = f"{folder}:{os.environ.get('PYTHONPATH', '')}"
    return "time.time", {"PYTHONPATH": path, "TFREC_CLOCK": str(clock)}


def told_by(answer: httpx.Response) -> Any:
    answer.raise_for_status()
    return answer.json()


def at_this_time(server: Server, number: int, item: str) -> dict[str, Any]:
    """What is asked at each time, and whether it is right."""
    url, body = server.url, {"user_id": "clock", "k": 10, "explain": True}
    own = event("clock", item)
    back = event("clock", item, timestamp=1.6e9 - number * DAY)
    put = f"put-{number}"
    with httpx.Client(base_url=url, timeout=30) as client:
        told_by(client.post("/v1/events", json=own))
        told_by(client.post("/v1/events", json=back))
        told_by(client.put(f"/v1/items/{put}", json={"title": f"Put {number}"}))
        answers = [told_by(client.post("/v1/recommend", json=body)) for _ in range(5)]
        answers.append(told_by(client.post("/v1/recommend", json={**body, "context": {"time": 1}})))
        told_by(client.post("/v1/shelves", json={"user_id": "clock"}))
        told_by(client.get("/v1/search", params={"q": "put"}))
        stats = told_by(client.get("/v1/stats"))
        among = told_by(client.post("/v1/recommend", json={**body, "include": [put]}))
    scores = [item["score"] for one in answers for item in one["items"]]
    return {
        "events": [own["event_id"], back["event_id"]],
        "stamp": server.get("users/clock")["history"][-2]["timestamp"],
        "lists": all(len(one["items"]) == 10 for one in answers),
        "finite": all(score is not None and math.isfinite(score) for score in scores),
        "largest": max(scores),
        "new": put in [one["item_id"] for one in among["items"]],
        "uptime": stats["uptime"],
    }


def main() -> None:
    asked = arguments(__doc__)
    rows, sent, right, uptimes = [], [], True, [0.0]
    with tempfile.TemporaryDirectory(prefix="tfrec-clock-") as name:
        how, told = environment(Path(name))
        with served(asked.bundle, policy=POLICY, environment=told) as server:
            found = items(server)
            first = 0.0
            for number, (jump, seconds) in enumerate(JUMPS.items()):
                Path(name, "clock").write_text(f"{seconds:+d}s")
                one = at_this_time(server, number, found[number % len(found)])
                sent += one["events"]
                first = first or one["stamp"]
                off = abs(one["stamp"] - first - seconds)
                kept = server.history("clock") == sent
                good = one["lists"] and one["finite"] and one["new"] and kept and off < 600
                uptimes.append(one["uptime"])
                right &= good
                row = (jump, f"{one['stamp'] - first:+.0f} s", one["lists"], one["finite"])
                rows.append((*row, f"{one['largest']:.3g}", one["new"], kept))
            Path(name, "clock").write_text(f"{-DAY:+d}s")
            server.end(signal.SIGKILL)
            server.start()
            again = server.history("clock") == sent
            after = at_this_time(server, len(JUMPS), found[0])
            tracebacks = server.tracebacks()
    columns = (
        *("the clock", "seen by the server", "lists whole", "scores finite", "largest score"),
        *("new item can be recommended", "history in order of arrival"),
    )
    table(f"a clock that jumps, by {how}", columns, rows)
    grows = uptimes == sorted(uptimes)
    right &= again and after["lists"] and after["new"] and grows and not tracebacks
    verdict(
        right, by=how, killed_and_started_in_the_past=again, uptime_only_grows=grows,
        tracebacks=tracebacks,
    )  # fmt: skip


if __name__ == "__main__":
    main()
