"""The matrix products of a graph, and how large the numbers in them become on given clips.

What FP16, INT8 and FP8 are decided by: a product whose numbers do not fit stays in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper

from export.calibration.recorder import Shapes, record
from export.graph.onnx_export import ExportError

Magnitudes = Mapping[str, float]
"""Largest absolute value of each tensor, by its name."""


class Product(NamedTuple):
    """A matrix product, with the bias that is added to it if there is one."""

    node: NodeProto
    bias: NodeProto | None
    """The addition."""

    @property
    def name(self) -> str:
        return str(self.node.name)

    @property
    def tensors(self) -> tuple[str, ...]:
        """What goes in, what comes out, and that with the bias."""
        sums = self.bias.output if self.bias else ()
        return (*self.node.input, *self.node.output, *sums)


def find_products(graph: GraphProto) -> list[Product]:
    """Every matrix product but the head, which is a Gemm and float32 in every precision."""
    constants = {tensor.name for tensor in graph.initializer}
    biases = {}
    for node in graph.node:
        if node.op_type == "Add" and not constants.isdisjoint(node.input):
            biases.update({name: node for name in node.input if name not in constants})
    return [
        Product(node, biases.get(node.output[0])) for node in graph.node if node.op_type == "MatMul"
    ]


class MagnitudeRecorder:
    """Keeps the largest magnitude of all that a graph's products touch."""

    def __init__(self) -> None:
        self._constant: dict[str, float] = {}
        self._measured: list[str] = []
        self._largest: NDArray[np.float32] | None = None

    def attach(self, graph: GraphProto, shapes: Shapes) -> None:
        weights = {tensor.name: tensor for tensor in graph.initializer}
        touched = dict.fromkeys(
            name for product in find_products(graph) for name in product.tensors
        )
        self._constant = {
            name: _largest(onnx.numpy_helper.to_array(weights[name]))
            for name in touched
            if name in weights
        }
        self._measured = [name for name in touched if name not in weights]
        for index, name in enumerate(self._measured):
            for operator in ("ReduceMax", "ReduceMin"):
                output = f"{operator}_{index}"
                graph.node.append(helper.make_node(operator, [name], [output], keepdims=0))
                graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, []))

    def take(self, clip: int, values: Sequence[NDArray[Any]]) -> None:
        ends = np.abs(np.array(values)).reshape(-1, 2).max(axis=1)
        self._largest = ends if self._largest is None else np.maximum(self._largest, ends)

    @property
    def magnitudes(self) -> Magnitudes:
        """Of all clips that were recorded.

        Raises:
            ExportError: a number is not finite.
        """
        measured = [] if self._largest is None else self._largest.tolist()
        found = {**self._constant, **dict(zip(self._measured, measured, strict=True))}
        for name, value in found.items():
            if not np.isfinite(value):
                raise ExportError(f"the network computes {value} in {name} on these clips")
        return found


def record_magnitudes(path: Path, clips: NDArray[np.uint8]) -> Magnitudes:
    """The largest magnitudes in a float32 graph on some clips.

    Args:
        path: as `export_onnx` wrote it.
        clips: uint8 (clips, time, height, width, 3); they go through one at a time.

    Raises:
        ExportError: a number is not finite.
    """
    recorder = MagnitudeRecorder()
    record(path, clips, recorder)
    return recorder.magnitudes


def _largest(values: NDArray[np.float32]) -> float:
    return float(np.abs(values).max(initial=0))
