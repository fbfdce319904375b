"""What the endpoints that take a video have in common: upload -> clips -> answer, in time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Any, Generic, NamedTuple, TypeVar

from anyio import CancelScope
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from export.bundle.bundle import Bundle
from model.video import Clips
from model.video.opening import CODECS
from service.api.deadlines import Urgency, urgency_of, within
from service.api.dependencies import State
from service.api.problems import PROBLEM_TYPE
from service.api.schemas.openapi import Problem, inlined_schema
from service.api.schemas.predictions import Timings
from service.decoding.messages import DecodeRequest
from service.errors import RequestTimeoutError
from service.inference.parameters import ViewParameters
from service.inference.scheduler import Answer
from service.ingest.disconnect import until_disconnect
from service.ingest.multipart import FILE_FIELD, SOURCE_FIELD
from service.ingest.upload_rate import Pace
from service.ingest.uploads import Upload, receive
from service.ingest.url_policy import MAX_URL
from service.observability.metrics import Metrics
from service.observability.tracing import record_stages
from service.registry.local_client import GaveWayError, Wanted

T = TypeVar("T")
P = TypeVar("P", bound=ViewParameters)
M = TypeVar("M", bound=BaseModel)
CANARY_KEY = "X-Canary-Key"
"""Requests with the same value of this header are answered by the same version."""

_PROBLEMS = {
    400: "The multipart body is malformed.",
    401: "An API key is missing or unknown.",
    403: "The API key lacks the scope.",
    404: "There is no model of this name.",
    408: "The upload took too long.",
    413: "The upload or the video is over a limit.",
    415: "Not a kind of video that is accepted.",
    422: "The video or a parameter cannot be used.",
    429: "The rate or the concurrency of the API key is used up.",
    503: "Too much waits already, or the service is starting or stopping.",
    504: "The answer took too long.",
}


def problem_response(description: str) -> dict[str, Any]:
    """The OpenAPI description of an error."""
    schema = inlined_schema(Problem)
    return {"description": description, "content": {PROBLEM_TYPE: {"schema": schema}}}


PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: problem_response(description) for status, description in _PROBLEMS.items()
}


def video_body(parameters: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI description of a body with a video, and in a form these parameters as well."""
    binary = {"type": "string", "format": "binary"}
    url = {"type": "string", "format": "uri", "maxLength": MAX_URL}
    fields = {
        name: {key: value for key, value in schema.items() if key != "title"}
        for name, schema in parameters.model_json_schema()["properties"].items()
    }
    return {
        "required": True,
        "description": f"The video itself; or a form with the video in `{FILE_FIELD}` or its URL "
        f"in `{SOURCE_FIELD}`; or an object with the URL, where the service reads URLs. Parameters "
        "in form and object win over those in the query.",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {FILE_FIELD: binary, SOURCE_FIELD: url, **fields},
                    "oneOf": [{"required": [FILE_FIELD]}, {"required": [SOURCE_FIELD]}],
                }
            },
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": [SOURCE_FIELD],
                    "properties": {SOURCE_FIELD: url, **fields},
                }
            },
            "application/octet-stream": {"schema": binary},
            "video/*": {"schema": binary},
        },
    }


class VideoAnswer(NamedTuple, Generic[P]):
    """What the network says of one video."""

    bundle: Bundle
    """Whose network it was."""
    parameters: P
    clips: Clips
    answer: Answer
    timings: Timings


async def answer_video(request: Request, state: State, query: P) -> VideoAnswer[P]:
    """Receives the request's video, decodes it and runs its clips through the network.

    Raises:
        ServiceError: as `receive`, `DecoderPool.decode`, `VideoLease.answer` and `answer_in_time`.
        RequestValidationError: a parameter is wrong.
    """
    started = time.perf_counter()
    settings = state.settings
    urgency = urgency_of(request)
    # Now, so that what is wrong, or a video that there is no room for, costs no upload.
    check_clips(query, settings.max_clips_per_request)
    state.network.check_room(query.model, query.views * query.crops, urgency.priority)
    state.decoders.check_room()
    async with (
        within(urgency.deadline),
        receive(
            request,
            state.spool,
            settings.max_upload_bytes,
            Pace.of(settings),
            state.sources,
        ) as upload,
    ):
        parameters = merge_parameters(query, upload.fields, settings.max_clips_per_request)
        work = _process(state, upload, parameters, urgency, request.headers.get(CANARY_KEY))
        bundle, clips, decode_s, answer = await answer_in_time(
            request, settings.request_timeout_s, work
        )
    seconds = {
        "upload": upload.seconds,
        "decode": decode_s,
        "queue": answer.queue_s,
        "inference": answer.inference_s,
        "total": time.perf_counter() - started,
    }
    observe(state.metrics, bundle.name, seconds, len(clips.frames))
    _observe_video(state.metrics, upload, clips)
    timings = Timings(**{stage: round(value * 1e3, 2) for stage, value in seconds.items()})
    return VideoAnswer(bundle, parameters, clips, answer, timings)


def observe(metrics: Metrics, model: str, seconds: dict[str, float], clips: int) -> None:
    """Records, also in the trace, how long the stages of an answered request took, and how many
    clips it had.
    """
    record_stages(seconds)
    metrics.request_clips.observe(clips)
    for stage, value in seconds.items():
        metrics.of_stage(model, stage).observe(value)


def _observe_video(metrics: Metrics, upload: Upload, clips: Clips) -> None:
    """Records what was sent."""
    facts = clips.facts
    metrics.upload_bytes.observe(upload.size)
    metrics.video_seconds.observe(facts.duration_s)
    metrics.video_short_side_pixels.observe(min(facts.width, facts.height))
    # A decoder that a file has taken over could name anything.
    metrics.videos.labels(facts.codec if facts.codec in CODECS else "other").inc()


def merge_fields(query: M, fields: dict[str, str]) -> M:
    """The query's parameters with the form's on top.

    Raises:
        RequestValidationError: a form field is unknown or wrong.
    """
    return of_body(type(query), {**query.model_dump(exclude_unset=True), **fields})


def of_body(model: type[M], content: object) -> M:
    """What a body says, checked.

    Raises:
        RequestValidationError: something in it is unknown or wrong.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problems = [{**item, "loc": ("body", *item["loc"])} for item in error.errors()]
        raise RequestValidationError(problems) from None


def merge_parameters(query: P, fields: dict[str, str], max_clips: int) -> P:
    """The query's parameters with the form's on top.

    Raises:
        RequestValidationError: a form field is unknown or wrong, or too many clips are asked for.
    """
    parameters = merge_fields(query, fields)
    check_clips(parameters, max_clips)
    return parameters


def check_clips(parameters: ViewParameters, max_clips: int) -> None:
    """
    Raises:
        RequestValidationError: too many clips are asked for.
    """
    if parameters.views * parameters.crops > max_clips:
        message = f"views x crops may be {max_clips} at most"
        raise RequestValidationError(
            [{"loc": ("query", "views"), "msg": message, "type": "too_many_clips"}]
        )


async def _process(
    state: State, upload: Upload, parameters: ViewParameters, urgency: Urgency, key: str | None
) -> tuple[Bundle, Clips, float, Answer]:
    """Decodes, then infers, in the model that the request names.

    Returns the bundle that answered, the clips, the seconds of decoding and the answer.
    """
    wanted = Wanted(parameters.model, key=key)
    try:
        return await _look(state, wanted, upload, parameters, urgency)
    except GaveWayError:
        return await _look(state, wanted._replace(canary=False), upload, parameters, urgency)


async def _look(
    state: State, wanted: Wanted, upload: Upload, parameters: ViewParameters, urgency: Urgency
) -> tuple[Bundle, Clips, float, Answer]:
    started = time.perf_counter()
    asked = parameters.views * parameters.crops
    # In this order: a video that waits for a decoder keeps no room before the engine.
    async with state.decoders.acquire() as decode:
        with state.network.for_video(wanted, asked, urgency.priority) as lease:
            bundle, seen = lease.bundle, lease.bundle.config.preprocessing
            clips = await decode(
                DecodeRequest(upload.path, seen, parameters.views, parameters.crops)
            )
            decode_s = time.perf_counter() - started
            answer = await lease.answer(clips.frames, urgency.priority, urgency.deadline)
            return bundle, clips, decode_s, answer


async def answer_in_time(request: Request, timeout_s: float, work: Awaitable[T]) -> T:
    """Runs `work` until it is done, its time is up, or the client has gone.

    Raises:
        RequestTimeoutError, ClientDisconnectedError: `work` was cancelled.
    """
    scope: CancelScope | None = None
    try:
        deadline = asyncio.get_running_loop().time() + timeout_s
        with until_disconnect(request.receive, deadline) as scope:
            return await work
    except TimeoutError:
        if scope is None or not scope.cancelled_caught:
            raise
        raise RequestTimeoutError(f"There was no answer after {timeout_s:g} s.") from None
