"""Which tokens attend to each other: the paper's five schemes (section 3, figure 2) as one table.

Every attention here is plain multi-head self-attention within groups of tokens; only the grouping
differs. Without torch, so that costs can be counted where there is none: `split` and `join` only
call methods of the tensors that they are given.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

from model.config import AttentionType

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# What one axis of the clip does in a grouping:
#   all     every position attends to every other
#   each    every position is a group of its own
#   halves  two groups of neighbours (a window of half the axis)
#   stride  two groups, every second position
AxisRule = Literal["all", "each", "halves", "stride"]


class Grouping(NamedTuple):
    """Which patches attend to each other, axis by axis."""

    time: AxisRule
    height: AxisRule
    width: AxisRule

    def split(self, patches: Tensor) -> Tensor:
        """(batch, time, height, width, dim) -> (batch, groups, tokens, dim)."""
        sizes, group_axes, token_axes = self._factors(patches.shape[1:4])
        batch, dim = patches.shape[0], patches.shape[-1]
        order = [0, *group_axes, *token_axes, len(sizes) + 1]
        # Lists, as torch.compile does not see through generators.
        groups = math.prod([sizes[axis - 1] for axis in group_axes])
        tokens = math.prod([sizes[axis - 1] for axis in token_axes])
        return (
            patches.reshape(batch, *sizes, dim).permute(order).reshape(batch, groups, tokens, dim)
        )

    def join(self, groups: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `split`, back to patches of the given shape."""
        sizes, group_axes, token_axes = self._factors(shape[1:4])
        order = [0, *group_axes, *token_axes, len(sizes) + 1]
        inverse = [order.index(axis) for axis in range(len(order))]
        split_sizes = [sizes[axis - 1] for axis in (*group_axes, *token_axes)]
        return groups.reshape(shape[0], *split_sizes, shape[-1]).permute(inverse).reshape(shape)

    def counts(self, time: int, height: int, width: int) -> tuple[int, int]:
        """Number of groups, and tokens in each, for a clip of that many patches."""
        sizes, group_axes, _ = self._factors((time, height, width))
        groups = math.prod([sizes[axis - 1] for axis in group_axes])
        return groups, time * height * width // groups

    def _factors(self, lengths: tuple[int, ...]) -> tuple[list[int], list[int], list[int]]:
        """Factors each axis; says which of the factors (counted from 1) index groups or tokens."""
        sizes: list[int] = []
        group_axes: list[int] = []
        token_axes: list[int] = []
        for rule, length in zip(self, lengths, strict=True):
            if rule == "halves":
                sizes += [2, length // 2]
                group_axes.append(len(sizes) - 1)
                token_axes.append(len(sizes))
            elif rule == "stride":
                sizes += [length // 2, 2]
                token_axes.append(len(sizes) - 1)
                group_axes.append(len(sizes))
            else:
                sizes.append(length)
                (group_axes if rule == "each" else token_axes).append(len(sizes))
        return sizes, group_axes, token_axes


class Scheme(NamedTuple):
    """The attentions of one block, in order.

    `before` are attentions over patches only, each followed by a linear of its own; `main` is the
    last one, where every group also holds a copy of the class token. Only `main` has the weights
    of an image ViT's attention, so that such a ViT can initialise every scheme.
    """

    before: dict[str, Grouping]
    main: Grouping


_TIME = Grouping("all", "each", "each")
_FRAME = Grouping("each", "all", "all")

SCHEMES: dict[AttentionType, Scheme] = {
    "divided_space_time": Scheme({"temporal": _TIME}, _FRAME),
    "joint_space_time": Scheme({}, Grouping("all", "all", "all")),
    "space_only": Scheme({}, _FRAME),
    "sparse_local_global": Scheme(
        {"local": Grouping("all", "halves", "halves")}, Grouping("stride", "stride", "stride")
    ),
    "axial": Scheme(
        {"temporal": _TIME, "width": Grouping("each", "each", "all")},
        Grouping("each", "all", "each"),
    ),
}
