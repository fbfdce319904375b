"""`GET /v1/models`: what serves."""

from __future__ import annotations

from fastapi import APIRouter

from model.cost import cost
from service.schemas import ModelFacts, ModelsResponse
from service.state import Running

router = APIRouter(prefix="/v1", tags=["models"])


@router.get("/models", summary="List the models that serve")
async def models(state: Running) -> ModelsResponse:
    """The bundles that answer requests, with what they are and what runs them."""
    bundle, runtime = state.models.current.bundle, state.models.current.runtime
    manifest = bundle.manifest
    return ModelsResponse(
        models=(
            ModelFacts(
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
                tensorrt=state.models.tensorrt,
                temperature=manifest.temperature,
                training=manifest.training,
            ),
        )
    )
