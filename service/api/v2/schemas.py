"""Requests and responses of the Open Inference Protocol."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from service.inference.parameters import Schema


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
        max_length=16, fail_fast=True, strict=False, description="(clips, time, height, width, 3)"
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
    inputs: list[InferInput] = Field(min_length=1, max_length=1, fail_fast=True)
    outputs: list[InferOutput] | None = Field(default=None, max_length=16, fail_fast=True)


class InferredTensor(Schema):
    name: str
    datatype: Literal["FP32"]
    shape: tuple[int, ...]
    parameters: InferInputParameters | None = None
    data: tuple[float, ...] | None = Field(None, description="Row-major, if not binary.")


class InferResponse(Schema):
    model_name: str
    model_version: str
    id: str | None = None
    outputs: tuple[InferredTensor, ...]


class TensorMetadata(Schema):
    name: str
    datatype: str
    shape: tuple[int, ...] = Field(description="-1 is the number of clips.")


class ModelMetadata(Schema):
    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


class ServerMetadata(Schema):
    name: str
    version: str
    extensions: tuple[str, ...]


class ServerReady(Schema):
    ready: Literal[True] = True


class ModelReady(ServerReady):
    name: str


class ProtocolError(Schema):
    """An error of the Open Inference Protocol."""

    error: str
