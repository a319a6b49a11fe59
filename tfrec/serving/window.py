"""Window: how fast and how often a server answered of late, in memory that does not grow."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

STEP = 10  # seconds
STEPS = 60  # kept
RECENT = 30  # steps of which percentiles are given

_SHORTEST, _LONGEST = 1e-5, 100.0  # seconds
_RATIO = 1.05  # of two neighbouring bins: a percentile is right within 2.5 percent
_LOG_RATIO = math.log(_RATIO)
_BINS = math.ceil(math.log(_LONGEST / _SHORTEST) / _LOG_RATIO)


class Window:
    """Counts requests, and times by stage, in steps of ten seconds; the last ten minutes stay.

    Times go into bins of a logarithmic scale, so that one more costs the same whatever there was
    before. Any number of threads may record and read.

    Args:
      stages: Names of what is timed.
      whole: The one of them that stands for a request.
      clock: Seconds that only grow; tests give their own.
      calendar: Seconds since 1970.
    """

    def __init__(
        self,
        stages: Sequence[str],
        whole: str = "total",
        clock: Callable[[], float] = time.monotonic,
        calendar: Callable[[], float] = time.time,
    ) -> None:
        self.stages = tuple(stages)
        self._whole = self.stages.index(whole)
        self._clock, self._calendar = clock, calendar
        self._begun = clock()
        self._lock = threading.Lock()
        self._bins = np.zeros((STEPS, len(self.stages), _BINS), np.int32)
        self._requests = np.zeros(STEPS, np.int64)
        self._errors = np.zeros(STEPS, np.int64)
        self._number = 0  # of the newest step that has a place
        self.requests = self.errors = 0

    def record(self, failed: bool, seconds: Mapping[str, float] | None = None) -> None:
        """Counts a request.

        Args:
          failed: Whether it was the server that failed.
          seconds: Stage -> how long it took; empty: a request that is only counted.
        """
        places = [(self.stages.index(stage), _bin(took)) for stage, took in (seconds or {}).items()]
        with self._lock:
            step = self._now() % STEPS
            self._requests[step] += 1
            self._errors[step] += failed
            for stage, place in places:
                self._bins[step, stage, place] += 1
            self.requests += 1
            self.errors += failed

    def summary(self) -> dict[str, Any]:
        """``uptime``, ``requests``, ``errors``, ``rate``, ``latency`` and ``series``.

        Latency is in milliseconds, None where nothing was timed; rates are of the last minute.
        """
        with self._lock:
            newest = self._now()
            order = np.arange(newest - STEPS + 1, newest + 1) % STEPS
            bins, requests, errors = (
                kept[order] for kept in (self._bins, self._requests, self._errors)
            )
        uptime = self._clock() - self._begun
        into = uptime - newest * STEP
        recent = bins[-RECENT:].sum(0)
        return {
            "uptime": round(uptime, 1),
            "requests": self.requests,
            "errors": self.errors,
            "rate": round(float(requests[-7:].sum()) / max(1.0, min(uptime, 60 + into)), 2),
            "latency": {stage: _latency(recent[i]) for i, stage in enumerate(self.stages)},
            "series": self._series(bins[:, self._whole], requests, errors, into),
        }

    def _series(
        self, bins: NDArray[Any], requests: NDArray[Any], errors: NDArray[Any], into: float
    ) -> list[dict[str, Any]]:
        newest = self._calendar() - into
        return [
            {
                "time": round(newest - (STEPS - 1 - i) * STEP, 1),
                "requests": int(requests[i]),
                "p50": _percentile(bins[i], 0.5),
                "p99": _percentile(bins[i], 0.99),
                "errors": int(errors[i]),
            }
            for i in range(STEPS)
        ]

    def _now(self) -> int:
        """Number of the present step; the places of the steps since the last call are emptied."""
        number = int((self._clock() - self._begun) / STEP)
        passed = min(number - self._number, STEPS)
        if passed > 0:
            places = np.arange(number - passed + 1, number + 1) % STEPS
            self._bins[places] = 0
            self._requests[places] = self._errors[places] = 0
            self._number = number
        return number


def _bin(seconds: float) -> int:
    if seconds <= _SHORTEST:
        return 0
    return min(_BINS - 1, int(math.log(seconds / _SHORTEST) / _LOG_RATIO))


def _latency(bins: NDArray[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: _percentile(bins, share)
        for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
    }
    return {**found, "count": int(bins.sum())}


def _percentile(bins: NDArray[Any], share: float) -> float | None:
    """Milliseconds that this share of the times stays below; None: there are no times."""
    so_far = np.cumsum(bins)
    if not so_far[-1]:
        return None
    place = int(np.searchsorted(so_far, share * so_far[-1]))
    return round(1000 * _SHORTEST * float(_RATIO ** (place + 0.5)), 3)
