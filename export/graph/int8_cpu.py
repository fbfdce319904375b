"""INT8 for CPUs: from the float32 graph to one whose large products are of 8-bit integers.

Weights are rounded once, here, one scale for each output channel; activations at run time, by
their range in the batch at hand. The patch projection, the products inside attention, the head and
what only the class token goes through in the last block stay float32: together they are a few
percent of the work, and rounding them would cost as much accuracy as all the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper, shape_inference

from export.graph.onnx_export import INPUT_NAME, ExportError

# CPUs without VNNI add two products of an 8-bit weight and an activation of up to 255 in 16 bits,
# and cut off what is more. Weights within 64 never get there, so that what the gate saw on one CPU
# is what another one serves. Measured cost against 127: see docs/export.md.
WEIGHT_LIMIT = 64


def quantize(source: Path, target: Path) -> None:
    """Writes the INT8 graph of a float32 one that `export_onnx` has written.

    Args:
        source: the float32 graph.
        target: where the INT8 graph goes; same inputs and outputs. For ONNX Runtime on CPUs only:
            TensorRT takes no dynamic quantization.

    Raises:
        ExportError: the graph has no product to quantize, or the result is no valid graph.
    """
    model = shape_inference.infer_shapes(onnx.load(source), strict_mode=True)
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    chosen = {node.output[0] for node in large_products(graph, weights)}
    if not chosen:
        raise ExportError(f"{source.name} has no product of a size that INT8 would make faster")
    nodes, quantized, seen = [], {}, set()
    for node in graph.node:
        if node.output[0] not in chosen:
            nodes.append(node)
            continue
        activation, weight = node.input
        if activation not in seen:  # the same for query, key and value
            seen.add(activation)
            nodes.append(_quantize_activation(activation))
        if weight not in quantized:
            quantized[weight] = _quantize_weight(weights[weight])
        nodes += _integer_product(node)
    kept = [tensor for tensor in graph.initializer if tensor.name not in quantized]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*kept, *(part for pair in quantized.values() for part in pair)])
    try:
        onnx.save(model, target)
        onnx.checker.check_model(str(target), full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the INT8 graph is not valid: {error}") from error


def round_weight(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric 8-bit weights within `WEIGHT_LIMIT`, one scale for each output channel.

    Args:
        weight: (inputs, outputs).

    Returns:
        int8 (inputs, outputs) and float32 (outputs,), whose product is near `weight`.
    """
    largest = np.abs(weight).max(axis=0).astype(np.float64)
    scale = np.where(largest > 0, largest / WEIGHT_LIMIT, 1.0)
    return np.rint(weight / scale).astype(np.int8), scale.astype(np.float32)


def large_products(graph: onnx.GraphProto, weights: dict[str, TensorProto]) -> Iterator[NodeProto]:
    """Products of many tokens with a matrix of weights, but for the one that reads the pixels."""
    shapes = {
        value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in graph.value_info
    }
    from_pixels = {INPUT_NAME}
    for node in graph.node:
        reads_pixels = not from_pixels.isdisjoint(node.input)
        matrix = node.op_type == "MatMul" and node.input[1] in weights
        if matrix and not reads_pixels:
            one_token = shapes[node.input[0]][-2] == 1
            if len(weights[node.input[1]].dims) == 2 and not one_token:
                yield node
        if reads_pixels and not matrix and node.op_type != "Shape":
            from_pixels.update(node.output)


def _quantize_activation(name: str) -> NodeProto:
    return helper.make_node(
        "DynamicQuantizeLinear", [name], [f"{name}_{part}" for part in ("u8", "scale", "zero")]
    )


def _quantize_weight(weight: TensorProto) -> list[TensorProto]:
    values, scale = round_weight(numpy_helper.to_array(weight))
    return [
        numpy_helper.from_array(values, f"{weight.name}_s8"),
        numpy_helper.from_array(scale, f"{weight.name}_scale"),
    ]


def _integer_product(node: NodeProto) -> list[NodeProto]:
    """The pattern that ONNX Runtime turns into one kernel, with the bias that is added next."""
    (activation, weight), (output,) = node.input, node.output
    total, cast, scale = (f"{output}_{part}" for part in ("s32", "f32", "scale"))
    return [
        helper.make_node(
            "MatMulInteger",
            [f"{activation}_u8", f"{weight}_s8", f"{activation}_zero"],
            [total],
            name=node.name,
        ),
        helper.make_node("Cast", [total], [cast], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{activation}_scale", f"{weight}_scale"], [scale]),
        helper.make_node("Mul", [cast, scale], [output]),
    ]
