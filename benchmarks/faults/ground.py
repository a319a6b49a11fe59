"""What all scripts of faults share: a server of a bundle, load on it, and tables of results."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

STARTS_WITHIN = 120.0


def arguments(about: str, **more: tuple[int, str]) -> argparse.Namespace:
    """What a script is told: the bundle, and its own numbers."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="a bundle; it is copied, and not changed")
    for name, (default, help_) in more.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{help_} ({default})")
    return parser.parse_args()


class Server:
    """`tfrec serve` in a process of its own.

    Args:
      bundle: The folder.
      folder: Where its state and its log are.
      settings: As ``--set`` takes them, without ``serve.``.
      before: Words before the command, and ``environment`` beside ours.
    """

    def __init__(
        self,
        bundle: Path,
        folder: Path,
        settings: Sequence[str] = (),
        before: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.bundle, self.folder = bundle, folder
        self.state, self.log = folder / "state", folder / "log"
        self.settings, self.before = list(settings), list(before)
        self.environment = {**os.environ, **(environment or {})}
        self.port, self.starts = 0, 0
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> float:
        """Starts it, on the same port if it ran before; seconds until it is ready."""
        begun = time.monotonic()
        command = [*self.before, sys.executable, "-m", "tfrec", "serve", str(self.bundle)]
        command += ["--port", str(self.port), "--state", str(self.state)]
        command += [word for one in self.settings for word in ("--set", f"serve.{one}")]
        self.starts += 1
        log = self.log.with_name(f"log-{self.starts}")
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=self.environment
            )
        while time.monotonic() - begun < STARTS_WITHIN:
            for line in log.read_text().splitlines():
                if line.startswith("serving "):
                    self.port = int(line.split("://")[1].split("/")[0].rpartition(":")[2])
                    if self._ready():
                        return time.monotonic() - begun
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise SystemExit(f"the server does not start:\n{log.read_text()}")

    def _ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def end(self, how: int = signal.SIGTERM) -> int:
        """Ends it, and waits for the end; its exit code."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(how)
        code = self.process.wait(timeout=60)
        self.process = None
        return code

    def get(self, path: str) -> Any:
        return httpx.get(f"{self.url}/v1/{path}", timeout=60).raise_for_status().json()

    def history(self, user: str) -> list[str]:
        return [one["event_id"] for one in self.get(f"users/{user}")["history"]]

    def memory_mb(self) -> float:
        assert self.process is not None
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def files(self) -> int:
        """Open files and connections."""
        assert self.process is not None
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def tracebacks(self) -> int:
        """Over all its starts."""
        return sum(p.read_text().count("Traceback") for p in self.folder.glob("log-*"))


@contextlib.contextmanager
def served(bundle: Path, *settings: str, policy: str = "", **more: Any) -> Iterator[Server]:
    """A server of a copy of a bundle, ended and cleared away at the end."""
    with tempfile.TemporaryDirectory(prefix="tfrec-faults-") as name:
        folder = Path(name)
        shutil.copytree(bundle, folder / "bundle", symlinks=True)
        if policy:
            (folder / "bundle" / "policy.toml").write_text(policy)
        server = Server(folder / "bundle", folder, settings, **more)
        server.start()
        try:
            yield server
        finally:
            server.end(signal.SIGKILL)


def event(user: str, item: str, kind: str = "view", **more: Any) -> dict[str, Any]:
    return {"event_id": uuid.uuid4().hex, "user_id": user, "item_id": item, "event": kind, **more}


@dataclass(eq=False)
class Writer(threading.Thread):
    """Sends one event after another, each until it is acknowledged, whatever happens meanwhile."""

    server: Server
    user: str
    items: Sequence[str]
    sent: list[str] = field(default_factory=list)
    acknowledged: list[str] = field(default_factory=list)
    again: int = 0

    def __post_init__(self) -> None:
        super().__init__(daemon=True)
        self._end = threading.Event()
        self.start()

    def run(self) -> None:
        with httpx.Client(timeout=10) as client:
            for item in itertools.cycle(self.items):
                one = event(self.user, item)
                self.sent.append(one["event_id"])
                while not self._acknowledged(client, one):
                    if self._end.is_set():
                        return
                    self.again += 1
                    time.sleep(0.01)
                if self._end.is_set():
                    return

    def _acknowledged(self, client: httpx.Client, one: dict[str, Any]) -> bool:
        try:
            answer = client.post(f"{self.server.url}/v1/events", json=one)
        except httpx.TransportError:
            return False
        if answer.status_code == 200:
            self.acknowledged.append(one["event_id"])
        return answer.status_code == 200

    def stop(self) -> None:
        self._end.set()
        self.join()


class Asking:
    """Threads that ask for lists all the time, and count what comes."""

    def __init__(self, server: Server, threads: int = 4, **body: Any) -> None:
        self.server, self.body = server, body
        self.statuses: Counter[str] = Counter()
        self.versions: Counter[str] = Counter()
        self.seconds: list[float] = []
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(threads)]

    def _ask(self, number: int) -> None:
        with httpx.Client(timeout=30) as client:
            for turn in itertools.count():
                if self._end.is_set():
                    return
                body = {"user_id": f"asking-{number}-{turn % 500}", "k": 10, **self.body}
                begun = time.perf_counter()
                try:
                    answer = client.post(f"{self.server.url}/v1/recommend", json=body)
                except httpx.TransportError as error:
                    self.statuses[type(error).__name__] += 1
                    continue
                self.seconds.append(time.perf_counter() - begun)
                self.statuses[str(answer.status_code)] += 1
                if answer.status_code == 200:
                    self.versions[answer.json()["model_version"]] += 1

    def __enter__(self) -> Asking:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def times(self) -> str:
        """p50 and p99 of the answers."""
        return f"{percentile(self.seconds, 0.5)}, {percentile(self.seconds, 0.99)}"


async def exchange(
    stream: tuple[asyncio.StreamReader, asyncio.StreamWriter], path: str, body: dict[str, Any]
) -> tuple[int, Any]:
    """Posts to a connection that stays open; status and answer."""
    reader, writer = stream
    sent = json.dumps(body).encode()
    head = f"POST /v1/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(sent)}\r\n\r\n"
    writer.write(head.encode() + sent)
    await writer.drain()
    got = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    length = int(got.split("content-length: ")[1].split("\r\n")[0])
    return int(got.split(" ")[1]), json.loads(await reader.readexactly(length))


def percentile(seconds: Sequence[float], share: float) -> str:
    """As milliseconds."""
    found = sorted(seconds)
    at = min(int(share * len(found)), len(found) - 1)
    return f"{1e3 * found[at]:.0f} ms" if found else "none"


def items(server: Server, count: int = 50) -> list[str]:
    return [one["item_id"] for one in server.get(f"popular?k={count}")["items"]]


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table as Markdown has it."""
    print(f"\n{title}\n")
    text = [columns, *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[n]) for row in text) for n in range(len(columns))]
    lines = [" | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in text]
    lines.insert(1, " | ".join("-" * w for w in widths))
    print("\n".join(f"| {line} |" for line in lines), flush=True)


def verdict(holds: bool, **about: Any) -> None:
    """Prints the machine, the figures as JSON and whether all is as it must be; then ends."""
    cores = os.cpu_count()
    print(f"\nmachine: {platform.machine()}, {cores} cores, Python {platform.python_version()}")
    print(json.dumps(about))
    print("holds" if holds else "DOES NOT HOLD")
    raise SystemExit(0 if holds else 1)
