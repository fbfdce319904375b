"""`POST /v1/classify`: a video in, action labels out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from model.video import Clips
from service.batcher import Answer
from service.classification import classification
from service.decoding import Job
from service.errors import ClientDisconnectedError, RequestTimeoutError
from service.logging import request_id
from service.models import ServedModel
from service.schemas import ClassifyParameters, ClassifyResponse, Problem, Timings
from service.state import Running, State
from service.uploads import FILE_FIELD, Upload, receive

router = APIRouter(prefix="/v1", tags=["classify"])
T = TypeVar("T")

_PARAMETER_SCHEMAS = {
    name: {key: value for key, value in schema.items() if key != "title"}
    for name, schema in ClassifyParameters.model_json_schema()["properties"].items()
}
_BINARY = {"type": "string", "format": "binary"}
_REQUEST_BODY = {
    "required": True,
    "description": "The video itself, or a form with the video in `file`. Parameters in the form "
    "win over those in the query.",
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": [FILE_FIELD],
                "properties": {FILE_FIELD: _BINARY, **_PARAMETER_SCHEMAS},
            }
        },
        "application/octet-stream": {"schema": _BINARY},
        "video/*": {"schema": _BINARY},
    },
}
_PROBLEMS = {
    400: "The multipart body is malformed.",
    408: "The upload took too long.",
    413: "The upload or the video is over a limit.",
    415: "Not a kind of video that is accepted.",
    422: "The video or a parameter cannot be used.",
    503: "Too much waits already, or the service is starting or stopping.",
    504: "The answer took too long.",
}
PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {
        "description": description,
        "content": {"application/problem+json": {"schema": Problem.model_json_schema()}},
    }
    for status, description in _PROBLEMS.items()
}


@router.post(
    "/classify",
    response_model=ClassifyResponse,
    responses=PROBLEM_RESPONSES,
    openapi_extra={"requestBody": _REQUEST_BODY},
    summary="Name the action in a video",
)
async def classify(
    request: Request, state: Running, query: Annotated[ClassifyParameters, Query()]
) -> Response:
    """Decodes the video, runs its clips through the network and answers with the best labels."""
    started = time.perf_counter()
    settings = state.settings
    async with receive(
        request, settings.spool_dir, settings.max_upload_bytes, settings.upload_timeout_s
    ) as upload:
        parameters = merge_parameters(query, upload.fields, settings.max_clips_per_request)
        # One model from sampling to labels, also when another takes over meanwhile.
        with state.models.current.in_use() as model:
            clips, decode_s, answer = await _answer_in_time(
                request, settings.request_timeout_s, _process(state, model, upload, parameters)
            )
    timings = {
        "upload": upload.seconds,
        "decode": decode_s,
        "queue": answer.queue_s,
        "inference": answer.inference_s,
        "total": time.perf_counter() - started,
    }
    for stage, seconds in timings.items():
        state.metrics.stage_seconds.labels(stage).observe(seconds)
    response = ClassifyResponse(
        **vars(classification(model.bundle, clips, answer.logits, parameters)),
        timings_ms=Timings(**{key: round(value * 1e3, 2) for key, value in timings.items()}),
        request_id=request_id.get() or "",
    )
    # Serialised here: validating the answer a second time would cost a fifth of the request.
    return Response(response.model_dump_json(), media_type="application/json")


def merge_parameters(
    query: ClassifyParameters, fields: dict[str, str], max_clips: int
) -> ClassifyParameters:
    """The query's parameters with the form's on top.

    Raises:
        RequestValidationError: a form field is unknown or wrong, or too many clips are asked for.
    """
    given = query.model_dump(exclude_unset=True)
    try:
        parameters = ClassifyParameters.model_validate({**given, **fields})
    except ValidationError as error:
        problems = [{**item, "loc": ("body", *item["loc"])} for item in error.errors()]
        raise RequestValidationError(problems) from None
    if parameters.views * parameters.crops > max_clips:
        message = f"views x crops may be {max_clips} at most"
        raise RequestValidationError(
            [{"loc": ("query", "views"), "msg": message, "type": "too_many_clips"}]
        )
    return parameters


async def _process(
    state: State, model: ServedModel, upload: Upload, parameters: ClassifyParameters
) -> tuple[Clips, float, Answer]:
    """Decodes, then infers. Returns the clips, the seconds of decoding and the answer."""
    started = time.perf_counter()
    preprocessing = model.bundle.config.preprocessing
    clips = await state.decoders.decode(
        Job(upload.path, preprocessing, parameters.views, parameters.crops)
    )
    decode_s = time.perf_counter() - started
    return clips, decode_s, await model.batcher.submit(clips.frames)


async def _answer_in_time(request: Request, timeout_s: float, work: Coroutine[Any, Any, T]) -> T:
    """Runs `work` until it is done, its time is up, or the client has gone.

    Raises:
        RequestTimeoutError, ClientDisconnectedError: `work` was cancelled.
    """
    task = asyncio.ensure_future(work)
    # The body has been read, so the next message can only be the client's leaving.
    leaving = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({task, leaving}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if leaving.done():
            raise ClientDisconnectedError("The client went away.")
        raise RequestTimeoutError(f"There was no answer after {timeout_s:g} s.")
    finally:
        leaving.cancel()
        task.cancel()
