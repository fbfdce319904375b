"""Scaling, cropping, rotating: against definitions, and swscale against numpy."""

from __future__ import annotations

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from model.video.transforms import (
    Crops,
    crop_frame,
    plan_crops,
    resize_crop,
    spatial_views,
    to_rgb,
    upright_turns,
    usable_sar,
)

ONE_OR_THREE: tuple[Crops, ...] = (1, 3)


def smooth(height: int, width: int) -> NDArray[np.uint8]:
    """A colourful picture without sharp edges."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 23) + np.cos(y / 17), np.sin((x + y) / 31), np.cos(x / 41 - y / 19)]
    return np.stack([128 + 50 * wave for wave in waves], axis=-1).astype(np.uint8)


def noise(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def triangle_resize(line: NDArray[np.float64], outputs: int) -> NDArray[np.float64]:
    """The definition, one output at a time."""
    scale = len(line) / outputs
    reach = max(scale, 1.0)
    positions = np.arange(len(line)) + 0.5
    out = np.empty(outputs)
    for n in range(outputs):
        weights = np.maximum(1 - np.abs(positions - (n + 0.5) * scale) / reach, 0)
        out[n] = weights @ line / weights.sum()
    return out


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    error = float(np.mean((a.astype(float) - b) ** 2))
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


@pytest.mark.parametrize("outputs", [1, 7, 40, 97, 150])
def test_resize_is_the_triangle_filter_along_both_axes(outputs: int) -> None:
    line = np.random.default_rng(1).integers(0, 256, 97).astype(np.uint8)
    expected = triangle_resize(line.astype(float), outputs)
    tall = np.broadcast_to(line[:, None, None], (97, 5, 3))
    wide = np.broadcast_to(line[None, :, None], (5, 97, 3))
    down, across = resize_crop(tall, (outputs, 5)), resize_crop(wide, (5, outputs))
    assert np.abs(down[:, 2, 1] - expected).max() <= 0.51
    assert np.array_equal(down[:, 2], across[2])


def test_a_cropped_resize_equals_the_crop_of_the_whole_one() -> None:
    frame = noise(171, 230)
    whole = resize_crop(frame, (64, 86))
    part = resize_crop(frame, (64, 86), (3, 17, 40, 50))
    assert np.abs(part.astype(int) - whole[3:43, 17:67]).max() <= 1


def test_resize_to_the_same_size_changes_nothing() -> None:
    frame = noise(33, 47)
    assert np.array_equal(resize_crop(frame, (33, 47)), frame)


def test_a_fine_grid_becomes_grey_not_moire() -> None:
    grid = np.zeros((480, 480, 3), np.uint8)
    grid[::2] = 255
    assert np.ptp(resize_crop(grid, (111, 111))[5:-5]) <= 12


def test_one_crop_is_the_centre_of_256_to_224() -> None:
    plan = plan_crops(1080, 1920, 224, 1, 1.0)
    assert (plan.height, plan.width) == (256, 455)
    assert plan.corners == ((16, 116),)


def test_three_crops_are_the_ends_and_the_centre_of_the_long_side() -> None:
    wide, tall = plan_crops(240, 426, 224, 3, 1.0), plan_crops(426, 240, 224, 3, 1.0)
    assert (wide.height, wide.width) == (224, 398)
    assert wide.corners == ((0, 0), (0, 87), (0, 174))
    assert tall.corners == ((0, 0), (87, 0), (174, 0))


def test_aspect_ratio_of_pixels_decides_the_shape() -> None:
    plan = plan_crops(480, 640, 224, 3, 16 / 9)
    assert plan.width / plan.height == pytest.approx(640 * 16 / 9 / 480, rel=0.01)
    narrow = plan_crops(480, 640, 224, 3, 0.5)
    assert (narrow.height, narrow.width) == (336, 224)


def test_absurd_aspect_ratios_count_as_square() -> None:
    assert [usable_sar(sar) for sar in (None, 0.0, -1.0, 1e-6, 65535.0)] == [1.0] * 5
    assert usable_sar(128 / 117) == 128 / 117


@pytest.mark.parametrize(
    ("rotation", "turns"),
    [(0, 0), (90, 1), (-90, 3), (180, 2), (-180, 2), (270, 3), (45, 0), (-2147483648, 0), (360, 0)],
)
def test_rotation_metadata_in_quarter_turns_the_rest_ignored(rotation: int, turns: int) -> None:
    assert upright_turns(rotation) == turns


@pytest.mark.parametrize("shape", [(360, 640), (640, 360), (121, 161), (50, 50), (1080, 1920)])
def test_swscale_and_numpy_agree(shape: tuple[int, int]) -> None:
    rgb = smooth(*shape)
    frame = av.VideoFrame.from_ndarray(rgb, "rgb24")
    for crops in ONE_OR_THREE:
        by_swscale = crop_frame(frame, 224, crops, 1.2)
        by_numpy = spatial_views(rgb[None], 224, crops, 1.2)[:, 0]
        assert by_swscale.shape == (crops, 224, 224, 3)
        assert psnr(by_swscale, by_numpy) > 50


def test_swscale_and_numpy_agree_on_noise() -> None:
    rgb = noise(720, 1280)
    frame = av.VideoFrame.from_ndarray(rgb, "rgb24")
    assert psnr(crop_frame(frame, 224, 1, 1.0), spatial_views(rgb[None], 224)[:, 0]) > 48


@pytest.mark.parametrize("height", [64, 32], ids=["as it is", "scaled"])
@pytest.mark.parametrize(("cb", "cr"), [(128, 128), (100, 150), (150, 110), (133, 121)])
def test_conversion_is_not_biased(height: int, cb: int, cr: int) -> None:
    frame = av.VideoFrame(256, 64, "yuv420p")
    luma = np.tile(np.arange(256).clip(80, 170).astype(np.uint8), (64, 1))
    frame.planes[0].update(luma.tobytes())
    for plane, chroma in zip(frame.planes[1:], (cb, cr), strict=True):
        plane.update(bytes([chroma]) * plane.buffer_size)
    y, u, v = (luma[0] - 16.0) * 255 / 219, (cb - 128) * 255 / 224, (cr - 128) * 255 / 224
    exact = np.stack([y + 1.402 * v, y - 0.344136 * u - 0.714136 * v, y + 1.772 * u], axis=-1)
    error = to_rgb(frame, 256, height) - exact
    assert np.abs(error.mean(axis=(0, 1))).max() < 0.5


@pytest.mark.parametrize(("colour_range", "white"), [(1, 255), (2, 235)])
def test_full_range_is_honoured(colour_range: int, white: int) -> None:
    frame = grey(235)
    frame.color_range = colour_range
    assert np.abs(to_rgb(frame).astype(int) - white).max() <= 1


@pytest.mark.parametrize("matrix", range(18))
def test_every_colour_matrix_gives_a_picture(matrix: int) -> None:
    frame = grey(126)
    frame.colorspace = matrix
    assert np.abs(to_rgb(frame).astype(int) - 128).max() <= 1


def test_a_sliver_is_not_scaled_up_whole() -> None:
    rgb = np.repeat(noise(1, 4000), 2, axis=0)
    frame = av.VideoFrame.from_ndarray(rgb, "rgb24")  # whole: 256 x 512,000, 393 MB
    assert np.abs(crop_frame(frame, 224, 1, 1.0) - spatial_views(rgb[None], 224)[:, 0]).max() == 0


def test_spatial_views_come_crop_by_crop_contiguous() -> None:
    frames = np.stack([smooth(90, 160), noise(90, 160)])
    views = spatial_views(frames, 32, 3)
    assert views.shape == (3, 2, 32, 32, 3)
    assert views.dtype == np.uint8
    assert views.flags.c_contiguous
    whole = resize_crop(frames[1], (32, 57))
    assert np.abs(views[2, 1].astype(int) - whole[:, 25:]).max() <= 1


def grey(luma: int) -> av.VideoFrame:
    frame = av.VideoFrame(64, 64, "yuv420p")
    for plane, value in zip(frame.planes, (luma, 128, 128), strict=True):
        plane.update(bytes([value]) * plane.buffer_size)
    return frame
