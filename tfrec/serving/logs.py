"""Logs: one line for each request and each thing worth knowing, written beside the event loop."""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

LOGGERS = ("tfrec", "uvicorn", "opentelemetry")
WAITING = 10_000  # lines; past them lines are dropped rather than requests held up
PAUSE = 0.2  # seconds between two rounds of writing; a warning does not wait

Fields = Callable[[], dict[str, Any]]


def hashed(salt: bytes, user_id: str) -> str:
    """What stands for a user in the logs: the same each time, and of no use without the salt."""
    return hmac.digest(salt, user_id.encode("utf-8", "surrogatepass"), "sha256")[:8].hex()


def start(
    level: str = "INFO",
    form: Literal["json", "text", "auto"] = "auto",
    stream: TextIO | None = None,
) -> Lines:
    """Sends what this process logs to a stream, from a thread of its own.

    uvicorn must leave logging alone (``log_config=None``): else it closes every handler there is.

    Args:
      level: The least that is written: ``DEBUG``, ``INFO``, ``WARNING`` or ``ERROR``.
      form: ``json``: an object on each line; ``text``: for a person; ``auto``: text on a terminal.
      stream: Where to; None: standard error.

    Returns:
      What to close at the end, so that nothing is lost.
    """
    stream = stream or sys.stderr
    text = form == "text" or (form == "auto" and stream.isatty())
    lines = Lines(stream, TextForm() if text else JsonForm(), level)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.addHandler(lines)
        logger.setLevel(level)
        logger.propagate = False
    return lines


class Lines(logging.Handler):
    """Takes lines in a microsecond each, and forms and writes them in a thread, many at a time.

    A record of ``logging`` costs several times that, which for a line on each request is too much;
    so those come in by :meth:`request`. A kill loses the lines of :data:`PAUSE` at most.

    Args:
      stream: Where to.
      form: What makes a line of a record.
      level: The least that is written.
      waiting: Lines that may wait.

    Attributes:
      dropped: Lines for which there was no room, or which the stream did not take.
    """

    def __init__(
        self, stream: TextIO, form: logging.Formatter, level: str, waiting: int = WAITING
    ) -> None:
        super().__init__(level)
        self.setFormatter(form)
        self.dropped = 0
        self._stream, self._most = stream, waiting
        self._waiting: deque[logging.LogRecord | tuple[float, int, Fields]] = deque()
        self._wake, self._ended = threading.Event(), False
        self._thread = threading.Thread(target=self._write, name="tfrec-logs", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Leaves a record to be written."""
        self._put(record, record.levelno)

    def request(self, level: int, fields: Fields) -> None:
        """Leaves the line of a request to be written, if its level is.

        Args:
          level: As in ``logging``.
          fields: Makes what is in the line; called by the thread that writes.
        """
        if level >= self.level:
            self._put((time.time(), level, fields), level)

    def close(self) -> None:
        """Writes what waits, as far as the stream takes it, and lets the loggers go."""
        for name in LOGGERS:
            logger = logging.getLogger(name)
            if self in logger.handlers:
                logger.removeHandler(self)
                logger.setLevel(logging.NOTSET)
                logger.propagate = True
        self._ended = True
        self._wake.set()
        self._thread.join(2.0)
        super().close()

    def _put(self, line: logging.LogRecord | tuple[float, int, Fields], level: int) -> None:
        if len(self._waiting) >= self._most:
            self.dropped += 1
            return
        self._waiting.append(line)
        if level >= logging.WARNING:
            self._wake.set()

    def _write(self) -> None:
        ended = False
        while not ended:
            self._wake.wait(PAUSE)
            self._wake.clear()
            ended = self._ended
            while self._waiting:
                self._write_some()

    def _write_some(self, most: int = 50) -> None:
        """Few at a time, so that requests do not wait long for the interpreter."""
        lines: list[str] = []
        while self._waiting and len(lines) < most:
            line = self._waiting.popleft()
            with contextlib.suppress(Exception):  # a line that cannot be formed must not end it all
                lines.append(self.format(_record(*line) if isinstance(line, tuple) else line))
        try:
            self._stream.write("".join(f"{line}\n" for line in lines))
            self._stream.flush()
        except (OSError, ValueError):  # nobody reads any more, or the stream is closed
            self.dropped += len(lines)


def _record(created: float, level: int, fields: Fields) -> logging.LogRecord:
    record = logging.LogRecord("tfrec.serving.requests", level, "", 0, "request", None, None)
    record.created = created
    record.fields = fields()
    return record


class JsonForm(logging.Formatter):
    """A record as one line of JSON: ``time``, ``level``, then its fields or its message."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line."""
        line: dict[str, Any] = {"time": _time(record), "level": record.levelname.lower()}
        line |= _fields(record) or {"logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextForm(logging.Formatter):
    """A record as a short line for a person at a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line, and below it the traceback if there is one."""
        told = _fields(record)
        message = _printable(_short(told) if told else record.getMessage())
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        line = f"{_time(record)[11:19]} {level}{message}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _short(told: dict[str, Any]) -> str:
    who = f" user {told['user']}" if told.get("user") else ""
    return f"{told['method']} {told['route']} {told['status']} {told['ms']} ms{who}"


def _printable(text: str) -> str:
    """The text without what would move a terminal's cursor or colour."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    found: dict[str, Any] = getattr(record, "fields", {})
    return found


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
