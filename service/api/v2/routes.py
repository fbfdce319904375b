"""`/v2`: the Open Inference Protocol over HTTP, for clients that bring clips, not videos.

tritonclient and KServe's client work with it unchanged. How bodies are written is in
`service/api/v2/codec.py`; errors are `{"error": "..."}`.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from starlette.routing import Match, Route
from starlette.types import Scope

from export.bundle.bundle import Bundle
from service.api.auth import admitted
from service.api.deadlines import HEADERS, Urgency, urgency_of, within
from service.api.dependencies import Accepting, Running, State, running_state
from service.api.schemas.health import LiveResponse
from service.api.schemas.openapi import inlined_schema
from service.api.v2.codec import (
    HEADER_LENGTH,
    MAX_JSON_BYTES,
    Body,
    Inference,
    body_limit,
    decode,
    encode,
)
from service.api.v2.schemas import (
    InferRequest,
    InferResponse,
    ModelMetadata,
    ModelReady,
    ProtocolError,
    ServerMetadata,
    ServerReady,
    TensorMetadata,
)
from service.api.video_requests import CANARY_KEY, answer_in_time, observe
from service.inference.results import ModelName
from service.inference.scheduler import PRIORITIES, Answer, Priority
from service.ingest.memory_budget import Share
from service.ingest.upload_rate import Pace
from service.ingest.uploads import Limit, receive_tensors
from service.registry.local_client import Wanted
from service.settings import MIB

# One: parsing keeps the interpreter to itself anyway, and one body at a time bounds the memory.
_DECODER = ThreadPoolExecutor(1, thread_name_prefix="tensors")
# As numbers of the protocol: 0 is what the header or the key says.
_PRIORITIES: tuple[Priority | None, ...] = (None, *PRIORITIES)
_DATATYPES = {"uint8": "UINT8", "float32": "FP32"}


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    descriptions = {
        400: "The request is malformed, or not what the network takes.",
        401: "An API key is missing or unknown.",
        403: "The API key lacks the scope.",
        404: "No such model or version serves.",
        408: "The upload took too long.",
        413: "The body is over a limit.",
        415: "A Content-Encoding other than gzip and deflate.",
        429: "The rate or the concurrency of the API key is used up.",
        503: "Too much waits already, or the service is starting or stopping.",
        504: "The answer took too long.",
    }
    return {
        status: {"model": ProtocolError, "description": descriptions[status]} for status in statuses
    }


Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


def _of_model(
    register: Callable[..., Any], path: str, summary: str, extra: dict[str, Any], **described: Any
) -> Callable[[Endpoint], Endpoint]:
    """Registers an endpoint for a model and for a version of a model. The path's parameters are
    added for OpenAPI only: the endpoint reads them from the request.
    """

    def add(endpoint: Endpoint) -> Endpoint:
        versioned = ("/models/{model}/versions/{version}", "this version of a model")
        for place, model in (versioned, ("/models/{model}", "a model")):
            names = re.findall(r"{(\w+)}", place)
            parameters = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                for name in names
            ]
            register(
                place + path,
                summary=summary.format(model),
                openapi_extra={**extra, "parameters": parameters + extra.get("parameters", [])},
                **described,
            )(endpoint)
        return endpoint

    return add


_BINARY = {
    "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
}
_BODY = {
    "requestBody": {
        "required": True,
        "description": f"JSON of at most {MAX_JSON_BYTES // MIB} MiB, or JSON and then the bytes "
        f"of the tensor, with the length of the JSON in the header `{HEADER_LENGTH}`. "
        "`Content-Encoding` may be gzip or deflate.",
        "content": {"application/json": {"schema": inlined_schema(InferRequest)}, **_BINARY},
    }
}
_HEADER = {
    "name": HEADER_LENGTH,
    "in": "header",
    "required": False,
    "description": "Bytes of JSON, if a tensor's bytes follow it.",
    "schema": {"type": "integer", "minimum": 0},
}


_NO_MODEL = _problems(401, 403, 404, 429, 503)
probes = APIRouter(prefix="/v2", tags=["open inference protocol"])
router = APIRouter(prefix="/v2", tags=["open inference protocol"])


@probes.get("/health/live", summary="Is the server alive?")
async def server_live() -> LiveResponse:
    """Answers as long as the event loop turns."""
    return LiveResponse()


@probes.get("/health/ready", summary="Can the server take requests?", responses=_problems(503))
async def server_ready(state: Accepting) -> ServerReady:
    """200 once the models are loaded and warm; 503 before, and as soon as it is to stop."""
    return ServerReady()


@router.get("", summary="What is the server?", responses=_problems(401, 403, 429))
async def server_metadata() -> ServerMetadata:
    """Its name, its version and the extensions of the protocol that it has."""
    return ServerMetadata(
        name="timesformer",
        version=version("timesformer-service"),
        extensions=("binary_tensor_data",),
    )


@_of_model(router.get, "", "What does {} take and give?", {}, responses=_NO_MODEL)
async def model_metadata(request: Request, state: Running) -> ModelMetadata:
    """The names, datatypes and shapes of its inputs and outputs."""
    model = state.network.model(_wanted(request))
    manifest = model.bundle.manifest
    inputs, outputs = (
        tuple(
            TensorMetadata(name=spec.name, datatype=_DATATYPES[spec.dtype], shape=spec.shape)
            for spec in specs
        )
        for specs in (manifest.inputs, manifest.outputs)
    )
    return ModelMetadata(
        name=model.bundle.name,
        versions=(model.bundle.version,),
        platform=model.runtime.engine,
        inputs=inputs,
        outputs=outputs,
    )


@_of_model(router.get, "/ready", "Can {} take requests?", {}, responses=_NO_MODEL)
async def model_ready(request: Request, state: Running) -> ModelReady:
    """200 if it is the one that serves."""
    return ModelReady(name=state.network.model(_wanted(request)).bundle.name)


# Only for OpenAPI: `infer_routes` are before them in the app's router. FastAPI takes 200 to 250 us
# of the event loop for a clip, a plain route 60 to 70 (tests/benchmarks/request_cost.py).
described = APIRouter(prefix="/v2", tags=["open inference protocol"])


@_of_model(
    described.post,
    "/infer",
    "Run clips through {}",
    {**_BODY, "parameters": [_HEADER, *HEADERS]},
    response_model=InferResponse,
    responses={
        200: {"content": _BINARY},
        **_problems(400, 401, 403, 404, 408, 413, 415, 429, 503, 504),
    },
)
async def infer(request: Request) -> Response:
    """Joins the clips with those of other clients and answers with the network's outputs."""
    async with admitted(request, "infer"):
        return await _infer(request, await running_state(request))


class _InferRoute(Route):
    """A plain route that adds itself to the scope, for metrics and spans, as FastAPI's do."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, found = super().matches(scope)
        return match, found if match is Match.NONE else {**found, "route": self}


infer_routes = [
    _InferRoute(route.path, infer, methods=["POST"])
    for route in described.routes
    if isinstance(route, APIRoute)
]


async def _infer(request: Request, state: State) -> Response:
    started = time.perf_counter()
    settings = state.settings
    urgency = urgency_of(request)
    header_length = request.headers.get(HEADER_LENGTH)
    # Found before the body is read, and again afterwards: it may have been swapped meanwhile, and
    # a slow sender must not keep an old version open. The body may ask for the highest priority.
    bundle = state.network.find(_wanted(request), urgency.highest)
    limit = body_limit(
        header_length is None,
        _clip_shape(bundle),
        settings.max_clips_per_request,
        settings.max_upload_bytes,
        settings.max_tensor_bytes,
    )
    with state.memory.share() as share:
        async with within(urgency.deadline):
            content = await receive_tensors(request, limit, Pace.of(settings), share)
        encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
        uploaded = time.perf_counter()
        work = _run(request, state, Body(content, encoding, header_length), limit, urgency, share)
        model, inference, answer = await answer_in_time(request, settings.request_timeout_s, work)
    names = {"model_name": model.name, "model_version": model.version}
    tensors = {"logits": answer.logits, "embedding": answer.embedding}
    body, length = encode(dict(names), tensors, inference.request)
    seconds = {
        "upload": uploaded - started,
        "queue": answer.queue_s,
        "inference": answer.inference_s,
        "total": time.perf_counter() - started,
    }
    observe(state.metrics, model.name, seconds, len(inference.frames))
    if length is None:
        return Response(body, media_type="application/json")
    headers = {HEADER_LENGTH: str(length)}
    return Response(body, headers=headers, media_type="application/octet-stream")


def _wanted(request: Request) -> Wanted:
    """The version that the path names."""
    path = request.path_params
    return Wanted(path["model"], path.get("version"), request.headers.get(CANARY_KEY))


def _clip_shape(bundle: Bundle) -> tuple[int, ...]:
    config = bundle.config
    return (config.num_frames, config.image_size, config.image_size, 3)


async def _run(
    request: Request, state: State, body: Body, limit: Limit, urgency: Urgency, share: Share
) -> tuple[ModelName, Inference, Answer]:
    """Decodes the body and infers, within the time that it gives itself.

    Raises:
        ServiceError: as `decode`, `Share.take` and `ClipsLease.answer`.
    """
    with state.network.for_clips(_wanted(request)) as held:
        read = partial(
            decode,
            body,
            _clip_shape(held.bundle),
            max_clips=state.settings.max_clips_per_request,
            limit=limit,
        )
        inference = read() if body.is_quick else await _in_turn(read)
        if body.encoding != "identity":  # what came is counted, and it is more now
            share.take(max(0, inference.frames.nbytes - len(body.content)))
        asked = inference.request.parameters
        urgency = urgency.asking(_PRIORITIES[asked.priority], asked.timeout / 1e6)
        version, answer = await held.answer(inference.frames, urgency.priority, urgency.deadline)
        return ModelName(name=held.bundle.name, version=version), inference, answer


async def _in_turn(read: Callable[[], Inference]) -> Inference:
    """Reads a body once those before it have been read."""
    # The executor keeps what was given up until its turn comes: let that not be the body.
    waiting = [read]
    try:
        return await asyncio.get_running_loop().run_in_executor(_DECODER, lambda: waiting.pop()())
    finally:
        waiting.clear()
