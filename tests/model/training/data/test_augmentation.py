"""Augmentation changes what it says, per clip, reproducibly, and targets follow the pixels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.training.data.augmentation import _OPERATIONS, Augmentation, augment
from model.training.errors import RecipeError

CLASSES = 4


def clips(batch: int = 8) -> tuple[Tensor, Tensor]:
    """Every clip has noise of its own, the same in all its frames."""
    generator = torch.Generator().manual_seed(3)
    picture = torch.randint(0, 256, (batch, 1, 16, 24, 3), generator=generator, dtype=torch.uint8)
    return picture.repeat(1, 3, 1, 1, 1), torch.arange(batch) % CLASSES


def changed(seed: int = 0, batch: int = 8, **settings: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return augment(*clips(batch), CLASSES, Augmentation(**settings), generator)


EVERYTHING: dict[str, Any] = {
    "flip": 0.5,
    "upside_down": 0.5,
    "backwards": 0.5,
    "shuffle_colours": 0.5,
    "invert": 0.5,
    "colour": 0.4,
    "randaugment": 2,
    "erasing": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
}


def test_nothing_asked_nothing_changed() -> None:
    frames, targets = changed()
    assert torch.equal(frames, clips()[0])
    assert torch.equal(targets, torch.eye(CLASSES).repeat(2, 1))


def test_the_same_generator_gives_the_same_batch_and_the_input_stays() -> None:
    before = clips()[0]
    for seed in range(5):
        first, second = changed(seed, **EVERYTHING), changed(seed, **EVERYTHING)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert first[0].dtype == torch.uint8
        torch.testing.assert_close(first[1].sum(1), torch.ones(8))
    assert not torch.equal(changed(0, **EVERYTHING)[0], changed(1, **EVERYTHING)[0])
    assert torch.equal(before, clips()[0])


@pytest.mark.parametrize(
    "name", [name for name in EVERYTHING if name not in ("label_smoothing", "backwards")]
)
def test_a_still_clip_stays_still(name: str) -> None:
    """What changes a clip, changes all its frames alike: no motion is made up."""
    frames, _ = changed(**{name: EVERYTHING[name]})
    assert not torch.equal(frames, clips()[0])
    assert torch.equal(frames, frames[:, :1].expand_as(frames))


def test_mirrored_clips_take_the_mirrored_label() -> None:
    frames, targets = changed(batch=64, flip=0.5, flip_labels=(1, 0, 2, 3))
    original, labels = clips(64)
    mirrored = (frames == original.flip(3)).flatten(1).all(1)
    assert 20 < mirrored.sum() < 44
    assert torch.equal(frames[~mirrored], original[~mirrored])
    swapped = torch.tensor([1, 0, 2, 3])[labels]
    assert torch.equal(targets.argmax(1), torch.where(mirrored, swapped, labels))


def test_colour_changes_clips_differently_and_by_no_more_than_asked() -> None:
    grey = torch.full((64, 2, 4, 4, 3), 100, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    frames, _ = augment(grey, torch.zeros(64).long(), 1, Augmentation(colour=0.2), generator)
    levels = frames[:, 0, 0, 0, 0]
    assert len(levels.unique()) > 10
    assert (levels.min(), levels.max()) >= (80, 110)
    assert levels.max() <= 120


@pytest.mark.parametrize("operation", range(len(_OPERATIONS)))
def test_every_operation_is_nothing_at_zero_and_something_beyond(operation: int) -> None:
    pixels = clips(1)[0].float()
    apply = _OPERATIONS[operation]
    torch.testing.assert_close(apply(pixels, 0.0), pixels, atol=0.01, rtol=0)
    assert (apply(pixels, 0.6) - pixels).abs().mean() > 1
    assert apply(pixels, -0.6).shape == pixels.shape


def test_erasing_replaces_one_box_of_some_clips() -> None:
    frames, targets = changed(batch=200, erasing=0.5)
    different = (frames != clips(200)[0]).any(-1)[:, 0]
    touched = different.flatten(1).any(1)
    assert 70 < touched.sum() < 130
    for clip in different[touched]:
        rows, cols = clip.any(1).nonzero(), clip.any(0).nonzero()
        box = clip[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1]
        assert box.float().mean() > 0.9
        assert box.numel() <= 0.45 * clip.numel()  # a third, rounded to whole pixels
    assert torch.equal(targets.argmax(1), clips(200)[1])


def test_mixup_blends_pixels_in_the_share_of_the_targets() -> None:
    frames, targets = changed(mixup=1.0)
    original, labels = clips()
    share = targets[0, labels[0]]
    assert 0.02 < share < 0.98
    blended = original.float() * share + original.flip(0).float() * (1 - share)
    assert (frames.float() - blended).abs().max() <= 0.51
    assert targets[0, labels[-1]].item() == pytest.approx(1 - share.item())


def test_cutmix_pastes_the_share_of_the_targets() -> None:
    for seed in range(20):
        frames, targets = changed(seed, cutmix=1.0)
        original, labels = clips()
        kept = (frames == original).all(-1)[0, 0].float().mean().item()
        assert targets[0, labels[0]] == pytest.approx(kept, abs=1e-2)  # two pixels may be equal
        theirs = (frames == original) | (frames == original.flip(0))
        assert theirs.all()


def test_with_both_some_batches_are_blended_and_some_pasted() -> None:
    original = clips()[0]
    pasted = 0
    for seed in range(40):
        frames, _ = changed(seed, mixup=1.0, cutmix=1.0)
        pasted += bool(((frames == original) | (frames == original.flip(0))).all())
    assert 8 < pasted < 32


def test_label_smoothing_spreads_a_share() -> None:
    _, targets = changed(label_smoothing=0.2)
    assert targets[0].tolist() == pytest.approx([0.85, 0.05, 0.05, 0.05])


@pytest.mark.parametrize(
    "wrong",
    [{"flip": 1.5}, {"transpose": -1}, {"invert": 2}, {"colour": -0.1}, {"mixup": -1.0},
     {"flip_labels": (1, 2, 0)}, {"flip_labels": (0, 5)}, {"randaugment": -1}],
)  # fmt: skip
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        Augmentation(**wrong)
