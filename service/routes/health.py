"""`/health/live`, `/health/ready` and `/metrics`: for orchestrators and Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.metrics import CONTENT_TYPE, Metrics
from service.requests import PROBLEM_RESPONSES
from service.schemas import LiveResponse, ModelName, ReadyResponse
from service.state import Running

router = APIRouter(tags=["health"])


@router.get("/health/live", summary="Is the process alive?")
async def live() -> LiveResponse:
    """Answers as long as the event loop turns; restart the process when it does not."""
    return LiveResponse()


@router.get(
    "/health/ready", summary="Can it take requests?", responses={503: PROBLEM_RESPONSES[503]}
)
async def ready(state: Running) -> ReadyResponse:
    """200 once the model is loaded and warm, 503 before and while the service stops."""
    bundle, runtime = state.models.current.bundle, state.models.current.runtime
    return ReadyResponse(
        model=ModelName(name=bundle.name, version=bundle.version),
        engine=runtime.engine,
        provider=runtime.provider,
        device=runtime.device,
        precision=runtime.precision,
        tensorrt=state.models.tensorrt,
    )


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    """The metrics of this process in the Prometheus text format, also while it is not ready."""
    metrics: Metrics = request.app.state.metrics
    return Response(metrics.render(), headers={"Content-Type": CONTENT_TYPE})
