"""What is done to a batch of clips before the network sees it: whole batches at once, on the device
where they are, every draw from the generator that is given. Of a batch that several processes
share, each changes its own clips as one process would. Scale and crop are drawn in `data.py`, where
decoded frames are resampled anyway.

uint8 in, uint8 out, as the network takes nothing else: blending rounds by half a level at most.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name the field uses

from model.training.data.symmetries import (
    SYMMETRIES,
    LabelMap,
    check_label_map,
    label_indices,
    labels_field,
    reflect,
)
from model.training.distributed.batch_shards import Draws, Share
from model.training.errors import RecipeError

_GREY = (0.299, 0.587, 0.114)  # BT.601 luma
_CUTMIX_SHARE = 0.5  # of the batches that are mixed, where both kinds are on
_ERASED_AREA = (0.02, 1 / 3)  # of the picture; and the aspect ratio: Zhong et al., 2020, table 7
_ERASED_ASPECT = 0.3
_SHARES = ("shuffle_colours", "invert", "colour", "magnitude", "erasing", "label_smoothing")


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Which changes, and how strong. Everything off is 0; what is drawn is drawn once per clip.

    Attributes:
        flip, upside_down, transpose, backwards: probability of mirroring left and right, of
            mirroring top and bottom, of exchanging rows and columns, and of time running
            backwards; done in this order. 0 where a direction means something, or the map says
            what each class becomes.
        flip_labels, upside_down_labels, transpose_labels, backwards_labels: what classes become,
            by index or by pairs of names; see `symmetries.py`.
        shuffle_colours: probability that red, green and blue change places at random.
        invert: probability of the negative.
        colour: brightness, contrast and saturation change by up to this share.
        randaugment: operations drawn per clip (Cubuk et al., 2020), of strength `magnitude`.
        erasing: probability that a box of the clip becomes noise, the same in all its frames.
        mixup, cutmix: alpha of the beta distribution that clips are blended, or pasted, in shares
            of; with both, each batch draws one of them.
        label_smoothing: share of a target that is spread evenly over all classes.
    """

    flip: float = 0.0
    flip_labels: LabelMap | None = None
    upside_down: float = 0.0
    upside_down_labels: LabelMap | None = None
    transpose: float = 0.0
    transpose_labels: LabelMap | None = None
    backwards: float = 0.0
    backwards_labels: LabelMap | None = None
    shuffle_colours: float = 0.0
    invert: float = 0.0
    colour: float = 0.0
    randaugment: int = 0
    magnitude: float = 0.3
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for field in (*SYMMETRIES, *_SHARES):
            if not 0 <= getattr(self, field) <= 1:
                raise RecipeError(f"{field} is {getattr(self, field)}; it must be from 0 to 1")
        for field in ("randaugment", "mixup", "cutmix"):
            if not 0 <= getattr(self, field) < math.inf:
                raise RecipeError(f"{field} is {getattr(self, field)}; it must not be negative")
        for field in map(labels_field, SYMMETRIES):
            check_label_map(field, getattr(self, field))

    @property
    def mixes(self) -> bool:
        """Whether clips of a batch are mixed with each other."""
        return bool(self.mixup or self.cutmix)

    def for_labels(self, labels: Sequence[str]) -> Augmentation:
        """The same with every label map by index, for a set with these classes.

        Raises:
            RecipeError: a map names a class that the set has not, or is for another number.
        """
        fields = list(map(labels_field, SYMMETRIES))
        maps: dict[str, Any] = {
            field: label_indices(field, getattr(self, field), labels) for field in fields
        }
        return dataclasses.replace(self, **maps)


def augment(
    frames: Tensor,
    labels: Tensor,
    num_classes: int,
    settings: Augmentation,
    generator: torch.Generator,
    share: Share | None = None,
) -> tuple[Tensor, Tensor]:
    """A changed batch and its soft targets.

    Args:
        frames: uint8 (batch, time, height, width, 3), on any device; not changed itself.
        labels: int64 (batch,), on the same device.
        settings: with label maps by index; see `Augmentation.for_labels`.
        generator: on the CPU; all that is random comes from it.
        share: which clips of the batch these are; None for all. Where clips are mixed, those
            opposite each other in the batch must be in one share.

    Returns:
        Frames as given, and targets float32 (batch, num_classes), each row of sum 1.
    """
    draws = Draws(generator, share or Share.whole(len(frames)))
    for name in SYMMETRIES:
        probability = getattr(settings, name)
        if probability:
            becomes = getattr(settings, labels_field(name))
            frames, labels = reflect(frames, labels, name, probability, becomes, draws)
    if settings.shuffle_colours:
        frames = _shuffle_colours(frames, settings.shuffle_colours, draws)
    if settings.invert:
        frames = _invert(frames, settings.invert, draws)
    if settings.randaugment:
        frames = _randaugment(frames, settings, draws)
    if settings.colour:
        frames = _colour(frames, settings.colour, draws)
    if settings.erasing:
        frames = _erase(frames, settings.erasing, draws)
    targets = F.one_hot(labels, num_classes).float()
    if settings.mixes:
        frames, targets = _mix(frames, targets, settings, generator)
    smooth = settings.label_smoothing
    return frames, targets * (1 - smooth) + smooth / num_classes


def _between(low: float, high: float, uniform: Tensor) -> Tensor:
    return low + (high - low) * uniform


def _per_clip(values: Tensor, frames: Tensor) -> Tensor:
    """(batch,) to where `frames` are, in a shape that multiplies them."""
    return values.to(frames.device).reshape(-1, 1, 1, 1, 1)


def _to_uint8(pixels: Tensor) -> Tensor:
    return pixels.round_().clamp_(0, 255).to(torch.uint8)


# ---- colour -----------------------------------------------------------------------------------


def _shuffle_colours(frames: Tensor, probability: float, draws: Draws) -> Tensor:
    """One of the six orders of the channels for each chosen clip; the old one is among them."""
    chosen = draws.uniform() < probability
    orders = draws.uniform(3).argsort(1)
    orders = torch.where(chosen[:, None], orders, torch.arange(3)).to(frames.device)
    return frames.gather(-1, orders.reshape(-1, 1, 1, 1, 3).expand_as(frames))


def _invert(frames: Tensor, probability: float, draws: Draws) -> Tensor:
    chosen = draws.uniform() < probability
    return torch.where(_per_clip(chosen, frames), 255 - frames, frames)


def _brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    return pixels * factor


def _contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_grey(pixels).mean((1, 2, 3), keepdim=True), pixels, factor)


def _saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_grey(pixels).expand_as(pixels), pixels, factor)


def _grey(pixels: Tensor) -> Tensor:
    return (pixels * torch.tensor(_GREY, device=pixels.device)).sum(-1, keepdim=True)


def _colour(frames: Tensor, strength: float, draws: Draws) -> Tensor:
    pixels = frames.float()
    for change in (_brightness, _contrast, _saturation):
        factor = _between(1 - strength, 1 + strength, draws.uniform())
        pixels = change(pixels, _per_clip(factor, frames)).clamp(0, 255)
    return _to_uint8(pixels)


# ---- RandAugment ------------------------------------------------------------------------------
# `amount` is in -1..1: strength and direction. float32 pixels (1, time, height, width, 3).


def _posterise(pixels: Tensor, amount: float) -> Tensor:
    step = 2.0 ** round(5 * abs(amount))
    return (pixels / step).floor() * step


def _solarise(pixels: Tensor, amount: float) -> Tensor:
    return torch.where(pixels > 255 * (1 - abs(amount) / 2), 255 - pixels, pixels)


def _sharpen(pixels: Tensor, amount: float) -> Tensor:
    """Towards or away from a 3 x 3 blur."""
    planes = pixels[0].permute(0, 3, 1, 2)
    blurred = F.avg_pool2d(F.pad(planes, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return (planes + amount * (planes - blurred)).permute(0, 2, 3, 1)[None]


def _affine(pixels: Tensor, matrix: list[list[float]]) -> Tensor:
    """Moves every frame alike; grey where there is no picture."""
    planes = pixels[0].permute(0, 3, 1, 2)
    grid = F.affine_grid(
        torch.tensor([matrix], device=pixels.device).expand(len(planes), -1, -1),
        list(planes.shape),
        align_corners=False,
    )
    moved = F.grid_sample(planes - 128, grid, mode="bilinear", align_corners=False) + 128
    return moved.permute(0, 2, 3, 1)[None]


def _rotate(pixels: Tensor, amount: float) -> Tensor:
    cos, sin = math.cos(amount * math.pi / 6), math.sin(amount * math.pi / 6)
    return _affine(pixels, [[cos, -sin, 0], [sin, cos, 0]])


_OPERATIONS: tuple[Callable[[Tensor, float], Tensor], ...] = (
    _posterise,
    _solarise,
    _sharpen,
    _rotate,
    lambda pixels, amount: _brightness(pixels, torch.tensor(1 + 0.9 * amount)),
    lambda pixels, amount: _contrast(pixels, torch.tensor(1 + 0.9 * amount)),
    lambda pixels, amount: _saturation(pixels, torch.tensor(1 + 0.9 * amount)),
    lambda pixels, amount: _affine(pixels, [[1, 0.3 * amount, 0], [0, 1, 0]]),
    lambda pixels, amount: _affine(pixels, [[1, 0, 0], [0.3 * amount, 1, 0]]),
    lambda pixels, amount: _affine(pixels, [[1, 0, 0.9 * amount], [0, 1, 0]]),
    lambda pixels, amount: _affine(pixels, [[1, 0, 0], [0, 1, 0.9 * amount]]),
)


def _randaugment(frames: Tensor, settings: Augmentation, draws: Draws) -> Tensor:
    changed = []
    which = draws.integers(len(_OPERATIONS), settings.randaugment).tolist()
    signs = (draws.integers(2, settings.randaugment) * 2 - 1).tolist()
    for clip, operations, directions in zip(torch.split(frames, 1), which, signs, strict=True):
        pixels = clip.float()
        for operation, direction in zip(operations, directions, strict=True):
            pixels = _OPERATIONS[operation](pixels, direction * settings.magnitude).clamp(0, 255)
        changed.append(_to_uint8(pixels))
    return torch.cat(changed)


# ---- boxes and mixtures -----------------------------------------------------------------------


def _box(
    height: int, width: int, area: float, aspect: float, generator: torch.Generator
) -> tuple[slice, slice]:
    """Rows and columns of a box of that share of the picture, somewhere wholly inside it."""
    rows = min(round(height * math.sqrt(area * aspect)), height)
    cols = min(round(width * math.sqrt(area / aspect)), width)
    top = int(torch.randint(height - rows + 1, (), generator=generator))
    left = int(torch.randint(width - cols + 1, (), generator=generator))
    return slice(top, top + rows), slice(left, left + cols)


def _erase(frames: Tensor, probability: float, draws: Draws) -> Tensor:
    frames = frames.clone()
    here = dict(zip(draws.share.rows, frames, strict=True))
    height, width = frames.shape[2:4]
    limit, generator = math.log(_ERASED_ASPECT), draws.generator
    for number in range(draws.share.count):
        if torch.rand((), generator=generator) >= probability:
            continue
        area, logarithm = (
            float(_between(*span, torch.rand(1, generator=generator)))
            for span in (_ERASED_AREA, (limit, -limit))
        )
        rows, cols = _box(height, width, area, math.exp(logarithm), generator)
        shape = (rows.stop - rows.start, cols.stop - cols.start, 3)
        noise = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        if number in here:
            here[number][:, rows, cols] = noise.to(frames.device)
    return frames


def _mix(
    frames: Tensor, targets: Tensor, settings: Augmentation, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Each clip with the one that lies opposite in the batch, all in the same share."""
    cut = bool(settings.cutmix)
    if settings.mixup and settings.cutmix:
        cut = float(torch.rand((), generator=generator)) < _CUTMIX_SHARE
    share = _beta(settings.cutmix if cut else settings.mixup, generator)
    others = frames.flip(0)
    if cut:
        height, width = frames.shape[2:4]
        rows, cols = _box(height, width, 1 - share, 1.0, generator)
        frames = frames.clone()
        frames[:, :, rows, cols] = others[:, :, rows, cols]
        pasted = (rows.stop - rows.start) * (cols.stop - cols.start)
        share = 1 - pasted / (height * width)
    else:
        frames = _to_uint8(torch.lerp(others.float(), frames.float(), share))
    return frames, torch.lerp(targets.flip(0), targets, share)


def _beta(alpha: float, generator: torch.Generator) -> float:
    """A draw from Beta(alpha, alpha), as a ratio of gammas."""
    shape = torch.full((2,), alpha, dtype=torch.float64)
    first, second = torch._standard_gamma(shape, generator=generator).clamp_min(1e-300).tolist()
    return float(first / (first + second))
