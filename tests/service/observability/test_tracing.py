"""Traces: whose request it is, in the log and at a collector that speaks OTLP over HTTP."""

from __future__ import annotations

import builtins
import gzip
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from service.observability.logs import JsonFormatter
from service.observability.tracing import Parent, TraceIds, open_tracer, parse_traceparent, spanned
from service.settings import SettingsError
from tests.service.conftest import Serve

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize(
    ("header", "parent"),
    [
        (f"00-{TRACE}-{PARENT}-01", Parent(TRACE, PARENT, sampled=True)),
        (f"00-{TRACE}-{PARENT}-00", Parent(TRACE, PARENT, sampled=False)),
        (f"cc-{TRACE}-{PARENT}-01-what-comes-later", Parent(TRACE, PARENT, sampled=True)),
        (f"00-{TRACE}-{PARENT}-01-too-much", None),
        (f"ff-{TRACE}-{PARENT}-01", None),
        (f"00-{'0' * 32}-{PARENT}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{PARENT}-01", None),
        (f"00-{TRACE}-{PARENT}", None),
        ("", None),
    ],
)
def test_traceparent_is_read_as_the_standard_says(header: str, parent: Parent | None) -> None:
    assert parse_traceparent(header) == parent


def log_line() -> dict[str, Any]:
    record = logging.makeLogRecord({"name": "x", "msg": "request"})
    return dict(json.loads(JsonFormatter().format(record)))


def test_log_lines_of_a_request_carry_its_clients_trace() -> None:
    tracer = open_tracer("off")
    with spanned(tracer.begin("GET", Parent(TRACE, PARENT, sampled=True))):
        line = log_line()
    assert line["trace_id"] == TRACE
    assert len(line["span_id"]) == 16
    assert line["span_id"] != PARENT
    assert "trace_id" not in log_line()


def test_a_request_without_a_trace_begins_one() -> None:
    tracer = open_tracer("off")
    ids = {tracer.begin("GET", None).ids for _ in range(3)}
    assert len({trace_id for trace_id, _ in ids}) == 3
    assert all(len(each.trace_id) == 32 for each in ids)
    assert isinstance(next(iter(ids)), TraceIds)


class Collector:
    """Keeps the spans that are sent to it."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resource: dict[str, str] = {}
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                    collector.resource |= {
                        item.key: item.value.string_value for item in group.resource.attributes
                    }
                    for scope in group.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    collector = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    yield collector
    collector.close()


def test_a_request_is_a_span_of_its_clients_trace_with_a_child_for_each_stage(
    collector: Collector, serve: Serve, video: Path, tmp_path: Path
) -> None:
    with serve(tracing="otlp", spool_dir=tmp_path) as client:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        answer = client.post("/v1/classify", content=video.read_bytes(), headers=headers)
        assert answer.status_code == 200
        client.post("/v1/classify", content=b"words", headers={"traceparent": "nonsense"})
    # The service sends what is left when it stops.
    spans = {span.name: span for span in collector.spans if span.trace_id.hex() == TRACE}
    assert set(spans) == {"POST /v1/classify", "upload", "decode", "queue", "inference"}
    request = spans.pop("POST /v1/classify")
    assert request.parent_span_id.hex() == PARENT
    attributes = {item.key: item.value for item in request.attributes}
    assert attributes["http.response.status_code"].int_value == 200
    assert attributes["http.route"].string_value == "/v1/classify"
    ends = [request.start_time_unix_nano]
    for stage in ("upload", "decode", "queue", "inference"):
        assert spans[stage].parent_span_id == request.span_id
        assert ends[-1] - 50_000_000 <= spans[stage].start_time_unix_nano
        ends.append(spans[stage].end_time_unix_nano)
    assert ends == sorted(ends)
    refused = [span for span in collector.spans if span.trace_id.hex() != TRACE]
    assert [span.name for span in refused] == ["POST /v1/classify"]
    assert refused[0].parent_span_id == b""
    assert collector.resource["service.name"] == "timesformer"


def test_the_service_is_named_as_opentelemetrys_variables_say(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "films")
    tracer = open_tracer("otlp")
    span = tracer.begin("GET", None)
    span.end("/health/live", 500)
    tracer.close()
    assert collector.resource["service.name"] == "films"
    (sent,) = collector.spans
    assert sent.status.code == sent.status.STATUS_CODE_ERROR


def test_a_trace_that_its_client_does_not_sample_is_not_sent(collector: Collector) -> None:
    tracer = open_tracer("otlp")
    span = tracer.begin("GET", Parent(TRACE, PARENT, sampled=False))
    assert span.ids.trace_id == TRACE
    span.stages({"upload": 0.1})
    span.end("/", 200)
    tracer.close()
    assert collector.spans == []


def test_spans_without_opentelemetry_are_an_error_at_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    really = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError("no", name="opentelemetry")
        return really(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(SettingsError, match=r"TIMESFORMER_TRACING.*extra `otel`"):
        open_tracer("otlp")
