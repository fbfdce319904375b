"""From pictures of any size and shape to square uint8 crops; one antialiased bilinear everywhere.

Decoded frames are scaled by swscale (`crop_frame`), plain RGB arrays by numpy (`spatial_views`,
`resize_crop`). Both are the same filter, a triangle as wide as the reduction, on the same geometry.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation
from numpy.typing import NDArray

Crops = Literal[1, 3]

# Without the last three, swscale rounds down and repeats chroma samples. Scaling straight to the
# target costs 2.9 ms for a 1080p frame and is 57 dB from converting to RGB and then resizing in
# float32 (12.5 ms); Pillow's own 8-bit resize is 60 dB from it. test_transforms.py holds it.
_SWSCALE = (
    Interpolation.BILINEAR
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
)
# A sliver of a picture, scaled up whole for one square of it, could take gigabytes. Above this
# many times the square of the short side the crop alone is computed, by numpy.
_MAX_WHOLE_PICTURE = 16
# YUV to RGB matrices that swscale has (H.273, table 4). It refuses frames that name another one, or
# none that exists; these are read as if they named none.
_MATRICES = frozenset({0, 1, 2, 4, 5, 6, 7, 9})
_UNSPECIFIED = 2
_ROWS_AT_ONCE = 8  # of the vertical pass: 2.8 ms for 1080p -> 224, against 23 ms all at once


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How a picture becomes crops: scale all of it to `height` x `width`, then cut squares.

    `corners` are the (top, left) of each square of side `size`, in pixels of the scaled picture.
    """

    height: int
    width: int
    size: int
    corners: tuple[tuple[int, int], ...]


def upright_turns(rotation: int) -> int:
    """Counterclockwise quarter turns (0 to 3) that set a frame upright.

    `rotation` is PyAV's `frame.rotation`, degrees counterclockwise. What is no multiple of 90 is
    ignored: a broken display matrix reads as -2147483648, and a tilt of 3 degrees is no reason to
    resample.
    """
    return rotation // 90 % 4 if rotation % 90 == 0 and abs(rotation) <= 360 else 0


def usable_sar(sar: float | None) -> float:
    """Width of a pixel over its height. Missing and absurd values (beyond 1:10) count as square."""
    return float(sar) if sar and 0.1 <= sar <= 10 else 1.0


def plan_crops(height: int, width: int, image_size: int, crops: Crops, sar: float) -> Geometry:
    """Scale and crops of a picture of `height` x `width` pixels, each `sar` times wider than high.

    One crop: the short side becomes 256/224 of `image_size`, and the centre is cut out. Three
    crops: the short side becomes `image_size`, and the two ends and the centre of the long side
    are cut out (left or top first).
    """
    short = image_size if crops == 3 else round(image_size * 256 / 224)
    display_width = width * sar
    scale = short / min(display_width, height)
    scaled_height = max(round(height * scale), short)
    scaled_width = max(round(display_width * scale), short)
    down, right = scaled_height - image_size, scaled_width - image_size
    centre = ((down + 1) // 2, (right + 1) // 2)
    corners = (centre,) if crops == 1 else ((0, 0), centre, (down, right))
    return Geometry(scaled_height, scaled_width, image_size, corners)


def crop_frame(frame: VideoFrame, image_size: int, crops: Crops, sar: float) -> NDArray[np.uint8]:
    """The crops of one decoded frame, upright and with square pixels.

    `sar` belongs to the frame as coded, before rotation.

    Returns:
        uint8 (crops, image_size, image_size, 3), RGB.
    Raises:
        av.FFmpegError, ValueError: swscale does not know the pixel format or has no memory.
    """
    turns = upright_turns(frame.rotation)
    height, width = (frame.height, frame.width) if turns % 2 == 0 else (frame.width, frame.height)
    upright_sar = sar if turns % 2 == 0 else 1 / sar
    plan = plan_crops(height, width, image_size, crops, upright_sar)
    if plan.height * plan.width > _MAX_WHOLE_PICTURE * min(plan.height, plan.width) ** 2:
        return _crop_array(np.rot90(to_rgb(frame), turns), plan)
    scaled = (plan.width, plan.height) if turns % 2 == 0 else (plan.height, plan.width)
    return _cut(np.rot90(to_rgb(frame, *scaled), turns), plan)


def to_rgb(
    frame: VideoFrame, width: int | None = None, height: int | None = None
) -> NDArray[np.uint8]:
    """A decoded frame as RGB, scaled if asked; colour range and matrix as the frame says.

    Returns:
        uint8 (height, width, 3), not rotated.
    """
    if frame.colorspace not in _MATRICES:
        frame.colorspace = _UNSPECIFIED
    rgb = frame.reformat(width, height, "rgb24", interpolation=_SWSCALE, threads=1)
    pixels: NDArray[np.uint8] = np.asarray(rgb.to_ndarray(), np.uint8)
    return pixels


def spatial_views(
    frames: NDArray[np.uint8], image_size: int, crops: Crops = 1, sar: float = 1.0
) -> NDArray[np.uint8]:
    """The crops of upright RGB frames.

    Args:
        frames: uint8 (time, height, width, 3).
        image_size: side of a crop in pixels.
        crops: 1 (centre) or 3 (both ends and the centre of the long side).
        sar: width of a pixel over its height.
    Returns:
        uint8 (crops, time, image_size, image_size, 3).
    """
    plan = plan_crops(frames.shape[1], frames.shape[2], image_size, crops, sar)
    out = np.empty((crops, len(frames), image_size, image_size, 3), np.uint8)
    for time, frame in enumerate(frames):
        out[:, time] = _crop_array(frame, plan)
    return out


def resize_crop(
    frame: NDArray[np.uint8],
    resized: tuple[int, int],
    box: tuple[int, int, int, int] | None = None,
) -> NDArray[np.uint8]:
    """Antialiased bilinear resize of an RGB array; only what `box` needs is computed.

    The filter is a triangle of half width `max(1, in / out)` pixels of the input, as in Pillow and
    in torch's `antialias=True`.

    Args:
        frame: uint8 (height, width, 3).
        resized: (height, width) of the whole picture after resizing.
        box: (top, left, height, width) of the part that is wanted, in resized pixels.
    Returns:
        uint8 (box height, box width, 3).
    """
    top, left, height, width = box or (0, 0, *resized)
    across = _bands(frame.shape[1], resized[1], left, width)
    first, last = across[0].start, across[-1].stop
    rows = np.empty((height, last - first, 3), np.float32)
    done = 0
    for band in _bands(frame.shape[0], resized[0], top, height):
        part = frame[band.start : band.stop, first:last].astype(np.float32)
        count = len(band.weights)
        flat = band.weights @ part.reshape(len(part), -1)
        rows[done : done + count] = flat.reshape(count, -1, 3)
        done += count
    pieces = [
        np.matmul(band.weights, rows[:, band.start - first : band.stop - first]) for band in across
    ]
    pixels = np.concatenate(pieces, axis=1)
    rounded: NDArray[np.uint8] = pixels.round().clip(0, 255).astype(np.uint8)
    return rounded


@dataclasses.dataclass(frozen=True)
class _Band:
    """Some neighbouring output pixels: `weights` float32 (outputs, inputs) of input[start:stop]."""

    start: int
    stop: int
    weights: NDArray[np.float32]


@functools.lru_cache(maxsize=256)
def _bands(inputs: int, outputs: int, first: int, count: int) -> tuple[_Band, ...]:
    """Filter weights of outputs first..first+count along one axis, a few outputs at a time."""
    return tuple(_make_bands(inputs, outputs, first, first + count))


def _make_bands(inputs: int, outputs: int, first: int, last: int) -> Iterator[_Band]:
    scale = inputs / outputs
    reach = max(scale, 1.0)
    for begin in range(first, last, _ROWS_AT_ONCE):
        centres = (np.arange(begin, min(begin + _ROWS_AT_ONCE, last)) + 0.5) * scale
        start = max(int(centres[0] - reach), 0)
        stop = min(int(centres[-1] + reach) + 1, inputs)
        distance = np.abs(np.arange(start, stop) + 0.5 - centres[:, None])
        weights = np.maximum(1.0 - distance / reach, 0.0)
        weights /= weights.sum(axis=1, keepdims=True)
        yield _Band(start, stop, weights.astype(np.float32))


def _crop_array(frame: NDArray[np.uint8], plan: Geometry) -> NDArray[np.uint8]:
    """Crops (crops, size, size, 3) of an upright array, each computed on its own."""
    square = (plan.size, plan.size)
    resized = (plan.height, plan.width)
    return np.stack([resize_crop(frame, resized, (*corner, *square)) for corner in plan.corners])


def _cut(scaled: NDArray[np.uint8], plan: Geometry) -> NDArray[np.uint8]:
    """Crops (crops, size, size, 3) of a picture that is already scaled."""
    size = plan.size
    return np.stack([scaled[top : top + size, left : left + size] for top, left in plan.corners])
