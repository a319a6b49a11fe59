"""The Python client against a real server, and against servers that fail in every way."""

import asyncio
import inspect
import json
import socket
import subprocess
import sys
import threading
import time
import uuid
from contextlib import contextmanager
from email.utils import formatdate

import pytest
from asgi_server import running
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tfrec.client import (
    AnswerError,
    AsyncClient,
    Client,
    ClientError,
    DeniedError,
    Event,
    NewItem,
    NotFoundError,
    RefusedError,
    UnavailableError,
)
from tfrec.serving.keys import Keys
from tfrec.serving.security import Guard

LIST = {"items": [], "model_version": "1", "request_id": "r"}


@pytest.fixture(scope="module")
def client(server):
    with Client(server.url, deadline=30) as client:
        client.wait_until_ready()
        yield client


@pytest.fixture
def visitor():
    return f"visitor-{uuid.uuid4().hex}"


class Failing:
    """A server that answers each request with the next of what it was given, then with a list."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.requests = []
        self.times = []

    async def __call__(self, scope, receive, send):
        request = Request(scope, receive)
        self.requests.append((request, await request.body()))
        self.times.append(time.monotonic())
        answer = self.answers.pop(0) if self.answers else JSONResponse(LIST)
        if answer == "break":
            start = {"type": "http.response.start", "status": 200}
            await send({**start, "headers": [(b"content-length", b"9")]})
            return  # which ends the connection in the middle
        await answer(scope, receive, send)


def refusal(status, code="unavailable", **headers):
    told = {"error": {"code": code, "message": "no", "field": "k"}, "request_id": "r"}
    return JSONResponse(told, status, {key.replace("_", "-"): v for key, v in headers.items()})


@contextmanager
def failing(*answers, **settings):
    app = Failing(*answers)
    with running(app) as address, Client(address, **settings) as client:
        yield app, client


@pytest.mark.slow
class TestAgainstTheServer:
    def test_it_is_ready(self, client):
        assert client.ready()

    def test_recommendations_are_values(self, client):
        found = client.recommend(user_id="u1", k=3, explain=True)
        assert len(found.items) == 3
        assert found.ids == [item.item_id for item in found.items]
        first = found.items[0]
        assert sum(first.parts.values()) == pytest.approx(first.score, abs=2e-3)
        assert first.explanation.rank_before >= 1
        assert found.model_version
        assert found.request_id

    def test_everything_that_can_be_said_is_understood(self, client):
        every = client.recommend(k=100).ids
        found = client.recommend(
            history=["i1", {"item_id": "i3", "event": "like", "value": 5, "timestamp": 1.0}],
            profile="red",
            context={"device": "phone"},
            k=5,
            exclude=every[:1],
            include=every[:4],
            diversity=0.3,
            explain=False,
        )
        assert set(found.ids) <= set(every[1:4])

    def test_shelves_come_as_they_are_asked_for(self, client):
        found = client.shelves(["popular", "for_you"], user_id="u1", k=2)
        assert {shelf.key for shelf in found.shelves} == {"popular", "for_you"}
        assert all(len(shelf.items) <= 2 for shelf in found.shelves)

    def test_an_event_counts_at_once_and_only_once(self, client, visitor):
        item = client.popular(k=1).ids[0]
        event = Event(visitor, item, "like", timestamp=5.0)
        assert (client.events(event).accepted, client.events([event]).known) == (1, 1)
        (done,) = client.user(visitor).history
        assert (done.event_id, done.item_id, done.timestamp) == (event.event_id, item, 5.0)
        assert item not in client.recommend(user_id=visitor, k=100).ids

    def test_many_events_go_in_several_requests(self, client, visitor):
        events = (Event(visitor, f"i{n}", "view") for n in range(2500))
        assert client.events(events).accepted == 2500
        assert [e.item_id for e in client.user(visitor).history] == [f"i{n}" for n in range(2500)]

    def test_long_ids_do_not_make_a_request_too_large(self, client, visitor):
        events = [Event(visitor, "i" * 500, "view", event_id=f"{n:0500d}") for n in range(1500)]
        assert client.events(events).accepted == 1500

    def test_nothing_to_tell_is_no_request(self, client):
        assert client.events([]).accepted == 0
        assert client.import_items([]).imported == 0

    def test_lists_by_words_and_by_item(self, client):
        assert client.search("red", k=2).items
        assert len(client.similar("i1", k=2).items) == 2
        assert len(client.popular(k=4, user_id="u1").items) == 4

    @pytest.mark.parametrize(
        "item_id", ["new one", "a/b", "a?b#c", "..", ".", "ü–漢", "100%", "a+b&c=d", "x:y"]
    )
    def test_an_item_comes_and_goes_whatever_its_id(self, client, item_id):
        put = client.put_item(item_id, "A title", "Its text")
        assert (put.item_id, put.title, put.origin) == (item_id, "A title", "live")
        assert client.item(item_id) == put
        assert client.delete_item(item_id) is True
        with pytest.raises(NotFoundError):
            client.item(item_id)

    def test_an_import_tells_of_the_lines_that_are_no_good(self, client):
        items = [NewItem("import-1", "One"), {"item_id": "import-2"}, NewItem("import-3", "Three")]
        found = client.import_items(items)
        assert found.imported == 2
        assert [error.line for error in found.errors] == [2]
        for n in (1, 3):
            client.delete_item(f"import-{n}")

    def test_a_user_is_known_and_forgotten(self, client, visitor):
        assert not client.user(visitor).known
        client.events(Event(visitor, "i1", "view"))
        assert client.user(visitor).known
        assert client.forget(visitor).events == 1
        assert client.user(visitor).history == ()

    def test_what_the_bundle_knows_of_a_user_is_there(self, client):
        user = client.user("u1")
        assert user.known
        assert user.earlier[0].event_id == ""

    def test_versions_are_listed_and_activated(self, client):
        versions = {one.version: one for one in client.models()}
        (active,) = [one.version for one in versions.values() if one.state == "active"]
        now = {one.version: one.share for one in client.activate(active)}
        assert now[active] == 1.0

    def test_figures_come_as_they_are(self, client):
        client.recommend(user_id="u1")
        assert client.stats()["latency"]["total"]["count"] > 0

    def test_a_refusal_says_why(self, client):
        with pytest.raises(RefusedError) as caught:
            client.recommend(k=10**6)
        assert (caught.value.status, caught.value.code) == (422, "unprocessable")
        assert caught.value.field == "k"
        assert caught.value.request_id in str(caught.value)

    def test_a_server_that_starts_is_waited_for_and_one_that_is_gone_is_told_of(self, own_server):
        own_server.stop()
        with Client(own_server.url, deadline=0.5) as client:
            assert not client.ready()
            with pytest.raises(UnavailableError, match="no answer"):
                client.popular()
            with pytest.raises(UnavailableError, match=r"is not ready after 0\.2 s"):
                client.wait_until_ready(0.2)
            own_server.start()
            client.wait_until_ready(30)
            assert client.popular().items

    def test_the_other_client_does_the_same(self, server, client, visitor):
        async def ask():
            async with AsyncClient(server.url, deadline=30) as other:
                await other.wait_until_ready()
                assert await other.ready()
                accepted = await other.events(Event(visitor, "i1", "like"))
                await other.put_item("async-1", "One", "text")
                imported = await other.import_items([NewItem("async-2", "Two")])
                assert (await other.item("async-1")).title == "One"
                deleted = [await other.delete_item(f"async-{n}") for n in (1, 2)]
                with pytest.raises(NotFoundError):
                    await other.item("async-1")
                found = (
                    (await other.recommend(user_id="u1", k=4)).ids,
                    [s.key for s in (await other.shelves(user_id="u1")).shelves],
                    (await other.search("red", k=3)).ids,
                    (await other.similar("i1", k=3)).ids,
                    (await other.popular(k=3)).ids,
                    await other.user("u1"),
                    await other.models(),
                )
                forgotten = await other.forget(visitor)
                assert await other.stats()
                assert await other.activate(active) == client.models()
                return accepted, imported, found, deleted, forgotten

        active = next(one.version for one in client.models() if one.state == "active")
        accepted, imported, found, deleted, forgotten = asyncio.run(ask())
        assert (accepted.accepted, imported.imported, forgotten.events) == (1, 1, 1)
        assert deleted == [True, True]
        assert found == (
            client.recommend(user_id="u1", k=4).ids,
            [s.key for s in client.shelves(user_id="u1").shelves],
            client.search("red", k=3).ids,
            client.similar("i1", k=3).ids,
            client.popular(k=3).ids,
            client.user("u1"),
            client.models(),
        )


class TestRetries:
    @pytest.mark.parametrize("status", [429, 502, 503, 504])
    def test_what_cannot_be_answered_now_is_asked_again(self, status):
        with failing(refusal(status), refusal(status)) as (app, client):
            assert client.popular().model_version == "1"
            assert len(app.requests) == 3

    def test_a_broken_connection_is_asked_again(self):
        with failing("break") as (app, client):
            assert client.popular().model_version == "1"
            assert len(app.requests) == 2

    def test_all_attempts_have_one_request_id_and_one_body(self):
        with failing(refusal(503), Response("busy", 502)) as (app, client):
            client.recommend(user_id="1")
            assert len({request.headers["x-request-id"] for request, _ in app.requests}) == 1
            assert {body for _, body in app.requests} == {b'{"user_id": "1"}'}

    def test_events_keep_their_ids_over_attempts(self):
        told = JSONResponse({"accepted": 0, "known": 1})
        with failing(refusal(503), told) as (app, client):
            assert client.events(Event("u", "i", "like")).known == 1
            ids = [json.loads(body)[0]["event_id"] for _, body in app.requests]
            assert ids[0] == ids[1]

    @pytest.mark.parametrize("told", ["1", lambda: formatdate(time.time() + 2, usegmt=True)])
    def test_the_server_says_when(self, told):
        after = told if isinstance(told, str) else told()
        with failing(refusal(429, retry_after=after)) as (app, client):
            client.popular()
            assert app.times[1] - app.times[0] > 0.9

    @pytest.mark.parametrize("status", [400, 409, 413, 422, 500])
    def test_what_would_end_alike_is_not_asked_again(self, status):
        with failing(refusal(status, "conflict")) as (app, client):
            with pytest.raises(RefusedError) as caught:
                client.popular()
            assert (caught.value.status, caught.value.code, caught.value.field) == (
                *(status, "conflict"),
                "k",
            )
            assert len(app.requests) == 1

    def test_a_wait_past_the_deadline_is_not_waited(self):
        with failing(refusal(503, retry_after="60")) as (_, client):
            start = time.monotonic()
            with pytest.raises(UnavailableError) as caught:
                client.popular(deadline=5)
            assert time.monotonic() - start < 4
            assert (caught.value.attempts, caught.value.status) == (1, 503)
            assert "asked once within 5 s" in str(caught.value)

    def test_the_deadline_holds_over_all_attempts(self):
        with failing(*[refusal(503) for _ in range(1000)]) as (app, client):
            start = time.monotonic()
            with pytest.raises(UnavailableError) as caught:
                client.popular(deadline=0.6)
            assert time.monotonic() - start < 5
            assert caught.value.attempts == len(app.requests) > 2
            assert isinstance(caught.value.__cause__, RefusedError)

    def test_pauses_grow(self):
        with failing(*[refusal(503) for _ in range(5)]) as (app, client):
            client.popular()
            pauses = [b - a for a, b in zip(app.times, app.times[1:], strict=False)]
            assert pauses[-1] > 0.3 > 0.15 > pauses[0]

    def test_a_server_that_says_nothing_is_given_up(self):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"http://127.0.0.1:{silent.getsockname()[1]}"
            with Client(address, timeout=0.2) as client, pytest.raises(UnavailableError):
                client.popular(deadline=0.7)

    def test_a_delete_whose_answer_was_lost_is_done(self):
        gone = refusal(404, "not_found")
        with failing("break", gone) as (_, client):
            assert client.delete_item("1") is True

    def test_a_delete_of_nothing_is_told_of(self):
        with failing(refusal(404, "not_found")) as (_, client), pytest.raises(NotFoundError):
            client.delete_item("1")

    def test_the_other_client_tries_again_too(self):
        async def ask(address):
            async with AsyncClient(address) as client:
                assert (await client.popular()).model_version == "1"
                with pytest.raises(UnavailableError):
                    await client.popular(deadline=0.1)

        app = Failing(refusal(503), "break", JSONResponse(LIST), *[refusal(503)] * 9)
        with running(app) as address:
            asyncio.run(ask(address))


class TestAnswers:
    @pytest.mark.parametrize(
        "answer",
        [
            Response("<html>hello</html>"),
            Response("[]", media_type="application/json"),
            JSONResponse({"items": [{}]}),
            Response(b"\xff\xfe"),
            Response(b"not gzip", headers={"content-encoding": "gzip"}),
        ],
    )
    def test_of_something_else_are_told_so(self, answer):
        with failing(answer) as (_, client), pytest.raises(AnswerError):
            client.recommend()

    def test_of_a_proxy_that_fails_are_refusals(self):
        answer = Response("<html>Internal Server Error</html>", 500)
        with failing(answer) as (_, client), pytest.raises(RefusedError) as caught:
            client.recommend()
        assert (caught.value.status, caught.value.code) == (500, "unknown")

    def test_of_a_newer_server_are_understood(self):
        item = {"item_id": "1", "title": "t", "score": 1, "source": "text", "aura": "blue"}
        answer = JSONResponse({**LIST, "items": [item], "mood": "good"})
        with failing(answer) as (_, client):
            assert client.popular().ids == ["1"]


class TestKeys:
    def test_open_a_server_that_wants_one(self, tmp_path):
        keys = Keys(tmp_path / "keys.json")
        guard = Guard(Failing(), keys=keys, required=True, loopback=False)
        with running(guard) as address:
            with Client(address, keys.create("read")) as client:
                assert client.popular().model_version == "1"
                with pytest.raises(DeniedError, match="role admin"):
                    client.stats()
            with Client(address) as client, pytest.raises(DeniedError) as caught:
                client.popular()
            assert caught.value.status == 401

    def test_that_no_header_can_hold_are_an_error_of_the_client(self):
        with failing(key="a\nb") as (_, client), pytest.raises(ClientError, match="cannot be sent"):
            client.popular()


@pytest.mark.parametrize("address", ["localhost:8080", "ftp://host", "http://", ""])
def test_an_address_that_is_none_is_refused_at_once(address):
    with pytest.raises(ValueError, match="is no address of a server"):
        Client(address)


def test_both_clients_offer_the_same():
    def offered(kind):
        return {
            name: inspect.signature(method)
            for name, method in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_")
        }

    assert offered(Client) == offered(AsyncClient)
    assert inspect.signature(Client) == inspect.signature(AsyncClient)


def test_threads_may_share_a_client():
    with failing() as (app, client):
        threads = [threading.Thread(target=client.popular) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(app.requests) == 20


def test_it_needs_nothing_else_of_tfrec():
    code = (
        "import sys, tfrec.client; "
        "print(sorted(m for m in sys.modules if m.startswith('tfrec') and '.client' not in m), "
        "'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("['tfrec'] False", "")
