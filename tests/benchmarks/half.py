"""The rewritten network for a GPU in PyTorch: products in FP16 or bfloat16, the rest in float32.

As `export.graph.fp16` does it to the graph: residual stream, LayerNorm, softmax, head and what only
the class token goes through in the last block stay in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name the field uses

from export.graph.rewrite import (
    GroupAttention,
    InferenceTimeSformer,
    MainAttention,
    SequenceAttention,
)


class HalfLinear(nn.Module):
    """A linear of 16-bit numbers; gives 16-bit numbers.

    `scale` is taken out of what goes in and put into the weights: pixels up to 255 would want
    weights that are too small for FP16.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, scale: float = 1.0) -> None:
        super().__init__()
        self.dtype, self.scale = dtype, scale
        self.register_buffer("weight", (linear.weight.detach() * scale).to(dtype))
        self.register_buffer(
            "bias", None if linear.bias is None else linear.bias.detach().to(dtype)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.scale != 1:
            x = x / self.scale
        # One copy casts and orders the tokens. Tokens that are not contiguous, as those of the
        # attention over time, would be multiplied group by group, and not in one product.
        x = x.to(self.dtype, memory_format=torch.contiguous_format)
        return F.linear(x, self.weight, self.bias)


class HalfAttention(nn.Module):
    """`SequenceAttention` with one linear for query, key and value, and a fused attention."""

    def __init__(self, attention: SequenceAttention, dtype: torch.dtype) -> None:
        super().__init__()
        parts = (attention.query, attention.key, attention.value)
        joined = nn.Linear(parts[0].in_features, sum(part.out_features for part in parts))
        zeros = torch.zeros(parts[0].out_features)
        with torch.no_grad():
            joined.weight.copy_(torch.cat([part.weight for part in parts]))
            joined.bias.copy_(torch.cat([zeros if p.bias is None else p.bias for p in parts]))
        self.qkv = HalfLinear(joined, dtype)
        self.out = HalfLinear(attention.out, dtype)
        self.num_heads, self.scale = attention.num_heads, attention.scale

    def forward(self, x: Tensor) -> Tensor:
        tokens, dim = x.shape[2:]
        heads = self.qkv(x).reshape(-1, tokens, 3, self.num_heads, dim // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        return mixed.transpose(1, 2).reshape(-1, *x.shape[1:])


def halve(network: InferenceTimeSformer, dtype: torch.dtype) -> InferenceTimeSformer:
    """Turns the large products of a rewritten network to 16 bits, in place."""
    if not isinstance(network.patch_embed, nn.Linear):
        raise ValueError("the network has been halved already")
    network.patch_embed = HalfLinear(network.patch_embed, dtype, 255)  # type: ignore[assignment]
    for block in network.blocks:
        for part in (*block.before, block.main):  # type: ignore[misc,union-attr]
            if isinstance(part, GroupAttention | MainAttention):
                part.attention = HalfAttention(part.attention, dtype)  # type: ignore[assignment]
        if isinstance(block.main, MainAttention):
            block.mlp.fc1 = HalfLinear(block.mlp.fc1, dtype)  # type: ignore[union-attr,arg-type,assignment]
            block.mlp.fc2 = HalfLinear(block.mlp.fc2, dtype)  # type: ignore[union-attr,arg-type,assignment]
    return network
