"""Traces: what a real collector receives, and that nothing is loaded where there is none."""

import gzip
import http.server
import subprocess
import sys
import threading
import time

import pytest

from tfrec.errors import ConfigError
from tfrec.serving.traces import open_tracer

trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")


@pytest.fixture
def collector(monkeypatch):
    """A collector of OTLP over HTTP; gives the spans it got, each with its service's name."""
    spans = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            assert self.path == "/v1/traces"
            asked = trace_service.ExportTraceServiceRequest.FromString(body)
            for found in asked.resource_spans:
                named = {a.key: a.value.string_value for a in found.resource.attributes}
                for scope in found.scope_spans:
                    spans.extend((named["service.name"], span) for span in scope.spans)
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
    yield spans
    server.shutdown()
    thread.join()
    server.server_close()


def record(tracer, status=200, parent=""):
    now = time.perf_counter()
    tracer.record(
        "POST /v1/recommend",
        now - 0.010,
        now,
        [("state", now - 0.009, now - 0.008), ("rank", now - 0.005, now - 0.001)],
        {"http.response.status_code": status, "http.route": "/v1/recommend"},
        parent,
    )


def test_a_request_and_its_stages_arrive_as_spans(collector):
    before = time.time_ns()
    tracer = open_tracer()
    record(tracer)
    tracer.close()
    spans = {span.name: span for _, span in collector}
    assert {name for name, _ in collector} == {"tfrec"}
    assert spans.keys() == {"POST /v1/recommend", "state", "rank"}
    whole = spans["POST /v1/recommend"]
    assert {spans[stage].parent_span_id for stage in ("state", "rank")} == {whole.span_id}
    assert len({span.trace_id for span in spans.values()}) == 1
    took = {
        name: span.end_time_unix_nano - span.start_time_unix_nano for name, span in spans.items()
    }
    assert took["rank"] == pytest.approx(4e6, rel=0.01)
    assert took["POST /v1/recommend"] == pytest.approx(10e6, rel=0.01)
    assert abs(whole.end_time_unix_nano - before) < 60e9
    told = {a.key: a.value for a in whole.attributes}
    assert told["http.route"].string_value == "/v1/recommend"
    assert told["http.response.status_code"].int_value == 200


def test_a_request_goes_on_with_the_trace_it_came_with(collector):
    tracer = open_tracer()
    record(tracer, parent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    record(tracer, parent="nonsense")
    tracer.close()
    whole = [span for _, span in collector if span.name.startswith("POST")]
    assert whole[0].trace_id.hex() == "0af7651916cd43dd8448eb211c80319c"
    assert whole[0].parent_span_id.hex() == "b7ad6b7169203331"
    assert not whole[1].parent_span_id


def test_a_request_that_is_not_sampled_is_not_sent(collector):
    tracer = open_tracer()
    record(tracer, parent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00")
    tracer.close()
    assert collector == []


def test_a_failure_of_the_server_is_marked_so(collector):
    tracer = open_tracer()
    record(tracer, status=500)
    record(tracer, status=404)
    tracer.close()
    assert [span.status.code for _, span in collector if span.name.startswith("POST")] == [2, 0]


def test_the_standard_name_of_the_service_holds(collector, monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "shop")
    tracer = open_tracer()
    record(tracer)
    tracer.close()
    assert {name for name, _ in collector} == {"shop"}


def test_without_a_collector_nothing_is_loaded():
    code = (
        "import sys; from tfrec.serving import telemetry, traces; "
        "assert traces.open_tracer({}) is None; telemetry.Telemetry(); "
        "print([name for name in sys.modules if name.startswith(('opentelemetry', 'requests'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_another_protocol_is_refused_in_words():
    told = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4317",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
    }
    with pytest.raises(ConfigError, match="is 'grpc', and only http/protobuf is spoken here"):
        open_tracer(told)
