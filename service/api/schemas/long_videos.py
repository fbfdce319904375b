"""Requests and responses of long videos: timelines, and jobs of all kinds."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, JsonValue, model_validator

from service.schemas import (
    ClassifyParameters,
    ModelName,
    Prediction,
    Schema,
    VideoFactsSchema,
    ViewParameters,
    number,
)


class TimelineParameters(Schema):
    """How a long video is to be cut into windows, and what is wanted of them."""

    window: float | None = Field(
        None,
        gt=0,
        le=3600,
        description="Seconds that one window shows; by default the span of the model's own clips.",
    )
    stride: float | None = Field(
        None,
        gt=0,
        le=3600,
        description="Seconds from the start of one window to that of the next, from an eighth of a "
        "window to a whole one; by default half a window.",
    )
    crops: Annotated[Literal[1, 3], BeforeValidator(number)] = Field(
        1, description="1: the centre. 3: the two ends and the centre of the long side."
    )
    top_k: int = Field(3, ge=1, le=10_000, description="Labels of each window, best first.")
    threshold: float = Field(0.0, ge=0, le=1, description="Labels that score less are left out.")
    smoothing: int = Field(
        3,
        ge=1,
        le=99,
        description="Windows that a score is averaged over, itself in their middle, before "
        "segments are made; an odd number.",
    )
    open_score: float = Field(
        0.5, ge=0, le=1, description="Smoothed score that a segment must reach somewhere."
    )
    close_score: float = Field(
        0.3, ge=0, le=1, description="Smoothed score that it must keep; at most `open_score`."
    )
    min_segment: float = Field(
        0.0, ge=0, le=86_400, description="Shorter segments, in seconds, are dropped."
    )

    @model_validator(mode="after")
    def _rule_is_one(self) -> Self:
        if self.close_score > self.open_score:
            raise ValueError("close_score must not be above open_score")
        if self.smoothing % 2 == 0:
            raise ValueError("smoothing must be an odd number")
        return self


class JobTimelineParameters(TimelineParameters):
    """The same, and by which model."""

    model: str | None = Field(
        None, max_length=64, description="Name of the model, if several serve; see `/v1/models`."
    )


class TimelineRequest(JobTimelineParameters):
    """The same, and how it is to be sent."""

    format: Literal["ndjson", "sse"] | None = Field(
        None,
        description="`ndjson`: a JSON object a line. `sse`: server-sent events. By default what "
        "`Accept` asks for, else `ndjson`.",
    )


class TimelineStart(Schema):
    """The first event of a timeline."""

    event: Literal["start"] = "start"
    model: ModelName
    video: VideoFactsSchema
    window_s: float
    stride_s: float
    windows: int = Field(description="How many are expected; damage may make them fewer.")
    request_id: str | None = None


class TimelineWindow(Schema):
    """What a model says of one window."""

    event: Literal["window"] = "window"
    number: int
    start_s: float
    end_s: float
    predictions: tuple[Prediction, ...]


class TimelineSegment(Schema):
    """A stretch of the video with one label; sent when it has ended."""

    event: Literal["segment"] = "segment"
    start_s: float
    end_s: float
    label: str
    class_index: int
    score: float = Field(ge=0, le=1, description="Mean over its windows.")
    windows: int


class LabelTime(Schema):
    label: str
    class_index: int
    seconds: float = Field(description="Of all segments with this label.")
    segments: int


class TimelineSummary(Schema):
    """The last event of a timeline that is whole."""

    event: Literal["summary"] = "summary"
    windows: int
    segments: int
    labels: tuple[LabelTime, ...] = Field(description="Longest first.")
    video: VideoFactsSchema
    total_s: float = Field(description="Seconds that it took.")


class TimelineError(Schema):
    """The last event of a timeline that could not go on: what was sent before holds."""

    event: Literal["error"] = "error"
    code: str = Field(description="As of a problem document.")
    status: int
    detail: str
    request_id: str | None = None


TimelineEvent = TimelineStart | TimelineWindow | TimelineSegment | TimelineSummary | TimelineError


class TimelineResult(Schema):
    """A whole timeline: the events' contents."""

    start: TimelineStart
    windows: tuple[TimelineWindow, ...]
    segments: tuple[TimelineSegment, ...]
    summary: TimelineSummary


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
