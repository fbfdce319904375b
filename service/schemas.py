"""Requests and responses of the HTTP API."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

_TENSORRT = (
    "`serving`; `building` while another engine serves; `failed`, `unavailable` or `off`, with why."
)


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def inlined_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a model with its definitions in place: `#/$defs` in the middle of an
    OpenAPI document would lead nowhere.
    """
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inline(node: Any) -> Any:
        if isinstance(node, list):
            return [inline(item) for item in node]
        if not isinstance(node, dict):
            return node
        target = definitions.get(node.get("$ref", "").removeprefix("#/$defs/"), {})
        rest = {key: value for key, value in node.items() if key != "$ref"}
        return {key: inline(value) for key, value in {**target, **rest}.items()}

    inlined: dict[str, Any] = inline(schema)
    return inlined


def _number(value: object) -> object:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class ViewParameters(_Schema):
    """How a video is to be looked at, and by which model."""

    model: str | None = Field(
        None, max_length=64, description="Name of the model, if several serve; see `/v1/models`."
    )
    views: int = Field(1, ge=1, le=1000, description="Clips spread over the video's length.")
    # Query and form values are strings, which a Literal of numbers does not take by itself.
    crops: Annotated[Literal[1, 3], BeforeValidator(_number)] = Field(
        1, description="1: the centre. 3: the two ends and the centre of the long side."
    )


class ClassifyParameters(ViewParameters):
    """How a video is to be looked at, and how much of the answer is wanted."""

    top_k: int = Field(5, ge=1, le=10_000, description="Labels in the answer, best first.")
    threshold: float = Field(0.0, ge=0, le=1, description="Labels that score less are left out.")


def _optional(model: type[BaseModel], name: str, kinds: str) -> Any:
    """A parameter of another model that may be left out, and is checked by that model."""
    return Field(None, description=f"{model.model_fields[name].description} Of {kinds}.")


class TimelineParameters(_Schema):
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
    crops: Annotated[Literal[1, 3], BeforeValidator(_number)] = Field(
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


class Prediction(_Schema):
    label: str
    class_index: int = Field(description="Position of the label in the model's list.")
    score: float = Field(ge=0, le=1, description="Mean of the softmax over all clips.")


class ModelName(_Schema):
    name: str
    version: str


class SamplingFacts(_Schema):
    """What the network was shown."""

    mode: Literal["dense", "uniform"] = Field(
        description="`dense`: frames at a fixed stride. `uniform`: spread over the whole video."
    )
    views: int
    crops: int
    times_s: tuple[tuple[float, ...], ...] = Field(
        description="For each view, when its frames are shown, from the first frame on."
    )


class VideoFactsSchema(_Schema):
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


class Timings(_Schema):
    """Milliseconds spent on this request."""

    upload: float
    decode: float = Field(description="Including the wait for a free decoder.")
    queue: float = Field(description="The wait for the engine.")
    inference: float
    total: float


class Classification(_Schema):
    """What a model says of a video, and on what grounds."""

    predictions: tuple[Prediction, ...]
    model: ModelName
    sampling: SamplingFacts
    video: VideoFactsSchema


_EXAMPLE_FACTS: dict[str, JsonValue] = {
    "model": {"name": "demo", "version": "1"},
    "sampling": {
        "mode": "dense",
        "views": 1,
        "crops": 1,
        "times_s": [[0.53, 0.67, 0.8, 0.93, 1.07, 1.2, 1.33, 1.47]],
    },
    "video": {
        "width": 320,
        "height": 240,
        "rotation": 0,
        "duration_s": 2.0,
        "frames": 60,
        "frame_rate": 30.0,
        "codec": "h264",
        "container": "mp4",
        "truncated": False,
    },
    "timings_ms": {
        "upload": 0.8,
        "decode": 21.5,
        "queue": 0.3,
        "inference": 14.2,
        "total": 37.4,
    },
    "request_id": "8c1f6a7e5d0b4f0f9a52a3f2c1d0e9b8",
}


class ClassifyResponse(Classification):
    timings_ms: Timings
    request_id: str

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "predictions": [
                        {"label": "turning clockwise", "class_index": 6, "score": 0.97}
                    ],
                    **_EXAMPLE_FACTS,
                }
            ]
        }
    )


class Embedding(_Schema):
    """What a model makes of a video, as a vector."""

    embedding: tuple[float, ...] = Field(description="Mean over all clips; not normalised.")
    dim: int
    model: ModelName
    sampling: SamplingFacts
    video: VideoFactsSchema


class EmbedResponse(Embedding):
    timings_ms: Timings
    request_id: str

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "embedding": [0.8125, -1.25, 0.0625, 0.5],
                    "dim": 4,
                    **_EXAMPLE_FACTS,
                }
            ]
        }
    )


class TimelineStart(_Schema):
    """The first event of a timeline."""

    event: Literal["start"] = "start"
    model: ModelName
    video: VideoFactsSchema
    window_s: float
    stride_s: float
    windows: int = Field(description="How many are expected; damage may make them fewer.")
    request_id: str | None = None


class TimelineWindow(_Schema):
    """What a model says of one window."""

    event: Literal["window"] = "window"
    number: int
    start_s: float
    end_s: float
    predictions: tuple[Prediction, ...]


class TimelineSegment(_Schema):
    """A stretch of the video with one label; sent when it has ended."""

    event: Literal["segment"] = "segment"
    start_s: float
    end_s: float
    label: str
    class_index: int
    score: float = Field(ge=0, le=1, description="Mean over its windows.")
    windows: int


class LabelTime(_Schema):
    label: str
    class_index: int
    seconds: float = Field(description="Of all segments with this label.")
    segments: int


class TimelineSummary(_Schema):
    """The last event of a timeline that is whole."""

    event: Literal["summary"] = "summary"
    windows: int
    segments: int
    labels: tuple[LabelTime, ...] = Field(description="Longest first.")
    video: VideoFactsSchema
    total_s: float = Field(description="Seconds that it took.")


class TimelineError(_Schema):
    """The last event of a timeline that could not go on: what was sent before holds."""

    event: Literal["error"] = "error"
    code: str = Field(description="As of a problem document.")
    status: int
    detail: str
    request_id: str | None = None


TimelineEvent = TimelineStart | TimelineWindow | TimelineSegment | TimelineSummary | TimelineError


class TimelineResult(_Schema):
    """A whole timeline: the events' contents."""

    start: TimelineStart
    windows: tuple[TimelineWindow, ...]
    segments: tuple[TimelineSegment, ...]
    summary: TimelineSummary


class JobRequest(_Schema):
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
    crops: Annotated[Literal[1, 3] | None, BeforeValidator(_number)] = _optional(
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


class JobProgress(_Schema):
    windows: int = Field(description="Windows that are done.")
    of: int = Field(description="Windows that are expected.")


class JobError(_Schema):
    code: str = Field(description="As of a problem document.")
    status: int
    detail: str


class JobStatus(_Schema):
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


class JobList(_Schema):
    jobs: tuple[JobStatus, ...] = Field(description="Newest first.")
    next: str | None = Field(description="Goes into `before` for the next page.")


class ModelFacts(_Schema):
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


class ModelsResponse(_Schema):
    models: tuple[ModelFacts, ...]


class CandidateRequest(_Schema):
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


class AdminModel(_Schema):
    """What the store has under a name, and what of it is used here."""

    name: str
    versions: tuple[str, ...] = Field(description="Published versions, oldest first.")
    history: tuple[str, ...] = Field(description="Versions that were active, the present first.")
    serving: str | None = Field(
        description="The version that answers requests now; null if none could be loaded."
    )
    refused: str | None = Field(description="Why the active version does not serve.")
    candidate: CandidateFacts | None


class AdminModels(_Schema):
    models: tuple[AdminModel, ...]


class _Lenient(BaseModel):
    """For the Open Inference Protocol: members that we do not know are extensions of others."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class InferParameters(_Lenient):
    binary_data_output: bool = Field(
        default=False,
        description="Outputs as bytes after the JSON, where they do not say otherwise.",
    )
    timeout: int = Field(
        default=0,
        ge=0,
        description="Microseconds from the request's head until the answer is of no use; 0: no "
        "limit of its own.",
    )
    priority: int = Field(
        default=0, ge=0, le=3, description="1 high, 2 normal, 3 low; 0: as `X-Request-Priority`."
    )


class InferInputParameters(_Lenient):
    binary_data_size: int | None = Field(
        default=None, ge=0, description="The tensor's bytes follow the JSON; this is how many."
    )


class InferInput(_Lenient):
    name: str = Field(description="`frames`.")
    # Lenient: JSON has no tuples.
    shape: tuple[int, ...] = Field(
        max_length=16, strict=False, description="(clips, time, height, width, 3)"
    )
    datatype: str = Field(description="`UINT8`.")
    parameters: InferInputParameters = InferInputParameters()
    data: JsonValue = Field(
        default=None, description="The numbers, flat in row-major order or nested."
    )


class InferOutputParameters(_Lenient):
    binary_data: bool | None = Field(default=None, description="As bytes after the JSON, or in it.")
    classification: int = Field(
        default=0, ge=0, le=0, description="Not offered; use `/v1/classify`."
    )


class InferOutput(_Lenient):
    name: str = Field(description="`logits` or `embedding`.")
    parameters: InferOutputParameters = InferOutputParameters()


class InferRequest(_Lenient):
    """Clips for the network. `outputs` left out means all of them."""

    id: str | None = Field(default=None, max_length=1024, description="Comes back in the answer.")
    parameters: InferParameters = InferParameters()
    inputs: list[InferInput] = Field(min_length=1, max_length=1)
    outputs: list[InferOutput] | None = Field(default=None, max_length=16)


class InferredTensor(_Schema):
    name: str
    datatype: Literal["FP32"]
    shape: tuple[int, ...]
    parameters: InferInputParameters | None = None
    data: tuple[float, ...] | None = Field(None, description="Row-major, if not binary.")


class InferResponse(_Schema):
    model_name: str
    model_version: str
    id: str | None = None
    outputs: tuple[InferredTensor, ...]


class TensorMetadata(_Schema):
    name: str
    datatype: str
    shape: tuple[int, ...] = Field(description="-1 is the number of clips.")


class ModelMetadata(_Schema):
    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


class ServerMetadata(_Schema):
    name: str
    version: str
    extensions: tuple[str, ...]


class ServerReady(_Schema):
    ready: Literal[True] = True


class ModelReady(ServerReady):
    name: str


class ProtocolError(_Schema):
    """An error of the Open Inference Protocol."""

    error: str


class LiveResponse(_Schema):
    live: Literal[True] = True


class ModelState(_Schema):
    """How one of several models is."""

    name: str
    version: str | None = Field(description="The version that serves; null if none does.")
    refused: bool = Field(
        description="The store's active version cannot be used; the log says why."
    )


class EngineState(_Schema):
    """How one of a model's engines is."""

    device: str = Field(description="`cpu`, or which GPU, such as `cuda:0`.")
    healthy: bool = Field(description="It is in use, and does not fail on everything.")


class ReadyResponse(_Schema):
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


class FieldProblem(_Schema):
    field: str
    message: str


class Problem(BaseModel):
    """RFC 9457 problem details. `code` is stable and for programs, `detail` is for people."""

    type: str = "about:blank"
    title: str
    status: int
    code: str
    detail: str
    request_id: str | None = None
    errors: list[FieldProblem] | None = None

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "about:blank",
                    "title": "Unprocessable Entity",
                    "status": 422,
                    "code": "no_video_stream",
                    "detail": "The file has no video stream.",
                    "request_id": "8c1f6a7e5d0b4f0f9a52a3f2c1d0e9b8",
                }
            ]
        }
    )
