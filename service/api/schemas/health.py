"""Responses of health checks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from service.inference.parameters import Schema
from service.inference.results import ModelName

_TENSORRT = (
    "`serving`; `building` while ONNX Runtime serves; or `missing`, `failed`, `unavailable` or "
    "`off`, with the reason."
)


class LiveResponse(Schema):
    live: Literal[True] = True


class ModelState(Schema):
    """How one of several models is."""

    name: str
    version: str | None = Field(description="The version that serves; null if none does.")
    refused: bool = Field(
        description="The store's active version cannot be used; the log says why."
    )


class EngineState(Schema):
    """How one of a model's engines is."""

    device: str = Field(description="`cpu`, or which GPU, such as `cuda:0`.")
    healthy: bool = Field(description="It is in use, and does not fail on everything.")


class ReadyResponse(Schema):
    """With several models, `model` and what runs it are of the first that serves."""

    ready: Literal[True] = True
    model: ModelName
    engine: str
    provider: str
    device: str
    precision: str = Field(description="`float32`, `fp16`, `int8` or `fp8`.")
    tensorrt: str = Field(description=_TENSORRT)
    engines: tuple[EngineState, ...]
    models: tuple[ModelState, ...]
