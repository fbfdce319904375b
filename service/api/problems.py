"""Turns errors into HTTP responses: RFC 9457 problem documents, and `{"error": ...}` under `/v2`.

An error comes in, a response goes out; each response of `send_problem` is counted by its code.
"""

from __future__ import annotations

from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from service.errors import BadRequestError, ServiceError, codes
from service.observability.logs import request_id
from service.observability.metrics import Metrics

PROBLEM_TYPE = "application/problem+json"


def _problem(error: ServiceError, **extra: Any) -> Response:
    """Returns the RFC 9457 response of an error."""
    body = {
        "type": "about:blank",
        "title": _title(error.status),
        "status": error.status,
        "code": error.code,
        "detail": error.detail,
        "request_id": request_id.get(),
        **extra,
    }
    return Response(
        orjson.dumps(body), error.status, headers=error.headers, media_type=PROBLEM_TYPE
    )


def problem_for(path: str, error: ServiceError, **extra: Any) -> Response:
    """Returns the error in the form that clients of `path` expect: `{"error": ...}` under `/v2`, as
    the Open Inference Protocol specifies, and a problem document everywhere else.
    """
    if path != "/v2" and not path.startswith("/v2/"):
        return _problem(error, **extra)
    return Response(
        orjson.dumps({"error": error.detail}),
        error.status,
        headers=error.headers,
        media_type="application/json",
    )


def send_problem(request: Request, error: ServiceError, **extra: Any) -> Response:
    """Returns the response of a request that ends in an error, and counts the error by its code."""
    metrics: Metrics = request.app.state.metrics
    metrics.rejected.labels(error.code).inc()
    return problem_for(request.scope["path"], error, **extra)


def install(app: FastAPI, metrics: Metrics) -> None:
    """Installs handlers that turn every error of the app into a response."""
    for code in codes():
        metrics.rejected.labels(code)  # at 0, so that the first one is seen as a rise

    @app.exception_handler(ServiceError)
    async def service_error(request: Request, error: ServiceError) -> Response:
        return send_problem(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid_request(request: Request, error: RequestValidationError) -> Response:
        fields = [
            {"field": ".".join(str(part) for part in item["loc"][1:]), "message": item["msg"]}
            for item in error.errors()
        ]
        sentence = "; ".join(f"{item['field']}: {item['message']}" for item in fields)
        return send_problem(request, _invalid(sentence), errors=fields)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = ", ".join(_allowed_methods(request))
        known = ServiceError(str(error.detail), headers=headers)
        known.status = error.status_code
        known.code = _title(error.status_code).lower().replace(" ", "_")
        return send_problem(request, known)


def _allowed_methods(request: Request) -> Iterator[str]:
    """Yields the methods of all routes of the request's path, because Starlette's own `Allow`
    header names the methods of one route only.
    """
    for method in ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"):
        scope = {**request.scope, "method": method}
        if any(route.matches(scope)[0] == Match.FULL for route in request.app.routes):
            yield method


def _invalid(detail: str) -> ServiceError:
    error = BadRequestError(detail)
    error.status, error.code = 422, "invalid_parameters"
    return error


def _title(status: int) -> str:
    return HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "Error"
