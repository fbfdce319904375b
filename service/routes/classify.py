"""`POST /v1/classify`: a video in, action labels out."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from service.classification import classification
from service.logging import request_id
from service.requests import PROBLEM_RESPONSES, answer_video, video_body
from service.schemas import ClassifyParameters, ClassifyResponse
from service.state import Running
from service.urgency import HEADERS

router = APIRouter(prefix="/v1", tags=["classify"])


@router.post(
    "/classify",
    response_model=ClassifyResponse,
    responses=PROBLEM_RESPONSES,
    openapi_extra={"requestBody": video_body(ClassifyParameters), "parameters": HEADERS},
    summary="Name the action in a video",
)
async def classify(
    request: Request, state: Running, query: Annotated[ClassifyParameters, Query()]
) -> Response:
    """Decodes the video, runs its clips through the network and answers with the best labels."""
    bundle, parameters, clips, answer, timings = await answer_video(request, state, query)
    response = ClassifyResponse(
        **vars(classification(bundle, clips, answer.logits, parameters)),
        timings_ms=timings,
        request_id=request_id.get() or "",
    )
    # Serialised here: validating the answer a second time would cost a fifth of the request.
    return Response(response.model_dump_json(), media_type="application/json")
