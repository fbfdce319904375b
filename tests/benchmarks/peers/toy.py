"""A bundle whose engine is a toy: about 5 ms for a batch of one, a little more for each clip.

    python -m tests.benchmarks.peers.toy build/peers/store

It takes and gives what the demo model does, so that the service can serve it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.runtime.onnxruntime import OnnxRuntime
from model.demo import STORE

WIDTH = 768


def main() -> None:
    store = Path(sys.argv[1])
    folder = store / "toy/1"
    shutil.rmtree(store / "toy", ignore_errors=True)
    shutil.copytree(STORE / "demo/1", folder)
    shutil.copy(STORE / "demo/active.json", store / "toy/active.json")
    layers = 4
    for _ in range(3):  # as many layers as take 5 ms here, now
        content = graph(layers)
        layers = max(1, round(layers * 0.005 / seconds(content)))
    (folder / "model.onnx").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["name"] = "toy"
    manifest["files"]["model.onnx"] = {
        **manifest["files"]["model.onnx"],
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": len(content),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    print(f"{folder}: {layers} layers, {seconds(content) * 1e3:.1f} ms for one clip")


def seconds(content: bytes) -> float:
    runtime = OnnxRuntime(content, cuda=False)
    frames = np.zeros((1, 8, 64, 64, 3), np.uint8)
    took = []
    for _ in range(30):
        started = time.perf_counter()
        runtime.run(frames)
        took.append(time.perf_counter() - started)
    return float(np.median(took))


def graph(layers: int) -> bytes:
    """Frames to a vector a clip; then layers over the batch's mean, which cost the same for any
    batch, and which every answer depends on.
    """
    random = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        values = random.standard_normal(shape) / np.sqrt(shape[0])
        return numpy_helper.from_array(values.astype(np.float32), name)

    weights = [
        numpy_helper.from_array(np.array([-1, 8 * 64 * 64 * 3], np.int64), "flat"),
        numpy_helper.from_array(np.array([0], np.int64), "batch"),
        numpy_helper.from_array(np.array([1 / 255], np.float32), "scale"),
        weight("first", 8 * 64 * 64 * 3, 24),
        weight("wide", 24, WIDTH),
        weight("narrow", WIDTH, 96),
        weight("last", 96, 12),
    ]
    nodes = [
        helper.make_node("Reshape", ["frames", "flat"], ["pixels"]),
        helper.make_node("Cast", ["pixels"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["numbers", "scale"], ["scaled"]),
        helper.make_node("MatMul", ["scaled", "first"], ["clips"]),
        helper.make_node("ReduceMean", ["clips", "batch"], ["mean"], keepdims=1),
        helper.make_node("MatMul", ["mean", "wide"], ["layer0"]),
    ]
    for index in range(layers):
        weights.append(weight(f"weight{index}", WIDTH, WIDTH))
        product, layer = f"product{index}", f"layer{index + 1}"
        nodes.append(helper.make_node("MatMul", [f"layer{index}", f"weight{index}"], [product]))
        nodes.append(helper.make_node("Tanh", [product], [layer]))
    nodes += [
        helper.make_node("MatMul", ["clips", "wide"], ["own"]),
        helper.make_node("Add", ["own", f"layer{layers}"], ["both"]),
        helper.make_node("MatMul", ["both", "narrow"], ["embedding"]),
        helper.make_node("MatMul", ["embedding", "last"], ["logits"]),
    ]
    made = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("frames", TensorProto.UINT8, ["batch", 8, 64, 64, 3])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 12]),
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 96]),
        ],
        weights,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return model.SerializeToString()


if __name__ == "__main__":
    main()
