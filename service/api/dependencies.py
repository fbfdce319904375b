"""What the endpoints share: made at startup, reachable from every request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request

from service.decoding.pool import DecoderPool
from service.errors import NotReadyError
from service.ingest.memory_budget import Memory
from service.ingest.spool import Spool
from service.ingest.url_sources import Sources
from service.jobs.manager import Jobs
from service.observability.metrics import Metrics
from service.registry.local_client import Network
from service.registry.models import Models
from service.settings import Settings


@dataclass(frozen=True)
class State:
    """The running service."""

    settings: Settings
    metrics: Metrics
    network: Network
    decoders: DecoderPool
    spool: Spool
    sources: Sources
    memory: Memory
    """Of clips that are sent ready."""
    models: Models
    streams: DecoderPool
    """Of long videos."""
    jobs: Jobs | None


# Though it waits for nothing: a plain function would be run in a thread, for each request.
async def running_state(request: Request) -> State:
    """The state.

    Raises:
        NotReadyError: the service is starting or stopping.
    """
    state: State | None = request.app.state.service
    if state is None:
        raise NotReadyError("The service is starting or stopping.")
    return state


async def _accepting(request: Request, state: Annotated[State, Depends(running_state)]) -> State:
    if request.app.state.stopping:
        raise NotReadyError("The service is stopping.")
    return state


def is_ready(app_state: Any) -> bool:
    """Whether an app takes requests that an engine of it can answer."""
    state: State | None = app_state.service
    return state is not None and not app_state.stopping and state.models.is_ready


Running = Annotated[State, Depends(running_state)]
"""The state, for endpoints that need a service that is ready; else they answer 503."""

Accepting = Annotated[State, Depends(_accepting)]
"""The same for readiness: it is gone as soon as the service is to stop, while it serves on a little
for those who have not heard yet.
"""
