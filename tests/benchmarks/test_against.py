"""Figures of a bundle beside other programs: that they mean what they say, never how fast."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from model.config import ATTENTION_TYPES, AttentionType
from model.demo import STORE
from tests.benchmarks.against import main
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
