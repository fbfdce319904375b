"""Around every request: its id, its log line, its metrics, and a last answer if we break or stop.

Pure ASGI: the framework's decorator-style middleware hides a client's leaving from the endpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.problems import problem_for
from service.errors import InternalError, NotReadyError
from service.observability.logs import request_id
from service.observability.metrics import Metrics
from service.observability.tracing import Tracer, parse_traceparent, spanned

logger = logging.getLogger(__name__)
REQUEST_ID_HEADER = "X-Request-ID"
# For answers that bring none of their own: what is no page is not to be shown, kept or guessed at.
_SECURITY_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"cache-control": b"no-store",
    b"referrer-policy": b"no-referrer",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
}
LAST_WORD_S = 1.0
"""What a client may take to read why its request ends with the service."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestContext:
    """Gives each request an id (the client's own, if it sent a sane one) and accounts for it."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracer: Tracer) -> None:
        self._app = app
        self._metrics = metrics
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        identifier = _header(scope, b"x-request-id")
        parent = parse_traceparent(_header(scope, b"traceparent"))
        span = self._tracer.begin(_method(scope), parent)
        if not _REQUEST_ID.fullmatch(identifier):
            identifier = uuid.uuid4().hex
        token = request_id.set(identifier)
        self._metrics.requests_in_progress.inc()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = message["headers"]
                headers.append((b"x-request-id", identifier.encode("ascii")))
                _add_security_headers(headers)
                if scope["app"].state.stopping:
                    # So that the client's next request goes elsewhere.
                    headers.append((b"connection", b"close"))
            await send(message)

        with spanned(span):
            try:
                await self._app(scope, receive, send_with_id)
            except Exception:
                logger.exception("unhandled error")
                if not status:
                    error = InternalError("Something broke on our side; the log has more.")
                    answer = problem_for(scope["path"], error)
                    await answer(scope, receive, send_with_id)
            except asyncio.CancelledError:
                if scope["app"].state.stopping and not status:
                    self._metrics.rejected.labels(NotReadyError.code).inc()
                    await answer_last(scope, receive, send_with_id)
                raise
            finally:
                self._metrics.requests_in_progress.dec()
                # The template, not the path: what clients type must not become label values.
                route = getattr(scope.get("route"), "path", "unmatched")
                self._account(scope, route, status, time.perf_counter() - started)
                span.end(route, status)
                request_id.reset(token)

    def _account(self, scope: Scope, route: str, status: int, seconds: float) -> None:
        self._metrics.requests.labels(route, _method(scope), str(status)).inc()
        level = logging.DEBUG if route in {"/health/live", "/health/ready", "/metrics"} else 20
        if logger.isEnabledFor(level):
            facts = {"method": scope["method"], "path": scope["path"], "status": status}
            logger.log(level, "request", extra={**facts, "seconds": round(seconds, 4)})


async def answer_last(scope: Scope, receive: Receive, send: Send) -> None:
    """Tells a client whose request is ended with the service that another one may answer it."""
    answer = problem_for(
        scope["path"], NotReadyError("The service stopped before it had an answer.")
    )
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LAST_WORD_S):
            await answer(scope, receive, send)


def _header(scope: Scope, wanted: bytes) -> str:
    """The first header of a name; nothing if there is none."""
    for name, value in scope["headers"]:
        if name == wanted:
            return str(value, "latin-1")
    return ""


def _add_security_headers(headers: list[tuple[bytes, bytes]]) -> None:
    given = {name.lower() for name, _ in headers}
    headers += [item for item in _SECURITY_HEADERS.items() if item[0] not in given]


def _method(scope: Scope) -> str:
    known = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
    return scope["method"] if scope["method"] in known else "other"
