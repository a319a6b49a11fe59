"""A process that fills its disk: python filling.py FOLDER tmpfs|limit; prints what it saw as JSON.

With `tmpfs` the folder is a small file system of its own, with a file `ballast` in it; with `limit`
no file may grow beyond a megabyte.
"""

import json
import resource
import sys
from pathlib import Path

from tfrec.errors import StateError
from tfrec.serving.exposures import ExposureLog, Shown
from tfrec.serving.sqlite_state import SqliteState
from tfrec.serving.state import Event


def events(number: int) -> list[Event]:
    return [Event(f"{number}-{i}", "u", "i" * 100, "like", 1.0) for i in range(20)]


def fill(state: SqliteState) -> tuple[int, str]:
    for number in range(100_000):
        try:
            state.append(events(number))
        except StateError as error:
            return number, str(error)
    raise AssertionError("the disk took all of it")


def exposures(folder: Path) -> list[object]:
    log = ExposureLog(folder, rows=1_000_000, seconds=1000)
    ids = [f"{n}-{n * n * 7919}" for n in range(200_000)]
    log.record(Shown("r", "u", ids, [0.0] * len(ids), [1.0] * len(ids), ids, "p", "1", 1.0))
    log.close()
    return [log.dropped, log.written, log.problem, [path.name for path in folder.iterdir()]]


def main() -> None:
    folder, way = Path(sys.argv[1]), sys.argv[2]
    if way == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    state = SqliteState(folder / "state")
    acknowledged, message = fill(state)
    seen = {"acknowledged": acknowledged, "message": message}
    seen["kept"] = [len(state.history("u")), state.counts()["events"]]
    seen["exposures"] = exposures(folder / "exposures")
    if way == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    else:
        (folder / "ballast").unlink()
    seen["again"] = sum(state.append(events(acknowledged)))
    state.close()
    state = SqliteState(folder / "state")
    seen["reopened"] = len(state.history("u"))
    state.close()
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
