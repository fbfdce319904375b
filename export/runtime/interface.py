"""What every engine offers: clips in, `Outputs` out."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "float32", "fp16", "int8", "fp8"]


class RuntimeUnavailableError(RuntimeError):
    """The engine or device that was asked for cannot run this bundle here."""


class Outputs(NamedTuple):
    """What the network says of a batch of clips."""

    logits: NDArray[np.float32]
    """(batch, classes)"""
    embedding: NDArray[np.float32]
    """(batch, dim)"""


class Runtime(Protocol):
    """An engine with a bundle's network loaded."""

    @property
    def engine(self) -> str:
        """What executes the network, such as `onnxruntime`."""

    @property
    def provider(self) -> str:
        """What that runs on, in the engine's own words, such as `CPUExecutionProvider`."""

    @property
    def device(self) -> str:
        """`cpu` or `cuda`."""

    @property
    def gpu(self) -> int | None:
        """Which of the visible GPUs; None on a CPU."""

    @property
    def precision(self) -> str:
        """`float32`, `fp16`, `int8` or `fp8`: of the graph that is loaded."""

    @property
    def slots(self) -> int:
        """Batches that may be on their way at once, each `run` in a thread of its own."""

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes that it was built for, rising; above the last, batches are cut. Empty: any
        size is as good.
        """

    def run(self, frames: NDArray[np.uint8]) -> Outputs:
        """Classifies clips: uint8 (batch, time, height, width, 3) to `Outputs`."""

    def close(self) -> None:
        """Frees the device's memory; the object is dead afterwards."""


def device_name(runtime: Runtime) -> str:
    """`cpu`, or the GPU's name, such as `cuda:1`."""
    return runtime.device if runtime.gpu is None else f"{runtime.device}:{runtime.gpu}"
