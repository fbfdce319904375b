"""A bundle whose engine is a toy: about 5 ms for a batch of one, 16 ms for one of 32.

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

from export.runtime.cores import usable_cores
from export.runtime.onnxruntime import OnnxRuntime
from model.demo import STORE

WIDTH = 256
ROWS = 16  # of the matrix that each clip adds to the layers' input
SHARED = 14  # times as many, whatever the batch
ONE_CLIP_S = 0.0047


def main() -> None:
    store = Path(sys.argv[1])
    folder = store / "toy/1"
    shutil.rmtree(store / "toy", ignore_errors=True)
    shutil.copytree(STORE / "demo/1", folder)
    shutil.copy(STORE / "demo/active.json", store / "toy/active.json")
    layers = 20
    for _ in range(3):  # as many layers as take that long here
        content = graph(layers)
        layers = max(1, round(layers * ONE_CLIP_S / seconds(content, 1)))
    content = graph(layers)
    (folder / "model.onnx").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["name"] = "toy"
    manifest["files"]["model.onnx"] = {
        **manifest["files"]["model.onnx"],
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": len(content),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    took = ", ".join(f"{seconds(content, clips) * 1e3:.1f} ms for {clips}" for clips in (1, 16, 32))
    print(f"{folder}: {layers} layers, {took} clips at best")


def seconds(content: bytes, clips: int) -> float:
    """CPU time of one thread, shared among all cores; the least of some runs. Neighbours on the
    machine add less to it than to the time on the clock.
    """
    runtime = OnnxRuntime(content, cuda=False, threads=1)
    frames = np.zeros((clips, 8, 64, 64, 3), np.uint8)
    took = []
    for _ in range(50):
        started = time.process_time()
        runtime.run(frames)
        took.append(time.process_time() - started)
    return min(took) / usable_cores()


def graph(layers: int) -> bytes:
    """Each clip becomes some rows; layers go over these and over rows of the batch's mean, which
    are many and cost the same for any batch, and which every answer depends on.
    """
    random = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        values = random.standard_normal(shape) / np.sqrt(shape[0])
        return numpy_helper.from_array(values.astype(np.float32), name)

    def whole(name: str, *values: int) -> onnx.TensorProto:
        return numpy_helper.from_array(np.array(values, np.int64), name)

    weights = [
        whole("parts", -1, ROWS, 8 * 64 * 64 * 3 // ROWS),
        whole("zero", 0),
        whole("batch_axis", 0),
        whole("row_axis", 1),
        whole("last_axis", 2),
        whole("copies", SHARED, 1, 1),
        whole("shared", SHARED),
        whole("end", np.iinfo(np.int64).max),
        numpy_helper.from_array(np.array([1 / 255], np.float32), "scale"),
        weight("first", 1, WIDTH),
        weight("layer", WIDTH, WIDTH),
        weight("narrow", WIDTH, 96),
        weight("last", 96, 12),
    ]
    nodes = [
        helper.make_node("Reshape", ["frames", "parts"], ["pixels"]),
        helper.make_node("Cast", ["pixels"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["numbers", "last_axis"], ["grey"], keepdims=1),
        helper.make_node("Mul", ["grey", "scale"], ["scaled"]),
        helper.make_node("MatMul", ["scaled", "first"], ["clips"]),
        helper.make_node("ReduceMean", ["clips", "batch_axis"], ["mean"], keepdims=1),
        helper.make_node("Tile", ["mean", "copies"], ["means"]),
        helper.make_node("Concat", ["means", "clips"], ["layer0"], axis=0),
    ]
    for index in range(layers):
        nodes.append(helper.make_node("MatMul", [f"layer{index}", "layer"], [f"product{index}"]))
        nodes.append(helper.make_node("Tanh", [f"product{index}"], [f"layer{index + 1}"]))
    end = f"layer{layers}"
    nodes += [
        helper.make_node("ReduceMean", [end, "row_axis"], ["rows"], keepdims=0),
        helper.make_node("Slice", ["rows", "zero", "shared", "batch_axis"], ["common"]),
        helper.make_node("ReduceMean", ["common", "batch_axis"], ["context"], keepdims=1),
        helper.make_node("Slice", ["rows", "shared", "end", "batch_axis"], ["own"]),
        helper.make_node("Add", ["own", "context"], ["both"]),
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
