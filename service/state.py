"""What the endpoints share: made at startup, reachable from every request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from service.decoding import DecoderPool
from service.errors import NotReadyError
from service.metrics import Metrics
from service.models import Models
from service.settings import Settings
from service.spool import Spool


@dataclass(frozen=True)
class State:
    """The running service."""

    settings: Settings
    metrics: Metrics
    models: Models
    decoders: DecoderPool
    streams: DecoderPool
    """Of long videos."""
    spool: Spool


def _running(request: Request) -> State:
    state: State | None = request.app.state.service
    if state is None:
        raise NotReadyError("The service is starting or stopping.")
    return state


Running = Annotated[State, Depends(_running)]
"""The state, for endpoints that need a service that is ready; else they answer 503."""
