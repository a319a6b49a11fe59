"""Telemetry: what a server tells of itself, as metrics, figures, logs and traces."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tfrec.serving.answers import STATUS
from tfrec.serving.logs import Lines, hashed
from tfrec.serving.served import Served
from tfrec.serving.window import Window

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from tfrec.serving.traces import Tracer

STAGES = ("parse", "state", "wait", "encode", "retrieve", "rank", "rerank", "total")
CONTENT_TYPE = prometheus.CONTENT_TYPE_LATEST
GONE = 499  # the status that stands for a client that left before there was an answer

# What a client can make up must not become a label: each value of one is kept for ever.
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"))
EVENTS = frozenset(("view", "click", "like", "dislike", "hide", "rating", "purchase"))
QUIET = ("/v1/stats", "/v1/models")  # what the operators' page asks all the time

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_FINE = (0.0001, 0.00025, 0.0005, *_SECONDS[:-1])
_CODES = {status: code for code, status in STATUS.items()}


class Stages:
    """The times of one request: ``scope["state"]["stages"]``, one for each.

    Attributes:
      begun: When it came in, by ``time.perf_counter``, as all times here.
      spans: Stage, begin and end of what was done for it.
      user_id: Whom it was about, if it was about somebody; hashed before it is written anywhere.
      model_version: Which version of the bundle answered.
    """

    __slots__ = ("_last", "begun", "model_version", "spans", "user_id")

    def __init__(self) -> None:
        self.begun = self._last = time.perf_counter()
        self.spans: list[tuple[str, float, float]] = []
        self.user_id = ""
        self.model_version = ""

    def mark(self, stage: str) -> None:
        """Says that what was done since the last mark, or since the request came, was ``stage``."""
        now = time.perf_counter()
        self.spans.append((stage, self._last, now))
        self._last = now

    def add(self, stage: str, begin: float, end: float) -> None:
        """Adds a stage that was timed elsewhere, such as in a batch; the next mark begins there."""
        self.spans.append((stage, begin, end))
        self._last = end

    def seconds(self, ended: float) -> dict[str, float]:
        """Stage -> its time in all, with the ``total``; empty if no stage was told of."""
        found: dict[str, float] = {}
        for stage, begin, end in self.spans:
            found[stage] = found.get(stage, 0.0) + end - begin
        return {**found, "total": ended - self.begun} if found else found


class Telemetry:
    """Everything that is counted and timed; one for each server.

    Args:
      served: Counts what is recommended; to be replaced when the catalog is another.
      salt: Mixed into users' ids before they are logged.
      tracer: Where spans go; None: nowhere.
      lines: Where the line of each request goes; None: nowhere.
    """

    def __init__(
        self,
        served: Served | None = None,
        salt: bytes = b"",
        tracer: Tracer | None = None,
        lines: Lines | None = None,
    ) -> None:
        self.served = served or Served([0])
        self.window = Window(STAGES)
        self.registry = prometheus.CollectorRegistry()
        self._salt, self._tracer, self._lines = salt, tracer, lines
        self._live = _Live(self)
        self._lock = threading.Lock()
        self._events: Counter[str] = Counter()
        self._versions: set[str] = set()
        self._declare()

    def _declare(self) -> None:
        register = self.registry
        register.register(self._live)
        prometheus.ProcessCollector(registry=register)
        self._requests = prometheus.Histogram(
            "tfrec_request_seconds",
            "Time of requests",
            ("method", "route", "status"),
            buckets=_SECONDS,
            registry=register,
        )
        timed = prometheus.Histogram(
            "tfrec_stage_seconds",
            "Time of each stage of the requests that the models answer",
            ("stage",),
            buckets=_FINE,
            registry=register,
        )
        self._stages = {stage: timed.labels(stage) for stage in STAGES}

        def counter(name: str, about: str, *labels: str) -> prometheus.Counter:
            return prometheus.Counter(name, about, labels, registry=register)

        self._errors = counter("tfrec_errors", "Answers that are errors", "route", "code")
        self._cache = counter("tfrec_cache_lookups", "Looks into a cache", "cache", "result")
        self._taken = counter("tfrec_events", "Events that were taken in", "event")
        self._shares = prometheus.Gauge(
            "tfrec_version_share",
            "Share of users that each active version answers",
            ("version",),
            registry=register,
        )

    # --- what the app tells ---

    def events(self, kinds: Iterable[str]) -> None:
        """Counts events that were taken in, by what they are."""
        found = Counter(kind if kind in EVENTS else "other" for kind in kinds)
        with self._lock:
            self._events.update(found)
        for kind, times in found.items():
            self._taken.labels(kind).inc(times)

    def cache(self, name: str, hit: bool) -> None:
        """Counts a look into a cache."""
        self._cache.labels(name, "hit" if hit else "miss").inc()

    def versions(self, shares: Mapping[str, float]) -> None:
        """Says which versions answer which share of users, in place of what was said before."""
        with self._lock:
            for version in self._versions - shares.keys():
                self._shares.remove(version)
            for version, share in shares.items():
                self._shares.labels(version).set(share)
            self._versions = set(shares)

    def gauge(self, name: str, about: str, value: Callable[[], float]) -> None:
        """Adds a figure that is asked for when the metrics are, such as a queue's length."""
        self._live.gauges[name] = (about, value)

    def counter(self, name: str, about: str, value: Callable[[], float]) -> None:
        """The same for one that only grows, such as exposures that were dropped."""
        self._live.counters[name] = (about, value)

    # --- what it tells ---

    def render(self) -> bytes:
        """The metrics as Prometheus reads them, of the type :data:`CONTENT_TYPE`."""
        return prometheus.generate_latest(self.registry)

    def stats(self) -> dict[str, Any]:
        """What ``GET /v1/stats`` tells of requests, times, lists and events."""
        with self._lock:
            events = dict(self._events)
        return {**self.window.summary(), "served": self.served.summary(), "events": events}

    def finished(self, request: Finished) -> None:
        """Counts, logs and traces a request."""
        seconds = request.stages.seconds(request.ended)
        self._count(request, seconds)
        if self._lines is not None:
            level = logging.ERROR if request.status >= 500 else logging.INFO
            self._lines.request(level, partial(self._fields, request))
        if self._tracer is not None:
            self._trace(self._tracer, request)

    def _count(self, request: Finished, seconds: Mapping[str, float]) -> None:
        route, status = request.route, request.status
        took = request.ended - request.stages.begun
        self._requests.labels(request.method, route, str(status)).observe(took)
        if status >= 400:
            self._errors.labels(route, _CODES.get(status, str(status))).inc()
        for stage, part in seconds.items():
            self._stages[stage].observe(part)
        if route.startswith("/v1/") and not route.startswith(QUIET):
            self.window.record(status >= 500, seconds)

    def _fields(self, request: Finished) -> dict[str, Any]:
        """What is logged of a request."""
        stages = request.stages
        fields = {
            "request_id": request.state.get("request_id", ""),
            "method": request.method,
            "route": request.route,
            "status": request.status,
            "ms": round(1000 * (request.ended - stages.begun), 2),
            "bytes": request.sent,
        }
        if stages.user_id:
            fields["user"] = hashed(self._salt, stages.user_id)
        if stages.model_version:
            fields["model_version"] = stages.model_version
        if "key_id" in request.state:
            fields["key"] = request.state["key_id"]
        return fields

    def _trace(self, tracer: Tracer, request: Finished) -> None:
        stages = request.stages
        attributes: dict[str, str | int] = {
            "http.request.method": request.method,
            "http.route": request.route,
            "http.response.status_code": request.status,
            "tfrec.request_id": request.state.get("request_id", ""),
            "tfrec.model_version": stages.model_version,
        }
        name = f"{request.method} {request.route}"
        parent = dict(request.headers).get(b"traceparent", b"").decode("latin-1")
        tracer.record(name, stages.begun, request.ended, stages.spans, attributes, parent)


class Finished:
    """A request that is over.

    Args:
      scope: As ASGI has it, with the route that was found and what is in its state.
      status: Of its answer; :data:`GONE`: there was none.
      sent: Bytes of the answer's body.
    """

    __slots__ = ("ended", "headers", "method", "route", "sent", "stages", "state", "status")

    def __init__(self, scope: Scope, status: int, sent: int) -> None:
        self.ended = time.perf_counter()
        self.method = scope["method"] if scope["method"] in METHODS else "other"
        self.route = route_of(scope)
        self.headers: Iterable[tuple[bytes, bytes]] = scope["headers"]
        self.state: dict[str, Any] = scope["state"]
        self.stages: Stages = self.state["stages"]
        self.status, self.sent = status, sent


class Observer:
    """ASGI middleware outside all others: gives each request its :class:`Stages`, and counts it.

    Args:
      app: What it observes.
      telemetry: Where it counts.
    """

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self.app = app
        self.telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection of any kind, as ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope.setdefault("state", {})["stages"] = Stages()
        status, sent = GONE, 0

        async def counted(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                sent += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, counted)
        finally:
            self.telemetry.finished(Finished(scope, status, sent))


def route_of(scope: Scope) -> str:
    """The route as it was declared, such as ``/v1/users/{user_id}``; never what a client sent."""
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else "unmatched"


class _Live(Collector):
    """Figures that are asked for when the metrics are."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self.gauges: dict[str, tuple[str, Callable[[], float]]] = {}
        self.counters: dict[str, tuple[str, Callable[[], float]]] = {}

    def collect(self) -> Iterator[Metric]:
        """Every figure as it is now."""
        for name, (about, value) in self.gauges.items():
            yield GaugeMetricFamily(name, about, value())
        for name, (about, value) in self.counters.items():
            yield CounterMetricFamily(name, about, value())
        yield from _of_lists(self._telemetry.served.summary())


def _of_lists(served: Mapping[str, Any]) -> Iterator[Metric]:
    yield CounterMetricFamily("tfrec_lists", "Lists that were answered", served["lists"])
    yield GaugeMetricFamily(
        "tfrec_coverage", "Share of the catalog that was recommended", served["coverage"]
    )
    if served["diversity"] is not None:
        about = "Mean of 1 - cosine of the pairs of a list"
        yield GaugeMetricFamily("tfrec_diversity", about, served["diversity"])
    about = "Share of places that each tenth of the catalog got, 1 the most popular"
    tenths = GaugeMetricFamily("tfrec_popularity_share", about, labels=["tenth"])
    for number, share in enumerate(served["popularity_deciles"], 1):
        tenths.add_metric([str(number)], share)
    yield tenths
    sources = CounterMetricFamily("tfrec_sources", "Places by their source", labels=["source"])
    for source, times in served["sources"].items():
        sources.add_metric([source], times)
    yield sources
