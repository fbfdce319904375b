"""Textures and shapes for the rendered clips, at many scales: what a scene's things look like.

Textures are (side, side, 3) float32 in 0..1, and repeat without a seam.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

TEXELS = 256  # texels along one side of a texture
OBJECT_MARGIN = 1.15  # an object's texture ends here, in radii of the object


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(math.exp(rng.uniform(math.log(low), math.log(high))))


def _noise(rng: np.random.Generator, side: int, slope: float) -> Array:
    """Noise (side, side) of mean 0 and deviation 1 with amplitudes falling as 1/f^slope."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]) * side
    frequency[0, 0] = 1
    white = np.fft.rfft2(rng.standard_normal((side, side), np.float32))
    field = np.fft.irfft2(white / frequency**slope, (side, side))
    field -= field.mean()
    return np.asarray(field / field.std(), np.float32)


def _colours(rng: np.random.Generator, count: int) -> Array:
    """Colours (count, 3): a common brightness each, and some chroma."""
    return (rng.uniform(0, 1, (count, 1)) + rng.normal(0, 0.2, (count, 3))).astype(np.float32)


def _clouds(rng: np.random.Generator, side: int) -> Array:
    """1/f noise, like natural images, between three colours; sometimes with hard edges: blobs."""
    first, second = (_noise(rng, side, rng.uniform(0.8, 2.0)) for _ in range(2))
    if rng.random() < 0.5:
        first = np.tanh(rng.uniform(1, 8) * _noise(rng, side, rng.uniform(1.4, 2.2)))
    base, one, two = _colours(rng, 3)
    texture = base + first[..., None] * (one - base) * 0.5 + second[..., None] * (two - base) * 0.2
    return np.asarray(texture, np.float32)


def _leaves(rng: np.random.Generator, side: int) -> Array:
    """Dead leaves: shapes of all sizes that hide each other, as things do in photographs."""
    texture = np.empty((side, side, 3), np.float32)
    texture[:] = _colours(rng, 1)[0]
    for colour in _colours(rng, int(rng.integers(15, 70))):
        height, width = (int(log_uniform(rng, 0.03, 0.25) * side) for _ in range(2))
        rows, cols = np.ogrid[-height : height + 1, -width : width + 1]
        row, col = rng.integers(0, side, 2)
        if rng.random() < 0.5:
            inside = (rows / height) ** 2 + (cols / width) ** 2 <= 1
        else:
            inside = np.abs(rows / height + rng.uniform(-0.7, 0.7) * cols / width) <= 0.6
        at = np.ix_((rows.ravel() + row) % side, (cols.ravel() + col) % side)
        texture[at] = np.where(inside[..., None], colour, texture[at])
    return texture


def _plaid(rng: np.random.Generator, side: int) -> Array:
    """Two crossing waves, soft or as hard as a chessboard. Never wider apart than a fast step."""
    rows, cols = np.meshgrid(*[np.arange(side, dtype=np.float32) / side * 2 * math.pi] * 2)
    along, across = rng.integers(2, 6, 2)
    tilt = int(rng.integers(-2, 3))
    wave = np.sin(along * rows + tilt * cols) * rng.uniform(0.5, 1.5)
    wave = wave + np.sin(across * cols - tilt * rows + rng.uniform(0, 6.3))
    wave = np.tanh(rng.uniform(0.7, 8) * wave)
    dark, bright = _colours(rng, 2)
    return np.asarray(dark + (wave[..., None] + 1) * 0.5 * (bright - dark), np.float32)


def make_texture(rng: np.random.Generator, side: int = TEXELS) -> Array:
    """A texture (side, side, 3) in 0..1: leaves, clouds or plaid over clouds, any contrast."""
    clouds = _clouds(rng, side)
    kind = rng.random()
    if kind < 0.45:
        texture = _leaves(rng, side) + rng.uniform(0, 0.4) * (clouds - clouds.mean())
    elif kind < 0.8:
        texture = clouds
    else:
        weight = rng.uniform(0.3, 0.7)
        texture = weight * _plaid(rng, side) + (1 - weight) * clouds
    texture -= texture.mean()
    texture *= log_uniform(rng, 0.08, 0.3) / max(float(texture.std()), 1e-3)
    return np.asarray(np.clip(texture + rng.uniform(0.3, 0.7), 0, 1), np.float32)


def make_outline(rng: np.random.Generator, side: int) -> Array:
    """Opacity (side, side) of an object of radius 1: a polygon, an ellipse or a flower."""
    axis = np.linspace(-OBJECT_MARGIN, OBJECT_MARGIN, side, dtype=np.float32)
    x, y = np.meshgrid(axis, axis / np.float32(rng.uniform(0.45, 1.0)))
    distance, theta = np.hypot(x, y), np.arctan2(y, x)
    corners = int(rng.integers(3, 7))
    if rng.random() < 0.5:
        part = math.pi / corners
        radius = math.cos(part) / np.cos(np.mod(theta, 2 * part) - part)
    else:
        petal = rng.uniform(0, 0.3)
        radius = 1 - petal + petal * np.sin(corners * theta)
    return np.asarray(np.clip((radius - distance) * side / 6 + 0.5, 0, 1), np.float32)


def make_pyramid(colour: Array, alpha: Array | None) -> tuple[Array, ...]:
    """Levels (side, side, 4), each half as fine as the one before, down to a sixteenth."""
    opacity = np.ones(colour.shape[:2], np.float32) if alpha is None else alpha
    levels = [np.dstack([colour * opacity[..., None], opacity])]  # premultiplied
    for _ in range(4):
        fine = levels[-1]
        levels.append((fine[::2, ::2] + fine[1::2, ::2] + fine[::2, 1::2] + fine[1::2, 1::2]) / 4)
    return tuple(np.ascontiguousarray(level, np.float32) for level in levels)
