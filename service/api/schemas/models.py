"""Models and candidates: `/v1/models` and `/v1/admin`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from service.api.schemas.health import _TENSORRT
from service.inference.parameters import Schema


class ModelFacts(Schema):
    """A model that serves."""

    name: str
    version: str
    created: str
    labels: tuple[str, ...]
    parameters: int
    architecture: dict[str, str | int | float]
    preprocessing: dict[str, str | int | float | list[float]]
    engine: str
    provider: str
    device: str = Field(description="`cpu` or `cuda`.")
    precision: str = Field(description="`float32`, `fp16`, `int8` or `fp8`.")
    tensorrt: str = Field(description=_TENSORRT)
    temperature: float = Field(description="What logits are divided by before the softmax.")
    training: dict[str, object] | None


class ModelsResponse(Schema):
    models: tuple[ModelFacts, ...]


class CandidateRequest(Schema):
    """Which version to try beside the one that serves, and how."""

    version: str = Field(pattern=r"^[1-9][0-9]{0,8}$")
    mode: Literal["shadow", "canary"] = Field(
        description="`shadow`: gets copies of requests that were answered, and is compared. "
        "`canary`: answers requests itself."
    )
    share: float = Field(gt=0, le=1, description="Of the requests; 0.05 is every twentieth.")


class CandidateFacts(CandidateRequest):
    """The candidate of a model, and in this replica what came of it so far."""

    since: str
    trying: bool = Field(description="False if it was refused or taken out; see `refused`.")
    refused: str | None = Field(description="Why it is not tried.")
    requests: dict[str, int] = Field(
        description="By what came of them, as in `timesformer_candidate_requests_total`."
    )
    mean_score_difference: float | None = Field(
        description="Of a shadow: 0 for the same scores, 1 for nothing in common."
    )


class AdminModel(Schema):
    """What the store has under a name, and what of it is used here."""

    name: str
    versions: tuple[str, ...] = Field(description="Published versions, oldest first.")
    history: tuple[str, ...] = Field(description="Versions that were active, the present first.")
    serving: str | None = Field(
        description="The version that answers requests now; null if none could be loaded."
    )
    refused: str | None = Field(description="Why the active version does not serve.")
    candidate: CandidateFacts | None


class AdminModels(Schema):
    models: tuple[AdminModel, ...]
