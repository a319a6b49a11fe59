"""Attempts: whether a call is sent again, when, and what comes of it in the end."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Generic, TypeVar

import httpx

from tfrec.client.calls import Call
from tfrec.client.failures import (
    AnswerError,
    ClientError,
    DeniedError,
    NotFoundError,
    RefusedError,
    UnavailableError,
)

T = TypeVar("T")

AGAIN = frozenset((429, 502, 503, 504))
FIRST_WAIT, LONGEST_WAIT = 0.05, 2.0  # seconds


class Attempts(Generic[T]):
    """One call until its end. It sends nothing and waits for nothing: its client does that.

    Args:
      call: What is asked.
      timeout: Seconds that one attempt may take.
      deadline: Seconds that all of them together may take, with the waiting between them.
      clock: Seconds that only grow; tests give their own.
    """

    def __init__(
        self,
        call: Call[T],
        timeout: float,
        deadline: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.call = call
        self.count = 0
        self._timeout, self._deadline, self._clock = timeout, deadline, clock
        self._end = clock() + deadline
        self._request_id = uuid.uuid4().hex

    def next(self) -> dict[str, Any]:
        """What the next attempt sends, as httpx's ``request`` takes it."""
        self.count += 1
        headers = {"x-request-id": self._request_id}
        if self.call.body is not None:
            headers["content-type"] = self.call.kind
        return {
            "method": self.call.method,
            "url": self.call.path,
            "params": self.call.query or None,
            "content": self.call.body,
            "headers": headers,
            "timeout": max(0.001, min(self._timeout, self._end - self._clock())),
        }

    def failed(self, error: httpx.HTTPError) -> float:
        """Seconds to wait before the next attempt, after one that brought no answer.

        Raises:
          UnavailableError: the deadline is reached before.
          ClientError: another attempt would end alike.
        """
        if isinstance(error, (httpx.UnsupportedProtocol, httpx.LocalProtocolError)):
            raise ClientError(f"the request cannot be sent: {error}") from error
        if not isinstance(error, httpx.TransportError):
            raise AnswerError(f"the answer cannot be read: {error}") from error
        about = str(error) or type(error).__name__
        return self._wait(0.0, f"there is no answer from the server: {about}", None, error)

    def answered(self, response: httpx.Response) -> float | None:
        """Seconds to wait before the next attempt; None: the answer is the last one.

        Raises:
          UnavailableError: there should be another, but the deadline is reached before.
        """
        if response.status_code not in AGAIN:
            return None
        refused = refusal(response)
        message = f"the server cannot answer now: {refused}"
        return self._wait(_retry_after(response), message, response.status_code, refused)

    def result(self, response: httpx.Response) -> T:
        """What the call comes to.

        Raises:
          RefusedError: the server will not.
          AnswerError: the answer is none of this API.
        """
        if response.is_success:
            return self._read(response)
        refused = refusal(response)
        gone = response.status_code == 404 and self.count > 1
        if gone and self.call.if_gone is not None:
            return self.call.if_gone
        raise refused

    def _read(self, response: httpx.Response) -> T:
        try:
            return self.call.read(response.json())
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise AnswerError(
                f"{response.url} answered what is not of this API ({type(error).__name__}: "
                f"{error}); is it a tfrec server of this version?"
            ) from error

    def _wait(self, asked: float, message: str, status: int | None, error: Exception) -> float:
        longest = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (self.count - 1))
        wait = max(asked, random.uniform(longest / 2, longest))  # so that clients do not march
        if self._clock() + wait >= self._end:
            times = "once" if self.count == 1 else f"{self.count} times"
            raise UnavailableError(
                f"{message} (asked {times} within {self._deadline:g} s)", self.count, status
            ) from error
        return wait


def refusal(response: httpx.Response) -> RefusedError:
    """The error that an answer tells of, whoever it is from: a proxy may answer too."""
    try:
        told: Mapping[str, Any] = response.json()["error"]
        code, message = str(told["code"]), str(told["message"])
        field = told.get("field")
    except (ValueError, TypeError, KeyError, AttributeError):
        code, field = "unknown", None
        message = response.reason_phrase or f"status {response.status_code}"
    kinds = {401: DeniedError, 403: DeniedError, 404: NotFoundError}
    kind = kinds.get(response.status_code, RefusedError)
    request_id = response.headers.get("x-request-id", "")
    return kind(response.status_code, code, message, request_id, field)


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks for, as a number or as a date; 0: none."""
    told = response.headers.get("retry-after", "")
    if told.isascii() and told.isdigit():
        return float(told)
    try:
        return max(0.0, (parsedate_to_datetime(told) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0
