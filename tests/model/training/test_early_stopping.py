"""A run that gets no better ends early, with the best of its weights, also when it was stopped."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.data.lists import read_videos
from model.training import checkpoint
from model.training.config import Machine, Step
from model.training.errors import RecipeError, StoppedError
from model.training.event_log import read_log
from model.training.loop import LOG
from model.training.recipe import Recipe
from model.training.trainer import CHECKPOINTS, REPORT, WEIGHTS
from tests.model.training.test_loop import run, same_result

# Colours are learned soon, and no share of right answers is better than all.
RECIPE = Recipe().replace(
    {"optimizer": "adamw", "epochs": 30.0, "learning_rate": 0.01, "batch_size": 4,
     "schedule": "cosine", "patience": 2, "watch": "top1"}
)  # fmt: skip
STEPS_PER_EPOCH = 2


def patient_run(colours: Path, out: Path, **more: Any) -> dict[str, Any]:
    machine = Machine(checkpoint_every=5)
    return run(
        colours, out, recipe=RECIPE, validation=read_videos(colours), machine=machine, **more
    )


@pytest.fixture(scope="module")
def stopped_early(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("early")
    patient_run(colours, out)
    return out


def test_it_ends_when_nothing_has_improved_and_keeps_the_best(stopped_early: Path) -> None:
    evaluations = [each for each in read_log(stopped_early / LOG) if each["event"] == "evaluation"]
    top1 = [each["top1"] for each in evaluations]
    best = top1.index(max(top1))
    assert len(top1) == best + 1 + 2
    report = json.loads((stopped_early / REPORT).read_text())
    assert report["weights_of_step"] == STEPS_PER_EPOCH * (best + 1)
    assert report["steps"] == STEPS_PER_EPOCH * len(top1) < 60
    assert report["metrics"]["top1"] == max(top1) == 1.0

    found = checkpoint.load_newest(stopped_early / CHECKPOINTS)
    assert found is not None
    written = load_file(stopped_early / WEIGHTS)
    for name, value in found[1]["best"]["weights"].items():
        assert torch.equal(written[name], value)
    assert not torch.equal(written["head.weight"], found[1]["model"]["head.weight"])


def test_a_stopped_run_remembers_what_was_best(
    colours: Path, stopped_early: Path, tmp_path: Path
) -> None:
    """Stopped after the best evaluation, and once more when only the result is to be written."""
    best = json.loads((stopped_early / REPORT).read_text())["weights_of_step"]

    def stop(step: Step) -> None:
        if step.step == best + 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError):
        patient_run(colours, tmp_path, on_step=stop)
    patient_run(colours, tmp_path)
    same_result(tmp_path, stopped_early)
    (tmp_path / WEIGHTS).unlink()
    patient_run(colours, tmp_path, on_step=lambda step: pytest.fail("it trains on"))
    same_result(tmp_path, stopped_early)


def test_patience_needs_something_to_evaluate_on(colours: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--validation or --hold-out"):
        run(colours, tmp_path, patience=1)
