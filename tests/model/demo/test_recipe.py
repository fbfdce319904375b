"""A few steps of the recipe run from end to end, and again the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402

from model.config import VARIANTS  # noqa: E402
from model.demo import clips  # noqa: E402
from model.demo import recipe as demo  # noqa: E402
from model.demo.render import LABELS  # noqa: E402
from model.timesformer import TimeSformer  # noqa: E402

SMALL = VARIANTS["demo"].replace(
    image_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=2, mlp_ratio=3.0
)
SHORT = demo.Recipe(flow_steps=2, steps=3, clips=6, held_out=2, batch=4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("demo")
    demo.run(SHORT, SMALL, folder / "out", folder / "cache", workers=1)
    return folder / "out", folder / "cache"


def test_the_recipe_writes_weights_that_the_network_takes(trained: tuple[Path, Path]) -> None:
    out, _ = trained
    TimeSformer(SMALL).load_state_dict(load_file(out / "weights.safetensors"))


def test_the_report_says_what_was_trained_and_how_well(trained: tuple[Path, Path]) -> None:
    report = json.loads((trained[0] / "training.json").read_text())
    assert report["config"] == json.loads(json.dumps(SMALL.to_dict()))
    assert report["recipe"]["steps"] == SHORT.steps
    assert report["labels"] == list(LABELS)
    held_out = report["held_out"]
    assert held_out["clips"] == 2
    assert held_out["per_class"].keys() == set(LABELS[:2])
    assert held_out["top1"] == pytest.approx(
        np.mean(list(held_out["per_class"].values())), abs=1e-3
    )
    assert report["versions"]["torch"] == torch.__version__


def test_the_same_recipe_again_gives_the_same_weights(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    out, cache = trained
    rendered = clips.training_set(SHORT.seed, SHORT.clips, SMALL, cache, workers=1)
    again = demo.train(SHORT, SMALL, rendered, tmp_path)
    first = load_file(out / "weights.safetensors")
    assert all(torch.equal(value, first[name]) for name, value in again.state_dict().items())
