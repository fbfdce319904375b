"""The rendered clips show what their label says, the same for the same seed, as real files."""

from __future__ import annotations

import itertools
from pathlib import Path

import av
import numpy as np
import pytest

from model.config import Preprocessing
from model.demo import render
from model.demo.render import LABELS, Array, Frames

TIMES = (np.arange(8) - 3.5) * 4 / 30
SEES = Preprocessing(num_frames=8, image_size=64, frame_stride=4)


def moving_scene(label: str, seed: int) -> tuple[list[render.Layer], Frames]:
    """A background that moves as the label says, without objects, noise, blur or bars."""
    rng = np.random.default_rng(seed)
    layers = [render._background(rng, render.make_motion(label, rng))]
    still = render.make_motion("still", rng)
    camera = render.Camera(0.0, still, gamma=1.0, saturation=1.0, noise=0.0, bars=(0.0, 0.0))
    exposed = [render._expose(layers, camera, time, (96, 96), 96) for time in TIMES]
    return layers, np.stack([render._develop(frame, camera, rng) for frame in exposed])


def displacement(before: Array, after: Array) -> tuple[float, float]:
    """x and y by which `after` is `before` moved: the peak of their phase correlation."""
    window = np.hanning(len(before))[:, None] * np.hanning(len(before))
    first, second = (np.fft.fft2((image - image.mean()) * window) for image in (before, after))
    cross = second * first.conj()
    peak = np.fft.ifft2(cross / (np.abs(cross) + 1e-3)).real.argmax()
    y, x = np.unravel_index(peak, before.shape)
    side = len(before)
    return (x + side // 2) % side - side // 2, (y + side // 2) % side - side // 2


def drift(frames: Frames) -> Array:
    """Median displacement x, y over four frames' time: pixel peaks are coarse for slow clips."""
    grey = frames.astype(np.float32).mean(-1)
    steps = [displacement(grey[i], grey[i + 4]) for i in range(len(grey) - 4)]
    return np.median(np.array(steps, np.float32), axis=0)


@pytest.mark.parametrize(
    ("label", "axis", "sign"),
    [
        ("moving left", 0, -1),
        ("moving right", 0, 1),
        ("moving up", 1, -1),
        ("moving down", 1, 1),
    ],
)
def test_a_scene_that_moves_moves_where_its_label_says(label: str, axis: int, sign: int) -> None:
    drifts = [drift(moving_scene(label, seed)[1]) for seed in range(2)]
    assert all(sign * moved[axis] > abs(moved[1 - axis]) for moved in drifts), drifts


def test_left_played_backwards_is_right() -> None:
    _, frames = moving_scene("moving left", 1)
    assert drift(frames)[0] < 0 < drift(frames[::-1])[0]


@pytest.mark.parametrize(("label", "sign"), [("approaching", 1), ("receding", -1)])
def test_what_approaches_flows_outward_and_what_recedes_inward(label: str, sign: int) -> None:
    layers, _ = moving_scene(label, 3)
    flow = render.flow(layers, TIMES, cells=4, view=1.0)
    spread = flow[:, :, -1, 0].mean() - flow[:, :, 0, 0].mean()
    assert sign * spread > 0


@pytest.mark.parametrize(
    ("label", "sign"), [("turning clockwise", 1), ("turning counter-clockwise", -1)]
)
def test_clockwise_is_to_the_right_above_and_to_the_left_below(label: str, sign: int) -> None:
    layers, _ = moving_scene(label, 3)
    flow = render.flow(layers, TIMES, cells=4, view=1.0)
    assert sign * (flow[:, 0, :, 0].mean() - flow[:, -1, :, 0].mean()) > 0


@pytest.mark.parametrize("seed", range(3))
def test_the_flow_is_what_the_pixels_do(seed: int) -> None:
    layers, frames = moving_scene("moving up", seed)
    expected = render.flow(layers, TIMES, cells=1, view=1.0)[:, 0, 0] * 96
    four_frames = np.median([expected[i : i + 4].sum(0) for i in range(4)], axis=0)
    assert drift(frames) == pytest.approx(four_frames, abs=1.5)


def test_a_still_scene_keeps_still_and_a_flickering_one_changes_only_its_light() -> None:
    for label in ("still", "flickering"):
        layers, frames = moving_scene(label, 5)
        assert np.abs(render.flow(layers, TIMES, cells=2, view=1.0)).max() * 96 < 1
        light = frames.mean((1, 2, 3))
        assert (np.ptp(light) > 5) == (label == "flickering")


def test_one_seed_gives_one_clip_and_another_seed_another() -> None:
    first, again, other = (
        render.training_clip("swinging", np.random.default_rng([7, index]), SEES, 4)
        for index in (0, 0, 1)
    )
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize("label", LABELS)
def test_every_class_gives_frames_that_are_neither_empty_nor_all_alike(label: str) -> None:
    frames, flow = render.training_clip(label, np.random.default_rng(11), SEES, 4)
    assert frames.shape == (8, 64, 64, 3)
    assert frames.dtype == np.uint8
    assert flow.shape == (7, 4, 4, 2)
    assert frames.std() > 3
    changes = [np.abs(a.astype(int) - b).mean() for a, b in itertools.pairwise(frames)]
    assert max(changes) > 0 or label == "still"


def test_an_unknown_motion_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="somersault"):
        render.render_frames("somersault", np.random.default_rng(0), TIMES, (32, 32))


def test_a_written_clip_is_an_mp4_that_others_can_decode(tmp_path: Path) -> None:
    paths = [tmp_path / "clip.mp4", tmp_path / "again.mp4"]
    for path in paths:
        render.write_clip(path, "turning clockwise", seed=4, seconds=0.3, rate=30)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with av.open(paths[0]) as container:
        video = container.streams.video[0]
        assert video.average_rate == 30
        assert all(80 <= side <= 200 and side % 2 == 0 for side in (video.height, video.width))
        assert sum(1 for _ in container.decode(video)) == 9
