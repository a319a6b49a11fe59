"""Timing: how fast a bundle is and how much memory it takes, in a process that has nothing else.

``python -m tfrec.timing BUNDLE SECONDS`` writes what it measured to its standard output, as JSON.
"""

from __future__ import annotations

import contextlib
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfrec.bundle import Bundle
from tfrec.engines import recommender_of
from tfrec.errors import SetupError
from tfrec.golden import Golden, predictions

_MANY = 32
_SAMPLE = 512  # texts that are read in turn


def processor() -> str:
    """The name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def measured(folder: Path, seconds: float = 2.0) -> dict[str, float]:
    """Times a bundle in a new process, with one thread for each core.

    Args:
      folder: The bundle.
      seconds: How long each call is repeated.

    Returns:
      Medians of milliseconds: ``one_ms`` and ``many_ms`` to read one text and 32 of them (absent
      where no text is read); ``query_ms`` and ``queries_ms`` for the query vectors of one user
      and of 32; ``rank_ms`` and ``ranks_ms`` for what the ranker says of the candidates of one
      and of 32 (absent where there is none); ``request_ms`` of a whole request for ten items.
      And ``memory_mb``, the most memory that the process had.

    Raises:
      SetupError: the process ended without an answer.
    """
    command = [sys.executable, "-m", "tfrec.timing", str(folder), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
        raise SetupError(f"{folder} could not be timed in a process of its own: {reason}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measure(folder: Path, seconds: float) -> dict[str, float]:
    bundle = Bundle.load(folder, check=False)
    recommender = recommender_of(bundle)
    found: dict[str, float] = {}
    if recommender.text.shape[1]:
        read = [text for text in recommender.catalog.texts if text]
        chosen = np.random.default_rng(0).permutation(len(read))[:_SAMPLE]
        texts = [read[place] for place in chosen]
        for name, size in (("one_ms", 1), ("many_ms", _MANY)):
            groups = [texts[i : i + size] for i in range(0, len(texts), size)]
            found[name] = _median(recommender.engine.encode_text, groups, seconds)
    golden = Golden.load(bundle.folder / "golden")
    everyone, _ = recommender.asked(golden.requests)

    def rank(places: NDArray[np.int64]) -> None:
        asked = everyone.take(places)
        predictions(recommender, asked, golden.query[places], golden.candidates[places])

    count = len(everyone)
    for query, ranks, size in (("query_ms", "rank_ms", 1), ("queries_ms", "ranks_ms", _MANY)):
        places = [np.arange(i, i + size) % count for i in range(count)]
        users = [everyone.take(some) for some in places]
        found[query] = _median(recommender.queries, users, seconds)
        if recommender.policy.tasks:
            found[ranks] = _median(rank, places, seconds)
    found["request_ms"] = _median(
        recommender.recommend, [[one] for one in golden.requests], seconds
    )
    found["memory_mb"] = round(_peak() / 1e6, 1)
    return found


def _peak() -> int:
    """The most bytes of memory that this process had."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    # Elsewhere; on Linux it would be that of the process that started this one, if that had more.
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _median(call: Callable[[Any], Any], inputs: list[Any], seconds: float) -> float:
    """Milliseconds of a call, each of the inputs in turn, at least once and a warm-up."""
    call(inputs[0])
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < len(inputs) or time.perf_counter() < until:
        began = time.perf_counter()
        call(inputs[len(times) % len(inputs)])
        times.append(time.perf_counter() - began)
        if time.perf_counter() > until + 4 * seconds:
            break
    return round(1000 * float(np.median(times)), 4)


if __name__ == "__main__":
    print(json.dumps(_measure(Path(sys.argv[1]), float(sys.argv[2]))))
