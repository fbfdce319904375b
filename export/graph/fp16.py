"""FP16 without wrong answers: a strongly typed graph of mixed precision, for GPUs.

Matrix products are in FP16 where their numbers fit; residual stream, LayerNorm, softmax, means and
the head in float32. Between a LayerNorm or softmax and a product tokens are moved in FP16. Each
cast is a node of the graph, so that no engine decides anything; `check_types` holds the finished
graph to these rules and shares no code with what wrote it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx import shape_inference as inference

from export.bundle.manifest import ProductReport
from export.graph.matmuls import Magnitudes, Product, find_products
from export.graph.onnx_export import ExportError

FLOAT: int = TensorProto.FLOAT
HALF: int = TensorProto.FLOAT16
LARGEST = 65504.0
# Other clips may bring larger numbers than those that were measured on.
HEADROOM = 4
# Below 2^-14 FP16 loses bits: where not even the largest number is well above, nearly all do.
SMALLEST = 2.0**-10
# A number that is neither too large nor too small is off by 2^-11 at most.
_WEIGHT_ERROR = 2.0**-10
_MOVES = frozenset(
    {"Concat", "Expand", "Gather", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
)
_FLOAT32_ONLY = frozenset({"Gemm", "LayerNormalization", "ReduceMean", "Softmax"})


def export_fp16(source: Path, target: Path, magnitudes: Magnitudes) -> tuple[ProductReport, ...]:
    """Writes the FP16 graph of a float32 one that `export_onnx` has written.

    Args:
        source: the float32 graph.
        target: where the FP16 graph goes; same inputs and outputs.
        magnitudes: of `source`, by `record_magnitudes`.

    Returns:
        Each product's largest numbers, its precision, and why that is float32 where it is.

    Raises:
        ExportError: the result is no valid graph, or not of the types that it should be.
    """
    model = inference.infer_shapes(onnx.load(source), strict_mode=True)
    reports = judge_products(model.graph, magnitudes)
    kept = {report.name for report in reports if report.precision == "float32"}
    _Converter(model.graph, kept, magnitudes).convert()
    try:
        onnx.save(model, target)
        onnx.checker.check_model(str(target), full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the FP16 graph is not valid: {error}") from error
    check_types(model, kept)
    return reports


def judge_products(graph: GraphProto, magnitudes: Magnitudes) -> tuple[ProductReport, ...]:
    """Which products fit into FP16 and which do not, in the graph's order."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    return tuple(_judge(product, weights, magnitudes) for product in find_products(graph))


def _judge(
    product: Product, weights: dict[str, TensorProto], magnitudes: Magnitudes
) -> ProductReport:
    *inputs, output = (magnitudes[name] for name in (*product.node.input, *product.node.output))
    reason = None
    for what, value in zip(("an input", "an input", "its result"), (*inputs, output), strict=True):
        if value > LARGEST / HEADROOM:
            reason = f"{what} of {value:.4g} is beyond {LARGEST:g} / {HEADROOM}"
        elif 0 < value < SMALLEST:
            reason = f"{what} is nowhere above {value:.4g}: too small"
    for name in product.node.input:
        if reason is None and name in weights:
            off = _rounding_error(numpy_helper.to_array(weights[name]))
            if off > _WEIGHT_ERROR:
                reason = f"its weights would be off by {off:.2g}: too small"
    return ProductReport(
        name=product.name,
        precision="float32" if reason else "fp16",
        inputs=(inputs[0], inputs[1]),
        output=output,
        reason=reason,
    )


def _rounding_error(weight: NDArray[np.float32]) -> float:
    """How far FP16 puts an output channel's weights off, relative to their length; the worst."""
    weight = weight.astype(np.float64)
    with np.errstate(over="ignore"):  # infinitely off
        off = np.linalg.norm(weight - weight.astype(np.float16), axis=-2)
    length = np.linalg.norm(weight, axis=-2)
    return float(np.divide(off, length, out=np.zeros_like(off), where=length > 0).max())


class _Converter:
    """Goes through a float32 graph once, in order, and writes it anew in mixed precision.

    A tensor keeps its name in float32; in FP16 it is `NAME_fp16`.
    """

    def __init__(self, graph: GraphProto, kept: Collection[str], magnitudes: Magnitudes) -> None:
        self._graph = graph
        self._kept = kept
        self._biases = {
            product.bias.output[0]: product
            for product in find_products(graph)
            if product.bias and magnitudes[product.bias.output[0]] <= LARGEST / HEADROOM
        }
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        self._floats = {value.name for value in graph.value_info if _element(value) == FLOAT}
        self._floats.update(name for name, w in self._weights.items() if w.data_type == FLOAT)
        self._floats.update(value.name for value in graph.output)
        self._readers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._wanted: dict[str, set[int]] = {}
        self._computed: dict[str, int] = {}  # in which type a tensor was made
        self._made: dict[str, set[int]] = {}  # and in which it is there
        self._nodes: list[NodeProto] = []

    def convert(self) -> None:
        graph = self._graph
        for node in list(graph.node):
            if node.output[0] in self._floats:
                self._rewrite(node)
            else:
                self._nodes.append(node)
        read = {name for node in self._nodes for name in node.input}
        halves = [
            numpy_helper.from_array(
                numpy_helper.to_array(tensor).astype(np.float16), half_name(name)
            )
            for name, tensor in self._weights.items()
            if half_name(name) in read
        ]
        kept = [tensor for name, tensor in self._weights.items() if name in read]
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(self._nodes)
        graph.initializer.extend([*kept, *halves])

    def _rewrite(self, node: NodeProto) -> None:
        kind = self._type_of(node)
        inputs = [self._in_type(name, kind) for name in node.input]
        typed = NodeProto()
        typed.CopyFrom(node)
        del typed.input[:]
        typed.input.extend(inputs)
        if kind == HALF:
            typed.output[0] = half_name(node.output[0])
        for attribute in typed.attribute:
            if node.op_type == "Cast" and attribute.name == "to":
                attribute.i = kind
        self._nodes.append(typed)
        self._computed[node.output[0]] = kind
        self._made[node.output[0]] = {kind}

    def _type_of(self, node: NodeProto) -> int:
        """The type that a node computes in, and whose result it gives."""
        (output,) = node.output
        only_halves = self._wanted_types(output) == {HALF}
        if node.op_type == "MatMul":
            return FLOAT if node.name in self._kept else HALF
        if output in self._biases:
            product = self._biases[output].node
            return HALF if only_halves and self._is_half(product.output[0]) else FLOAT
        if node.op_type == "Gelu":
            return HALF if only_halves and self._is_half(node.input[0]) else FLOAT
        if node.op_type in _MOVES:
            # Fewer bytes to move; what no product reads in FP16 was never in it.
            moved = [name for name in node.input if name in self._floats]
            made = all(self._is_half(name) for name in moved)
            return HALF if only_halves or (made and output not in self._outputs) else FLOAT
        if node.op_type == "Cast":
            return HALF if only_halves else FLOAT
        return FLOAT

    @property
    def _outputs(self) -> set[str]:
        return {value.name for value in self._graph.output}

    def _is_half(self, name: str) -> bool:
        """Whether a tensor was computed in FP16, not cast to it."""
        return self._computed.get(name) == HALF

    def _in_type(self, name: str, kind: int) -> str:
        """The name of a tensor in a type, cast here if it is not there yet."""
        if name not in self._floats:
            return name
        wanted, other = (half_name(name), name) if kind == HALF else (name, half_name(name))
        if name not in self._weights and kind not in self._made[name]:
            self._nodes.append(
                helper.make_node("Cast", [other], [wanted], name=f"{wanted}/Cast", to=kind)
            )
            self._made[name].add(kind)
        return wanted

    def _wanted_types(self, name: str) -> set[int]:
        """In which types a tensor will be read, seen through what only moves it."""
        if name not in self._wanted:
            wanted: set[int] = {FLOAT} if name in self._outputs else set()
            for reader in self._readers.get(name, ()):
                if reader.op_type in _MOVES or reader.op_type == "Gelu":
                    wanted |= self._wanted_types(reader.output[0])
                elif reader.op_type == "MatMul" and reader.name not in self._kept:
                    wanted.add(HALF)
                else:
                    wanted.add(FLOAT)
            self._wanted[name] = wanted
        return self._wanted[name]


def half_name(name: str) -> str:
    """What the FP16 form of a float32 tensor is called."""
    return f"{name}_fp16"


def _element(value: onnx.ValueInfoProto) -> int:
    return int(value.type.tensor_type.elem_type)


def check_types(model: ModelProto, kept: Collection[str] = ()) -> None:
    """Holds a finished graph to the rules of this file, node by node.

    Args:
        kept: names of the products that stay in float32.

    Raises:
        ExportError: names each node that computes in a type it should not.
    """
    graph = inference.infer_shapes(model, strict_mode=True).graph
    types = {tensor.name: int(tensor.data_type) for tensor in graph.initializer}
    values = (*graph.input, *graph.output, *graph.value_info)
    types.update({value.name: _element(value) for value in values})
    half_products = {
        node.output[0] for node in graph.node if node.op_type == "MatMul" and node.name not in kept
    }
    constants = {tensor.name for tensor in graph.initializer}
    wrong = []
    for node in graph.node:
        found = {types[name] for name in node.input} & {FLOAT, HALF}
        allowed = _allowed(node, kept, half_products, constants) if found else set()
        if found and (len(found) > 1 or not found <= allowed):
            wrong.append(f"{node.op_type} {node.name} reads {_names(found)}, not {_names(allowed)}")
    makers = {name: node for node in graph.node for name in node.output}
    wrong += [
        f"{name} is rounded to FP16 and back by Cast {node.name}"
        for node in graph.node
        if node.op_type == "Cast" and types[node.input[0]] == HALF
        for name in _rounded_for_nothing(node.input[0], makers)
    ]
    wrong += [
        f"output {value.name} is {_names({_element(value)})}"
        for value in graph.output
        if _element(value) != FLOAT
    ]
    if wrong:
        raise ExportError(f"the FP16 graph is not of the types that it should be: {wrong}")


def _allowed(
    node: NodeProto, kept: Collection[str], half_products: set[str], constants: set[str]
) -> set[int]:
    if node.op_type == "MatMul":
        return {FLOAT} if node.name in kept else {HALF}
    if node.op_type == "Add":
        adds_bias = not constants.isdisjoint(node.input)
        return {FLOAT, HALF} if adds_bias and not half_products.isdisjoint(node.input) else {FLOAT}
    if node.op_type in _FLOAT32_ONLY:
        return {FLOAT}
    if node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
        return {HALF}
    if node.op_type in _MOVES | {"Cast", "Gelu"}:
        return {FLOAT, HALF}
    raise ExportError(f"the FP16 graph has an operator that nothing is known of: {node.op_type}")


def _rounded_for_nothing(name: str, makers: dict[str, NodeProto]) -> Iterator[str]:
    """What FP16 numbers that go back to float32 are, where they are no product's result."""
    node = makers.get(name)
    if node is None or node.op_type == "Cast":
        yield name
    elif node.op_type in _MOVES:
        moved = node.input if node.op_type == "Concat" else node.input[:1]
        for each in moved:
            yield from _rounded_for_nothing(each, makers)


def _names(types: Iterable[int]) -> str:
    return " and ".join(TensorProto.DataType.Name(kind) for kind in sorted(types))
