"""Traces: a span for each request and each of its stages, sent to a collector of OpenTelemetry."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from tfrec.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")

Span = tuple[str, float, float]
"""A stage, and when it began and ended by ``time.perf_counter``."""


def open_tracer(environment: Mapping[str, str] = os.environ) -> Tracer | None:
    """A tracer if the standard variables of OpenTelemetry name a collector, else None.

    Nothing of OpenTelemetry is imported where there is none.

    Raises:
      ConfigError: the variables ask for a protocol that is not spoken here.
    """
    if not any(environment.get(name) for name in ENDPOINTS):
        return None
    asked = next((environment[name] for name in PROTOCOLS if environment.get(name)), "")
    if asked not in ("", "http/protobuf"):
        raise ConfigError(
            f"OTEL_EXPORTER_OTLP_PROTOCOL is '{asked}', and only http/protobuf is spoken here; "
            "unset it, and name the collector's HTTP port (4318 by default)"
        )
    return Tracer()


class Tracer:
    """Makes spans of requests that are over, and sends them from a thread of its own.

    Where to, which share, and under which name is read from the standard variables
    (``OTEL_EXPORTER_OTLP_ENDPOINT``, ``OTEL_TRACES_SAMPLER``, ``OTEL_SERVICE_NAME``, ...).
    """

    def __init__(self) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = _provider()
        self._tracer = self._provider.get_tracer("tfrec")
        self._extract = TraceContextTextMapPropagator().extract
        self._under = trace.set_span_in_context
        self._kinds = trace.SpanKind
        self._failed = trace.Status(trace.StatusCode.ERROR)

    def record(
        self,
        name: str,
        begun: float,
        ended: float,
        stages: Iterable[Span],
        attributes: Mapping[str, str | int],
        parent: str = "",
    ) -> None:
        """Makes the spans of one request.

        Args:
          name: Method and route.
          begun: When it began, by ``time.perf_counter``.
          ended: When it ended.
          stages: What it consisted of.
          attributes: What else is known of it, by OpenTelemetry's names.
          parent: The header ``traceparent`` that it came with; empty: none.
        """
        epoch = time.time_ns() - time.perf_counter_ns()

        def moment(seconds: float) -> int:
            return epoch + int(seconds * 1e9)

        above = self._extract({"traceparent": parent}) if parent else None
        span = self._tracer.start_span(
            name, above, self._kinds.SERVER, attributes, start_time=moment(begun)
        )
        if span.is_recording():
            within = self._under(span)
            for stage, start, end in stages:
                inner = self._tracer.start_span(stage, within, start_time=moment(start))
                inner.end(moment(end))
        if int(attributes.get("http.response.status_code", 0)) >= 500:
            span.set_status(self._failed)
        span.end(moment(ended))

    def close(self) -> None:
        """Sends what waits, and stops."""
        self._provider.shutdown()


def _provider() -> TracerProvider:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "tfrec"}
    provider = TracerProvider(resource=Resource.create(name), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
