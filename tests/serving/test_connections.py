"""Connections: a head that is too long, too slow or none at all ends them; nothing else does."""

import contextlib
import json
import socket
import time

import pytest
from asgi_server import running

from tfrec.serving import connections


async def app(scope, receive, send):
    """Answers with the length of the body."""
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    body = str(size).encode()
    head = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def port(monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.4)
    with running(app, http=connections.Connection, ws="none") as url:
        yield int(url.rpartition(":")[2])


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def rest(sock):
    """All that still comes, until the server ends the connection."""
    got = b""
    with contextlib.suppress(ConnectionError):
        while part := sock.recv(1 << 16):
            got += part
    return got


def status(answer):
    return int(answer.split(b" ")[1])


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\nX: half"])
def test_a_head_that_does_not_come_in_time_ends_the_connection(port, sent):
    with connect(port) as sock:
        sock.sendall(sent)
        begun = time.monotonic()
        answer = rest(sock)
        assert 0.2 < time.monotonic() - begun < 5
    assert status(answer) == 408
    head, _, body = answer.partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in head
    assert set(json.loads(body)) == {"error", "request_id"}


def test_bytes_that_drip_do_not_buy_time(port):
    with connect(port) as sock:
        begun = time.monotonic()
        with contextlib.suppress(OSError):
            for byte in b"GET / HTTP/1.1\r\nX: " + b"y" * 1000:
                sock.sendall(bytes([byte]))
                time.sleep(0.02)
        assert time.monotonic() - begun < 5


def test_a_second_request_has_its_own_time(port):
    with connect(port) as sock:
        for _ in range(4):
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert status(sock.recv(1 << 16)) == 200
            time.sleep(0.2)
        sock.sendall(b"GET / HTTP/1.1\r\n")  # and half of one has no more than the first
        assert status(rest(sock)) == 408


def test_a_slow_body_is_not_the_heads_matter(port):
    with connect(port) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n")
        for _ in range(4):
            time.sleep(0.2)
            sock.sendall(b"x")
        assert sock.recv(1 << 16).endswith(b"4")


@pytest.mark.parametrize(
    "endless",
    [
        b"GET /" + b"a" * 1000,
        b"GET / HTTP/1.1\r\nX: " + b"a" * 1000,
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 100,
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"X: y\r\n" * 100,
    ],
)
def test_a_head_without_end_is_refused(port, endless):
    tail = b"X: y\r\n" * 100 if endless.endswith(b"\r\n") else b"a" * 600
    sent = 0
    with connect(port) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(endless)
        while sent < 64 << 20:
            sock.sendall(tail)
            sent += len(tail)
        raise AssertionError("64 MB of a head were taken")


def test_a_head_that_is_too_long_is_told_so(port):
    with connect(port) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nX: " + b"a" * (connections.HEAD_BYTES + 1))
        assert status(rest(sock)) == 431


def test_bodies_of_any_size_and_in_tiny_chunks_pass(port):
    for chunk in (1, 7, 100_000):
        size = max(200_000 // (10 if chunk < 10 else 1) // chunk * chunk, chunk)
        one = b"%x\r\n" % chunk + b"x" * chunk + b"\r\n"
        with connect(port) as sock:
            head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            sock.sendall(head + one * (size // chunk) + b"0\r\n\r\n")
            assert sock.recv(1 << 16).endswith(str(size).encode())


def test_requests_one_after_another_in_one_piece_are_all_answered(port):
    one = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"
    with connect(port) as sock:
        sock.sendall(one * 3000 + one.replace(b"Host", b"Connection: close\r\nHost"))
        assert rest(sock).count(b"200 OK") == 3001


def test_what_is_no_http_gets_an_error_in_the_one_form(port):
    with connect(port) as sock:
        sock.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        answer = rest(sock)
    assert status(answer) == 400
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "bad_request"
