"""A recipe: all that decides what is learned from given videos and weights. And the named ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from model.training.data.augmentation import Augmentation
from model.training.data.loader import View
from model.training.errors import RecipeError
from model.training.optimisation import Optimisation

Precision = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Values, no code: the same recipe, videos, first weights and software give the same weights.

    Attributes:
        batch_size: clips that go through the network together.
        balanced: every class is drawn as often as any other, however many videos it has.
        precision: of matrix products; weights and optimiser stay float32. `float16` is for GPUs
            without bfloat16 and scales the loss.
    """

    optimisation: Optimisation = dataclasses.field(default_factory=Optimisation)
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
    view: View = dataclasses.field(default_factory=View)
    batch_size: int = 16
    balanced: bool = False
    precision: Precision = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.seed < 0:
            raise RecipeError("batch_size must be above 0, and seed must not be negative")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def replace(self, changes: Mapping[str, Any]) -> Recipe:
        """A copy with some fields changed, those of its parts included; names are all distinct.

        Raises:
            RecipeError: an unknown field, or a value that makes no sense.
        """
        parts = {"optimisation": Optimisation, "augmentation": Augmentation, "view": View}
        result, rest = self, dict(changes)
        for name, part in parts.items():
            fields = {field.name for field in dataclasses.fields(part)}
            own = {key: rest.pop(key) for key in list(rest) if key in fields}
            replaced = dataclasses.replace(getattr(result, name), **own)
            result = dataclasses.replace(result, **{name: replaced})
        unknown = rest.keys() - {field.name for field in dataclasses.fields(self)}
        if unknown:
            raise RecipeError(f"a recipe has no {', '.join(sorted(unknown))}")
        return dataclasses.replace(result, **rest)


PRESETS: dict[str, Recipe] = {
    # Section 4 of the paper, for Kinetics and weights that begin as an image model's.
    "paper": Recipe(
        Optimisation(
            optimizer="sgd",
            epochs=15,
            learning_rate=0.005,
            momentum=0.9,
            weight_decay=1e-4,
            schedule="steps",
            decay_epochs=(11, 14),
            decay=0.1,
        ),
        Augmentation(flip=0.5),
        View(scale=(256 / 224, 320 / 224)),
        batch_size=16,
    ),
    # What fine-tuning of video transformers has settled on since.
    "modern": Recipe(
        Optimisation(
            optimizer="adamw",
            epochs=30,
            learning_rate=5e-4,
            weight_decay=0.05,
            schedule="cosine",
            warm_up=2,
            layer_decay=0.75,
            ema=0.9998,
            clip_norm=1.0,
        ),
        Augmentation(
            flip=0.5,
            randaugment=2,
            magnitude=0.3,
            erasing=0.25,
            mixup=0.8,
            cutmix=1.0,
            label_smoothing=0.1,
        ),
        View(scale=(256 / 224, 320 / 224), temporal_jitter=0.1),
        batch_size=16,
    ),
    # A model that serves already and goes on learning: a tenth of the rate of `modern`, lower still
    # for early blocks, so that what it knows is bent and not rewritten. No mixing and no
    # smoothing, which change how confident it is; no mirroring, since nobody may be there
    # to say whether sides matter.
    "refresh": Recipe(
        Optimisation(
            optimizer="adamw",
            epochs=5,
            learning_rate=5e-5,
            weight_decay=0.05,
            schedule="cosine",
            warm_up=0.5,
            layer_decay=0.75,
            ema=0.999,
            clip_norm=1.0,
        ),
        view=View(scale=(256 / 224, 320 / 224)),
        batch_size=16,
    ),
}
