"""`POST /v1/embed`: a video in, its embedding out, for search, clustering and classifiers."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from numpy.typing import NDArray

from service.classification import sampling_facts, video_facts
from service.logging import request_id
from service.requests import PROBLEM_RESPONSES, answer_video, video_body
from service.schemas import EmbedResponse, ModelName, ViewParameters
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
    vector = mean_embedding(answer.embedding)
    response = EmbedResponse(
        embedding=tuple(vector),
        dim=len(vector),
        model=ModelName(name=bundle.name, version=bundle.version),
        sampling=sampling_facts(clips, parameters),
        video=video_facts(clips.facts, clips.truncated),
        timings_ms=timings,
        request_id=request_id.get() or "",
    )
    # Serialised here, as in `classify`.
    return Response(response.model_dump_json(), media_type="application/json")


def mean_embedding(embedding: NDArray[np.float32]) -> list[float]:
    """(clips, dim) to the clips' mean, float32 in as few digits as tell it from its neighbours."""
    mean = embedding.mean(axis=0, dtype=np.float64).astype(np.float32)
    # By way of text: 0.1 in float32 would be 0.10000000149011612 in JSON.
    return [float(str(value)) for value in mean]
