"""The guard before a real server: who gets in, what is refused, what answers carry."""

import asyncio
import http.client
import json
import logging
import re
import socket
import time
from contextlib import closing, contextmanager

import httpx
import pytest
from asgi_server import running
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from tfrec.serving.keys import Keys
from tfrec.serving.security import HEADERS, Guard


async def echo(request):
    body = await request.body()
    return JSONResponse({"bytes": len(body), **request.scope["state"]})


async def swallow(request):
    """As a framework that answers whatever went wrong while it read."""
    try:
        return JSONResponse({"bytes": sum([len(chunk) async for chunk in request.stream()])})
    except Exception:  # noqa: BLE001 - as frameworks do
        return PlainTextResponse("the framework's own answer", 400)


async def fails(request):
    raise RuntimeError("a secret path: /home/me")


async def fails_halfway(request):
    async def parts():
        yield b"begun"
        raise RuntimeError("a secret")

    return StreamingResponse(parts())


async def kept(request):
    return PlainTextResponse("kept", headers={"cache-control": "max-age=60"})


async def deaf(request):
    return PlainTextResponse("never read it")


ROUTES = [
    Route("/v1/kept", kept),
    Route("/v1/swallow", swallow, methods=["POST"]),
    Route("/v1/fails", fails),
    Route("/v1/halfway", fails_halfway),
    Route("/v1/deaf", deaf, methods=["POST"]),
    Route("/{path:path}", echo, methods=["GET", "POST", "PUT", "DELETE"]),
]


@contextmanager
def guarded(**settings):
    app = Guard(Starlette(routes=ROUTES), **settings)
    with running(app) as address, httpx.Client(base_url=address) as client:
        yield client


@pytest.fixture(scope="module")
def local():
    with guarded() as client:
        yield client


def refused(answer, status, code):
    """The error that an answer tells of, in the one form there is."""
    assert answer.status_code == status, answer.text
    told = answer.json()
    assert answer.headers["content-type"] == "application/json"
    assert set(told) == {"error", "request_id"}
    assert told["request_id"] == answer.headers["x-request-id"]
    assert told["error"]["code"] == code
    return told["error"]["message"]


def raw(client, *parts, pause=0.0, half=False):
    """What comes back for bytes sent over a socket of its own, until it is closed."""
    with closing(socket.create_connection((client.base_url.host, client.base_url.port))) as wire:
        for part in parts:
            wire.sendall(part)
            time.sleep(pause)
        if half:
            wire.shutdown(socket.SHUT_WR)
        wire.settimeout(10)
        return b"".join(iter(lambda: wire.recv(65536), b""))


class TestKeys:
    @pytest.fixture(scope="class")
    @classmethod
    def tokens(cls, tmp_path_factory):
        keys = Keys(tmp_path_factory.mktemp("keys") / "keys.json")
        return keys, {role: keys.create(role) for role in ("read", "write", "admin")}

    @pytest.fixture(scope="class")
    @classmethod
    def client(cls, tokens):
        with guarded(keys=tokens[0], required=True, loopback=False) as client:
            yield client

    @pytest.mark.parametrize(
        ("method", "path", "needed"),
        [
            ("GET", "/", "open"),
            ("GET", "/operate", "open"),
            ("GET", "/static/page.js", "open"),
            ("GET", "/healthz", "open"),
            ("HEAD", "/readyz", "open"),
            ("POST", "/", "admin"),
            ("GET", "/metrics", "read"),
            ("GET", "/openapi.json", "read"),
            ("POST", "/v1/recommend", "read"),
            ("POST", "/v1/shelves", "read"),
            ("GET", "/v1/search", "read"),
            ("GET", "/v1/users/7", "read"),
            ("GET", "/v1/items/7", "read"),
            ("POST", "/v1/events", "write"),
            ("PUT", "/v1/items/7", "write"),
            ("DELETE", "/v1/items/7", "write"),
            ("POST", "/v1/items:import", "admin"),
            ("DELETE", "/v1/users/7", "admin"),
            ("GET", "/v1/models", "admin"),
            ("POST", "/v1/models/3:activate", "admin"),
            ("GET", "/v1/stats", "admin"),
            ("POST", "/v1/unheard-of", "admin"),
        ],
    )
    def test_open_what_their_role_may(self, client, tokens, method, path, needed):
        roles = ["open", "read", "write", "admin"]
        for role in roles:
            sent = {"authorization": f"Bearer {tokens[1][role]}"} if role != "open" else {}
            answer = client.request(method, path, headers=sent)
            if roles.index(role) >= roles.index(needed):
                assert answer.status_code not in (401, 403), (role, answer.text)
            else:
                assert answer.status_code == (401 if role == "open" else 403), (role, answer.text)

    def test_may_come_in_a_header_of_their_own(self, client, tokens):
        answer = client.get("/v1/items/7", headers={"x-api-key": tokens[1]["read"]})
        assert answer.status_code == 200
        assert answer.json()["key_id"] == tokens[0].listing()[0].id

    def test_that_are_missing_are_asked_for(self, client):
        answer = client.get("/v1/items/7")
        assert "Authorization: Bearer KEY" in refused(answer, 401, "unauthorized")
        assert answer.headers["www-authenticate"] == 'Bearer realm="tfrec"'

    def test_that_are_wrong_are_told_so_and_not_repeated(self, client):
        answer = client.get("/v1/items/7", headers={"authorization": "Bearer tfrec_a_b"})
        assert refused(answer, 401, "unauthorized") == "this API key is not valid"
        assert 'error="invalid_token"' in answer.headers["www-authenticate"]
        assert "tfrec_a_b" not in answer.text

    def test_with_too_low_a_role_are_told_which_it_takes(self, client, tokens):
        sent = {"authorization": f"bearer {tokens[1]['read']}"}
        message = refused(client.get("/v1/stats", headers=sent), 403, "forbidden")
        assert message == "this needs a key with the role admin, and yours has read"

    def test_that_were_revoked_no_longer_open_a_running_server(self, tmp_path):
        keys = Keys(tmp_path / "keys.json")
        sent = {"authorization": f"Bearer {keys.create('read')}"}
        with guarded(keys=keys, required=True, loopback=False) as client:
            assert client.get("/v1/x", headers=sent).status_code == 200
            Keys(keys.path).revoke(keys.listing()[0].id)
            time.sleep(1.1)
            assert client.get("/v1/x", headers=sent).status_code == 401

    def test_are_not_needed_on_the_machine_itself(self, local):
        assert local.delete("/v1/users/7").status_code == 200


class TestRate:
    def test_past_it_a_sender_is_told_when_to_come_again(self):
        with guarded(rate=0.5) as client:
            answers = [client.get("/v1/x") for _ in range(2)]
            assert answers[0].status_code == 200
            assert "try again in 2 s" in refused(answers[1], 429, "too_many_requests")
            assert answers[1].headers["retry-after"] == "2"

    def test_is_counted_for_each_key(self, tmp_path):
        keys = Keys(tmp_path / "keys.json")
        sent = [{"authorization": f"Bearer {keys.create('read')}"} for _ in range(2)]
        with guarded(keys=keys, required=True, loopback=False, rate=0.01) as client:
            assert [client.get("/v1/x", headers=h).status_code for h in sent * 2] == [
                *(200, 200),
                *(429, 429),
            ]

    def test_holds_for_those_who_guess_keys(self, tmp_path):
        keys = Keys(tmp_path / "keys.json")
        with guarded(keys=keys, required=True, loopback=False, rate=1) as client:
            got = [
                client.get("/v1/x", headers={"x-api-key": f"tfrec_{i}_x"}).status_code
                for i in range(4)
            ]
            assert got == [401, 401, 429, 429]

    def test_never_tells_a_watchdog_to_wait(self):
        with guarded(rate=0.01) as client:
            assert {client.get("/readyz").status_code for _ in range(5)} == {200}


class TestBody:
    @pytest.fixture(scope="class")
    @classmethod
    def client(cls):
        with guarded(max_body=2000, max_import=300_000, body_seconds=0.4) as client:
            yield client

    @pytest.mark.parametrize(
        ("path", "size"), [("/v1/recommend", 2000), ("/v1/items:import", 300_000)]
    )
    def test_of_the_size_allowed_comes_in(self, client, path, size):
        assert client.post(path, content=b"x" * size).json()["bytes"] == size
        assert client.post(path, content=iter([b"x" * size])).json()["bytes"] == size

    @pytest.mark.parametrize(
        ("path", "size"),
        [("/v1/recommend", 2001), ("/v1/swallow", 3_000_000), ("/v1/items:import", 300_001)],
    )
    def test_that_is_larger_is_refused_before_it_comes(self, client, path, size):
        message = refused(client.post(path, content=b"x" * size), 413, "too_large")
        assert re.fullmatch(r"the body is larger than \d+ bytes", message)

    @pytest.mark.parametrize("path", ["/v1/recommend", "/v1/swallow", "/v1/items:import"])
    def test_that_turns_out_larger_is_refused_whatever_the_app_makes_of_it(self, client, path):
        chunks = (b"x" * 10_000 for _ in range(100))
        refused(client.post(path, content=chunks), 413, "too_large")

    def test_of_many_megabytes_is_refused_so_that_the_sender_can_read_why(self, client):
        wire = http.client.HTTPConnection(client.base_url.host, client.base_url.port)
        wire.request("POST", "/v1/recommend", body=b"x" * 50_000_000)
        answer = wire.getresponse()
        assert (answer.status, answer.headers["connection"]) == (413, "close")
        assert json.loads(answer.read())["error"]["code"] == "too_large"
        wire.close()

    def test_that_was_refused_while_short_leaves_the_connection_open(self, client):
        wire = http.client.HTTPConnection(client.base_url.host, client.base_url.port)
        for _ in range(3):
            wire.request("POST", "/v1/recommend", body=b"x" * 2500)
            answer = wire.getresponse()
            assert (answer.status, answer.headers["connection"]) == (413, None)
            answer.read()
        wire.close()

    def test_that_comes_too_slowly_is_given_up(self, client):
        head = b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
        start = time.monotonic()
        answer = raw(client, head + b"x", b"x", pause=0.1)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"code": "too_slow"' in answer
        assert time.monotonic() - start < 5

    def test_may_take_longer_when_there_is_much_of_it(self, client):
        def parts():
            for _ in range(6):
                time.sleep(0.15)
                yield b"x" * 40_000

        assert client.post("/v1/items:import", content=parts()).json()["bytes"] == 240_000

    def test_that_never_ends_does_not_outlive_an_answer_that_did_not_wait_for_it(self, client):
        head = b"POST /v1/deaf HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
        answer = raw(client, head)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"connection: close" in answer

    def test_that_waits_to_be_asked_for_is_not_asked_for(self, client):
        head = b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\n"
        answer = raw(client, head + b"Content-Length: 9000000\r\nExpect: 100-continue\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 413 ")

    def test_that_breaks_off_is_nobodys_failure(self, client, caplog):
        head = b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nx"
        for _ in range(5):
            with closing(
                socket.create_connection((client.base_url.host, client.base_url.port))
            ) as wire:
                wire.sendall(head)
                time.sleep(0.05)
        assert client.post("/v1/recommend", content=b"x").status_code == 200
        assert caplog.records == []

    @pytest.mark.parametrize("told", [b"-1", b"1e9", b"99999999999999999999999"])
    def test_of_an_absurd_length_is_refused(self, client, told):
        head = b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
        answer = raw(client, head + told + b"\r\n\r\n", half=True)
        assert answer[:13] in (b"HTTP/1.1 400 ", b"HTTP/1.1 413 ")


class TestAnswers:
    @pytest.mark.parametrize("path", ["/", "/v1/kept", "/v1/fails", "/static/x", "/v1/x"])
    def test_carry_every_security_header_once(self, local, path):
        answer = local.get(path)
        for name, value in HEADERS:
            assert answer.headers.get_list(name.decode()) == [value.decode()]

    def test_allow_no_other_origin(self, local):
        sent = {"origin": "https://evil.example", "access-control-request-method": "POST"}
        for method in ("GET", "OPTIONS"):
            answer = local.request(method, "/v1/x", headers=sent)
            assert not [name for name in answer.headers if name.startswith("access-control")]

    def test_of_the_api_are_not_stored(self, local):
        assert local.get("/v1/x").headers["cache-control"] == "no-store"
        assert "cache-control" not in local.get("/static/x").headers

    def test_may_say_themselves_how_long_they_hold(self, local):
        assert local.get("/v1/kept").headers.get_list("cache-control") == ["max-age=60"]

    def test_tell_nothing_of_a_failure_but_log_it_with_the_requests_id(self, local, caplog):
        answer = local.get("/v1/fails", headers={"x-request-id": "mine"})
        assert answer.status_code == 500
        assert "secret" not in answer.text
        assert "request mine failed" in caplog.text
        assert "a secret path" in caplog.text

    def test_that_broke_off_halfway_do_not_look_whole(self, local, caplog):
        with pytest.raises(httpx.RemoteProtocolError):
            local.get("/v1/halfway")
        assert "a secret" in caplog.text

    def test_of_a_bare_app_that_fails_are_errors_in_json(self, caplog):
        async def app(scope, receive, send):
            raise KeyError("secret")

        with running(Guard(app)) as address:
            message = refused(httpx.get(f"{address}/v1/x"), 500, "internal")
        assert message == "the server failed at this; its log says why"

    def test_are_given_even_if_the_app_forgets_to(self):
        async def app(scope, receive, send):
            await asyncio.sleep(0)

        with running(Guard(app)) as address:
            refused(httpx.get(f"{address}/v1/x"), 500, "internal")


class TestRequestId:
    def test_is_taken_from_the_request(self, local):
        answer = local.get("/v1/x", headers={"x-request-id": "Shop-1.2_3"})
        assert answer.headers["x-request-id"] == answer.json()["request_id"] == "Shop-1.2_3"

    @pytest.mark.parametrize("sent", ["", "a b", "x" * 65, 'a"b', "a/b"])
    def test_that_is_no_good_is_made_anew(self, local, sent):
        answer = local.get("/v1/x", headers={"x-request-id": sent})
        assert re.fullmatch("[0-9a-f]{16}", answer.headers["x-request-id"])

    def test_is_made_where_there_is_none_each_time_another(self, local):
        assert len({local.get("/v1/x").headers["x-request-id"] for _ in range(20)}) == 20


class TestHost:
    @pytest.mark.parametrize("host", ["localhost", "LOCALHOST:99", "127.0.0.1:8080", "[::1]:8080"])
    def test_of_the_machine_itself_is_answered(self, local, host):
        assert local.get("/v1/x", headers={"host": host}).status_code == 200

    @pytest.mark.parametrize(
        "host", ["evil.example", "evil.example:80", "localhost.evil.example", "", "[::2]", "[::1"]
    )
    def test_that_was_made_to_resolve_here_is_not(self, local, host):
        answer = local.get("/v1/x", headers={"host": host})
        if host == "[::1":
            assert answer.status_code in (200, 403)  # a name no browser can send
        else:
            assert "localhost" in refused(answer, 403, "forbidden")

    def test_of_any_name_is_answered_elsewhere(self):
        with guarded(loopback=False) as client:
            assert client.get("/v1/x", headers={"host": "shop.example"}).status_code == 200

    def test_may_be_one_that_was_named(self):
        with guarded(hosts=["Shop.example"]) as client:
            assert client.get("/v1/x", headers={"host": "shop.example:80"}).status_code == 200


class TestOtherSites:
    @pytest.mark.parametrize(
        "sent",
        [
            {"sec-fetch-site": "cross-site"},
            {"origin": "https://evil.example"},
            {"origin": "http://localhost:1"},
            {"origin": "null"},
        ],
    )
    def test_may_not_change_anything(self, local, sent):
        for method in ("POST", "PUT", "DELETE"):
            answer = local.request(method, "/v1/items/7", headers=sent)
            assert "another site" in refused(answer, 403, "forbidden")

    def test_may_link_here(self, local):
        assert local.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 200

    def test_are_not_our_own_page(self, local):
        origin = f"http://{local.base_url.netloc.decode()}"
        sent = {"origin": origin, "sec-fetch-site": "same-origin"}
        assert local.post("/v1/events", headers=sent).status_code == 200

    def test_are_not_the_names_that_were_given(self):
        with guarded(hosts=["shop.example"]) as client:
            sent = {"origin": "https://shop.example"}
            assert client.post("/v1/events", headers=sent).status_code == 200


def test_a_websocket_is_refused(local):
    head = (
        b"GET /v1/x HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    assert b" 101 " not in raw(local, head, half=True)


def test_nothing_is_logged_of_what_is_refused(local, caplog):
    caplog.set_level(logging.INFO, "tfrec")
    local.get("/v1/x", headers={"host": "evil.example"})
    assert [record for record in caplog.records if record.name.startswith("tfrec")] == []
