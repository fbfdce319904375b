"""W3C trace context in, and spans out where OpenTelemetry is installed and asked for.

A request belongs to the trace that its client names in `traceparent`, or begins one; every log line
of it carries the ids. With `TIMESFORMER_TRACING=otlp` each request is a span, with one child a
stage (upload, decode, queue, inference), sent to the collector that OpenTelemetry's own variables
name (`OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_SERVICE_NAME`, `OTEL_TRACES_SAMPLER` and so on).

The module does not use FastAPI's own telemetry (0.165): the span of FastAPI costs 0.13 ms of CPU a
request (0.30 ms with spans of operations), ours 0.06 ms, and FastAPI exports the query, in which
clients send the URLs of their webhooks.
"""

from __future__ import annotations

import contextlib
import contextvars
import re
import secrets
import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, NamedTuple, Protocol

from service.settings import SettingsError

if TYPE_CHECKING:
    from opentelemetry.trace import Span as OtelSpan
    from opentelemetry.trace import Tracer as OtelTracer

# https://www.w3.org/TR/trace-context/ version 00; later versions may have more behind the flags.
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
STAGES = ("upload", "decode", "queue", "inference")
"""In the order in which a request goes through them."""


class TraceIds(NamedTuple):
    """What a log line says of the trace, in hexadecimal."""

    trace_id: str
    span_id: str


class Parent(NamedTuple):
    """What a client sent in `traceparent`."""

    trace_id: str
    span_id: str
    sampled: bool


current: contextvars.ContextVar[TraceIds | None] = contextvars.ContextVar("trace", default=None)
_span: contextvars.ContextVar[Span | None] = contextvars.ContextVar("span", default=None)


class Span(Protocol):
    """One request, or one stage of it."""

    ids: TraceIds

    def stages(self, seconds: dict[str, float]) -> None:
        """Adds a child for each stage, which lasted so long and ended, the last of them, now."""

    def end(self, route: str, status: int) -> None:
        """Ends it with what became of the request."""


class Tracer(Protocol):
    """Begins a span for each request."""

    def begin(self, method: str, parent: Parent | None) -> Span: ...

    def close(self) -> None:
        """Sends what has not been sent."""


def parse_traceparent(header: str) -> Parent | None:
    """What the header says, or None if there is none or it is not of the form."""
    found = _TRACEPARENT.fullmatch(header)
    if not found or set(found[1]) == {"0"} or set(found[2]) == {"0"}:
        return None
    if header.startswith("00-") and found[4]:
        return None
    return Parent(found[1], found[2], bool(int(found[3], 16) & 1))


def open_tracer(kind: str) -> Tracer:
    """The tracer of the setting `tracing`.

    Raises:
        SettingsError: OpenTelemetry is asked for and not installed.
    """
    if kind == "off":
        return _IdsOnly()
    try:
        return _Otlp()
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"TIMESFORMER_TRACING: {error.name} is not installed: "
            "this needs the extra `otel` of the package timesformer-service"
        ) from error


@contextlib.contextmanager
def spanned(span: Span) -> Iterator[None]:
    """Inside the block, log lines carry the span's ids and `record_stages` adds to it."""
    ids, this = current.set(span.ids), _span.set(span)
    try:
        yield
    finally:
        current.reset(ids)
        _span.reset(this)


def record_stages(seconds: dict[str, float]) -> None:
    """Adds the stages of the present request to its span."""
    span = _span.get()
    if span is not None:
        span.stages(seconds)


class _IdsOnly:
    """Ids for the log; nothing is sent."""

    def begin(self, method: str, parent: Parent | None) -> Span:
        trace_id = parent.trace_id if parent else secrets.token_hex(16)
        return _Ids(TraceIds(trace_id, secrets.token_hex(8)))

    def close(self) -> None:
        pass


class _Ids:
    def __init__(self, ids: TraceIds) -> None:
        self.ids = ids

    def stages(self, seconds: dict[str, float]) -> None:
        pass

    def end(self, route: str, status: int) -> None:
        pass


class _Otlp:
    """Spans to an OpenTelemetry collector, in the background."""

    def __init__(self) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        # What OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say wins over ours.
        ours = {"service.name": "timesformer", "service.version": version("timesformer-service")}
        resource = Resource(ours).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("timesformer")

    def begin(self, method: str, parent: Parent | None) -> Span:
        from opentelemetry import trace

        context = None
        if parent is not None:
            remote = trace.SpanContext(
                int(parent.trace_id, 16),
                int(parent.span_id, 16),
                is_remote=True,
                trace_flags=trace.TraceFlags(int(parent.sampled)),
            )
            context = trace.set_span_in_context(trace.NonRecordingSpan(remote))
        span = self._tracer.start_span(
            method, context, trace.SpanKind.SERVER, {"http.request.method": method}
        )
        return _OtlpSpan(self._tracer, span, method)

    def close(self) -> None:
        self._provider.shutdown()


class _OtlpSpan:
    def __init__(self, tracer: OtelTracer, span: OtelSpan, method: str) -> None:
        self._tracer = tracer
        self._span = span
        self._method = method
        context = span.get_span_context()
        self.ids = TraceIds(f"{context.trace_id:032x}", f"{context.span_id:016x}")

    def stages(self, seconds: dict[str, float]) -> None:
        from opentelemetry.trace import set_span_in_context

        context = set_span_in_context(self._span)
        took = [(stage, int(seconds[stage] * 1e9)) for stage in STAGES if stage in seconds]
        begins = time.time_ns() - sum(nanoseconds for _, nanoseconds in took)
        for stage, nanoseconds in took:
            child = self._tracer.start_span(stage, context, start_time=begins)
            begins += nanoseconds
            child.end(begins)

    def end(self, route: str, status: int) -> None:
        from opentelemetry.trace import StatusCode

        self._span.update_name(f"{self._method} {route}")
        self._span.set_attributes({"http.route": route, "http.response.status_code": status})
        if status >= 500:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()
