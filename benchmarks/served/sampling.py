"""Sampling: where the time of a running server goes, by py-spy."""

from __future__ import annotations

import collections
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

PEER = "py-spy==0.4.2"
_LINE = re.compile(r":\d+\)$")


def record(process: int, seconds: float, raw: Path) -> None:
    """Leaves samples of all threads of a process, in py-spy's raw form."""
    command = [py_spy(), "record", "--pid", str(process), "--rate", "200", "--threads"]
    command += ["--duration", str(seconds), "--format", "raw", "--output", str(raw)]
    subprocess.run(command, check=True, capture_output=True)


def py_spy() -> str:
    from tfrec.data.sources import cache_folder

    folder = cache_folder() / "peers-serving"
    if not (folder / "bin" / "py-spy").is_file():
        print(f"installing {PEER} into {folder}", file=sys.stderr)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--target", str(folder), PEER], check=True)
    return str(folder / "bin" / "py-spy")


_WAITS = ("wait (threading", "_worker (concurrent", "select (", "run (asyncio", "_run (tfrec")


def shares(raw: Path, most: int = 60) -> dict[str, Any]:
    """Thread and function -> share of the samples in which something was done, of itself and with
    what it calls."""
    own: collections.Counter[str] = collections.Counter()
    whole: collections.Counter[str] = collections.Counter()
    threads: collections.Counter[str] = collections.Counter()
    for line in raw.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        thread, *frames = (_LINE.sub(")", frame) for frame in stack.split(";"))
        if not frames or any(wait in frames[-1] for wait in _WAITS):
            continue
        threads[thread.partition(": ")[2] or thread] += int(count)
        own[frames[-1]] += int(count)
        for frame in set(frames):
            whole[frame] += int(count)
    total = max(sum(threads.values()), 1)
    return {
        name: {key: round(n / total, 4) for key, n in counted.most_common(most)}
        for name, counted in (("threads", threads), ("own", own), ("whole", whole))
    }
