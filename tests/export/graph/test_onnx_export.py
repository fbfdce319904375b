"""The graph: what it takes and gives, and that its answers are the network's."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, shape_inference
from torch import nn

from export.graph.onnx_export import INPUT_NAME, OPSET, OUTPUT_NAMES, ExportError, export_onnx
from export.graph.rewrite import InferenceTimeSformer, rewrite
from export.runtime.onnxruntime import OnnxRuntime
from export.verification.torch_reference import run_reference
from model.network.timesformer import TimeSformer
from tests.export.conftest import EVERY_SCHEME
from tests.model.conftest import random_frames, random_model, tiny_config

# Operators that TensorRT's parser takes in float32, none of them approximate.
SAFE_OPERATORS = {
    "Add", "Cast", "Concat", "Expand", "Gather", "Gelu", "Gemm", "LayerNormalization", "MatMul",
    "Mul", "ReduceMean", "Reshape", "Shape", "Slice", "Softmax", "Squeeze", "Transpose",
    "Unsqueeze",
}  # fmt: skip


class Exported(NamedTuple):
    model: TimeSformer
    network: InferenceTimeSformer
    path: Path


@pytest.fixture(scope="module", params=EVERY_SCHEME)
def exported_scheme(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    """A network of each scheme with random weights, rewritten, and its graph."""
    model = random_model(tiny_config(request.param))
    network, path = rewrite(model), tmp_path_factory.mktemp("graphs") / "model.onnx"
    export_onnx(network, path)
    return Exported(model, network, path)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_answers_equal_the_networks_at_every_batch_size(
    exported_scheme: Exported, batch: int
) -> None:
    model, _, path = exported_scheme
    clips = random_frames(model.config, batch=batch, seed=batch).numpy()
    expected, actual = run_reference(model, clips), OnnxRuntime(path, cuda=False).run(clips)

    np.testing.assert_allclose(actual.logits, expected.logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(actual.embedding, expected.embedding, rtol=0, atol=1e-5)
    assert np.ptp(expected.logits) > 0.1  # else equality would say little


def test_takes_uint8_frames_and_gives_logits_and_embedding(exported_scheme: Exported) -> None:
    graph = onnx.load(exported_scheme.path).graph
    described = [
        (
            value.name,
            value.type.tensor_type.elem_type,
            [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim],
        )
        for value in (*graph.input, *graph.output)
    ]
    assert described == [
        (INPUT_NAME, TensorProto.UINT8, ["batch", 4, 32, 32, 3]),
        (OUTPUT_NAMES[0], TensorProto.FLOAT, ["batch", 5]),
        (OUTPUT_NAMES[1], TensorProto.FLOAT, ["batch", 24]),
    ]


def test_the_file_is_valid_whole_and_free_of_where_it_was_made(exported_scheme: Exported) -> None:
    content = exported_scheme.path.read_bytes()
    proto = onnx.load_from_string(content)
    onnx.checker.check_model(proto, full_check=True)

    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", OPSET)]
    assert not proto.functions
    assert not proto.metadata_props
    assert not proto.graph.metadata_props
    assert not [node.name for node in proto.graph.node if node.metadata_props or node.doc_string]
    assert list(exported_scheme.path.parent.iterdir()) == [exported_scheme.path]
    root = str(Path(__file__).parents[3]).encode()
    for trace in (root, b".py", b"site-packages", b"Traceback"):
        assert trace not in content


def test_weights_are_stored_once(exported_scheme: Exported) -> None:
    weights = sum(tensor.numel() for tensor in exported_scheme.network.state_dict().values())
    graph = onnx.load(exported_scheme.path).graph
    stored = sum(int(np.prod(tensor.dims)) for tensor in graph.initializer)
    assert weights <= stored < weights * 1.02


class TestFitForTensorRT:
    """What its parser refuses or gets wrong, so that one graph serves every engine."""

    def test_only_operators_that_every_engine_knows(self, exported_scheme: Exported) -> None:
        nodes = onnx.load(exported_scheme.path).graph.node
        assert {node.op_type for node in nodes} <= SAFE_OPERATORS
        assert {node.domain for node in nodes} == {""}

    def test_uint8_is_cast_before_anything_else(self, exported_scheme: Exported) -> None:
        graph = onnx.load(exported_scheme.path).graph
        readers = {node.op_type for node in graph.node if INPUT_NAME in node.input}
        assert readers == {"Cast", "Shape"} or readers == {"Cast"}

    def test_no_tensor_has_more_than_eight_axes(self, exported_scheme: Exported) -> None:
        graph = shape_inference.infer_shapes(
            onnx.load(exported_scheme.path), strict_mode=True
        ).graph
        ranks = {
            value.name: len(value.type.tensor_type.shape.dim)
            for value in (*graph.value_info, *graph.input, *graph.output)
        }
        assert ranks.keys() >= {name for node in graph.node for name in node.output}
        assert max(ranks.values()) <= 8

    def test_every_norm_is_one_operator(self, exported_scheme: Exported) -> None:
        nodes = onnx.load(exported_scheme.path).graph.node
        norms = [m for m in exported_scheme.network.modules() if isinstance(m, nn.LayerNorm)]
        assert len(norms) == [node.op_type for node in nodes].count("LayerNormalization")

    def test_shapes_depend_on_the_batch_alone(self, exported_scheme: Exported) -> None:
        """Every reshape is by constants with the batch left open: nothing to compute at run time
        but the class token's copies, one a clip."""
        graph = onnx.load(exported_scheme.path).graph
        constants = {tensor.name for tensor in graph.initializer}
        reshapes = [node for node in graph.node if node.op_type == "Reshape"]
        assert reshapes
        assert all(node.input[1] in constants for node in reshapes)


@pytest.mark.slow
def test_the_original_network_can_be_exported_too(tmp_path: Path) -> None:
    """The benchmarks measure the rewritten graph against it."""
    model = random_model(tiny_config(depth=1))
    export_onnx(model, tmp_path / "model.onnx")
    clips = random_frames(model.config).numpy()
    actual = OnnxRuntime(tmp_path / "model.onnx", cuda=False).run(clips)
    np.testing.assert_allclose(actual.logits, run_reference(model, clips).logits, atol=1e-5)


def test_a_network_that_is_no_graph_is_an_export_error_and_the_log_levels_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def branching(
        self: InferenceTimeSformer, frames: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        answer = frames.float().mean(dim=(1, 2, 3))
        return (answer, answer) if answer.sum() > 0 else (-answer, answer)

    monkeypatch.setattr(InferenceTimeSformer, "forward", branching)
    level = logging.getLogger("torch.onnx").level
    with pytest.raises(ExportError, match="could not be exported to ONNX"):
        export_onnx(rewrite(random_model(tiny_config())), tmp_path / "model.onnx")
    assert logging.getLogger("torch.onnx").level == level
