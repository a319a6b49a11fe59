"""Breaker: when a server is asked and when it is left alone, and a count of what came of it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from typing import Literal

Turn = Literal["ask", "test", "leave"]


@dataclass(frozen=True)
class Status:
    """How a server does.

    Attributes:
      since: Seconds since 1970 since when it is away; None: it is not.
      reason: What went wrong last; empty: nothing did.
      calls: How often an answer was needed.
      answered: How often the server's was taken.
      retried: How often it was asked a second time.
      failed: How often it was asked and gave no good answer.
      fallbacks: How often the process itself answered.
    """

    since: float | None = None
    reason: str = ""
    calls: int = 0
    answered: int = 0
    retried: int = 0
    failed: int = 0
    fallbacks: int = 0

    @property
    def state(self) -> Literal["ok", "away"]:
        """``away`` while the server is left alone."""
        return "ok" if self.since is None else "away"

    def __str__(self) -> str:
        if self.since is None:
            return "ok"
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.since))
        return f"away since {when}: {self.reason}"


class Breaker:
    """Leaves a server alone that failed some times in a row, but for one call now and then.

    Any number of threads may call it.

    Args:
      failures: So many in a row, and it is away.
      pause: Seconds from one try of a server that is away to the next.
    """

    def __init__(self, failures: int = 3, pause: float = 5.0) -> None:
        self.failures, self.pause = failures, pause
        self._status = Status()
        self._row = 0
        self._again = 0.0  # by time.monotonic()
        self._lock = threading.Lock()

    def turn(self) -> Turn:
        """What the call that now comes is to do: ask, test the server and ask, or leave it."""
        with self._lock:
            self._count(calls=1)
            if self._status.since is None:
                return "ask"
            now = time.monotonic()
            if now < self._again:
                self._count(fallbacks=1)
                return "leave"
            self._again = now + self.pause  # the others wait for what comes of it
            return "test"

    def answered(self) -> None:
        """It gave a good answer."""
        with self._lock:
            self._count(answered=1)
            self._row = 0

    def retried(self) -> None:
        """It is asked a second time."""
        with self._lock:
            self._count(retried=1)

    def failed(self, reason: str) -> bool:
        """It gave none; whether it was there until now and is away from now on."""
        with self._lock:
            self._count(failed=1, fallbacks=1)
            self._row += 1
            return self._away(reason, self._row >= self.failures)

    def leave(self, reason: str) -> bool:
        """It is not to be used, as was found out beside any call; whether it was until now."""
        with self._lock:
            return self._away(reason, True)

    def back(self) -> bool:
        """It passed a test; whether it was away until now."""
        with self._lock:
            was_away, self._row = self._status.since is not None, 0
            self._status = replace(self._status, since=None)
            return was_away

    def status(self) -> Status:
        """How the server does."""
        with self._lock:
            return self._status

    def _count(self, **more: int) -> None:
        sums = {name: getattr(self._status, name) + count for name, count in more.items()}
        self._status = replace(self._status, **sums)

    def _away(self, reason: str, gone: bool) -> bool:
        here = self._status.since is None
        self._status = replace(self._status, reason=reason)
        if gone:
            self._again = time.monotonic() + self.pause
        if gone and here:
            self._status = replace(self._status, since=time.time())
        return gone and here
