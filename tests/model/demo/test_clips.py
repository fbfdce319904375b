"""Labels follow the augmentation of clips, and rendered clips are kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from model.config import VARIANTS
from model.demo import clips
from model.demo.render import LABELS

SMALL = VARIANTS["demo"].replace(image_size=32, patch_size=16)


@pytest.mark.parametrize(
    ("changes", "before", "after"),
    [
        (clips.MIRROR, "moving left", "moving right"),
        (clips.MIRROR, "moving up", "moving up"),
        (clips.MIRROR, "turning clockwise", "turning counter-clockwise"),
        (clips.UPSIDE_DOWN, "moving down", "moving up"),
        (clips.UPSIDE_DOWN, "approaching", "approaching"),
        (clips.TRANSPOSE, "moving left", "moving up"),
        (clips.TRANSPOSE, "moving down", "moving right"),
        (clips.BACKWARDS, "approaching", "receding"),
        (clips.BACKWARDS, "moving up", "moving down"),
        (clips.BACKWARDS, "shaking", "shaking"),
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
        seen, moved, label = clips.augment((frames, flow, LABELS.index("moving right")), rng)
        row, col = (
            np.argwhere(np.ptp(frame, axis=-1) + frame[..., 0] != frame[0, 0, 0])
            for frame in (seen[0], seen[1])
        )  # the one pixel unlike the corner
        step = tuple((col[0] - row[0])[::-1])
        assert step == steps[LABELS[label]] == tuple(moved[0, 0, 0])
        found.add(LABELS[label])
    assert found == steps.keys()


def test_held_out_clips_come_through_files_and_are_rendered_once(tmp_path: Path) -> None:
    first = clips.held_out_set(3, 2, SMALL, tmp_path, workers=1)
    assert first.shape == (2, 8, 32, 32, 3)
    assert first.std() > 3
    (kept,) = tmp_path.rglob("frames.npy")
    np.save(kept, first + 1)
    assert np.array_equal(clips.held_out_set(3, 2, SMALL, tmp_path, workers=1), first + 1)
