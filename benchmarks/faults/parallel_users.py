"""Many users in parallel: each gets his own list, and what each did is kept, once.

    python benchmarks/faults/parallel_users.py BUNDLE [--users 10000] [--at-once 1000]

Each user has a connection of his own; so many are open at once. He asks for a list, likes the first
of it, and asks again: the liked one must be gone. Who is told that the server is busy (503) or late
(504) comes again after a second, as the answer says.
"""

from __future__ import annotations

import asyncio
import random
import resource
import time
from collections import Counter
from typing import Any

from ground import Server, arguments, event, exchange, percentile, served, table, verdict


class Users:
    """What becomes of all users."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.statuses: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.sent: dict[str, str] = {}
        self.wrong = self.open = self.most = 0

    async def one(self, number: int) -> None:
        user = f"parallel-{number}"
        stream = await asyncio.open_connection("127.0.0.1", self.server.port)
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            first = await self._told(stream, "recommend", {"user_id": user, "k": 5})
            liked = event(user, first["items"][0]["item_id"], "like")
            self.sent[user] = liked["event_id"]
            await self._told(stream, "events", liked)
            then = await self._told(stream, "recommend", {"user_id": user, "k": 5})
            shown = [item["item_id"] for item in then["items"]]
            self.wrong += liked["item_id"] in shown or len(shown) != 5
        finally:
            self.open -= 1
            stream[1].close()

    async def _told(self, stream: Any, path: str, body: dict[str, Any]) -> Any:
        while True:
            begun = time.perf_counter()
            status, told = await exchange(stream, path, body)
            self.statuses[f"{path} {status}"] += 1
            if status == 200:
                self.seconds.append(time.perf_counter() - begun)
                return told
            if status not in (503, 504):
                raise SystemExit(f"{path}: {status} {told}")
            await asyncio.sleep(1 + random.random())


async def all_of(users: Users, count: int, at_once: int) -> None:
    room = asyncio.Semaphore(at_once)

    async def one(number: int) -> None:
        async with room:
            await users.one(number)

    await asyncio.gather(*(one(number) for number in range(count)))


def main() -> None:
    asked = arguments(__doc__, users=(10_000, "users"), **{"at-once": (1000, "at once")})
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit[1], limit[1]))
    with served(asked.bundle) as server:
        memory = server.memory_mb()
        users = Users(server)
        begun = time.monotonic()
        asyncio.run(all_of(users, asked.users, asked.at_once))
        took = time.monotonic() - begun
        kept = server.get("stats")["state"]
        draw = random.Random(1).sample(sorted(users.sent), min(200, len(users.sent)))
        right = sum(server.history(user) == [users.sent[user]] for user in draw)
        ended, tracebacks = server.memory_mb(), server.tracebacks()
    failed = sum(n for s, n in users.statuses.items() if s.split()[1] not in ("200", "503", "504"))
    rows = [
        ("users", asked.users),
        ("connections open at once", users.most),
        ("answers by path and status", dict(users.statuses)),
        ("failed for good", failed),
        ("second list that was not right", users.wrong),
        ("events and users kept", f"{kept['events']}, {kept['users']}"),
        ("histories that are right, of those looked at", f"{right} of {len(draw)}"),
        ("time in all, answers a second", f"{took:.0f} s, {len(users.seconds) / took:.0f}"),
        ("p50 and p99", f"{percentile(users.seconds, 0.5)}, {percentile(users.seconds, 0.99)}"),
        ("memory before and after", f"{memory:.0f} MB, {ended:.0f} MB"),
        ("tracebacks", tracebacks),
    ]
    table("users in parallel", ("", "found"), rows)
    whole = kept["events"] == kept["users"] == asked.users and right == len(draw)
    verdict(whole and not failed and not users.wrong and not tracebacks)


if __name__ == "__main__":
    main()
