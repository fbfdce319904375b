"""An FP16 graph whose products are each switched to 8 bits and back by its inputs, run by run.

Choosing products takes dozens of runs, each of other products or scales; a session for each of them
would take longer to make than to run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from export.graph.onnx_export import INPUT_NAME
from export.runtime.cores import usable_cores
from export.runtime.interface import Outputs
from export.verification.gpu_emulation import emulate


class Switches:
    """Runs it on the CPU, rounding as a GPU does.

    Args:
        halves: the FP16 graph.
        eight: the same graph with all of `names` in 8 bits, whatever the scales of activations.
        names: of the products.
    """

    def __init__(self, halves: ModelProto, eight: ModelProto, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._rounded = [
            node.input[0] for node in eight.graph.node if node.op_type == "QuantizeLinear"
        ]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = usable_cores()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            emulate(_switched(halves, eight, self._names)),
            options,
            providers=["CPUExecutionProvider"],
        )

    def run(
        self,
        frames: NDArray[np.uint8],
        scales: Mapping[str, NDArray[np.float16]],
        chosen: Collection[str],
    ) -> Outputs:
        """Answers with the chosen products in 8 bits.

        Args:
            frames: uint8 (clips, time, height, width, 3).
            scales: of activations, by their names in the FP16 graph.
        """
        feeds: dict[str, object] = {INPUT_NAME: frames}
        feeds.update({_scale(name): scales[name].astype(np.float32) for name in self._rounded})
        feeds.update({_switch(name): np.array(name in chosen) for name in self._names})
        logits, embedding = self._session.run(["logits", "embedding"], feeds)
        return Outputs(logits, embedding)


def _scale(activation: str) -> str:
    return f"{activation}/scale"


def _switch(product: str) -> str:
    return f"{product}/switch"


def _switched(halves: ModelProto, eight: ModelProto, names: Collection[str]) -> ModelProto:
    """`eight`, with a choice before each factor, and scales that are inputs."""
    exact = {node.name: node.input for node in halves.graph.node}
    nodes: list[NodeProto] = []
    inputs = {_switch(name): TensorProto.BOOL for name in sorted(names)}
    for node in eight.graph.node:
        if node.op_type == "QuantizeLinear":
            activation, scale, _ = node.input
            inputs[_scale(activation)] = TensorProto.FLOAT  # the emulation knows no FP16 inputs
            half = TensorProto.FLOAT16
            nodes.append(helper.make_node("Cast", [_scale(activation)], [scale], to=half))
        if node.name in names:
            either = [f"{node.name}/{index}" for index in range(2)]
            nodes += [
                helper.make_node("Where", [_switch(node.name), *factors], [name])
                for name, *factors in zip(either, node.input, exact[node.name], strict=True)
            ]
            node = helper.make_node("MatMul", either, node.output, name=node.name)
        nodes.append(node)
    read = {name for node in nodes for name in node.input}
    made = {name for node in nodes for name in node.output}
    weights = {
        tensor.name: tensor
        for tensor in (*halves.graph.initializer, *eight.graph.initializer)
        if tensor.name in read - made
    }
    values = [helper.make_tensor_value_info(name, kind, []) for name, kind in inputs.items()]
    graph = helper.make_graph(
        nodes,
        eight.graph.name,
        [*eight.graph.input, *values],
        eight.graph.output,
        list(weights.values()),
    )
    return helper.make_model(graph, opset_imports=eight.opset_import, ir_version=eight.ir_version)
