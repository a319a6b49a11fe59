"""HTTP on a connection: what is slow, endless, unread or no HTTP ends, and the rest goes on."""

import json
import socket
import threading
import time
from contextlib import closing, contextmanager

import httpx
import pytest
from asgi_server import running
from starlette.requests import Request
from starlette.responses import Response

from tfrec.serving import connections
from tfrec.serving.connections import Connection
from tfrec.serving.security import HEADERS, Guard

ASK = b"GET /v1/x HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def app(scope, receive, send):
    body = await Request(scope, receive).body()
    size = 20_000_000 if scope["path"] == "/large" else 2
    await Response(b"x" * size, headers={"x-body": str(len(body))})(scope, receive, send)


@pytest.fixture(scope="module")
def place():
    """Where a hasty server listens."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("HEAD_SECONDS", 0.4), ("READ_SECONDS", 0.4), ("HEAD_BYTES", 5000)):
            patch.setattr(connections, name, value)
        with running(Guard(app, max_body=1 << 20), http=Connection) as address:
            url = httpx.URL(address)
            yield url.host, url.port


@contextmanager
def wire(place):
    with closing(socket.create_connection(place)) as connected:
        connected.settimeout(10)
        yield connected


def rest(connected):
    """Everything until the connection is ended from the other side."""
    found = b""
    try:
        while part := connected.recv(65536):
            found += part
    except ConnectionResetError:
        pass
    return found


def read_slowly(connected):
    """Bytes of a large answer, which takes longer than a client may read nothing."""
    found = 0
    while found < 20_000_000 and (part := connected.recv(1 << 20)):
        found += len(part)
        time.sleep(0.05)
    return found


def refusal(answer):
    """Status and code of an error, in the form that all errors have."""
    head, _, body = answer.partition(b"\r\n\r\n")
    for name, value in HEADERS:
        assert name + b": " + value in head
    told = json.loads(body)
    assert f"x-request-id: {told['request_id']}".encode() in head
    return int(head.split()[1]), told["error"]["code"]


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
    ],
)
def test_what_is_no_http_is_told_so_as_json(place, nonsense, caplog):
    with wire(place) as connected:
        connected.sendall(nonsense)
        assert refusal(rest(connected)) == (400, "bad_request")
    assert caplog.records == []


@pytest.mark.parametrize("begun", [b"G", b"GET / HTTP/1.1\r\nHost: local", b"\r\n"])
def test_a_head_that_does_not_come_is_not_waited_for(place, begun):
    with wire(place) as connected:
        connected.sendall(begun)
        assert refusal(rest(connected)) == (408, "bad_request")


def test_a_head_that_comes_in_drops_is_not_waited_for(place):
    start = time.monotonic()
    with wire(place) as connected:
        try:
            for byte in ASK * 2:
                connected.sendall(bytes([byte]))
                time.sleep(0.05)
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert time.monotonic() - start < 3


def test_a_connection_on_which_nothing_comes_is_ended(place):
    with wire(place) as connected:
        assert rest(connected) == b""


@pytest.mark.parametrize("begun", [b"G", b"\r\n"])
def test_the_second_head_is_not_waited_for_either(place, begun):
    with wire(place) as connected:
        connected.sendall(ASK)
        assert connected.recv(65536).startswith(b"HTTP/1.1 200")
        connected.sendall(begun)
        assert refusal(rest(connected)) == (408, "bad_request")


@pytest.mark.parametrize(
    "endless",
    [
        b"GET /" + b"x" * 200_000,
        b"GET / HTTP/1.1\r\nHost: " + b"x" * 200_000,
        b"GET / HTTP/1.1\r\n" + b"X-A: b\r\n" * 40_000,
        b"\r\n" * 100_000,
    ],
)
def test_a_head_that_does_not_end_is_refused(place, endless):
    with wire(place) as connected:
        try:
            for start in range(0, len(endless), 3000):
                connected.sendall(endless[start : start + 3000])
                time.sleep(0.002)
        except (BrokenPipeError, ConnectionResetError):
            pass
        found = rest(connected)
    assert not found or refusal(found)[0] in (400, 431)


def test_trailers_that_do_not_end_are_refused(place):
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
    before = Connection.refused
    with wire(place) as connected:
        try:
            connected.sendall(head)
            for _ in range(200):
                connected.sendall(b"X-A: b\r\n" * 100)
                time.sleep(0.002)
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert not rest(connected).startswith(b"HTTP/1.1 200")
    assert Connection.refused == before + 1


def test_a_client_that_does_not_read_is_left(place):
    before = Connection.refused
    with wire(place) as connected:
        connected.sendall(ASK.replace(b"/v1/x", b"/large"))
        time.sleep(1.5)
        assert len(rest(connected)) < 20_000_000
    assert Connection.refused == before + 1


def test_a_client_that_reads_slowly_but_does_gets_it_all(place):
    with wire(place) as connected:
        connected.sendall(ASK.replace(b"/v1/x", b"/large"))
        assert read_slowly(connected) >= 20_000_000


def test_long_bodies_and_many_requests_on_a_connection_are_as_ever(place):
    with httpx.Client(base_url=f"http://{place[0]}:{place[1]}") as client:
        for size in (0, 1, 6000, 1 << 20, 10):
            answer = client.post("/v1/x", content=b"x" * size)
            assert answer.headers["x-body"] == str(size)
            answer = client.post("/v1/x", content=iter([b"x"] * min(size, 3000)))
            assert answer.headers["x-body"] == str(min(size, 3000))


def test_requests_sent_without_waiting_are_answered_in_order(place):
    with wire(place) as connected:
        connected.sendall(ASK * 20)
        found = b""
        while found.count(b"HTTP/1.1 200 OK") < 20:
            found += connected.recv(65536)


def test_a_slow_head_does_not_break_the_answer_before_it(place):
    with wire(place) as connected:
        connected.sendall(ASK.replace(b"/v1/x", b"/large") + b"GET /")
        assert read_slowly(connected) >= 20_000_000


def test_hundreds_of_half_open_connections_hold_up_nobody(place):
    open_ones = [socket.create_connection(place) for _ in range(300)]
    try:
        for number, one in enumerate(open_ones):
            if number % 2:
                one.sendall(b"GET /v1/x HTTP/1.1\r\nHost:")
        done = []
        threads = [
            threading.Thread(
                target=lambda: done.append(
                    httpx.get(f"http://{place[0]}:{place[1]}/v1/x", timeout=10).status_code
                )
            )
            for _ in range(10)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert done == [200] * 10
    finally:
        for one in open_ones:
            one.close()
