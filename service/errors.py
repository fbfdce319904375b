"""Every way that a request can fail, and its one mapping to HTTP (RFC 9457 problem details).

ServiceError
|- BadRequestError           400  the request itself is malformed
|- InvalidTensorError        400  Open Inference Protocol: not what the network takes
|- UnauthorizedError         401
|- ForbiddenError            403
|- ModelNotFoundError        404
|- BundleRefusedError        409  another version cannot be taken; the old one stays
|- TooManyRequestsError      429  with Retry-After
|- UploadTooLargeError       413
|- UploadTimeoutError        408
|- UnsupportedEncodingError  415
|- JobNotFoundError          404  or another owner's
|- JobNotDoneError           409  it has no result, or not yet
|- JobsOffError              409  this service keeps no jobs
|- ResultTooLargeError       422  a job's; it is not kept
|- JobAbandonedError         422  the service ended as often as it ran the job
|- WebhookRefusedError       422  a URL that is not called
|- SourceRefusedError        422  a URL that is not read
|- SourceFailedError         422  its host does not answer with a file
|- VideoRejectedError        4xx  what `model.video` says of the file, see VIDEO_STATUS
|- ClientDisconnectedError   499  nobody is there to read it; for the metrics
|- QueueFullError            503  with Retry-After
|- DeadlineUnreachableError  503  with Retry-After: it would not be done in time, so it is not begun
|- JobsFullError             503  with Retry-After
|- SpoolFullError            503  with Retry-After
|- MemoryFullError           503  with Retry-After
|- DecoderUnavailableError   503  with Retry-After
|- NotReadyError             503  with Retry-After
|- ModelUnavailableError     503  it could not be loaded; other models serve
|- RequestTimeoutError       504  the service's own limit
|- DeadlineExceededError     504  the limit that the request gave itself
`- InternalError             500  a defect of ours; the log has the traceback
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

from model.video import VideoError
from service.logging import request_id
from service.metrics import Metrics

PROBLEM_TYPE = "application/problem+json"

# 415: not a kind of file we take. 413: over a limit. 422: the right kind, but not usable.
VIDEO_STATUS: dict[str, int] = {
    "empty_file": 422,
    "no_video_stream": 422,
    "undecodable_video": 422,
    "too_few_frames": 422,
    "unsupported_format": 415,
    "video_too_large": 413,
    "decoding_timeout": 422,
    "decoder_crashed": 422,
}


class ServiceError(Exception):
    """Base of all: a status, a stable code for programs, and a sentence for people."""

    status = 500
    code = "internal_error"

    def __init__(self, detail: str, *, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.headers = headers or {}


class BadRequestError(ServiceError):
    status, code = 400, "bad_request"


class InvalidTensorError(ServiceError):
    status, code = 400, "invalid_tensor"


class UnauthorizedError(ServiceError):
    status, code = 401, "unauthorized"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, headers={"WWW-Authenticate": "Bearer"})


class ForbiddenError(ServiceError):
    status, code = 403, "forbidden"


class BundleRefusedError(ServiceError):
    status, code = 409, "bundle_refused"


class TooManyRequestsError(ServiceError):
    status, code = 429, "too_many_requests"

    def __init__(self, detail: str, retry_after_s: int) -> None:
        super().__init__(detail, headers={"Retry-After": str(retry_after_s)})


class ModelNotFoundError(ServiceError):
    status, code = 404, "model_not_found"


class UnsupportedEncodingError(ServiceError):
    status, code = 415, "unsupported_encoding"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, headers={"Accept-Encoding": "gzip, deflate"})


class UploadTooLargeError(ServiceError):
    status, code = 413, "upload_too_large"


class UploadTimeoutError(ServiceError):
    status, code = 408, "upload_timeout"


class JobNotFoundError(ServiceError):
    status, code = 404, "job_not_found"


class JobNotDoneError(ServiceError):
    status, code = 409, "job_not_done"


class JobsOffError(ServiceError):
    status, code = 409, "jobs_off"


class JobAbandonedError(ServiceError):
    status, code = 422, "job_abandoned"


class ResultTooLargeError(ServiceError):
    status, code = 422, "result_too_large"


class JobsFullError(ServiceError):
    status, code = 503, "jobs_full"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, headers={"Retry-After": "60"})


class WebhookRefusedError(ServiceError):
    status, code = 422, "webhook_refused"


class SourceRefusedError(ServiceError):
    status, code = 422, "source_refused"


class SourceFailedError(ServiceError):
    status, code = 422, "source_failed"


class VideoRejectedError(ServiceError):
    """The file cannot be classified; status and code are those of the `VideoError`."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.status = VIDEO_STATUS.get(code, 422)

    @classmethod
    def of(cls, error: VideoError) -> VideoRejectedError:
        return cls(error.code, str(error))


class ClientDisconnectedError(ServiceError):
    status, code = 499, "client_disconnected"


class QueueFullError(ServiceError):
    status, code = 503, "queue_full"

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(
            f"The service is at its limit; try again in {retry_after_s} s.",
            headers={"Retry-After": str(retry_after_s)},
        )


class SpoolFullError(ServiceError):
    status, code = 503, "spool_full"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, headers={"Retry-After": "10"})


class MemoryFullError(ServiceError):
    status, code = 503, "memory_full"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, headers={"Retry-After": "5"})


class DecoderUnavailableError(ServiceError):
    status, code = 503, "decoder_unavailable"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, headers={"Retry-After": "5"})


class NotReadyError(ServiceError):
    status, code = 503, "not_ready"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, headers={"Retry-After": "5"})


class ModelUnavailableError(ServiceError):
    status, code = 503, "model_unavailable"


class DeadlineUnreachableError(ServiceError):
    status, code = 503, "deadline_unreachable"

    def __init__(self, needed_s: float, retry_after_s: int) -> None:
        super().__init__(
            f"With what waits already it would take about {needed_s:.3g} s, longer than the "
            "request may take.",
            headers={"Retry-After": str(retry_after_s)},
        )


class DeadlineExceededError(ServiceError):
    status, code = 504, "deadline_exceeded"


class RequestTimeoutError(ServiceError):
    status, code = 504, "request_timeout"


class InternalError(ServiceError):
    status, code = 500, "internal_error"


def codes() -> dict[str, int]:
    """Every stable code that a problem may have, but for those of HTTP itself, with its status."""
    errors = {
        error.code: error.status
        for error in ServiceError.__subclasses__()
        if error is not VideoRejectedError
    }
    return {**VIDEO_STATUS, **errors, "invalid_parameters": 422}


def problem(error: ServiceError, **extra: Any) -> Response:
    """The RFC 9457 response of an error."""
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


def answer_to(path: str, error: ServiceError, **extra: Any) -> Response:
    """An error in the form that clients of `path` know: `{"error": ...}` under `/v2`, where the
    Open Inference Protocol has it so, and else a problem document.
    """
    if path != "/v2" and not path.startswith("/v2/"):
        return problem(error, **extra)
    return Response(
        orjson.dumps({"error": error.detail}),
        error.status,
        headers=error.headers,
        media_type="application/json",
    )


def refuse(request: Request, error: ServiceError, **extra: Any) -> Response:
    """The answer to a request that ends in an error, which is counted by its code."""
    metrics: Metrics = request.app.state.metrics
    metrics.rejected.labels(error.code).inc()
    return answer_to(request.scope["path"], error, **extra)


def install(app: FastAPI, metrics: Metrics) -> None:
    """Answers every error of the app."""
    for code in codes():
        metrics.rejected.labels(code)  # at 0, so that the first one is seen as a rise

    @app.exception_handler(ServiceError)
    async def service_error(request: Request, error: ServiceError) -> Response:
        return refuse(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid_request(request: Request, error: RequestValidationError) -> Response:
        fields = [
            {"field": ".".join(str(part) for part in item["loc"][1:]), "message": item["msg"]}
            for item in error.errors()
        ]
        sentence = "; ".join(f"{item['field']}: {item['message']}" for item in fields)
        return refuse(request, _invalid(sentence), errors=fields)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = ", ".join(_allowed_methods(request))
        known = ServiceError(str(error.detail), headers=headers)
        known.status = error.status_code
        known.code = _title(error.status_code).lower().replace(" ", "_")
        return refuse(request, known)


def _allowed_methods(request: Request) -> Iterator[str]:
    """What the request's path may be asked with. The framework names the methods of one route,
    where several may share a path.
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
