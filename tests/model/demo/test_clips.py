"""The flow follows the augmentation of clips."""

from __future__ import annotations

import numpy as np

from model.demo import clips


def test_augmentation_changes_frames_and_flow_alike() -> None:
    """A dot that runs to the right and the flow that says so stay in agreement."""
    frames = np.zeros((8, 16, 16, 3), np.uint8)
    for time in range(8):
        frames[time, 7, 2 + time] = 255
    flow = np.tile(np.float32([1, 0]), (7, 2, 2, 1))
    rng = np.random.default_rng(0)
    found = set()
    for _ in range(40):
        seen, moved = clips.augment((frames, flow), rng)
        row, col = (
            np.argwhere(np.ptp(frame, axis=-1) + frame[..., 0] != frame[0, 0, 0])
            for frame in (seen[0], seen[1])
        )  # the one pixel unlike the corner
        step = tuple((col[0] - row[0])[::-1])
        assert step == tuple(moved[0, 0, 0])
        found.add(step)
    assert found == {(-1, 0), (1, 0), (0, -1), (0, 1)}
