"""The matrix products of a graph, and how large the numbers in them become on given clips.

What FP16, INT8 and FP8 are decided by: a product whose numbers do not fit stays in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper

from export.onnx import INPUT_NAME, ExportError
from export.runtime.cores import usable_cores

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


def record_magnitudes(path: Path, clips: NDArray[np.uint8]) -> Magnitudes:
    """Runs a float32 graph and keeps the largest magnitude of all that its products touch.

    Args:
        path: as `export_onnx` wrote it.
        clips: uint8 (clips, time, height, width, 3); they go through one at a time.

    Raises:
        ExportError: a number is not finite.
    """
    model = onnx.load(path)
    graph = model.graph
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    touched = dict.fromkeys(name for product in find_products(graph) for name in product.tensors)
    found = {name: _largest(weights[name]) for name in touched if name in weights}
    measured = [name for name in touched if name not in weights]
    del graph.output[:]
    for index, name in enumerate(measured):
        for operator in ("ReduceMax", "ReduceMin"):
            output = f"{operator}_{index}"
            graph.node.append(helper.make_node(operator, [name], [output], keepdims=0))
            graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, []))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    ends = [session.run(None, {INPUT_NAME: clip[None]}) for clip in clips]
    largest = np.abs(np.array(ends)).max(axis=0).reshape(-1, 2).max(axis=1)
    found.update(zip(measured, largest.tolist(), strict=True))
    for name, value in found.items():
        if not np.isfinite(value):
            raise ExportError(f"{path.name} computes {value} in {name} on the calibration clips")
    return found


def _largest(values: NDArray[np.float32]) -> float:
    return float(np.abs(values).max(initial=0))
