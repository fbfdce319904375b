"""Figures of a bundle beside other programs: that they mean what they say, never how fast."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.bench import Turn
from export.onnx import export_onnx
from export.precision import quantize
from export.rewrite import multiply_adds, rewrite
from export.runtime.onnxruntime import OnnxRuntime
from model.config import ATTENTION_TYPES, AttentionType
from model.demo import STORE
from tests.benchmarks.against import main, share_of_limit
from tests.benchmarks.limit import products_alone
from tests.benchmarks.published import AsPublished
from tests.benchmarks.yardsticks import COMPILED, EAGER, HUGGING_FACE, NAIVE, OPENVINO
from tests.model.conftest import random_model, tiny_config


@pytest.mark.parametrize("scheme", ATTENTION_TYPES)
def test_the_network_as_published_gives_the_same_answers(scheme: AttentionType) -> None:
    model = random_model(tiny_config(attention_type=scheme))
    frames = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    with torch.inference_mode():
        for one, other in zip(model(frames), AsPublished.of(model)(frames), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_the_share_of_the_limit_is_of_multiply_adds_a_second() -> None:
    network, limit = [Turn((2.0,), 2.0)], [Turn((1.0,), 1.0)]
    assert share_of_limit(network, limit, 100, 100).median == 0.5
    assert share_of_limit(network, limit, 100, 200).median == 0.25


def test_the_limit_has_the_products_of_the_graph_and_takes_every_batch(tmp_path: Path) -> None:
    network = rewrite(random_model(tiny_config()))
    export_onnx(network, tmp_path / "model.onnx")
    quantize(tmp_path / "model.onnx", tmp_path / "model.int8.onnx")
    head = network.head.in_features * network.head.out_features
    limit = products_alone(tmp_path / "model.onnx")
    assert limit.multiply_adds == multiply_adds(network) - head
    for file in ("model.onnx", "model.int8.onnx"):
        graph = onnx.load(tmp_path / file).graph
        count = sum(node.op_type in ("MatMul", "MatMulInteger") for node in graph.node)
        runtime = OnnxRuntime(products_alone(tmp_path / file).graph, cuda=False, threads=1)
        for batch in (1, 3):
            read, _ = runtime.run(np.ones(batch, np.uint8))
            assert read.shape == (count,)
            assert np.isfinite(read).all()
            assert len(np.unique(read)) > count / 2, "products that are alike are done once"


def test_others_run_the_same_weights_or_are_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_compiler(*arguments: object, **options: object) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setitem(sys.modules, "openvino", None)
    threads = torch.get_num_threads()
    quick = ["--device", "cpu", "--threads", "1", "--rounds", "1", "--batches", "1", "--json"]
    main([str(STORE / "demo" / "1"), *quick])
    torch.set_num_threads(threads)
    facts = json.loads(capsys.readouterr().out)
    rows = {row["engine"]: row for row in facts["engines"]}
    reasons = {each["artefact"]: each["reason"] for each in facts["left_out"]}
    assert facts["speed_up_over"] == NAIVE
    assert reasons[COMPILED] == "RuntimeError: no compiler here"
    assert reasons[OPENVINO] == "openvino is not installed"
    assert {NAIVE, EAGER} <= rows.keys()
    assert (HUGGING_FACE in rows) is not (HUGGING_FACE in reasons)
    assert all(row["off_by"] < 1e-5 for row in rows.values())
    assert rows["model.onnx, CPUExecutionProvider"]["of_limit"][1] > 0
    (start,) = facts["starts"]
    assert 0 < start["load_seconds"] < start["start_seconds"]
    assert start["resident_bytes"] > 0
