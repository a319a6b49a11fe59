"""Faults: what production does to a server, and what must be true all the same."""

import contextlib
import itertools
import json
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import httpx
import pyarrow.dataset
import pytest
from conftest import Server
from redis_server import RedisServer

pytestmark = pytest.mark.slow

HEAD = "POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\n"


def event(user, item="i1", kind="view", **more):
    return {"event_id": uuid.uuid4().hex, "user_id": user, "item_id": item, "event": kind, **more}


def post(url, path, body, **more):
    return httpx.post(f"{url}/v1/{path}", json=body, timeout=30, **more)


def get(url, path):
    return httpx.get(f"{url}/v1/{path}", timeout=30).raise_for_status().json()


def recommended(url, **body):
    answer = post(url, "recommend", body)
    assert answer.status_code == 200, answer.text
    return [item["item_id"] for item in answer.json()["items"]]


def history(url, user):
    return [one["event_id"] for one in get(url, f"users/{user}")["history"]]


def shares(url):
    return {one["version"]: one["share"] for one in get(url, "models")["versions"] if one["share"]}


def eventually(holds, seconds=20.0):
    """Waits until something holds; else it never did."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


@contextlib.contextmanager
def running(bundle, state, folder, *settings):
    """A server with settings, from start to end."""
    more = [word for setting in settings for word in ("--set", f"serve.{setting}")]
    server = Server(bundle, str(state), folder / f"log-{uuid.uuid4().hex}", more)
    server.start()
    try:
        yield server
    finally:
        server.stop(signal.SIGKILL)


class Writer(threading.Thread):
    """Sends one event after another, each until it is acknowledged, whatever happens meanwhile."""

    def __init__(self, server, user):
        super().__init__(daemon=True)
        self.server, self.user = server, user
        self.sent, self.acknowledged = [], []
        self._end = threading.Event()
        self.start()

    def run(self):
        with httpx.Client(timeout=10) as client:
            while not self._end.is_set():
                one = event(self.user)
                self.sent.append(one["event_id"])
                while not self._acknowledged(client, one) and not self._end.is_set():
                    time.sleep(0.02)

    def _acknowledged(self, client, one):
        try:
            answer = client.post(f"{self.server.url}/v1/events", json=one)
        except httpx.TransportError:
            return False
        if answer.status_code == 200:
            self.acknowledged.append(one["event_id"])
        return answer.status_code == 200

    def stop(self):
        self._end.set()
        self.join()


@contextlib.contextmanager
def writers(server, count=4):
    """Writers of so many users, stopped at the end."""
    found = [Writer(server, f"writer-{n}") for n in range(count)]
    try:
        yield found
    finally:
        for one in found:
            one.stop()


class Asking:
    """Threads that ask for lists all the time, and keep each answer with the time it was asked."""

    def __init__(self, url, body, threads=4):
        self.url, self.body = url, body
        self.answers = []
        self._end = threading.Event()
        self._pool = ThreadPoolExecutor(threads)
        self._work = [self._pool.submit(self._ask, n) for n in range(threads)]

    def _ask(self, number):
        with httpx.Client(timeout=30) as client:
            for turn in itertools.count():
                if self._end.is_set():
                    return
                body = {"user_id": f"asking-{number}-{turn % 20}", **self.body}
                begun = time.monotonic()
                answer = client.post(f"{self.url}/v1/recommend", json=body)
                self.answers.append((begun, answer.status_code, answer.json()))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._end.set()
        self._pool.shutdown()
        for work in self._work:
            work.result()  # a request that failed on its way is raised here


def new_version(bundle, source, number, spoil=lambda folder: None):
    """Another version, there all at once."""
    partial = bundle / "partial"
    shutil.copytree(bundle / "versions" / source, partial, symlinks=True)
    spoil(partial)
    partial.rename(bundle / "versions" / number)


class TestKilled:
    def test_no_acknowledged_event_is_lost_or_doubled(self, own_server):
        with writers(own_server) as found:
            for _ in range(2):
                time.sleep(0.7)
                own_server.stop(signal.SIGKILL)
                acknowledged = {one.user: list(one.acknowledged) for one in found}
                own_server.start()
                for one in found:
                    kept = history(own_server.url, one.user)
                    assert len(kept) == len(set(kept))
                    assert set(acknowledged[one.user]) <= set(kept)
        for one in found:
            kept = history(own_server.url, one.user)
            assert len(one.acknowledged) > 3
            assert kept in (one.sent, one.acknowledged)  # the last may not have arrived

    def test_what_was_told_outlives_a_kill(self, own_server):
        url = own_server.url
        sent = [event("keeper", item) for item in ("i3", "nowhere", "i3")]
        post(url, "events", sent).raise_for_status()
        httpx.put(f"{url}/v1/items/kept", json={"title": "A kept thing"}).raise_for_status()
        httpx.delete(f"{url}/v1/items/i5").raise_for_status()
        httpx.delete(f"{url}/v1/users/u4").raise_for_status()
        post(url, "models/1:activate", {"share": 0.25}).raise_for_status()
        everything = recommended(url, user_id="keeper", k=500)
        assert "kept" in everything
        own_server.stop(signal.SIGKILL)
        own_server.start()
        assert history(url, "keeper") == [one["event_id"] for one in sent]
        assert recommended(url, user_id="keeper", k=500) == everything
        assert get(url, "items/kept")["title"] == "A kept thing"
        assert httpx.get(f"{url}/v1/items/i5").status_code == 404
        assert get(url, "users/u4")["known"] is False
        assert shares(url) == {"2": 0.75, "1": 0.25}

    def test_sigterm_answers_what_is_under_way_and_writes_what_was_shown(self, own_server):
        body = json.dumps({"user_id": "u1", "k": 4}).encode()
        address = ("127.0.0.1", own_server.port)
        with contextlib.ExitStack() as stack:
            waiting = []
            for number in range(20):
                sock = stack.enter_context(socket.create_connection(address, timeout=30))
                head = (
                    f"{HEAD}X-Request-Id: drained-{number}\r\nContent-Length: {len(body)}\r\n\r\n"
                )
                sock.sendall(head.encode() + body[:5])
                waiting.append(sock)
            idle = stack.enter_context(socket.create_connection(address, timeout=30))
            time.sleep(0.5)
            process = own_server.process
            process.send_signal(signal.SIGTERM)
            assert idle.recv(1) == b""  # it is closing
            for sock in waiting:
                sock.sendall(body[5:])
            for sock in waiting:
                answer = b"".join(iter(lambda sock=sock: sock.recv(1 << 16), b""))
                assert answer.startswith(b"HTTP/1.1 200")
                assert json.loads(answer.partition(b"\r\n\r\n")[2])["items"]
        assert process.wait(timeout=30) == 0
        shown = pyarrow.dataset.dataset(own_server.state + "/exposures", format="parquet")
        asked = set(shown.to_table().column("request_id").to_pylist())
        assert {f"drained-{number}" for number in range(20)} <= asked


class TestVersions:
    def test_a_damaged_one_is_refused_and_the_old_one_goes_on(self, own_bundle, tmp_path):
        def flip(folder):
            path = max((p for p in folder.rglob("*.tflite")), key=lambda p: p.stat().st_size)
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 255
            path.write_bytes(content)

        with running(own_bundle, tmp_path / "state", tmp_path, "watch=0.1") as server:
            new_version(own_bundle, "1", "3", flip)
            new_version(own_bundle, "1", "4", lambda f: (f / "manifest.json").write_text("{}"))

            def states():
                return {v["version"]: v["state"] for v in get(server.url, "models")["versions"]}

            eventually(lambda: states()["4"] == "failed")
            assert post(server.url, "models/3:activate", {}).status_code == 409
            assert states() == {"4": "failed", "3": "failed", "2": "active", "1": "available"}
            assert post(server.url, "recommend", {}).json()["model_version"] == "2"
            server.stop()
            server.start()  # which must not stumble over it either
            assert post(server.url, "recommend", {}).json()["model_version"] == "2"

    def test_a_new_one_is_taken_in_by_itself_with_all_items_that_were_put(
        self, own_bundle, tmp_path
    ):
        with running(own_bundle, tmp_path / "state", tmp_path, "watch=0.1") as server:
            url = server.url
            httpx.put(f"{url}/v1/items/put", json={"title": "Put before"}).raise_for_status()
            with Asking(url, {"k": 500}) as asking:
                new_version(own_bundle, "1", "3")
                eventually(lambda: shares(url) == {"3": 1.0})
                recommended(url, user_id="last")
            assert {status for _, status, _ in asking.answers} == {200}
            answer = post(url, "recommend", {"user_id": "last", "k": 500}).json()
            assert answer["model_version"] == "3"
            assert "put" in [item["item_id"] for item in answer["items"]]

    def test_going_back_and_forth_under_load_fails_no_request(self, server):
        with Asking(server.url, {"k": 5}) as asking:
            for version in ["1", "2"] * 5:
                post(server.url, f"models/{version}:activate", {}).raise_for_status()
                answer = post(server.url, "recommend", {}).json()
                assert answer["model_version"] == version
        assert {status for _, status, _ in asking.answers} == {200}
        assert {told["model_version"] for _, _, told in asking.answers} == {"1", "2"}
        assert all(len(told["items"]) == 5 for _, _, told in asking.answers)


class TestItems:
    def test_one_that_is_deleted_while_it_is_recommended_never_comes_again(self, server):
        deleted = {}
        with Asking(server.url, {"k": 500}) as asking, httpx.Client(base_url=server.url) as client:
            for number in range(15):
                name = f"doomed-{number}"
                put = client.put(f"/v1/items/{name}", json={"title": f"the war {number}"})
                assert put.status_code == 201
                eventually(lambda name=name: any(_holds(a, name) for a in asking.answers[-8:]))
                assert client.delete(f"/v1/items/{name}").status_code == 200
                deleted[name] = time.monotonic()
            time.sleep(0.3)
        assert {status for _, status, _ in asking.answers} == {200}
        for name, when in deleted.items():
            assert any(_holds(answer, name) for answer in asking.answers)
            assert not any(_holds(answer, name) for answer in asking.answers if answer[0] > when)


def _holds(answer, name):
    return any(item["item_id"] == name for item in answer[2].get("items", ()))


def raw(port, sent, seconds=10.0):
    """What comes back for bytes; a reset counts as the end."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as sock:
        got = b""
        with contextlib.suppress(ConnectionError):
            sock.sendall(sent)
            with contextlib.suppress(OSError):  # it is closed already
                sock.shutdown(socket.SHUT_WR)
            while part := sock.recv(1 << 16):
                got += part
        return got


MALFORMED = {
    "binary": b"\x00\x01\x02\xff" * 20,
    "a TLS greeting": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,
    "no version": b"GET /\r\n\r\n",
    "a foreign method": b"BREW /coffee HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "no host": b"GET /v1/popular HTTP/1.1\r\nConnection: close\r\n\r\n",
    "raw bytes in the path": b"GET /v1/items/\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a negative length": HEAD.encode() + b"Content-Length: -1\r\n\r\n",
    "two lengths": HEAD.encode() + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "a length and chunks": HEAD.encode()
    + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a chunk without a size": HEAD.encode() + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "a body larger than told of": HEAD.encode() + b"Content-Length: 99999999\r\n\r\n{}",
    "a long head": b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * (1 << 18) + b"\r\n\r\n",
    "a long path": b"GET /" + b"a" * (1 << 18) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 50_000 + b"\r\n",
    "nested arrays": HEAD.encode()
    + b"Connection: close\r\nContent-Length: 100000\r\n\r\n"
    + b"[" * 100_000,
    "no JSON": HEAD.encode() + b"Connection: close\r\nContent-Length: 4\r\n\r\n\xff\xfe\x00{",
    "half a character": HEAD.encode()
    + b'Connection: close\r\nContent-Length: 20\r\n\r\n{"user_id":"\\ud800"}',
    "an array": HEAD.encode() + b"Connection: close\r\nContent-Length: 2\r\n\r\n[]",
}


class TestClients:
    @pytest.mark.parametrize("what", MALFORMED)
    def test_what_is_malformed_is_refused_each_time_and_harms_nobody(self, server, what):
        for _ in range(15):
            answer = raw(server.port, MALFORMED[what])
            status = answer.partition(b"\r\n")[0]
            assert not answer or status.startswith(b"HTTP/1.1 4"), answer[:200]
        assert recommended(server.url, user_id="u1")
        assert "Traceback" not in server.log.read_text()

    def test_a_body_without_an_end_of_line_is_refused_in_an_import(self, server):
        def endless():
            for _ in range(64):
                yield b"x" * (1 << 16)

        url = f"{server.url}/v1/items:import"
        answer = httpx.post(url, content=endless(), timeout=60)
        assert answer.status_code == 413
        assert "line 1" in answer.json()["error"]["message"]

    def test_half_open_and_slow_ones_take_nothing_from_others(self, server):
        with contextlib.ExitStack() as stack:
            for number in range(300):
                sock = socket.create_connection(("127.0.0.1", server.port), timeout=10)
                stack.enter_context(sock)
                if number % 3:
                    sock.sendall(HEAD.encode()[: number % len(HEAD)])
            for number in range(20):
                assert recommended(server.url, user_id=f"u{number}")
        eventually(lambda: get(server.url, "stats")["waiting"] == 0)

    def test_one_that_leaves_before_the_answer_leaves_nothing_behind(self, server):
        body = json.dumps({"user_id": "u1", "k": 100, "explain": True}).encode()
        head = f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode()
        for number in range(200):
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
                sock.sendall(head + body[: len(body) if number % 2 else 9])
                if number % 4 == 1:  # a reset in place of an end
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        eventually(lambda: get(server.url, "stats")["waiting"] == 0)
        assert recommended(server.url, user_id="u1")
        assert "Traceback" not in server.log.read_text()


class TestClock:
    def test_events_from_the_past_and_the_future_keep_their_order_and_harm_no_list(self, server):
        when = [1.7e9, 1.6e9, 0, 9.9e10, 1.65e9]
        sent = [event("timeless", f"i{n}", timestamp=t) for n, t in enumerate(when)]
        for one in sent:
            post(server.url, "events", one).raise_for_status()
            assert recommended(server.url, user_id="timeless", context={"time": 1.0})
        assert history(server.url, "timeless") == [one["event_id"] for one in sent]

    def test_a_rating_off_every_scale_harms_no_list(self, server):
        for value in (1e308, -1e308):
            rated = event("rater", kind="rating", value=value)
            post(server.url, "events", rated).raise_for_status()
        answer = post(server.url, "recommend", {"user_id": "rater", "k": 5}).json()
        assert all(item["score"] is not None for item in answer["items"])
        assert "RuntimeWarning" not in server.log.read_text()


def refused(*arguments):
    """Exit code and lines of a server that cannot start."""
    command = [sys.executable, "-m", "tfrec", "serve", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, (done.stdout + done.stderr).strip().splitlines()


class TestCannotStart:
    def test_a_port_in_use(self, server, bundle, tmp_path):
        code, lines = refused(bundle, "--port", server.port, "--state", tmp_path / "state")
        assert (code, len(lines)) == (3, 1)
        assert str(server.port) in lines[0]
        assert "--port" in lines[0]

    def test_a_state_that_another_server_uses(self, server, bundle):
        code, lines = refused(bundle, "--port", 0, "--state", server.state)
        assert (code, len(lines)) == (3, 1)
        assert server.state in lines[0]

    def test_a_bundle_that_is_not_there(self, tmp_path):
        code, lines = refused(tmp_path / "nothing", "--port", 0)
        assert (code, len(lines)) == (2, 1)
        assert str(tmp_path / "nothing") in lines[0]
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("policy", "says"),
        [
            ("[steps\nrank = ", "TOML"),
            ('[steps]\nrerank = ["shuffled"]', "shuffled"),
        ],
    )
    def test_a_policy_that_is_wrong(self, own_bundle, tmp_path, policy, says):
        (own_bundle / "policy.toml").write_text(policy)
        code, lines = refused(own_bundle, "--port", 0, "--state", tmp_path / "state")
        assert (code, len(lines)) == (2, 1)
        assert "policy.toml" in lines[0]
        assert says in lines[0]

    def test_others_could_ask_and_there_is_no_key(self, bundle, tmp_path):
        options = ("--host", "0.0.0.0", "--port", 0, "--state", tmp_path / "state")
        code, lines = refused(bundle, *options)
        assert (code, len(lines)) == (2, 1)
        assert "tfrec keys create" in lines[0]


class TestStore:
    def test_a_full_disk_stops_events_and_nothing_else(self, own_server):
        url, pid = own_server.url, own_server.process.pid
        first = event("hoarder")
        post(url, "events", first).raise_for_status()
        unlimited = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, unlimited[1]))  # no file may grow
        lost = event("hoarder")
        answer = post(url, "events", lost)
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        for _ in range(20):
            assert recommended(url, user_id="hoarder")
        assert history(url, "hoarder") == [first["event_id"]]
        resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)
        assert post(url, "events", lost).json()["accepted"] == 1
        own_server.stop(signal.SIGKILL)
        own_server.start()
        assert history(url, "hoarder") == [first["event_id"], lost["event_id"]]


@pytest.fixture
def redis(tmp_path):
    (tmp_path / "redis").mkdir()
    found = RedisServer(tmp_path / "redis")
    yield found
    found.close()


class TestRedis:
    def test_gone_and_back_loses_nothing_that_was_acknowledged(self, redis, bundle, tmp_path):
        with running(bundle, redis.url, tmp_path) as server, writers(server, 2) as found:
            for _ in range(2):
                time.sleep(0.5)
                redis.kill()
                answer = post(server.url, "events", event("other"))
                assert answer.status_code == 503
                assert answer.headers["retry-after"]
                assert httpx.get(f"{server.url}/readyz", timeout=30).status_code == 503
                assert httpx.get(f"{server.url}/healthz").status_code == 200
                redis.start()
                eventually(lambda: httpx.get(f"{server.url}/readyz").status_code == 200)
                before = [len(one.acknowledged) for one in found]
                eventually(
                    lambda before=before: all(
                        len(one.acknowledged) > n for one, n in zip(found, before, strict=True)
                    )
                )
            for one in found:
                one.stop()
                kept = history(server.url, one.user)
                assert kept in (one.sent, one.acknowledged)

    def test_one_that_hangs_keeps_nobody_waiting_past_the_deadline(self, redis, bundle, tmp_path):
        with running(bundle, redis.url, tmp_path, "deadline=0.5") as server:
            sent = event("patient")
            redis.signal(signal.SIGSTOP)
            try:
                for path, body in (("events", sent), ("recommend", {"user_id": "patient"})):
                    begun = time.monotonic()
                    assert post(server.url, path, body).status_code in (503, 504)
                    assert time.monotonic() - begun < 5
                assert httpx.get(f"{server.url}/readyz", timeout=30).status_code in (503, 504)
                assert httpx.get(f"{server.url}/healthz").status_code == 200
            finally:
                redis.signal(signal.SIGCONT)
            eventually(lambda: httpx.get(f"{server.url}/readyz").status_code == 200)
            post(server.url, "events", sent).raise_for_status()
            assert history(server.url, "patient") == [sent["event_id"]]

    def test_two_servers_see_what_the_other_was_told(self, redis, bundle, tmp_path):
        with (
            running(bundle, redis.url, tmp_path, "watch=0.2") as one,
            running(bundle, redis.url, tmp_path, "watch=0.2") as two,
        ):
            sent = event("shared", "i2", "like")
            post(one.url, "events", sent).raise_for_status()
            assert history(two.url, "shared") == [sent["event_id"]]
            assert "i2" not in recommended(two.url, user_id="shared", k=500)
            httpx.put(f"{one.url}/v1/items/both", json={"title": "For both"}).raise_for_status()
            eventually(lambda: "both" in recommended(two.url, user_id="shared", k=500), 5)
            httpx.delete(f"{two.url}/v1/items/both").raise_for_status()
            eventually(lambda: "both" not in recommended(one.url, user_id="shared", k=500), 5)
            post(two.url, "models/1:activate", {}).raise_for_status()
            eventually(lambda: shares(one.url) == {"1": 1.0}, 10)
            assert shares(two.url) == {"1": 1.0}
