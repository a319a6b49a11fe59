"""Telemetry behind a real server: what is counted, timed and logged of each request."""

import io
import json
import re
import time
from contextlib import contextmanager

import httpx
import pytest
from asgi_server import running
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from tfrec.serving import logs
from tfrec.serving.security import Guard
from tfrec.serving.served import Served
from tfrec.serving.telemetry import STAGES, Observer, Stages, Telemetry


async def recommend(request):
    stages = request.state.stages
    await request.body()
    for stage in STAGES[:-1]:
        stages.mark(stage)
    stages.user_id, stages.model_version = "Jane Doe", "3"
    return JSONResponse({"items": []})


async def user(request):
    return JSONResponse({}, int(request.query_params.get("status", 200)))


async def fails(request):
    raise RuntimeError("broken")


async def static(scope, receive, send):
    await Response("x" * 1000)(scope, receive, send)


ROUTES = [
    Route("/v1/recommend", recommend, methods=["POST"]),
    Route("/v1/users/{user_id}", user),
    Route("/v1/stats", user),
    Route("/v1/fails", fails),
    Mount("/static", app=static),
]


@contextmanager
def observed(telemetry):
    app = Observer(Guard(Starlette(routes=ROUTES)), telemetry)
    with running(app) as address, httpx.Client(base_url=address) as client:
        yield client


@pytest.fixture
def telemetry():
    return Telemetry(Served([0, 5, 4, 3, 2, 1]), salt=b"salt")


@pytest.fixture
def client(telemetry):
    with observed(telemetry) as client:
        yield client


def metrics(telemetry):
    """Name with labels -> value, as Prometheus would read them."""
    found = {}
    for family in text_string_to_metric_families(telemetry.render().decode()):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def counted(telemetry, name, times=1, **labels):
    """Waits for a count: a request is counted after its answer is sent."""
    key = f"{name}{{{','.join(f'{k}={v}' for k, v in sorted(labels.items()))}}}"
    for _ in range(200):
        if metrics(telemetry).get(key) == times:
            return True
        time.sleep(0.01)
    return metrics(telemetry).get(key)


class TestMetrics:
    def test_count_requests_by_route_and_status(self, telemetry, client):
        for status in (200, 200, 404):
            client.get(f"/v1/users/{status}", params={"status": status})
        about = {"method": "GET", "route": "/v1/users/{user_id}"}
        name = "tfrec_request_seconds_count"
        assert counted(telemetry, name, 2, status="200", **about) is True
        assert counted(telemetry, name, 1, status="404", **about) is True

    def test_time_each_stage(self, telemetry, client):
        client.post("/v1/recommend")
        for stage in STAGES:
            assert counted(telemetry, "tfrec_stage_seconds_count", 1, stage=stage) is True

    def test_count_errors_by_their_code(self, telemetry, client):
        client.get("/v1/fails")
        client.get("/v1/users/1", params={"status": 409})
        name = "tfrec_errors_total"
        assert counted(telemetry, name, 1, route="/v1/fails", code="internal") is True
        assert counted(telemetry, name, 1, route="/v1/users/{user_id}", code="conflict") is True

    def test_count_what_the_guard_refuses(self, telemetry, client):
        client.get("/v1/users/1", headers={"host": "evil.example"})
        name = "tfrec_errors_total"
        assert counted(telemetry, name, 1, route="unmatched", code="forbidden") is True

    def test_have_no_label_that_a_client_makes_up(self, telemetry, client):
        for number in range(20):
            client.get(f"/v1/users/{number}")
            client.get(f"/nowhere/{number}")
            client.request(f"M{number}", f"/static/{number}")
        assert counted(
            telemetry,
            "tfrec_request_seconds_count",
            20,
            method="GET",
            route="unmatched",
            status="404",
        )
        telemetry.events([f"event {number}" for number in range(20)])
        assert len([key for key in metrics(telemetry) if "_count{" in key]) <= 4 + len(STAGES)
        assert metrics(telemetry)["tfrec_events_total{event=other}"] == 20

    def test_tell_of_events_and_caches(self, telemetry):
        telemetry.events(["like", "like", "view"])
        telemetry.cache("text", True)
        telemetry.cache("text", False)
        found = metrics(telemetry)
        assert found["tfrec_events_total{event=like}"] == 2
        assert found["tfrec_cache_lookups_total{cache=text,result=hit}"] == 1
        assert found["tfrec_cache_lookups_total{cache=text,result=miss}"] == 1

    def test_tell_of_the_versions_that_are_active_now(self, telemetry):
        telemetry.versions({"1": 0.8, "2": 0.2})
        telemetry.versions({"2": 1.0})
        shares = {k: v for k, v in metrics(telemetry).items() if "version_share" in k}
        assert shares == {"tfrec_version_share{version=2}": 1.0}

    def test_tell_of_what_was_served(self, telemetry):
        telemetry.served.record([1, 2], ["behaviour", "text"], 0.5)
        found = metrics(telemetry)
        assert found["tfrec_lists_total{}"] == 1
        assert found["tfrec_coverage{}"] == 0.4
        assert found["tfrec_diversity{}"] == 0.5
        assert found["tfrec_sources_total{source=text}"] == 1
        assert found["tfrec_popularity_share{tenth=1}"] == 0.5

    def test_ask_for_figures_when_they_are_asked_for(self, telemetry):
        waiting = [1, 2, 3]
        telemetry.gauge("tfrec_queue_length", "Requests that wait", lambda: len(waiting))
        telemetry.counter("tfrec_exposures_dropped", "Exposures not logged", lambda: 7)
        waiting.pop()
        found = metrics(telemetry)
        assert found["tfrec_queue_length{}"] == 2
        assert found["tfrec_exposures_dropped_total{}"] == 7

    def test_are_of_this_server_alone(self):
        one, other = Telemetry(), Telemetry()
        one.events(["like"])
        assert "tfrec_events_total{event=like}" not in metrics(other)


class TestStats:
    def test_are_json_with_every_part_of_them(self, telemetry, client):
        client.post("/v1/recommend")
        telemetry.events(["like", "odd"])
        assert counted(telemetry, "tfrec_stage_seconds_count", 1, stage="total") is True
        found = json.loads(json.dumps(telemetry.stats()))
        assert found.keys() == {
            *("uptime", "requests", "errors", "rate", "latency", "series", "served", "events"),
        }
        assert found["latency"].keys() == set(STAGES)
        assert (found["requests"], found["latency"]["total"]["count"]) == (1, 1)
        assert found["events"] == {"like": 1, "other": 1}

    def test_do_not_count_those_who_ask_for_them(self, telemetry, client):
        for path in ("/v1/stats", "/static/page.js", "/nowhere"):
            client.get(path)
        client.get("/v1/users/1")
        about = {"method": "GET", "route": "/v1/users/{user_id}", "status": "200"}
        assert counted(telemetry, "tfrec_request_seconds_count", 1, **about) is True
        assert telemetry.stats()["requests"] == 1

    def test_time_only_what_the_models_answer(self, telemetry, client):
        client.get("/v1/users/1")
        client.get("/v1/fails")
        about = {"method": "GET", "route": "/v1/fails", "status": "500"}
        assert counted(telemetry, "tfrec_request_seconds_count", 1, **about) is True
        found = telemetry.stats()
        assert (found["requests"], found["errors"]) == (2, 1)
        assert found["latency"]["total"]["count"] == 0


class TestLines:
    @pytest.fixture
    def lines_of(self):
        """What we log while requests are sent, as plain values."""

        def run(ask):
            stream = io.StringIO()
            lines = logs.start("INFO", "json", stream)
            try:
                with observed(Telemetry(salt=b"salt", lines=lines)) as client:
                    ask(client)
            finally:
                lines.close()
            found = [json.loads(line) for line in stream.getvalue().splitlines()]
            return [line for line in found if not line.get("logger", "").startswith("uvicorn")]

        return run

    def test_tell_of_a_request_what_is_needed_to_find_it(self, lines_of):
        sent = {"x-request-id": "mine"}
        (line,) = lines_of(lambda client: client.post("/v1/recommend", headers=sent))
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
        assert line.pop("ms") > 0
        assert line == {
            "level": "info",
            "request_id": "mine",
            "method": "POST",
            "route": "/v1/recommend",
            "status": 200,
            "bytes": 12,
            "user": logs.hashed(b"salt", "Jane Doe"),
            "model_version": "3",
        }

    def test_name_no_user_and_nothing_that_was_sent(self, lines_of):
        def ask(client):
            client.post("/v1/recommend", content=b"private words")
            client.get("/v1/users/Jane%20Doe?q=private")
            client.get("/Jane Doe")

        assert not re.search("Jane|private", json.dumps(lines_of(ask)))

    def test_of_failures_are_errors_with_the_traceback_beside_them(self, lines_of):
        found = lines_of(lambda client: client.get("/v1/fails"))
        assert {line["level"] for line in found} == {"error"}
        (request,) = [line for line in found if "status" in line]
        (failure,) = [line for line in found if "error" in line]
        assert request["status"] == 500
        assert request["request_id"] in failure["message"]
        assert "RuntimeError: broken" in failure["error"]


class TestStages:
    def test_are_what_passed_between_marks(self):
        stages = Stages()
        stages.mark("parse")
        stages.add("rank", 10.0, 10.5)
        stages.add("rank", 20.0, 20.25)
        found = stages.seconds(stages.begun + 1)
        assert found["rank"] == 0.75
        assert found["total"] == pytest.approx(1)
        assert 0 <= found["parse"] < 1

    def test_that_were_not_told_of_have_no_total(self):
        assert Stages().seconds(1e9) == {}


@pytest.mark.slow
def test_a_server_logs_each_request_in_a_line_of_json(own_server):
    sent = {"x-request-id": "find-me"}
    httpx.post(f"{own_server.url}/v1/recommend", json={"user_id": "u1"}, headers=sent)
    own_server.stop()
    (line,) = [line for line in own_server.log.read_text().splitlines() if "find-me" in line]
    told = json.loads(line)
    assert (told["route"], told["status"]) == ("/v1/recommend", 200)
    assert told["model_version"]
    assert told["user"] != "u1"
