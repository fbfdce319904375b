"""Which versions serve and which are tried: list, activate, roll back, try, promote. For keys with
the scope `admin`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Depends, Request

from export.bundle.bundle import BundleError, Candidate
from service.api.dependencies import Running, State
from service.api.schemas.models import AdminModel, AdminModels, CandidateFacts, CandidateRequest
from service.api.schemas.openapi import inlined_schema
from service.api.video_requests import PROBLEM_RESPONSES, of_body, problem_response
from service.errors import BundleRefusedError
from service.inference.results import ModelName
from service.ingest.upload_rate import Pace
from service.ingest.uploads import receive_json
from service.registry.host import ModelHost
from service.registry.loading import store_of


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: PROBLEM_RESPONSES[status] for status in statuses}


router = APIRouter(
    prefix="/v1/admin/models",
    tags=["admin"],
    responses=_problems(400, 401, 403, 404, 422, 429, 503),
)
_REFUSED: dict[int | str, dict[str, Any]] = {
    409: problem_response("The version cannot be served; store and service are as they were.")
}


def _own_store(state: Running) -> None:
    """A change to this node's folder alone would be undone by the next look at the store."""
    if state.settings.store_url is not None:
        raise BundleRefusedError(
            f"The store is {state.settings.store_url}: change it there, with `timesformer bundles`."
        )


_CHANGE: dict[str, Any] = {"responses": _REFUSED, "dependencies": [Depends(_own_store)]}


@router.get("", summary="List models, versions and candidates", responses=_REFUSED)
async def models(state: Running) -> AdminModels:
    """What the store has under each served name, which of it is active, serves, and is tried."""
    return AdminModels(models=tuple([await _facts(host, state) for host in state.models.hosts]))


@router.get("/{model}", summary="List the versions of a model", responses=_REFUSED)
async def versions(model: str, state: Running) -> AdminModel:
    """What the store has under the name, which of it is active, serves, and is tried."""
    return await _facts(state.models.find(model), state)


@router.post("/{model}/versions/{version}/activate", summary="Serve a version", **_CHANGE)
async def activate(model: str, version: str, state: Running) -> ModelName:
    """Checks, loads and warms the version up, then lets it take over and marks it as active."""
    host = state.models.find(model)
    await host.activate(version)
    return _serving(host)


@router.post("/{model}/rollback", summary="Serve the version before", **_CHANGE)
async def rollback(model: str, state: Running) -> ModelName:
    """Goes back to the version that was active before."""
    host = state.models.find(model)
    await host.roll_back()
    return _serving(host)


@router.put(
    "/{model}/candidate",
    summary="Try a version",
    responses={**_problems(408, 413), **_REFUSED},
    dependencies=_CHANGE["dependencies"],
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": inlined_schema(CandidateRequest)}},
        }
    },
)
async def try_candidate(model: str, request: Request, state: Running) -> AdminModel:
    """Loads a version beside the one that serves, as a shadow or a canary, or changes its mode or
    share. All replicas of the store do the same; `timesformer bundles candidate` does so too.
    """
    host = state.models.find(model)
    content = await receive_json(request, Pace.of(state.settings))
    wanted = of_body(CandidateRequest, content)
    await host.try_candidate(Candidate(**wanted.model_dump()))
    return await _facts(host, state)


@router.delete("/{model}/candidate", summary="Try no version any more", **_CHANGE)
async def withdraw_candidate(model: str, state: Running) -> AdminModel:
    """Ends the trial in all replicas; what runs in the candidate is answered."""
    host = state.models.find(model)
    await host.withdraw_candidate()
    return await _facts(host, state)


@router.post("/{model}/candidate/promote", summary="Serve the candidate", **_CHANGE)
async def promote(model: str, state: Running) -> ModelName:
    """Makes the candidate, which is loaded already, the active version."""
    host = state.models.find(model)
    await host.promote()
    return _serving(host)


async def _facts(host: ModelHost, state: State) -> AdminModel:
    store = store_of(state.settings)
    try:
        found = await asyncio.to_thread(store.versions, host.name)
        history = await asyncio.to_thread(store.history, host.name)
        candidate = await asyncio.to_thread(store.candidate, host.name)
    except BundleError as error:
        raise BundleRefusedError(str(error)) from error
    return AdminModel(
        name=host.name,
        versions=tuple(found),
        history=tuple(history),
        serving=host.current.bundle.version if host.is_serving else None,
        refused=host.refusal,
        candidate=_candidate_facts(host, candidate) if candidate else None,
    )


def _candidate_facts(host: ModelHost, candidate: Candidate) -> CandidateFacts:
    trial = host.candidates.trial
    if trial is not None and trial.candidate != candidate:
        trial = None  # the watch has not followed yet
    return CandidateFacts(
        **candidate.model_dump(include={"version", "mode", "share"}),
        since=candidate.since.isoformat(timespec="seconds"),
        trying=trial is not None,
        refused=host.candidates.refusal,
        requests=dict(trial.counts) if trial else {},
        mean_score_difference=trial.mean_score_difference if trial else None,
    )


def _serving(host: ModelHost) -> ModelName:
    return ModelName(name=host.name, version=host.current.bundle.version)
