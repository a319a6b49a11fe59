"""`tfrec serve` under load, beside the plain way, in one run and one table.

    python benchmarks/serving.py --bundle DIR                  # everything; continues where it was
    python benchmarks/serving.py --bundle DIR --rows one many  # these; measured again with --again
    python benchmarks/serving.py --raw DIR                     # trains a short bundle first
    python benchmarks/serving.py --bundle DIR --quick          # minutes, for who works on it

DIR of --bundle is a bundle of MovieLens-1M with SavedModels, as `tfrec export` leaves it. Without
one, a run of 2 epochs is trained into --out, from ml-1m/ in the folder --raw if that is given: as
fast to serve as any other, but not as good.

All is asked of a server in a process of its own, with k = 10, histories of 50 events out of the
bundle's own, and the defaults of [steps] (retrieve 500, rank 200, re-rank 50), over the loopback
interface, beside the load generator (served/load.py) on the same cores. The rows:

  start    from exec to 200 of /readyz, of a state that is there already
  memory   after 1,000 requests, of that bundle and of 1 million items x 64
  one      one client, one request after another
  text     the same with words about oneself, different ones each time, through the BERT
  user     the same by the id of a user that the bundle knows, without a history in the request
  many     16 clients, each asking again at once
  plain    the same clients, in turns, at ours and at served/plain.py: the bundle's float
           SavedModels and TFRS BruteForce with TensorFlow behind FastAPI
  growth   one client at 4,000 and at 1 million items of served/grown.py, in turns: the same models
  events   events under load; each must show in the very next answer
  soak     ten minutes at half of what `many` reached, one request in ten an event
  profile  only if named: where the time goes, by py-spy, which is installed into the cache folder

Results are kept in --out/serving.json; what is there is not measured again without --again. How
much processor time others took meanwhile is kept with each, since on a shared machine it explains
more than anything else.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import json
import multiprocessing
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from served import sampling
from served.asked import write_requests
from served.table import report

HERE = Path(__file__).parent / "served"
ROWS = ("start", "memory", "one", "text", "user", "many", "plain", "growth", "events", "soak")
CLIENTS, K = 16, 10
SMALL, LARGE = 4_000, 1_000_000
STARTS_WITHIN = 120.0
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"
_TICK = os.sysconf("SC_CLK_TCK")


# --- processes ---


class Server:
    """A server in a process of its own, which has answered /readyz."""

    def __init__(self, command: Sequence[str], port: int, log: Path) -> None:
        self.port = port
        log.parent.mkdir(parents=True, exist_ok=True)
        begun = time.perf_counter()
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        while not self._ready():
            if self.process.poll() is not None or time.perf_counter() - begun > STARTS_WITHIN:
                self.stop()
                sys.exit(f"a server did not start: {' '.join(command)}\n{log.read_text()[-2000:]}")
            time.sleep(0.005)
        self.took = time.perf_counter() - begun

    def _ready(self) -> bool:
        try:
            return self.get("/readyz")[0] == 200
        except OSError:
            return False

    def get(self, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and JSON of a GET, or of a POST where there is a body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            data = None if body is None else json.dumps(body)
            method = "GET" if data is None else "POST"
            connection.request(method, path, data, {"content-type": "application/json"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def memory(self) -> dict[str, float]:
        """Megabytes: resident, its share of what it shares with others, and what is its own."""
        found = {}
        for line in Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, _, rest = line.partition(":")
            found[name] = int(rest.split()[0]) * 1024 / 1e6
        return {"rss": found["Rss"], "pss": found["Pss"], "anonymous": found["Anonymous"]}

    def cpu(self) -> float:
        """Seconds of processor time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICK

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=30)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def free_port() -> int:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return int(some.getsockname()[1])


class Bench:
    """The bundle, the requests about it, and its servers."""

    def __init__(self, told: argparse.Namespace, bundle: Path) -> None:
        self.told, self.bundle, self.out = told, bundle, Path(told.out)
        self.requests = self.out / "requests"
        self.small, self.large = (self.out / f"grown-{items}" for items in (SMALL, LARGE))
        self.rows: dict[str, Any] = {}

    def count(self, full: int, quick: int) -> int:
        return quick if self.told.quick else full

    @contextlib.contextmanager
    def serving(self, bundle: Path | None = None, kept: str = "") -> Iterator[Server]:
        """`tfrec serve`; its state is a new one unless ``kept`` names it."""
        bundle, port = bundle or self.bundle, free_port()
        state = self.out / "state" / (kept or bundle.name)
        if not kept:
            shutil.rmtree(state, ignore_errors=True)
        command = [sys.executable, "-m", "tfrec", "serve", str(bundle), "--port", str(port)]
        command += ["--state", str(state), *(f"--set={one}" for one in self.told.set)]
        server = Server(command, port, self.out / "log" / f"{bundle.name}.log")
        try:
            yield server
        finally:
            server.stop()

    @contextlib.contextmanager
    def plain(self) -> Iterator[Server]:
        port = free_port()
        command = [sys.executable, str(HERE / "plain.py"), str(self.bundle), str(port)]
        server = Server(command, port, self.out / "log" / "plain.log")
        try:
            yield server
        finally:
            server.stop()

    def load(self, server: Server, kind: str, **more: Any) -> dict[str, Any]:
        """What a load in a process of its own measured, and what it cost the server."""
        before = server.cpu()
        running = self.start_load(server, kind, **more)
        found: dict[str, Any] = json.loads(running.communicate()[0])
        found["server_cpu_ms"] = 1e3 * (server.cpu() - before) / max(found["requests"], 1)
        return found

    def start_load(self, server: Server, kind: str, **more: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(HERE / "load.py"), str(server.port)]
        command += [str(self.requests / f"{kind}.jsonl")]
        command += [f"--{name}={value}" for name, value in more.items()]
        return subprocess.Popen(command, stdout=subprocess.PIPE)

    def warm(self, server: Server, kind: str, clients: int = 1) -> None:
        count = self.count(300, 100)
        self.load(server, kind, clients=clients, requests=count, skip=-count)


# --- the rows ---


def start(bench: Bench) -> dict[str, Any]:
    took = []
    for turn in range(bench.count(5, 3) + 1):
        with bench.serving(kept="start") as server:
            if turn:  # the first reads what the others find in memory
                took.append(server.took)
    return {"seconds": took, "best": min(took), "median": statistics.median(took)}


def memory(bench: Bench) -> dict[str, Any]:
    found = {}
    for name, bundle, kind in (("own", bench.bundle, "history"), ("large", bench.large, "grown")):
        with bench.serving(bundle) as server:
            at_start = server.memory()
            bench.load(server, kind, requests=1000)
            found[name] = {"start": at_start, **server.memory()}
    return found


def one_client(kind: str) -> Callable[[Bench], dict[str, Any]]:
    def row(bench: Bench) -> dict[str, Any]:
        with bench.serving() as server:
            bench.warm(server, kind)
            found = bench.load(server, kind, requests=bench.count(2000, 400))
            return {**found, "stages": server.get("/v1/stats")[1]["latency"]}

    return row


def many(bench: Bench) -> dict[str, Any]:
    with bench.serving() as server:
        bench.warm(server, "history", CLIENTS)
        found = bench.load(server, "history", clients=CLIENTS, seconds=bench.count(60, 8))
        return {**found, "stages": server.get("/v1/stats")[1]["latency"]}


def plain(bench: Bench) -> dict[str, Any]:
    turns: dict[str, list[Any]] = {"ours": [], "plain": []}
    ones: dict[str, list[Any]] = {"ours": [], "plain": []}
    with bench.serving() as ours, bench.plain() as other:
        sides = {"ours": ours, "plain": other}
        same = _same_items(bench, ours, other)
        for server in sides.values():
            bench.warm(server, "history", CLIENTS)
        for _ in range(bench.count(3, 1)):
            for name, server in sides.items():
                seconds = bench.count(20, 6)
                turns[name].append(bench.load(server, "history", clients=CLIENTS, seconds=seconds))
                ones[name].append(bench.load(server, "history", requests=bench.count(500, 100)))
        kept = {name: server.memory() for name, server in sides.items()}
    found: dict[str, Any] = {"same": same, "errors": 0}
    for name in sides:
        found["errors"] += sum(turn["errors"] for turn in turns[name] + ones[name])
        found[name] = {
            "started": sides[name].took,
            "rate": statistics.median(turn["rate"] for turn in turns[name]),
            "p99": statistics.median(turn["p99"] for turn in turns[name]),
            "server_cpu_ms": statistics.median(turn["server_cpu_ms"] for turn in turns[name]),
            "one_p50": statistics.median(turn["p50"] for turn in ones[name]),
            "memory": kept[name],
        }
    return found


def _same_items(bench: Bench, ours: Server, other: Server, count: int = 50) -> float:
    """Share of the items that both give for the same histories."""
    lines = (bench.requests / "history.jsonl").read_text().splitlines()[:count]
    same = []
    for line in lines:
        lists = [
            {item["item_id"] for item in server.get("/v1/recommend", json.loads(line))[1]["items"]}
            for server in (ours, other)
        ]
        same.append(len(lists[0] & lists[1]) / K)
    return statistics.mean(same)


def growth(bench: Bench) -> dict[str, Any]:
    took: dict[str, list[float]] = {"small": [], "large": []}
    wide: dict[str, list[float]] = {"small": [], "large": []}
    with bench.serving(bench.small) as small, bench.serving(bench.large) as large:
        sides = {"small": small, "large": large}
        for server in sides.values():
            bench.warm(server, "grown")
        for _ in range(bench.count(5, 3)):
            for name, server in sides.items():
                found = bench.load(server, "grown", requests=bench.count(400, 100))
                took[name].append(found["p50"])
                wide[name].append(found["p99"])
        stages = {n: server.get("/v1/stats")[1]["latency"] for n, server in sides.items()}
        started = {name: server.took for name, server in sides.items()}
    middle = {name: statistics.median(times) for name, times in took.items()}
    return {
        **middle,
        "p99": {name: statistics.median(times) for name, times in wide.items()},
        "times": middle["large"] / middle["small"],
        "started": started,
        "stages": stages,
    }


def events(bench: Bench) -> dict[str, Any]:
    """Each event must show in the next answer, while others ask."""
    missed, kept, acknowledged = 0, 0, []
    count = bench.count(300, 40)
    with bench.serving() as server:
        asked = bench.start_load(server, "history", clients=4, seconds=1e6)
        try:
            for number in range(count):
                user, told = f"bench-{number}", []
                for event in ("view", "like", "hide"):
                    item = _top(server, user)
                    told.append(item)
                    sent = {"event_id": f"{user}-{event}", "user_id": user, "item_id": item}
                    begun = time.perf_counter()
                    status, _ = server.get("/v1/events", {**sent, "event": event})
                    acknowledged.append(time.perf_counter() - begun)
                    assert status == 200
                    missed += item in _items(server, user)
                known = server.get(f"/v1/users/{user}")[1]["history"]
                kept += [one["item_id"] for one in known] == told
        finally:
            asked.terminate()
            asked.wait()
    return {
        "events": 3 * count,
        "missed": missed,
        "histories": count,
        "histories_right": kept,
        "acknowledged_ms": 1e3 * statistics.median(acknowledged),
    }


def _items(server: Server, user: str) -> list[str]:
    status, answer = server.get("/v1/recommend", {"user_id": user, "k": K})
    assert status == 200, answer
    return [item["item_id"] for item in answer["items"]]


def _top(server: Server, user: str) -> str:
    return _items(server, user)[0]


def soak(bench: Bench) -> dict[str, Any]:
    seconds = bench.count(600, 60)
    minute = seconds / 10
    with bench.serving() as server:
        bench.warm(server, "soak", CLIENTS)
        full = bench.rows.get("many") or bench.load(server, "history", clients=CLIENTS, seconds=10)
        rate = full["rate"] / 2
        running = bench.start_load(server, "soak", clients=CLIENTS, seconds=seconds, rate=rate)
        begun, samples = time.perf_counter(), []
        while running.poll() is None:
            samples.append((time.perf_counter() - begun, server.memory()))
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(timeout=minute / 12)
        assert running.stdout is not None
        found: dict[str, Any] = json.loads(running.stdout.read())
    series = [(at, sample["pss"]) for at, sample in samples]
    first = statistics.median(mb for at, mb in series if 0.8 * minute <= at <= 1.2 * minute)
    last = statistics.median(mb for at, mb in series if seconds - 0.4 * minute <= at <= seconds)
    return {
        **found,
        "asked_rate": rate,
        "first_mb": first,
        "last_mb": last,
        "growth": last / first - 1,
        "series": [[round(at), round(mb, 1)] for at, mb in series],
    }


def profile(bench: Bench) -> dict[str, Any]:
    """Where the time of a busy server goes: samples of all threads that compute."""
    found: dict[str, Any] = {}
    with bench.serving() as server:
        bench.warm(server, "history", CLIENTS)
        for name, clients in (("one", 1), ("many", CLIENTS)):
            seconds = bench.count(30, 8)
            raw = bench.out / f"profile-{name}.raw"
            running = bench.start_load(server, "history", clients=clients, seconds=seconds + 2)
            sampling.record(server.process.pid, seconds, raw)
            running.communicate()
            found[name] = sampling.shares(raw)
    return found


MEASURES: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "start": start, "memory": memory, "one": one_client("history"), "text": one_client("text"),
    "user": one_client("user"), "many": many, "plain": plain, "growth": growth, "events": events,
    "soak": soak, "profile": profile,
}  # fmt: skip


# --- the machine, and who else was busy ---


def machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0))
    name = names[0] if names else platform.machine()
    return f"{cores} cores ({name}), Python {platform.python_version()}, Linux {platform.release()}"


def busy() -> tuple[float, float]:
    """Seconds of processor time so far: of all, and of this process and its children."""
    fields = [int(part) for part in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    user, nice, system, _, _, irq, soft, steal = fields[:8]
    mine = sum(os.times()[:4])
    return (user + nice + system + irq + soft + steal) / _TICK, mine


def measured(bench: Bench, name: str) -> dict[str, Any]:
    """A row, with the share of the machine that others took meanwhile."""
    (all_before, own_before), begun = busy(), time.perf_counter()
    found = MEASURES[name](bench)
    (all_after, own_after), took = busy(), time.perf_counter() - begun
    others = (all_after - all_before) - (own_after - own_before)
    cores = len(os.sched_getaffinity(0))
    shared = {"others": max(others, 0.0) / (took * cores), "took": took, "code": code()}
    return {**found, **shared}


def code() -> str:
    """Digest of the package: rows of one table should be of one code."""
    import tfrec

    hashed = hashlib.sha256()
    for path in sorted(Path(tfrec.__file__).parent.rglob("*.py")):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()[:12]


# --- bundles that are not there ---


def short_bundle(told: argparse.Namespace) -> Path:
    """A bundle of MovieLens-1M, trained for 2 epochs."""
    bundle, run = Path(told.out) / "movielens-1m", Path(told.out) / "run"
    if (bundle / "manifest.json").is_file():
        return bundle
    print("no --bundle: training a short one, 2 epochs, for speed alone", file=sys.stderr)
    tfrec = [sys.executable, "-m", "tfrec"]
    given = [f"--data-dir={Path(told.raw) / 'ml-1m'}"] if told.raw else []
    for setting in ("retrieval.epochs=2", "ranking.epochs=1", "refit=false"):
        given.append(f"--set=adapt.{setting}")
    for verb in (["prepare"], ["adapt", "--task", "retrieval"], ["adapt", "--task", "ranking"]):
        command = [*tfrec, verb[0], "movielens-1m", *verb[1:], *given, f"--out={run}"]
        subprocess.run(command, check=True)
    subprocess.run([*tfrec, "export", str(run), "--to", str(bundle)], check=True)
    return bundle


def write_grown(out: Path, items: int) -> None:
    from served import grown

    grown.write(out / "grown", items, out / f"grown-{items}")


def apart(function: Callable[..., None], *given: Any) -> None:
    """Runs a function in a process of its own, so that what it loads is gone afterwards."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=given)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit("what is to be measured could not be made; the message is above")


def prepared(told: argparse.Namespace) -> Bench:
    out = Path(told.out)
    out.mkdir(parents=True, exist_ok=True)
    bench = Bench(told, Path(told.bundle) if told.bundle else short_bundle(told))
    if {"memory", "growth"} & set(told.rows):
        for items, bundle in ((SMALL, bench.small), (LARGE, bench.large)):
            if not (bundle / "manifest.json").is_file():
                print(f"making a bundle of {items:,} items", file=sys.stderr)
                apart(write_grown, out, items)
        apart(write_requests, bench.small, bench.requests, ["history"])
        os.replace(bench.requests / "history.jsonl", bench.requests / "grown.jsonl")
    apart(write_requests, bench.bundle, bench.requests, ["history", "text", "user", "soak"])
    return bench


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", default="", help="of MovieLens-1M, with SavedModels")
    parser.add_argument("--raw", default="", help="folder with ml-1m/, where there is no bundle")
    parser.add_argument("--out", default="saved_models/bench-serve", help="where all is kept")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=[*ROWS, "profile"])
    parser.add_argument("--again", action="store_true", help="measure what was measured before")
    parser.add_argument("--quick", action="store_true", help="short runs, for who works on it")
    parser.add_argument("--set", action="append", default=[], help="for `tfrec serve`, KEY=VALUE")
    parser.add_argument("--page", default="", help="a page whose figures are replaced")
    told = parser.parse_args()
    kept = Path(told.out) / ("serving-quick.json" if told.quick else "serving.json")
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {"rows": {}}
    found["machine"] = machine()
    missing = [name for name in told.rows if told.again or name not in found["rows"]]
    if missing:
        bench = prepared(told)
        bench.rows = found["rows"]
        for name in missing:
            print(f"measuring {name} ...", file=sys.stderr, flush=True)
            found["rows"][name] = measured(bench, name)
            partial = kept.with_suffix(".partial")
            partial.write_text(json.dumps(found, indent=1))
            partial.rename(kept)
    text = report(found)
    print(f"\n{text}")
    if told.page:
        page = Path(told.page)
        before, begin, rest = page.read_text("utf-8").partition(BEGIN)
        _, end, after = rest.partition(END)
        page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
