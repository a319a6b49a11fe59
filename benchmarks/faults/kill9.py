"""kill -9 under write load: what was acknowledged is there afterwards, once, and in order.

    python benchmarks/faults/kill9.py BUNDLE [--rounds 10] [--writers 8]

Each writer sends events of a user of his own, one after another; one that was not acknowledged is
sent again, with the same id, until it is. Meanwhile the server is killed and started again. After
each start the acknowledged events of each user are looked for in his history.
"""

from __future__ import annotations

import random
import signal
import time

from ground import Writer, arguments, items, served, table, verdict

SECONDS = (0.5, 2.5)


def main() -> None:
    asked = arguments(__doc__, rounds=(10, "kills"), writers=(8, "users who write at once"))
    draw = random.Random(1)
    rows, lost, doubled = [], 0, 0
    with served(asked.bundle) as server:
        found = items(server)
        writers = [Writer(server, f"writer-{n}", found) for n in range(asked.writers)]
        for number in range(1, asked.rounds + 1):
            time.sleep(draw.uniform(*SECONDS))
            server.end(signal.SIGKILL)
            before = {one.user: list(one.acknowledged) for one in writers}
            took = server.start()
            gone = twice = kept = 0
            for one in writers:
                history = server.history(one.user)
                known = [event for event in before[one.user] if event in set(history)]
                gone += len(before[one.user]) - len(known)
                twice += len(history) - len(set(history))
                kept += len(history)
            count = sum(map(len, before.values()))
            rows.append((number, count, kept, gone, twice, f"{took:.1f} s"))
            lost, doubled = lost + gone, doubled + twice
        for one in writers:
            one.stop()
        # Each event was sent until it was acknowledged: the histories are what was sent.
        ordered = all(server.history(w.user) in (w.sent, w.acknowledged) for w in writers)
        again = sum(one.again for one in writers)
        events = sum(len(one.acknowledged) for one in writers)
        tracebacks = server.tracebacks()
    columns = ("kill", "acknowledged before", "in histories after", "lost", "doubled", "ready in")
    table("kill -9 under write load", columns, rows)
    verdict(
        not lost and not doubled and ordered and not tracebacks,
        events=events, lost=lost, doubled=doubled, in_order=ordered, sent_again=again,
        tracebacks=tracebacks,
    )  # fmt: skip


if __name__ == "__main__":
    main()
