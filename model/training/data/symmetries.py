"""Symmetries of a clip, and what each makes of its label: "moving left" is "moving right" in the
mirror. All four together make sixteen clips of one.

A set whose labels are directions says in a map what each class becomes. Maps are given by name, in
a recipe that is read by people, or by index.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from model.training.distributed.batch_shards import Draws
from model.training.errors import RecipeError

LabelMap = tuple[int, ...] | Mapping[str, str]
"""For each class the index of what it becomes; or pairs of names that change places, where classes
that are not named stay what they are."""

# frames are (batch, time, height, width, 3). The order is part of what a recipe means: each map is
# about what the changes before it have left.
SYMMETRIES: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": lambda frames: frames.flip(3),
    "upside_down": lambda frames: frames.flip(2),
    "transpose": lambda frames: frames.transpose(2, 3),
    "backwards": lambda frames: frames.flip(1),
}


def labels_field(name: str) -> str:
    """The recipe's field that holds the label map of a symmetry."""
    return f"{name}_labels"


def check_label_map(field: str, becomes: LabelMap | None) -> None:
    """Refuses a map that is no symmetry: done twice, every class must be itself again.

    Raises:
        RecipeError: it is not; names `field`.
    """
    if becomes is None:
        return
    if isinstance(becomes, Mapping):
        _partners(field, becomes)
    elif any(
        not 0 <= other < len(becomes) or becomes[other] != label
        for label, other in enumerate(becomes)
    ):
        raise RecipeError(f"{field} must pair classes: done twice, a class is itself")


def label_indices(
    field: str, becomes: LabelMap | None, labels: Sequence[str]
) -> tuple[int, ...] | None:
    """A map by name or index as one by index, for a set with these classes.

    Raises:
        RecipeError: it names a class that the set has not, or is for another number of classes.
    """
    if becomes is None:
        return None
    if not isinstance(becomes, Mapping):
        if len(becomes) != len(labels):
            raise RecipeError(f"{field} are for {len(becomes)} classes, not {len(labels)}")
        return becomes
    index = {label: number for number, label in enumerate(labels)}
    partners = _partners(field, becomes)
    unknown = sorted(partners.keys() - index.keys())
    if unknown:
        known = ", ".join(repr(label) for label in labels[:3])
        raise RecipeError(
            f"{field} names {unknown[0]!r}, which is none of the {len(labels)} classes of the set "
            f"({known}, ...)"
        )
    return tuple(index[partners.get(label, label)] for label in labels)


def _partners(field: str, pairs: Mapping[str, str]) -> dict[str, str]:
    """Each named class and its partner, both ways."""
    partners: dict[str, str] = {}
    for pair in pairs.items():
        for name, partner in (pair, pair[::-1]):
            if not isinstance(partner, str) or partners.setdefault(name, partner) != partner:
                raise RecipeError(
                    f"{field} must pair class names, each with one other; {name!r} has "
                    f"{partners.get(name)!r} and {partner!r}"
                )
    return partners


def reflect(
    frames: Tensor,
    labels: Tensor,
    name: str,
    probability: float,
    becomes: tuple[int, ...] | None,
    draws: Draws,
) -> tuple[Tensor, Tensor]:
    """Applies one of `SYMMETRIES` to some clips of a batch, and its map to their labels.

    Args:
        frames: uint8 (batch, time, height, width, 3); square for `transpose`.
        labels: int64 (batch,), on the same device.
    """
    chosen = (draws.uniform() < probability).to(frames.device)
    frames = torch.where(chosen.reshape(-1, 1, 1, 1, 1), SYMMETRIES[name](frames), frames)
    if becomes is not None:
        partners = torch.tensor(becomes, device=labels.device)
        labels = torch.where(chosen, partners[labels], labels)
    return frames, labels
