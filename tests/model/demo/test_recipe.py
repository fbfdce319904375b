"""The recipe's labels follow its augmentations, and a few steps of it run from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402

from model.config import VARIANTS  # noqa: E402
from model.demo import recipe as demo  # noqa: E402
from model.demo.render import LABELS  # noqa: E402
from model.demo.start import start_as_motion_energy  # noqa: E402
from model.timesformer import TimeSformer  # noqa: E402

SMALL = VARIANTS["demo"].replace(
    image_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=2, mlp_ratio=3.0
)
SHORT = demo.Recipe(flow_steps=2, steps=3, clips=12, held_out=12, batch=4)


@pytest.mark.parametrize(
    ("changes", "before", "after"),
    [
        (demo.MIRROR, "moving left", "moving right"),
        (demo.MIRROR, "moving up", "moving up"),
        (demo.MIRROR, "turning clockwise", "turning counter-clockwise"),
        (demo.UPSIDE_DOWN, "moving down", "moving up"),
        (demo.UPSIDE_DOWN, "approaching", "approaching"),
        (demo.TRANSPOSE, "moving left", "moving up"),
        (demo.TRANSPOSE, "moving down", "moving right"),
        (demo.BACKWARDS, "approaching", "receding"),
        (demo.BACKWARDS, "moving up", "moving down"),
        (demo.BACKWARDS, "shaking", "shaking"),
    ],
)
def test_a_changed_clip_has_the_label_of_what_it_now_shows(
    changes: tuple[int, ...], before: str, after: str
) -> None:
    assert LABELS[changes[LABELS.index(before)]] == after


def test_augmentation_changes_frames_flow_and_label_alike() -> None:
    """A dot that runs to the right and the flow that says so stay in agreement."""
    frames = np.zeros((8, 16, 16, 3), np.uint8)
    for time in range(8):
        frames[time, 7, 2 + time] = 255
    flow = np.tile(np.float32([1, 0]), (7, 2, 2, 1))
    steps = {"moving left": (-1, 0), "moving right": (1, 0)}
    steps |= {"moving up": (0, -1), "moving down": (0, 1)}
    rng = np.random.default_rng(0)
    found = set()
    for _ in range(40):
        seen, moved, label = demo.augment((frames, flow, LABELS.index("moving right")), rng)
        row, col = (
            np.argwhere(np.ptp(frame, axis=-1) + frame[..., 0] != frame[0, 0, 0])
            for frame in (seen[0], seen[1])
        )  # the one pixel unlike the corner
        step = tuple((col[0] - row[0])[::-1])
        assert step == steps[LABELS[label]] == tuple(moved[0, 0, 0])
        found.add(LABELS[label])
    assert found == steps.keys()


def test_the_first_attention_starts_by_looking_at_the_next_frame() -> None:
    torch.manual_seed(0)
    network = TimeSformer(VARIANTS["demo"])
    clips = torch.randint(0, 256, (2, 8, *[network.config.image_size] * 2, 3), dtype=torch.uint8)
    start_as_motion_energy(network, clips)
    temporal = network.blocks[0].before["temporal"]
    with torch.no_grad():
        patches = network._embed(clips)[1]
        groups = temporal.grouping.split(temporal.norm(patches)).flatten(0, 1)
        query, key, _ = temporal.attn.qkv(groups).chunk(3, dim=-1)
        width = network.config.head_dim
        weights = query[..., :width] @ key[..., :width].mT / width**0.5
    share = weights.softmax(-1).mean(0)
    asked = torch.arange(8).add(1).clamp(max=7)
    assert share[torch.arange(8), asked].min() > 0.9


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
    assert held_out["clips"] == 12
    assert held_out["per_class"].keys() == set(LABELS)
    assert held_out["top1"] == pytest.approx(
        np.mean(list(held_out["per_class"].values())), abs=1e-3
    )
    assert report["versions"]["torch"] == torch.__version__


def test_the_same_recipe_again_gives_the_same_weights(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    out, cache = trained
    rendered = demo.training_set(SHORT, SMALL, cache, workers=1)
    again = demo.train(SHORT, SMALL, rendered, tmp_path)
    first = load_file(out / "weights.safetensors")
    assert all(torch.equal(value, first[name]) for name, value in again.state_dict().items())
