"""Results of requests: predictions, embeddings, and the events of timelines.

The same results serve HTTP, jobs, the command line and archives.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from service.inference.parameters import Schema


class Prediction(Schema):
    label: str
    class_index: int = Field(description="Position of the label in the model's list.")
    score: float = Field(ge=0, le=1, description="Mean of the softmax over all clips.")


class ModelName(Schema):
    name: str
    version: str


class SamplingFacts(Schema):
    """What the network was shown."""

    mode: Literal["dense", "uniform"] = Field(
        description="`dense`: frames at a fixed stride. `uniform`: spread over the whole video."
    )
    views: int
    crops: int
    times_s: tuple[tuple[float, ...], ...] = Field(
        description="For each view, when its frames are shown, from the first frame on."
    )


class VideoFactsSchema(Schema):
    """What the file turned out to be; headers are not believed."""

    width: int = Field(description="As displayed: after rotation and pixel aspect ratio.")
    height: int
    rotation: int = Field(description="Degrees clockwise that a player turns the frames by.")
    duration_s: float
    frames: int
    frame_rate: float | None
    codec: str
    container: str
    truncated: bool = Field(description="The file ends early or is damaged; the rest was used.")


class Classification(Schema):
    """What a model says of a video, and on what grounds."""

    predictions: tuple[Prediction, ...]
    model: ModelName
    sampling: SamplingFacts
    video: VideoFactsSchema


class Embedding(Schema):
    """What a model makes of a video, as a vector."""

    embedding: tuple[float, ...] = Field(description="Mean over all clips; not normalised.")
    dim: int
    model: ModelName
    sampling: SamplingFacts
    video: VideoFactsSchema


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
