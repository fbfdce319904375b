"""Requests and responses of the HTTP API. Those of timelines and jobs are in `schemas_timeline.py`,
those of the Open Inference Protocol in `schemas_infer.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

_TENSORRT = (
    "`serving`; `building` while ONNX Runtime serves; or `missing`, `failed`, `unavailable` or "
    "`off`, with the reason."
)


class Schema(BaseModel):
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


def number(value: object) -> object:
    """Of a string of digits, as query and form values are; a Literal of numbers takes no other."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class ViewParameters(Schema):
    """How a video is to be looked at, and by which model."""

    model: str | None = Field(
        None, max_length=64, description="Name of the model, if several serve; see `/v1/models`."
    )
    views: int = Field(1, ge=1, le=1000, description="Clips spread over the video's length.")
    crops: Annotated[Literal[1, 3], BeforeValidator(number)] = Field(
        1, description="1: the centre. 3: the two ends and the centre of the long side."
    )


class ClassifyParameters(ViewParameters):
    """How a video is to be looked at, and how much of the answer is wanted."""

    top_k: int = Field(5, ge=1, le=10_000, description="Labels in the answer, best first.")
    threshold: float = Field(0.0, ge=0, le=1, description="Labels that score less are left out.")


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


class Timings(Schema):
    """Milliseconds spent on this request."""

    upload: float
    decode: float = Field(description="Including the wait for a free decoder.")
    queue: float = Field(description="The wait for the engine.")
    inference: float
    total: float


class Classification(Schema):
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


class Embedding(Schema):
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


class FieldProblem(Schema):
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
