"""Every way that a request can fail: its class, its stable code and its status number.

Imports nothing of this project and nothing of FastAPI, because decoder processes import it.
`service/api/problems.py` turns these errors into responses.

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
    """The file cannot be classified; `code` is that of the `VideoError`, a key of VIDEO_STATUS."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.status = VIDEO_STATUS.get(code, 422)


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
