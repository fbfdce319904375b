"""INT8: what is rounded and what is not, and that the answers stay near."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.graph.int8_cpu import WEIGHT_LIMIT, quantize, round_weight
from export.graph.onnx_export import ExportError, export_onnx
from export.graph.rewrite import rewrite
from export.runtime.onnxruntime import OnnxRuntime
from export.verification.parity import INT8, compare
from export.verification.torch_reference import run_reference
from model.network.schemes import SCHEMES
from model.network.timesformer import TimeSformer
from tests.model.conftest import random_frames, random_model, tiny_config


class Quantized(NamedTuple):
    model: TimeSformer
    float32: Path
    int8: Path

    @property
    def graph(self) -> onnx.GraphProto:
        return onnx.load(self.int8).graph


@pytest.fixture(
    scope="module",
    params=["divided_space_time", pytest.param("space_only", marks=pytest.mark.slow)],
)
def quantized(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Quantized:
    folder = tmp_path_factory.mktemp("int8")
    model = random_model(tiny_config(request.param, embed_dim=48, num_heads=4))
    export_onnx(rewrite(model), folder / "model.onnx")
    quantize(folder / "model.onnx", folder / "model.int8.onnx")
    return Quantized(model, folder / "model.onnx", folder / "model.int8.onnx")


@pytest.mark.parametrize("batch", [1, 3])
def test_answers_stay_near_the_networks(quantized: Quantized, batch: int) -> None:
    clips = random_frames(quantized.model.config, batch=batch).numpy()
    answers = OnnxRuntime(quantized.int8, cuda=False).run(clips)
    parity = compare(run_reference(quantized.model, clips), answers, INT8)
    assert parity.passed, parity
    assert parity.max_difference > 1e-4  # else nothing was rounded


def test_every_large_product_is_of_integers_and_no_other(quantized: Quantized) -> None:
    config = quantized.model.config
    before = len(SCHEMES[config.attention_type].before)
    whole_blocks = config.depth - 1
    # Query, key, value and output; in the main part two more of the MLP. The last block's main
    # part sees the class token alone.
    expected = whole_blocks * (4 * before + 6) + 4 * before
    operators = [node.op_type for node in quantized.graph.node]
    assert operators.count("MatMulInteger") == expected
    # Query, key and value share one rounding of their input, one that serves three products.
    readers = Counter(
        node.input[0] for node in quantized.graph.node if node.op_type == "MatMulInteger"
    )
    assert operators.count("DynamicQuantizeLinear") == len(readers)
    assert list(readers.values()).count(3) == config.depth * (before + 1) - 1
    assert quantized.int8.stat().st_size < 0.7 * quantized.float32.stat().st_size


def test_pixels_attention_products_and_head_stay_float32(quantized: Quantized) -> None:
    graph = quantized.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMul"]
    config = quantized.model.config
    pixels = 3 * config.patch_size**2
    assert [
        node for node in products
        if node.input[1] in weights and weights[node.input[1]].dims[0] == pixels
    ]  # fmt: skip
    within = [node for node in products if node.input[1] not in weights]
    assert len(within) == 2 * config.depth * (1 + len(SCHEMES[config.attention_type].before))
    assert weights["head.weight"].data_type == TensorProto.FLOAT


def test_weights_are_rounded_by_output_channel() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((50, 4)).astype(np.float32) * np.array([1e-3, 1, 1e3, 0], "f")
    values, scale = round_weight(weight)
    assert (values.dtype, scale.dtype) == (np.int8, np.float32)
    assert np.abs(values).max(axis=0).tolist() == [WEIGHT_LIMIT] * 3 + [0]
    off = np.abs(values * scale - weight).max(axis=0)
    assert (off <= 0.501 * np.abs(weight).max(axis=0) / WEIGHT_LIMIT).all()
    # CPUs without VNNI add two products in 16 bits.
    assert np.iinfo(np.int16).max >= 2 * 255 * WEIGHT_LIMIT


def test_a_graph_with_nothing_to_round_is_refused(tmp_path: Path) -> None:
    frames = helper.make_tensor_value_info("frames", TensorProto.UINT8, ["batch", 2])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["frames"], ["pixels"], to=TensorProto.FLOAT),
            helper.make_node("MatMul", ["pixels", "weight"], ["logits"]),
        ],
        "pixels only",
        [frames],
        [logits],
        [numpy_helper.from_array(np.eye(2, dtype=np.float32), "weight")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9),
        tmp_path / "model.onnx",
    )
    with pytest.raises(ExportError, match=r"model\.onnx has no product of a size"):
        quantize(tmp_path / "model.onnx", tmp_path / "model.int8.onnx")
    assert not (tmp_path / "model.int8.onnx").exists()
