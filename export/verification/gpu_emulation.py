"""What a GPU computes of a graph of mixed precision, shown on a CPU.

ONNX Runtime's CPU provider computes FP16 operators in float32 and drops the casts between them: an
overflow would not show. The graph that is made here computes in float32 throughout and rounds to
FP16 by a pair of casts wherever the original gives an FP16 number; such pairs are kept. Sums within
a product are not rounded, as on tensor cores. INT8 and FP8 are in the graph as nodes that round,
which ONNX Runtime computes as they are.
"""

from __future__ import annotations

from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx import shape_inference as inference

# What gives numbers that were there before needs no rounding again.
_MOVES = frozenset(
    {
        *("Concat", "Expand", "Gather", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"),
        "Where",
    }
)


def emulate(model: ModelProto) -> bytes:
    """The graph in float32 that rounds as `model` does; for an engine to load.

    Args:
        model: with FP16 tensors, such as `export_fp16` writes.
    """
    model = inference.infer_shapes(model, strict_mode=True)
    graph = model.graph
    halves = {
        value.name
        for value in graph.value_info
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16
    }
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            exact = numpy_helper.to_array(tensor).astype("float32")
            tensor.CopyFrom(numpy_helper.from_array(exact, tensor.name))
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        (output,) = node.output
        if output in halves and node.op_type not in _MOVES:
            nodes += _round(node)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return bytes(model.SerializeToString())


def _round(node: NodeProto) -> list[NodeProto]:
    """Makes the node give float32; the casts round that to FP16, and give float32 again."""
    (output,) = node.output
    exact, rounded = f"{output}_exact", f"{output}_rounded"
    node.output[0] = exact
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to":
            attribute.i = TensorProto.FLOAT
    return [
        helper.make_node("Cast", [exact], [rounded], to=TensorProto.FLOAT16),
        helper.make_node("Cast", [rounded], [output], to=TensorProto.FLOAT),
    ]
