"""`/health/live`, `/health/ready` and `/metrics`: for orchestrators and Prometheus."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from export.runtime import device_name
from service.api.dependencies import Accepting
from service.api.schemas.health import EngineState, LiveResponse, ModelState, ReadyResponse
from service.api.video_requests import PROBLEM_RESPONSES
from service.errors import NotReadyError
from service.inference.results import ModelName
from service.observability.metrics import CONTENT_TYPE, Metrics

router = APIRouter(tags=["health"])
metrics_router = APIRouter(tags=["health"])


@router.get("/health/live", summary="Is the process alive?")
async def live() -> LiveResponse:
    """Answers as long as the event loop turns; restart the process when it does not."""
    return LiveResponse()


@router.get(
    "/health/ready",
    summary="Can it take requests?",
    responses={status: PROBLEM_RESPONSES[status] for status in (404, 503)},
)
async def ready(
    state: Accepting,
    model: Annotated[str | None, Query(description="Ask for this one of several models.")] = None,
) -> ReadyResponse:
    """200 once the models are loaded and warm; 503 before, as soon as the service is to stop, and
    while every engine fails.

    Of several models one that could not be loaded does not keep the others from serving, so that
    one is enough, unless `model` asks for a certain one.
    """
    hosts = state.models.hosts
    asked = (state.models.find(model),) if model else tuple(h for h in hosts if h.is_serving)
    host = next((h for h in asked if any(h.current.batcher.healthy)), None)
    if host is None:
        raise NotReadyError("Every engine fails on what it is given.")
    bundle, runtime = host.current.bundle, host.current.runtime
    return ReadyResponse(
        model=ModelName(name=bundle.name, version=bundle.version),
        engine=runtime.engine,
        provider=runtime.provider,
        device=runtime.device,
        precision=runtime.precision,
        tensorrt=host.tensorrt,
        engines=tuple(
            EngineState(device=device_name(runtime), healthy=healthy)
            for runtime, healthy in zip(
                host.current.runtimes, host.current.batcher.healthy, strict=True
            )
        ),
        models=tuple(
            ModelState(
                name=host.name,
                version=host.current.bundle.version if host.is_serving else None,
                refused=host.refusal is not None,
            )
            for host in hosts
        ),
    )


@metrics_router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    """The metrics of the service in the Prometheus text format, also while it is not ready."""
    metrics: Metrics = request.app.state.metrics
    return Response(metrics.render(), headers={"Content-Type": CONTENT_TYPE})
