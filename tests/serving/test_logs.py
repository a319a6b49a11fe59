"""Logs: what a line holds, that none holds a request up, and that no user is named."""

import io
import json
import logging
import os
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest

from tfrec.serving import logs

REQUEST = {
    "request_id": "abc",
    "method": "POST",
    "route": "/v1/recommend",
    "status": 200,
    "ms": 3.21,
    "bytes": 512,
    "user": "0123456789abcdef",
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def written():
    """Logs what a function does, and gives the lines."""
    opened = []

    def run(do, form="json", level="INFO", stream=None):
        stream = stream or io.StringIO()
        lines = logs.start(level, form, stream)
        opened.append(lines)
        do(lines)
        lines.close()
        return stream.getvalue().splitlines()

    yield run
    assert not [name for name in logs.LOGGERS if logging.getLogger(name).handlers]


def log_request(lines):
    lines.request(logging.INFO, lambda: REQUEST)


def test_a_request_is_one_line_of_json(written):
    (line,) = written(log_request)
    told = json.loads(line)
    assert list(told)[:2] == ["time", "level"]
    assert told.pop("level") == "info"
    moment = datetime.fromisoformat(told.pop("time"))
    assert abs(datetime.now(UTC) - moment) < timedelta(seconds=60)
    assert told == REQUEST


def test_anything_else_is_a_line_with_its_message(written):
    (line,) = written(lambda _: logging.getLogger("tfrec.serving").warning("version %s is bad", 3))
    told = json.loads(line)
    assert (told["level"], told["logger"]) == ("warning", "tfrec.serving")
    assert told["message"] == "version 3 is bad"


def test_a_failure_brings_its_traceback_in_the_same_line(written):
    def fail(_):
        try:
            raise ValueError("no\nway")
        except ValueError:
            logging.getLogger("tfrec.serving").exception("request %s failed", "x")

    (line,) = written(fail)
    assert "ValueError: no\nway" in json.loads(line)["error"]


def test_a_terminal_gets_short_lines(written):
    (line,) = written(log_request, form="auto", stream=Terminal())
    assert line[9:] == "POST /v1/recommend 200 3.21 ms user 0123456789abcdef"
    (line,) = written(log_request, form="auto")
    assert json.loads(line)


def test_a_terminal_cannot_be_fooled_by_a_message(written):
    say = logging.getLogger("tfrec.serving").warning
    (line,) = written(lambda _: say("a\x1b[2J\nb"), form="text")
    assert line.endswith("warning: a?[2J?b")


def test_a_level_leaves_out_what_is_below_it(written):
    def log(lines):
        log_request(lines)
        lines.request(logging.ERROR, lambda: {**REQUEST, "status": 500})
        logging.getLogger("tfrec").info("no")
        logging.getLogger("tfrec").error("yes")

    assert len(written(log, level="ERROR")) == 2


def test_what_uvicorn_says_is_there_too(written):
    (line,) = written(lambda _: logging.getLogger("uvicorn.error").warning("bad request"))
    assert json.loads(line)["message"] == "bad request"


def test_lines_are_written_in_order(written):
    def log(lines):
        for number in range(300):
            lines.request(logging.INFO, lambda number=number: {"n": number})

    assert [json.loads(line)["n"] for line in written(log)] == list(range(300))


def test_a_line_that_cannot_be_formed_takes_no_other_with_it(written):
    def log(lines):
        lines.request(logging.INFO, lambda: 1 / 0)
        log_request(lines)

    assert len(written(log)) == 1


def test_a_reader_who_does_not_read_holds_nobody_up():
    read, write = os.pipe()
    stream = os.fdopen(write, "w")
    lines = logs.Lines(stream, logs.JsonForm(), "INFO", waiting=100)
    start = time.monotonic()
    for _ in range(3000):
        lines.request(logging.ERROR, lambda: {"x": "y" * 1000})
    assert time.monotonic() - start < 5
    assert lines.dropped > 0
    reader = threading.Thread(
        target=lambda: [None for _ in iter(lambda: os.read(read, 65536), b"")]
    )
    reader.start()
    lines.close()
    stream.close()
    reader.join()
    os.close(read)


def test_a_stream_that_was_closed_is_no_failure():
    stream = io.StringIO()
    lines = logs.Lines(stream, logs.JsonForm(), "INFO")
    stream.close()
    log_request(lines)
    lines.close()
    assert lines.dropped == 1


class TestHashed:
    def test_users_are_the_same_each_time_and_apart(self):
        found = {logs.hashed(b"salt", user) for user in ("1", "2", "1", "é", "\ud800")}
        assert len(found) == 4
        assert {len(one) for one in found} == {16}

    def test_users_differ_by_the_salt(self):
        assert logs.hashed(b"a", "1") != logs.hashed(b"b", "1")

    def test_is_hmac_of_sha256(self):
        # RFC 4231, test case 2
        expected = "5bdcc146bf60754e"
        assert logs.hashed(b"Jefe", "what do ya want for nothing?") == expected
