"""Requests and responses of `/v1/jobs`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, JsonValue

from service.inference.parameters import (
    ClassifyParameters,
    Schema,
    TimelineParameters,
    ViewParameters,
    number,
)


def _optional(model: type[BaseModel], name: str, kinds: str) -> Any:
    """A parameter of another model that may be left out, and is checked by that model."""
    return Field(None, description=f"{model.model_fields[name].description} Of {kinds}.")


class JobRequest(Schema):
    """What is to be done with a long video, later. Parameters are those of the kind."""

    kind: Literal["classify", "timeline", "embed"] = Field(
        description="What is to be done: as `/v1/classify`, `/v1/timeline` or `/v1/embed` would."
    )
    webhook: str | None = Field(
        None,
        max_length=1000,
        description="URL that is told by a signed `POST` when the job has ended.",
    )
    model: str | None = _optional(ViewParameters, "model", "all kinds")
    views: int | None = _optional(ViewParameters, "views", "classify, embed")
    crops: Annotated[Literal[1, 3] | None, BeforeValidator(number)] = _optional(
        ViewParameters, "crops", "all kinds"
    )
    top_k: int | None = _optional(ClassifyParameters, "top_k", "classify, timeline")
    threshold: float | None = _optional(ClassifyParameters, "threshold", "classify, timeline")
    window: float | None = _optional(TimelineParameters, "window", "timeline")
    stride: float | None = _optional(TimelineParameters, "stride", "timeline")
    smoothing: int | None = _optional(TimelineParameters, "smoothing", "timeline")
    open_score: float | None = _optional(TimelineParameters, "open_score", "timeline")
    close_score: float | None = _optional(TimelineParameters, "close_score", "timeline")
    min_segment: float | None = _optional(TimelineParameters, "min_segment", "timeline")


class JobProgress(Schema):
    windows: int = Field(description="Windows that are done.")
    of: int = Field(description="Windows that are expected.")


class JobError(Schema):
    code: str = Field(description="As of a problem document.")
    status: int
    detail: str


class JobStatus(Schema):
    """A job, without its result."""

    id: str
    kind: Literal["classify", "timeline", "embed"]
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    created: str
    started: str | None
    finished: str | None
    attempts: int = Field(description="How often it was begun: again where a server was killed.")
    bytes: int = Field(description="Size of an uploaded video.")
    parameters: dict[str, JsonValue]
    progress: JobProgress | None = Field(description="Of a timeline that runs.")
    error: JobError | None
    webhook: Literal["none", "waiting", "delivered", "failed"]


class JobList(Schema):
    jobs: tuple[JobStatus, ...] = Field(description="Newest first.")
    next: str | None = Field(description="Goes into `before` for the next page.")
