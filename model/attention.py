"""The five space-time attention schemes of the paper (section 3, figure 2) as one table.

A scheme says which tokens attend to each other. Every attention here is plain multi-head
self-attention within groups of tokens; only the grouping differs. Tokens of a clip are
`patches` of shape (batch, time, height, width, dim) and one class token `cls` (batch, 1, dim).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name the field uses

from model.config import AttentionType

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
        groups = math.prod(sizes[axis - 1] for axis in group_axes)
        tokens = math.prod(sizes[axis - 1] for axis in token_axes)
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
        groups = math.prod(sizes[axis - 1] for axis in group_axes)
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


class Attention(nn.Module):
    """Multi-head self-attention, (sequences, tokens, dim) -> the same shape."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        _, tokens, dim = x.shape
        heads = self.qkv(x).reshape(-1, tokens, 3, self.num_heads, dim // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(-1, tokens, dim))  # type: ignore[no-any-return] # nn.Module calls are untyped


class PatchAttention(nn.Module):
    """An attention of `Scheme.before`: LayerNorm, attention within groups, and a linear.

    The linear (`temporal_fc` in published weights) starts at zero, so that a network initialised
    from an image model begins as that image model.
    """

    def __init__(self, dim: int, num_heads: int, grouping: Grouping) -> None:
        super().__init__()
        self.grouping = grouping
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.fc = nn.Linear(dim, dim)

    def forward(self, patches: Tensor) -> Tensor:
        """(batch, time, height, width, dim) -> what is to be added to it."""
        groups = self.grouping.split(self.norm(patches))
        mixed = self.attn(groups.flatten(0, 1)).reshape(groups.shape)
        return self.grouping.join(self.fc(mixed), patches.shape)


def attend_with_class_token(
    attention: Attention, grouping: Grouping, cls: Tensor, patches: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention within groups, each of them with its own copy of the class token.

    Args:
        cls: (batch, 1, dim), normalised.
        patches: (batch, time, height, width, dim), normalised.

    Returns:
        The mixed class token (mean over its copies) and patches, shapes as given.
    """
    groups = grouping.split(patches)
    copies = cls[:, None].expand(-1, groups.shape[1], -1, -1)
    sequences = torch.cat([copies, groups], dim=2)
    mixed = attention(sequences.flatten(0, 1)).reshape(sequences.shape)
    return mixed[:, :, :1].mean(dim=1), grouping.join(mixed[:, :, 1:], patches.shape)
