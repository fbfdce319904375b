"""The attentions that a block is made of; `model/network/schemes.py` says which tokens they mix.

Tokens of a clip are `patches` of shape (batch, time, height, width, dim) and one class token `cls`
(batch, 1, dim).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name the field uses

from model.network.schemes import Grouping


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
