"""`GET /v1/models`: what serves."""

from __future__ import annotations

from fastapi import APIRouter

from model.network.cost import cost
from service.api.dependencies import Running
from service.api.schemas.models import ModelFacts, ModelsResponse
from service.registry.host import ModelHost

router = APIRouter(prefix="/v1", tags=["models"])


@router.get("/models", summary="List the models that serve")
async def models(state: Running) -> ModelsResponse:
    """What answers requests, the default first: what it is, and what runs it."""
    return ModelsResponse(
        models=tuple(_facts(host) for host in state.models.hosts if host.is_serving)
    )


def _facts(host: ModelHost) -> ModelFacts:
    bundle, runtime = host.current.bundle, host.current.runtime
    manifest = bundle.manifest
    return ModelFacts(
        name=bundle.name,
        version=bundle.version,
        created=manifest.created.isoformat(),
        labels=manifest.labels,
        parameters=cost(bundle.config).parameters,
        architecture=manifest.architecture,
        preprocessing=manifest.preprocessing,
        engine=runtime.engine,
        provider=runtime.provider,
        device=runtime.device,
        precision=runtime.precision,
        tensorrt=host.tensorrt,
        temperature=manifest.temperature,
        training=manifest.training,
    )
