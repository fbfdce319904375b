"""The graph: what it takes and gives, and that its answers are the network's."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from export.onnx import INPUT_NAME, OPSET, OUTPUT_NAMES, ExportError, export_onnx
from export.pipeline import run_reference
from export.runtime.onnxruntime import OnnxRuntime
from model.config import ATTENTION_TYPES
from model.timesformer import TimeSformer
from tests.model.conftest import random_frames, random_model, tiny_config


class Exported(NamedTuple):
    model: TimeSformer
    path: Path


@pytest.fixture(scope="module", params=ATTENTION_TYPES)
def exported_scheme(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    """A network of each scheme with random weights, and its graph."""
    model = random_model(tiny_config(request.param, depth=1))
    path = tmp_path_factory.mktemp("graphs") / "model.onnx"
    export_onnx(model, path)
    return Exported(model, path)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_answers_equal_the_networks_at_every_batch_size(
    exported_scheme: Exported, batch: int
) -> None:
    model, path = exported_scheme
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
    root = str(Path(__file__).parents[2]).encode()
    for trace in (root, b".py", b"site-packages", b"Traceback"):
        assert trace not in content


def test_weights_are_stored_once(exported_scheme: Exported) -> None:
    model, path = exported_scheme
    parameters = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(np.prod(tensor.dims) for tensor in onnx.load(path).graph.initializer)
    assert parameters * 0.9 < stored < parameters * 1.2


def test_a_network_that_is_no_graph_is_an_export_error_and_the_log_levels_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def branching(self: TimeSformer, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        answer = frames.float().mean(dim=(1, 2, 3))
        return (answer, answer) if answer.sum() > 0 else (-answer, answer)

    monkeypatch.setattr(TimeSformer, "forward", branching)
    level = logging.getLogger("torch.onnx").level
    with pytest.raises(ExportError, match="could not be exported to ONNX"):
        export_onnx(random_model(tiny_config()), tmp_path / "model.onnx")
    assert logging.getLogger("torch.onnx").level == level
