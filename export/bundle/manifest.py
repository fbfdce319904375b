"""What `manifest.json` says of a bundle, and the names of the files it may list."""

from __future__ import annotations

from datetime import datetime
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from model.config import ModelConfig

MANIFEST = "manifest.json"
LABELS = "labels.txt"
WEIGHTS = "weights.safetensors"
ONNX_FLOAT32 = "model.onnx"
ONNX_INT8 = "model.int8.onnx"
ONNX_FP16 = "model.fp16.onnx"
ONNX_INT8_QDQ = "model.int8-qdq.onnx"
ONNX_FP8 = "model.fp8.onnx"
GRAPHS = {
    "float32": ONNX_FLOAT32,
    "fp16": ONNX_FP16,
    "int8": ONNX_INT8,
    "int8-qdq": ONNX_INT8_QDQ,
    "fp8": ONNX_FP8,
}
"""The file of each kind of graph. INT8 is two: rounded at run time for CPUs, by calibrated ranges
for TensorRT."""
GPU_KINDS = frozenset({"fp16", "int8-qdq", "fp8"})
"""Graphs that no CPU computes as they say. `export.verification.gpu_emulation` shows what a GPU
computes."""
REPORT = "report.html"


def _relative(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"{name!r} is not a path inside the bundle")
    return name


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorSpec(_Model):
    """An input or output of the graph; -1 in `shape` is the batch."""

    name: str
    dtype: Literal["uint8", "float32"]
    shape: tuple[int, ...]


class FileEntry(_Model):
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0, description="bytes")


class Parity(_Model):
    """How one artefact's answers compare with the float32 network's on the same clips."""

    clips: int = Field(ge=1)
    max_difference: float = Field(description="largest absolute difference of two logits")
    mean_difference: float
    embedding_max_difference: float
    centred_cosine: float | None = Field(
        None, description="of the logits, each clip's mean taken away; the worst clip's"
    )
    embedding_cosine: float | None = Field(None, description="the same of the embedding")
    relative_error: float | None = Field(
        None,
        description="length of what a clip's logits are off by, relative to theirs with their mean "
        "taken away; the worst clip's",
    )
    embedding_relative_error: float | None = Field(None, description="the same of the embedding")
    softmax_divergence: float | None = Field(
        None, description="Kullback-Leibler divergence of the scores, in nats; the worst clip's"
    )
    top1_agreement: float = Field(ge=0, le=1)
    top5_agreement: float | None = Field(None, ge=0, le=1)
    low_margin_clips: int | None = Field(
        None, ge=0, description="clips whose best two logits are within noise of each other"
    )
    low_margin_agreement: float | None = Field(
        None, ge=0, le=1, description="top-1 agreement on those; on all others it must be 1"
    )
    limit: float | None = Field(
        description="largest `max_difference` that passes; null if the cosine decides"
    )
    cosine_limit: float | None = Field(None, description="least cosine that passes")
    error_limit: float | None = Field(None, description="largest relative error that passes")
    divergence_limit: float | None = Field(None, description="largest divergence that passes")
    passed: bool


class Cost(_Model):
    """What a network or graph costs."""

    parameters: int = Field(ge=0)
    multiply_adds: int = Field(ge=0, description="of one view, as the papers of the field count")


class ProductReport(_Model):
    """A matrix product of a graph of lower precision."""

    name: str = Field(description="the module of the network and the operator")
    precision: Literal["float32", "fp16", "int8", "fp8"]
    inputs: tuple[float, float] = Field(
        description="largest magnitude of each factor on the calibration clips"
    )
    output: float = Field(description="the same of the result, before a bias is added")
    error: float | None = Field(
        default=None,
        description="by how much of its length 8 bits put the result off on the calibration clips",
    )
    reason: str | None = Field(None, description="why it is not of the graph's own precision")


class CalibrationReport(_Model):
    """What ranges were measured on, and how those of 8 bits were chosen."""

    source: str = Field(description="name of the folder or list of videos, or `rendered`")
    clips: int = Field(ge=1)
    methods: dict[str, str] = Field(
        default_factory=dict, description="how much of the activations' range each graph covers"
    )
    agreement: dict[str, dict[str, float]] = Field(
        default_factory=dict,
        description="what decided that: least cosine on calibration clips, by graph and method",
    )


class Choice(_Model):
    """What `auto` takes on a kind of device."""

    order: tuple[str, ...] = Field(min_length=1, description="precisions, the fastest first")
    reason: str
    milliseconds: dict[str, float] | None = Field(
        default=None, description="a clip's, by precision, where they were measured"
    )


class Manifest(_Model):
    """`manifest.json`. Every fact about a bundle that a reader may want without its weights."""

    schema_version: Literal[1] = 1
    name: str
    version: str
    created: datetime
    source: str = Field(description="what the weights were loaded from")
    architecture: dict[str, Any]
    preprocessing: dict[str, Any]
    labels: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights_sha256: str
    files: dict[Annotated[str, AfterValidator(_relative)], FileEntry]
    software: dict[str, str]
    network_cost: Cost | None = Field(None, description="of the network as it was trained")
    graph_cost: Cost | None = Field(None, description="of the graph, after its exact rewrites")
    verification: dict[str, Parity]
    products: dict[str, tuple[ProductReport, ...]] = Field(
        default_factory=dict, description="of each graph whose precision was chosen by calibration"
    )
    calibration: CalibrationReport | None = None
    fastest: dict[Literal["cpu", "gpu"], Choice] = Field(
        default_factory=dict, description="what `auto` takes, where the export was to find out"
    )
    rejected: dict[str, str] = Field(
        default_factory=dict, description="graphs that `auto` tried and that failed, and why"
    )
    temperature: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="what logits are divided by to become scores"
    )
    training: dict[str, Any] | None = None
    parent: str | None = None

    @property
    def config(self) -> ModelConfig:
        """The architecture and preprocessing, as one.

        Raises:
            ConfigError: they describe no model.
        """
        return ModelConfig.from_dict({**self.architecture, **self.preprocessing})
