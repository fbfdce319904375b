"""The least time that a graph's matrix products take: a graph of them and of nothing else.

What an engine needs beyond that is layout, norms, softmax and the like; the share of the limit says
how much is left to be gained on a machine.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx import shape_inference as inference

from export.onnx import INPUT_NAME, ExportError
from export.onnx import OUTPUT_NAMES as OUTPUTS

_PRODUCTS = frozenset({"MatMul", "MatMulInteger"})
_QUANTIZED = frozenset({"QuantizeLinear", "DequantizeLinear"})


class Limit(NamedTuple):
    """A graph for an engine to load: uint8 (batch,) `frames` in, two vectors out."""

    graph: bytes
    multiply_adds: int
    """Of one clip."""


class _Tensor(NamedTuple):
    type: int
    shape: tuple[int, ...]


def products_alone(path: Path) -> Limit:
    """Every matrix product of a graph, with its own weights and shapes, for any batch.

    Activations are stand-ins, made once for all products of many tokens with weights that have the
    same shape. Of each result one number is read, so that none is left out.

    Raises:
        ExportError: the graph has no products, or shapes that cannot be told.
    """
    source = onnx.load(path)
    if any(node.op_type in _QUANTIZED for node in source.graph.node):
        raise ExportError(f"{path.name} quantizes by Q/DQ: its engine decides what is a product")
    tensors, weights = _tensors(source), {t.name: t for t in source.graph.initializer}
    builder = _Builder()
    multiply_adds = 0
    for index, node in enumerate(n for n in source.graph.node if n.op_type in _PRODUCTS):
        left, right = node.input[:2]
        if left not in tensors or right not in tensors:
            raise ExportError(f"{path.name}: the shapes of {node.name} are not known")
        # Two products of the same stand-ins would be computed once.
        mark = "" if right in weights else f"_{index}"
        names = [
            builder.weight(weights[name]) if name in weights else builder.stand_in(tensor, mark)
            for name, tensor in ((left, tensors[left]), (right, tensors[right]))
        ]
        builder.product(node.op_type, names, index)
        multiply_adds += _multiply_adds(tensors[left].shape, tensors[right].shape)
    if not multiply_adds:
        raise ExportError(f"{path.name} has no matrix product")
    return Limit(builder.finish(source), multiply_adds)


def _tensors(model: ModelProto) -> dict[str, _Tensor]:
    """Types and shapes for a batch of one, which leads the shape of every activation."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    for output in model.graph.output:
        output.type.tensor_type.shape.dim[0].dim_value = 1
    inferred = inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    found = {t.name: _Tensor(t.data_type, tuple(t.dims)) for t in inferred.initializer}
    for value in inferred.value_info:
        tensor = value.type.tensor_type
        shape = tuple(axis.dim_value for axis in tensor.shape.dim)
        if shape and all(shape):
            found[value.name] = _Tensor(tensor.elem_type, shape)
    return found


def _multiply_adds(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    groups = np.broadcast_shapes(left[:-2], right[:-2])
    return math.prod(groups) * left[-2] * left[-1] * right[-1]


class _Builder:
    def __init__(self) -> None:
        self.nodes: list[NodeProto] = [
            helper.make_node("Shape", [INPUT_NAME], ["batch"]),
            helper.make_node("Cast", [INPUT_NAME], ["pixels"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMax", ["pixels"], ["seed"], keepdims=0),
        ]
        self.constants: dict[str, TensorProto] = {}
        self.made: set[str] = set()
        self.read: list[str] = []
        for name, value in (("zero", 0), ("one", 1), ("flat", -1)):
            self._constant(name, np.array([value], np.int64))
        self._constant("middle", np.array(128, np.uint8))

    def weight(self, tensor: TensorProto) -> str:
        self.constants[tensor.name] = tensor
        return str(tensor.name)

    def stand_in(self, tensor: _Tensor, mark: str) -> str:
        """Numbers that depend on the input, so that no engine computes with them ahead."""
        kind = TensorProto.DataType.Name(tensor.type).lower()
        name = f"{kind}_{'x'.join(map(str, tensor.shape))}{mark}"
        if name in self.made:
            return name
        self.made.add(name)
        row = np.random.default_rng(len(self.made)).standard_normal(tensor.shape[-1])
        values = row if tensor.type != TensorProto.UINT8 else 128 + 30 * row
        self._constant(f"{name}_row", values.astype(np.float32))
        self._constant(f"{name}_first", np.array(tensor.shape[:1], np.int64))
        self._constant(f"{name}_rest", np.array(tensor.shape[1:], np.int64))
        self.nodes += [
            helper.make_node("Add", [f"{name}_row", "seed"], [f"{name}_seeded"]),
            helper.make_node("Cast", [f"{name}_seeded"], [f"{name}_cast"], to=tensor.type),
            helper.make_node("Mul", ["batch", f"{name}_first"], [f"{name}_groups"]),
            helper.make_node(
                "Concat", [f"{name}_groups", f"{name}_rest"], [f"{name}_shape"], axis=0
            ),
            helper.make_node("Expand", [f"{name}_cast", f"{name}_shape"], [name]),
        ]
        return name

    def product(self, operator: str, names: list[str], index: int) -> None:
        zero_point = ["middle"] if operator == "MatMulInteger" else []
        result = f"product_{index}"
        self.nodes += [
            helper.make_node(operator, [*names, *zero_point], [result]),
            helper.make_node("Reshape", [result, "flat"], [f"{result}_flat"]),
            helper.make_node("Slice", [f"{result}_flat", "zero", "one"], [f"{result}_first"]),
            helper.make_node("Cast", [f"{result}_first"], [f"{result}_read"], to=TensorProto.FLOAT),
        ]
        self.read.append(f"{result}_read")

    def finish(self, source: ModelProto) -> bytes:
        self.nodes.append(helper.make_node("Concat", self.read, [OUTPUTS[0]], axis=0))
        self.nodes.append(helper.make_node("Identity", [OUTPUTS[0]], [OUTPUTS[1]]))
        frames = helper.make_tensor_value_info(INPUT_NAME, TensorProto.UINT8, ["batch_size"])
        outputs = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [len(self.read)])
            for name in OUTPUTS
        ]
        graph = helper.make_graph(
            self.nodes, "products", [frames], outputs, list(self.constants.values())
        )
        model = helper.make_model(
            graph, opset_imports=source.opset_import, ir_version=source.ir_version
        )
        return bytes(model.SerializeToString())

    def _constant(self, name: str, value: np.typing.NDArray[np.generic]) -> None:
        self.constants[name] = numpy_helper.from_array(value, name)
