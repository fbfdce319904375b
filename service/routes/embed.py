"""`POST /v1/embed`: a video in, its embedding out, for search, clustering and classifiers."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from service.classification import embedding_of
from service.logging import request_id
from service.requests import PROBLEM_RESPONSES, answer_video, video_body
from service.schemas import EmbedResponse, ViewParameters
from service.state import Running
from service.urgency import HEADERS

router = APIRouter(prefix="/v1", tags=["embed"])


@router.post(
    "/embed",
    response_model=EmbedResponse,
    responses=PROBLEM_RESPONSES,
    openapi_extra={"requestBody": video_body(ViewParameters), "parameters": HEADERS},
    summary="Turn a video into a vector",
)
async def embed(
    request: Request, state: Running, query: Annotated[ViewParameters, Query()]
) -> Response:
    """Decodes the video, runs its clips through the network and answers with the mean of what
    goes into its last layer. It is not normalised; vectors of different models do not compare.
    """
    bundle, parameters, clips, answer, timings = await answer_video(request, state, query)
    response = EmbedResponse(
        **vars(embedding_of(bundle, clips, answer.embedding, parameters)),
        timings_ms=timings,
        request_id=request_id.get() or "",
    )
    # Serialised here, as in `classify`.
    return Response(response.model_dump_json(), media_type="application/json")
