"""Which version serves: list, activate, roll back. For keys with the scope `admin`."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter

from export.bundle import BundleError
from service.errors import BundleRefusedError
from service.loading import store_of
from service.requests import PROBLEM_RESPONSES, problem_response
from service.schemas import ModelName, VersionsResponse
from service.state import Running, State

router = APIRouter(
    prefix="/v1/admin",
    tags=["admin"],
    responses={status: PROBLEM_RESPONSES[status] for status in (401, 403, 429, 503)},
)
_REFUSED: dict[int | str, dict[str, Any]] = {
    409: problem_response("The version cannot be served; store and service are as they were.")
}


@router.get("/versions", summary="List the versions of the served model", responses=_REFUSED)
async def versions(state: Running) -> VersionsResponse:
    """What the store has under the served name, and which of it is active and which serves."""
    serving = state.models.current.bundle
    store = store_of(state.settings)
    try:
        found = await asyncio.to_thread(store.versions, serving.name)
        history = await asyncio.to_thread(store.history, serving.name)
    except BundleError as error:
        raise BundleRefusedError(str(error)) from error
    return VersionsResponse(
        name=serving.name, versions=tuple(found), history=tuple(history), serving=serving.version
    )


@router.post("/versions/{version}/activate", summary="Serve a version", responses=_REFUSED)
async def activate(version: str, state: Running) -> ModelName:
    """Checks, loads and warms the version up, then lets it take over and marks it as active."""
    await state.models.activate(version)
    return _serving(state)


@router.post("/rollback", summary="Serve the version before", responses=_REFUSED)
async def rollback(state: Running) -> ModelName:
    """Goes back to the version that was active before."""
    await state.models.roll_back()
    return _serving(state)


def _serving(state: State) -> ModelName:
    bundle = state.models.current.bundle
    return ModelName(name=bundle.name, version=bundle.version)
