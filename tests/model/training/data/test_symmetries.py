"""A clip that is mirrored, turned over, transposed or reversed takes the label of what it shows."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.training.data.augmentation import Augmentation, augment
from model.training.errors import RecipeError
from model.training.recipe import PRESETS

LABELS = ("left", "right", "up", "down", "still")
STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0), "still": (0, 0)}
SIDEWAYS, UPRIGHT = {"left": "right"}, {"up": "down"}
MAPS: dict[str, Any] = {
    "flip_labels": SIDEWAYS,
    "upside_down_labels": UPRIGHT,
    "transpose_labels": {"left": "up", "right": "down"},
    "backwards_labels": SIDEWAYS | UPRIGHT,
}
PROBABILITIES = {name.removesuffix("_labels"): 0.5 for name in MAPS}


def moving(label: str) -> np.ndarray:
    """A white dot on black, which goes a pixel a frame where the label says."""
    frames = np.zeros((4, 9, 9, 3), np.uint8)
    for number in range(4):
        row, column = (4 + number * step for step in STEPS[label])
        frames[number, row, column] = 255
    return frames


def seen(clip: Tensor) -> str:
    """What the dot of a clip does."""
    places = clip[..., 0].nonzero()[:, 1:]
    row, column = (places[1] - places[0]).tolist()
    return next(label for label, step in STEPS.items() if step == (row, column))


def augmented(settings: Augmentation, batch: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """Frames before and after, and labels after."""
    labels = torch.arange(batch) % len(LABELS)
    frames = torch.from_numpy(np.stack([moving(LABELS[label]) for label in labels]))
    generator = torch.Generator().manual_seed(0)
    after, targets = augment(frames, labels, len(LABELS), settings, generator)
    return frames, after, targets.argmax(1)


@pytest.mark.parametrize(
    "on", [*({name: 0.5} for name in PROBABILITIES), PROBABILITIES], ids=[*PROBABILITIES, "all"]
)
def test_the_label_is_what_the_clip_shows_after_any_of_the_changes(on: dict[str, float]) -> None:
    before, after, labels = augmented(Augmentation(**on, **MAPS).for_labels(LABELS))
    changed = (before != after).flatten(1).any(1)
    assert 0.15 * len(changed) < changed.sum() < len(changed)
    assert [seen(clip) for clip in after] == [LABELS[label] for label in labels]


def test_all_four_make_sixteen_clips_of_one() -> None:
    clip = torch.randint(0, 256, (1, 3, 4, 4, 3), dtype=torch.uint8)
    settings = Augmentation(**dict.fromkeys(PROBABILITIES, 0.5))
    generator = torch.Generator().manual_seed(0)
    frames, _ = augment(
        clip.repeat(400, 1, 1, 1, 1), torch.zeros(400).long(), 1, settings, generator
    )
    assert len(frames.flatten(1).unique(dim=0)) == 16


def test_colours_are_shuffled_and_inverted_clip_by_clip() -> None:
    clip = torch.tensor([10, 20, 30], dtype=torch.uint8).expand(300, 2, 2, 2, 3)
    settings = Augmentation(shuffle_colours=1.0, invert=0.5)
    generator = torch.Generator().manual_seed(0)
    frames, _ = augment(clip, torch.zeros(300).long(), 1, settings, generator)
    colours = {tuple(colour) for colour in frames[:, 0, 0, 0].tolist()}
    assert len(colours) == 12
    assert {tuple(sorted(colour)) for colour in colours} == {(10, 20, 30), (225, 235, 245)}


def test_labels_follow_symmetries_into_a_mixture() -> None:
    settings = Augmentation(flip=1.0, flip_labels=SIDEWAYS, mixup=1.0).for_labels(LABELS)
    frames = torch.from_numpy(np.stack([moving("left"), moving("up")]))
    generator = torch.Generator().manual_seed(0)
    _, targets = augment(frames, torch.tensor([0, 2]), len(LABELS), settings, generator)
    assert targets[0].nonzero().flatten().tolist() == [LABELS.index("right"), LABELS.index("up")]


def test_a_recipe_with_names_goes_through_json() -> None:
    recipe = PRESETS["modern"].replace({**PROBABILITIES, **MAPS})
    fields = json.loads(json.dumps(recipe.to_dict()))["augmentation"]
    assert PRESETS["modern"].replace(fields).augmentation == recipe.augmentation
    assert recipe.augmentation.for_labels(LABELS).flip_labels == (1, 0, 2, 3, 4)


def test_indices_stay_as_they_are() -> None:
    by_index = Augmentation(flip_labels=(1, 0, 2, 3, 4))
    assert by_index.for_labels(LABELS) == by_index
    with pytest.raises(RecipeError, match="flip_labels are for 5 classes, not 2"):
        by_index.for_labels(LABELS[:2])


@pytest.mark.parametrize(
    "pairs", [{"left": "right", "up": "right"}, {"left": "right", "right": "up"}, {"left": 1}]
)
def test_a_class_has_one_partner(pairs: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match="transpose_labels must pair class names"):
        Augmentation(transpose_labels=pairs)


def test_a_name_that_the_set_has_not_is_named() -> None:
    settings = Augmentation(backwards_labels={"left": "rigth"})
    with pytest.raises(RecipeError, match=r"backwards_labels names 'rigth', .* 5 classes .*'left'"):
        settings.for_labels(LABELS)
