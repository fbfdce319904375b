"""`POST /v1/classify` and `/v1/embed`: a video in, action labels or an embedding out."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from service.api.deadlines import HEADERS
from service.api.dependencies import Running
from service.api.schemas.predictions import ClassifyResponse, EmbedResponse, Timings
from service.api.video_requests import PROBLEM_RESPONSES, answer_video, video_body
from service.inference.parameters import ClassifyParameters, ViewParameters
from service.inference.postprocess import classification, embedding_of
from service.observability.logs import request_id

router = APIRouter(prefix="/v1")


def _described(parameters: type[ViewParameters]) -> dict[str, Any]:
    body = {"requestBody": video_body(parameters), "parameters": HEADERS}
    return {"responses": PROBLEM_RESPONSES, "openapi_extra": body}


@router.post(
    "/classify",
    tags=["classify"],
    response_model=ClassifyResponse,
    summary="Name the action in a video",
    **_described(ClassifyParameters),
)
async def classify(
    request: Request, state: Running, query: Annotated[ClassifyParameters, Query()]
) -> Response:
    """Decodes the video, runs its clips through the network and answers with the best labels."""
    bundle, parameters, clips, answer, timings = await answer_video(request, state, query)
    result = classification(bundle, clips, answer.logits, parameters)
    return _response(ClassifyResponse, result, timings)


@router.post(
    "/embed",
    tags=["embed"],
    response_model=EmbedResponse,
    summary="Turn a video into a vector",
    **_described(ViewParameters),
)
async def embed(
    request: Request, state: Running, query: Annotated[ViewParameters, Query()]
) -> Response:
    """Decodes the video, runs its clips through the network and answers with the mean of what
    goes into its last layer. It is not normalised; vectors of different models do not compare.
    """
    bundle, parameters, clips, answer, timings = await answer_video(request, state, query)
    result = embedding_of(bundle, clips, answer.embedding, parameters)
    return _response(EmbedResponse, result, timings)


def _response(
    kind: type[ClassifyResponse | EmbedResponse], result: object, timings: Timings
) -> Response:
    response = kind(**vars(result), timings_ms=timings, request_id=request_id.get() or "")
    # Serialised here: if FastAPI validated the answer again, that would cost a fifth of a request.
    return Response(response.model_dump_json(), media_type="application/json")
