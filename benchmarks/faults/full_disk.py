"""A full disk: events are refused and nothing else is, and what was acknowledged stays.

    python benchmarks/faults/full_disk.py BUNDLE [--megabytes 4]

The state is on a file system of its own in memory that is so small (root alone can make one), or
else no file of the server may grow past so much (RLIMIT_FSIZE). It is written full, then lists are
asked for; then there is room again, and it goes on; then it is full again, and the server is killed
and started.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from ground import Server, arguments, event, items, served, table, verdict

BULK = 200


class Small:
    """A place for the state that is full at a megabyte or two, and has room again if told so."""

    def __init__(self, server: Server, megabytes: int) -> None:
        self.server, self.most = server, megabytes << 20
        self.how = "RLIMIT_FSIZE"

    def full(self) -> None:
        assert self.server.process is not None
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.prlimit(self.server.process.pid, resource.RLIMIT_FSIZE, (self.most, hard))

    def roomy(self) -> None:
        assert self.server.process is not None
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.prlimit(self.server.process.pid, resource.RLIMIT_FSIZE, (hard, hard))


class Tmpfs(Small):
    """The same as a file system of its own, with a ballast that can be thrown out."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.ballast, self.how = server, folder / "ballast", "a tmpfs"

    def full(self) -> None:
        with contextlib.suppress(OSError), self.ballast.open("wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass

    def roomy(self) -> None:
        self.ballast.unlink()


@contextlib.contextmanager
def tmpfs(megabytes: int) -> Iterator[Path | None]:
    """A file system of so many megabytes; None: this user can make none."""
    folder = Path(tempfile.mkdtemp(prefix="tfrec-disk-"))
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    made = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield folder if made else None
    finally:
        if made:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        shutil.rmtree(folder, ignore_errors=True)


class Load:
    """Events and questions, and what became of them."""

    def __init__(self, server: Server, found: list[str]) -> None:
        self.server, self.items = server, found
        self.acknowledged: list[str] = []
        self.sent = 0

    def write(self, bulks: int) -> Counter[int]:
        statuses: Counter[int] = Counter()
        for _ in range(bulks):
            self.sent += 1
            item = self.items[self.sent % len(self.items)]
            bulk = [event("disk", item) for _ in range(BULK)]
            answer = httpx.post(f"{self.server.url}/v1/events", json=bulk, timeout=60)
            statuses[answer.status_code] += 1
            if answer.status_code == 200:
                self.acknowledged += [one["event_id"] for one in bulk]
            elif "retry-after" not in answer.headers:
                statuses[-1] += 1
        return statuses

    def ask(self, times: int = 100) -> Counter[int]:
        statuses: Counter[int] = Counter()
        bodies: list[dict[str, Any]] = [{"user_id": "disk"}, {"user_id": "u1"}, {}]
        for number in range(times):
            body = bodies[number % 3]
            answer = httpx.post(f"{self.server.url}/v1/recommend", json=body, timeout=60)
            statuses[answer.status_code] += 1
        return statuses

    def whole(self) -> bool:
        return self.server.history("disk") == self.acknowledged


def main() -> None:
    asked = arguments(__doc__, megabytes=(4, "size of the disk"))
    rows = []
    with tmpfs(asked.megabytes) as disk, served(asked.bundle) as server:
        found = items(server)
        if disk is not None:
            server.end()
            server.state = disk / "state"
            server.start()
        small = Tmpfs(server, disk) if disk is not None else Small(server, asked.megabytes)
        load = Load(server, found)

        def step(what: str, bulks: int) -> None:
            written, answers = load.write(bulks), load.ask()
            rows.append((what, dict(written), dict(answers), len(load.acknowledged), load.whole()))

        step("with room", 3)
        small.full()
        step("full", 30)
        small.roomy()
        step("room again", 3)
        small.full()
        step("full again", 30)
        server.end(signal.SIGKILL)
        starts = "at once"
        try:
            server.start()
        except SystemExit as error:
            starts = str(error).strip().splitlines()[-1]
            small.roomy()
            server.start()
            small.full()
        if not isinstance(small, Tmpfs):
            small.full()
        step("killed, and started while full", 3)
        small.roomy()
        step("room again", 3)
        tracebacks = server.tracebacks()
    columns = ("the disk", "bulks of events", "recommendations", "acknowledged", "all in history")
    table(f"a full disk, by {small.how} of {asked.megabytes} MB", columns, rows)
    holds = all(whole and set(answers) == {200} for _, _, answers, _, whole in rows)
    holds &= all(set(written) <= {200, 503} for _, written, *_ in rows)
    holds &= all(503 in rows[n][1] for n in (1, 3)) and set(rows[5][1]) == {200}
    verdict(holds and not tracebacks, by=small.how, start_while_full=starts, tracebacks=tracebacks)


if __name__ == "__main__":
    main()
