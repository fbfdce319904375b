"""Procedural clips of twelve motions, from nothing but a seed: what the demo model learns from.

A scene is a textured background with up to three textured objects on it. What its label names
happens to all of it, as when a camera pans, zooms or rolls, or to the objects alone. Textures,
colours, sizes, blur, noise, bars and compression are drawn without a look at the label, so one
frame says nothing about the class: only time does. torch looks textures up, as numpy would take ten
times as long.

Lengths are in short sides of the frame, times in seconds from the middle of the clip, x points
right and y down, angles grow clockwise.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name the field uses

from model.config import Preprocessing
from model.demo.textures import (
    OBJECT_MARGIN,
    TEXELS,
    Array,
    log_uniform,
    make_outline,
    make_pyramid,
    make_texture,
)

LABELS = (
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "approaching",
    "receding",
    "turning clockwise",
    "turning counter-clockwise",
    "still",
    "shaking",
    "swinging",
    "flickering",
)

Frames = npt.NDArray[np.uint8]
Times = npt.NDArray[np.float64]

# A pose says how a layer differs from rest: x, y, angle, log of the scale, log of the brightness.
X, Y, ANGLE, ZOOM, LIGHT = range(5)
TILE = 2.0  # side of the background's endlessly repeated texture
_RATES = (15, Fraction(24000, 1001), 25, 25, 30, 30, 60)  # of files, frames a second
SUBFRAMES = 3  # samples a pixel, spread over its area and over the shutter time

# Steady motions: (component of the pose, sign, slowest and fastest rate in 1/s). A clip lasts
# 0.93 s and a short side is 73 px of the network's input: 0.06 is 0.6 px from frame to frame.
_STEADY = {
    "moving left": (X, -1, 0.06, 0.7),
    "moving right": (X, 1, 0.06, 0.7),
    "moving up": (Y, -1, 0.06, 0.7),
    "moving down": (Y, 1, 0.06, 0.7),
    "approaching": (ZOOM, 1, 0.25, 1.4),
    "receding": (ZOOM, -1, 0.25, 1.4),
    "turning clockwise": (ANGLE, 1, 0.4, 3.2),
    "turning counter-clockwise": (ANGLE, -1, 0.4, 3.2),
}


@dataclasses.dataclass(frozen=True)
class Motion:
    """A pose over time: a steady part, and waves that come back to where they began."""

    velocity: Array  # (5,), pose per second
    acceleration: float  # relative change of the velocity per second
    amplitudes: Array  # (waves, 5)
    frequencies: Array  # (waves,), Hz
    phases: Array  # (waves,), radians

    def pose(self, time: float) -> Array:
        """The pose (5,) at a time in seconds from the middle of the clip."""
        steady = self.velocity * np.float32(time + 0.5 * self.acceleration * time * abs(time))
        waves = np.sin(2 * math.pi * self.frequencies * time + self.phases)
        return np.asarray(steady + waves @ self.amplitudes, np.float32)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A texture, where it lies, and how it moves. `radius` is None for the endless background."""

    pyramid: tuple[Array, ...]  # (side, side, 4) RGBA in 0..1, every level half the one before
    centre: tuple[float, float]
    angle: float
    radius: float | None
    motion: Motion


@dataclasses.dataclass(frozen=True)
class Camera:
    """How a scene is taken: everything of it is independent of what moves."""

    shutter: float  # seconds
    smear: Motion  # motion during the shutter time: blur that gives no motion away
    gamma: float
    saturation: float
    noise: float  # standard deviation on a 0..1 scale
    bars: tuple[float, float]  # height above and below, width left and right, 0 for none


# ---- motions ----------------------------------------------------------------------------------


def _waves(
    rng: np.random.Generator, amplitude: Array, low: float, high: float, count: int
) -> tuple[Array, Array, Array]:
    """`count` waves of `low` to `high` Hz that together are about as large as `amplitude` (5,)."""
    share = rng.standard_normal((count, 5)) / math.sqrt(count)
    frequencies = rng.uniform(low, high, count)
    return (
        (share * amplitude).astype(np.float32),
        frequencies.astype(np.float32),
        rng.uniform(0, 2 * math.pi, count).astype(np.float32),
    )


def make_motion(label: str, rng: np.random.Generator) -> Motion:
    """Draws a motion of the class `label`, with the slight tremble that every clip has."""
    velocity = np.zeros(5, np.float32)
    acceleration = 0.0
    tremble = log_uniform(rng, 0.0002, 0.002)
    waves = _waves(rng, np.array([tremble, tremble, tremble, 0, tremble], np.float32), 0.5, 10, 3)
    if label in _STEADY:
        component, sign, slow, fast = _STEADY[label]
        velocity[component] = sign * log_uniform(rng, slow, fast)
        if component in (X, Y):  # up to 15 degrees off the axis
            velocity[1 - component] = velocity[component] * math.tan(rng.uniform(-0.26, 0.26))
        acceleration = rng.uniform(-0.8, 0.8)
    elif label == "shaking":
        shift = log_uniform(rng, 0.012, 0.06)
        turn = rng.choice([0.0, 1.0]) * shift
        # Around half the 7.5 Hz at which clips are sampled: what is faster would look like a swing.
        waves = _waves(rng, np.array([shift, shift, turn, 0, 0], np.float32), 2.3, 5.2, 6)
    elif label == "swinging":
        waves = _swing(rng)
    elif label == "flickering":
        light = np.array([0, 0, 0, 0, log_uniform(rng, 0.25, 0.9)], np.float32)
        waves = _waves(rng, light, 1.5, 11, 5)
    return Motion(velocity, acceleration, *waves)


def _swing(rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """One smooth wave, to and fro at least once in 0.93 s: a shift in any direction or a turn."""
    amplitude = np.zeros((1, 5), np.float32)
    if rng.random() < 0.35:
        amplitude[0, ANGLE] = log_uniform(rng, 0.15, 0.7)
    else:
        shift, direction = log_uniform(rng, 0.04, 0.2), rng.uniform(0, 2 * math.pi)
        amplitude[0, X], amplitude[0, Y] = shift * math.cos(direction), shift * math.sin(direction)
    frequency = rng.uniform(0.95, 1.8, 1).astype(np.float32)
    return amplitude, frequency, rng.uniform(0, 2 * math.pi, 1).astype(np.float32)


# ---- scenes -----------------------------------------------------------------------------------


def _background(rng: np.random.Generator, motion: Motion) -> Layer:
    centre = (rng.uniform(-0.25, 0.25), rng.uniform(-0.25, 0.25))
    # A tile turned by less than a right angle: no stripe is always upright.
    return Layer(
        make_pyramid(make_texture(rng), None), centre, rng.uniform(-1.6, 1.6), None, motion
    )


def _object(rng: np.random.Generator, motion: Motion) -> Layer:
    side = TEXELS // 2
    pyramid = make_pyramid(make_texture(rng, side), make_outline(rng, side))
    centre = (rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.3))
    angle = rng.uniform(0, 2 * math.pi)
    return Layer(pyramid, centre, angle, log_uniform(rng, 0.15, 0.45), motion)


def make_layers(label: str, rng: np.random.Generator) -> list[Layer]:
    """The background and its objects; either everything or only the objects move as `label`."""
    if label not in LABELS:
        raise ValueError(f"unknown motion {label!r}; known are {LABELS}")
    scene_moves = rng.random() < 0.55
    motion = make_motion(label, rng)
    if scene_moves:
        return [_background(rng, motion)]
    objects = [_object(rng, motion) for _ in range(rng.choice([1, 2, 3], p=[0.6, 0.25, 0.15]))]
    return [_background(rng, make_motion("still", rng)), *objects]


def make_camera(rng: np.random.Generator) -> Camera:
    """Blur, colour, noise and bars, the same for all classes."""
    bars = (0.0, 0.0)
    if rng.random() < 0.12:
        width = rng.uniform(0.04, 0.16)
        bars = (width, 0.0) if rng.random() < 0.6 else (0.0, width)
    return Camera(
        shutter=rng.choice([0.0, 1.0]) * rng.uniform(0, 1 / 20),
        smear=make_motion(str(rng.choice(LABELS[:10])), rng),
        gamma=log_uniform(rng, 0.7, 1.4),
        saturation=float(rng.choice([0.0, 1.0], p=[0.15, 0.85])) * rng.uniform(0.3, 1.3),
        noise=float(rng.choice([0.0, 1.0])) * rng.uniform(0, 0.04),
        bars=bars,
    )


# ---- from scene to pixels ---------------------------------------------------------------------


def _turn_and_scale(layer: Layer, pose: Array) -> tuple[np.float32, np.float32]:
    """Cosine and sine of how far the layer is turned, times its scale."""
    angle, scale = layer.angle + float(pose[ANGLE]), math.exp(pose[ZOOM]) * (layer.radius or 1.0)
    return np.float32(math.cos(angle) * scale), np.float32(math.sin(angle) * scale)


def _to_layer(layer: Layer, pose: Array, xs: Array, ys: Array) -> tuple[Array, Array]:
    """Where the points of the frame at `xs` x `ys` lie on the layer, each (rows, columns)."""
    cos, sin = _turn_and_scale(layer, pose)
    x, y = xs[None] - (layer.centre[0] + pose[X]), ys[:, None] - (layer.centre[1] + pose[Y])
    square = cos * cos + sin * sin
    return (cos * x + sin * y) / square, (cos * y - sin * x) / square


def _to_frame(layer: Layer, pose: Array, u: Array, v: Array) -> Array:
    """The inverse of `_to_layer` less the centre: points (..., 2) of the frame."""
    cos, sin = _turn_and_scale(layer, pose)
    return np.stack([cos * u - sin * v + pose[X], sin * u + cos * v + pose[Y]], -1)


def _look_up(layer: Layer, u: Tensor, v: Tensor, texels_per_unit: float) -> Tensor:
    """The layer's RGBA at points of its own, bilinear and about as fine as asked for.

    Args:
        u, v: float32 (images, rows, columns).

    Returns:
        (images, 4, rows, columns). An object is transparent beyond its texture; the background
        repeats.
    """
    extent = TILE if layer.radius is None else 2 * OBJECT_MARGIN
    excess = layer.pyramid[0].shape[0] / extent / texels_per_unit
    level = min(int(math.log2(max(excess, 1.0))), len(layer.pyramid) - 1)
    texture = layer.pyramid[level]
    side = len(texture)
    points = torch.stack([u, v], -1)
    if layer.radius is None:
        # A border of one texel on every side lets the interpolation reach over the seam.
        texture = np.pad(texture, ((1, 1), (1, 1), (0, 0)), mode="wrap")
        points = points.mul_(1 / TILE).add_(0.5 - 0.5 / side).remainder_(1.0)
        points = points.mul_(2 * side / (side + 2)).add_(3 / (side + 2) - 1)
    else:
        points = points.mul_(1 / OBJECT_MARGIN)
    image = torch.from_numpy(np.ascontiguousarray(texture.transpose(2, 0, 1)))
    return F.grid_sample(image.expand(len(points), -1, -1, -1), points, align_corners=False)


def _draw(layer: Layer, poses: list[Array], xs: Array, ys: Array, canvas: Tensor) -> None:
    """Puts one layer onto `canvas` (images, 3, height, width), in a pose of its own on each.

    Args:
        xs, ys: where the pixels' centres are, (images, width) and (images, height).
    """
    rows, cols = slice(None), slice(None)
    scale = math.exp(poses[0][ZOOM]) * (layer.radius or 1.0)
    if layer.radius is not None:
        reach = scale * (OBJECT_MARGIN + 0.2) * math.sqrt(2)  # and a little, as it moves meanwhile
        x, y = layer.centre[0] + poses[0][X], layer.centre[1] + poses[0][Y]
        rows = slice(*np.searchsorted(ys[0], (y - reach, y + reach)))
        cols = slice(*np.searchsorted(xs[0], (x - reach, x + reach)))
    placed = [
        _to_layer(layer, pose, xs[image, cols], ys[image, rows]) for image, pose in enumerate(poses)
    ]
    u, v = (torch.from_numpy(np.stack(axis)) for axis in zip(*placed, strict=True))
    seen = _look_up(layer, u, v, scale / float(xs[0, 1] - xs[0, 0]))
    light = torch.tensor([math.exp(pose[LIGHT]) for pose in poses])[:, None, None, None]
    part = canvas[:, :, rows, cols]
    part.mul_(1 - seen[:, 3:]).addcmul_(seen[:, :3], light)


def _axes(size: tuple[int, int], short: float, offset: tuple[float, float]) -> tuple[Array, Array]:
    """x of every column and y of every row, sampled at `offset` within the pixel."""
    height, width = size
    xs = (np.arange(width) + offset[0] - width / 2) / short
    ys = (np.arange(height) + offset[1] - height / 2) / short
    return xs.astype(np.float32), ys.astype(np.float32)


def _expose(
    layers: list[Layer], camera: Camera, time: float, size: tuple[int, int], short: float
) -> Tensor:
    """One frame (3, height, width) in 0..1 as it reaches the sensor at `time`."""
    # The samples lie on a diagonal pattern within the pixel and along the shutter time.
    offsets = [
        ((index + 0.5) / SUBFRAMES, ((2 * index + 1) % SUBFRAMES + 0.5) / SUBFRAMES)
        for index in range(SUBFRAMES)
    ]
    xs, ys = (
        np.stack(axis) for axis in zip(*[_axes(size, short, o) for o in offsets], strict=True)
    )
    smears = [
        camera.smear.velocity * np.float32(camera.shutter * (along - 0.5)) for along, _ in offsets
    ]
    canvas = torch.zeros(SUBFRAMES, 3, *size)
    for layer in layers:
        pose = layer.motion.pose(time)
        _draw(layer, [pose + smear for smear in smears], xs, ys, canvas)
    return canvas.mean(0)


def _develop(frame: Tensor, camera: Camera, rng: np.random.Generator) -> Frames:
    """Colour, noise and bars: what the sensor makes of a frame (3, height, width), uint8."""
    frame = torch.lerp(frame.mean(0, keepdim=True), frame, camera.saturation)
    frame = frame.clamp_(0, 1).pow_(camera.gamma).permute(1, 2, 0)
    if camera.noise:
        noise = rng.standard_normal(tuple(frame.shape), np.float32)
        frame = frame.add(torch.from_numpy(noise), alpha=camera.noise)
    pixels: Frames = frame.clamp(0, 1).mul_(255).add_(0.5).to(torch.uint8).contiguous().numpy()
    for axis, share in enumerate(camera.bars):
        bar = round(share * pixels.shape[axis])
        if bar:
            view = np.swapaxes(pixels, 0, axis)
            view[:bar] = view[-bar:] = 0
    return pixels


def take(
    layers: list[Layer],
    rng: np.random.Generator,
    times: Times,
    size: tuple[int, int],
    short: float,
) -> Frames:
    """Takes the scene with a camera drawn from `rng`, see `render_frames`."""
    camera = make_camera(rng)
    return np.stack([_develop(_expose(layers, camera, t, size, short), camera, rng) for t in times])


def flow(layers: list[Layer], times: Times, cells: int, view: float) -> Array:
    """How far what is seen moves from each frame to the next, mean over square cells.

    Args:
        layers: The scene.
        times: When the frames are taken.
        cells: Cells along one side of a square view.
        view: Side of that view.

    Returns:
        (len(times) - 1, cells, cells, 2): x and y.
    """
    points = 8 * cells
    xs, ys = _axes((points, points), points / view, (0.5, 0.5))
    fields = []
    for before, after in itertools.pairwise(times):
        field = np.zeros((points, points, 2), np.float32)
        for layer in layers:
            first, last = layer.motion.pose(before), layer.motion.pose(after)
            u, v = _to_layer(layer, np.float32(0.5) * (first + last), xs, ys)
            seen = _look_up(layer, torch.from_numpy(u)[None], torch.from_numpy(v)[None], TEXELS)
            cover = seen[0, 3, :, :, None].numpy()
            path = _to_frame(layer, last, u, v) - _to_frame(layer, first, u, v)
            field += cover * (path - field)
        fields.append(field.reshape(cells, 8, cells, 8, 2).mean((1, 3)))
    return np.stack(fields)


def render_frames(
    label: str, rng: np.random.Generator, times: Times, size: tuple[int, int]
) -> Frames:
    """Draws a clip of the class `label`.

    Args:
        label: One of `LABELS`.
        rng: Decides all that the label leaves open.
        times: When each frame is taken, in seconds from the middle of the clip.
        size: Height and width in pixels.

    Returns:
        uint8 RGB frames (len(times), height, width, 3).

    Raises:
        ValueError: an unknown label.
    """
    return take(make_layers(label, rng), rng, times, size, min(size))


# ---- files ------------------------------------------------------------------------------------


def encode(
    file: Path | io.BytesIO,
    frames: Frames,
    rate: Fraction | int,
    codec: str,
    options: dict[str, str],
) -> None:
    """Writes frames (time, height, width, 3) with even sides as an mp4 file."""
    with av.open(file, "w", format="mp4") as container:
        stream = cast(av.VideoStream, container.add_stream(codec, rate=rate, options=options))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # so small that threads only cost
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def decode(file: Path | io.BytesIO) -> Iterator[Frames]:
    """Every frame (height, width, 3) of a file that `encode` wrote."""
    with av.open(file, "r") as container:
        for frame in container.decode(video=0):
            yield cast(Frames, frame.to_ndarray(format="rgb24"))


def _codec(rng: np.random.Generator) -> tuple[str, dict[str, str]]:
    """A codec and a quality from very good to poor."""
    kind = rng.random()
    if kind < 0.45:
        return "mpeg4", {"qscale": str(rng.integers(2, 16)), "flags": "+qscale"}
    if kind < 0.55:
        quality = {"crf": str(rng.integers(20, 45)), "b": "0"}
        return "libvpx-vp9", {**quality, "deadline": "realtime", "cpu-used": "8"}
    # Slower presets weigh macroblocks by a tree, and then frames as small as the network's come out
    # a little different from one call to the next.
    return "libx264", {"crf": str(rng.integers(16, 36)), "preset": "superfast"}


def training_clip(
    label: str, rng: np.random.Generator, preprocessing: Preprocessing, cells: int
) -> tuple[Frames, Array]:
    """What the network is given of a rendered video, and how everything in it moves.

    The frames are those that serving samples, up to the file's own frame rate; drawn right away
    in the network's scale and then, two times in three, compressed.

    Returns:
        Frames (time, size, size, 3), and the flow (time - 1, cells, cells, 2) in pixels.
    """
    side, step = preprocessing.image_size, preprocessing.frame_stride / 30
    rate = float(_RATES[rng.integers(len(_RATES))])
    times = np.arange(preprocessing.num_frames) * step + rng.uniform(0, 1 / rate)
    times = np.floor(times * rate) / rate
    times -= times.mean()
    layers = make_layers(label, rng)
    short = side * 256 / 224
    frames = take(layers, rng, times, (side, side), short)
    if rng.random() < 2 / 3:
        file = io.BytesIO()
        encode(file, frames, 8, *_codec(rng))
        file.seek(0)
        frames = np.stack(list(decode(file)))
    return frames, flow(layers, times, cells, side / short) * np.float32(short)


def write_clip(
    path: Path,
    label: str,
    seed: int | list[int],
    seconds: float | None = None,
    rate: Fraction | int | None = None,
) -> None:
    """Renders a video of the class `label` and writes it as mp4.

    What is not given is drawn: 80 to 200 px a side, 1.1 to 1.6 s (a little over the span of the
    demo model's clip), 15 to 60 frames a second, MPEG-4, VP9 or H.264 from very good to poor.

    Raises:
        ValueError: an unknown label.
    """
    rng = np.random.default_rng(seed)
    sides = [int(rng.integers(40, 81)) * 2, int(rng.integers(60, 101)) * 2]
    height, width = rng.permutation(sides)
    drawn_seconds, drawn_rate = rng.uniform(1.1, 1.6), _RATES[rng.integers(len(_RATES))]
    seconds, rate = seconds or drawn_seconds, rate or drawn_rate
    times = np.arange(round(seconds * rate)) / float(rate)
    frames = render_frames(label, rng, times - times.mean(), (int(height), int(width)))
    encode(path, frames, rate, *_codec(rng))
