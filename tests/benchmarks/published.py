"""The network as its published implementations write it; what ours is measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from model.network.attention import Attention
from model.network.timesformer import TimeSformer


class AsPublished(TimeSformer):
    """Class token and patches in one row all the way, normed together, and then the first taken.

    Ours keeps the two apart, so that an exporter or compiler sees that the last block's MLP of the
    patches is never read, and drops it. Who exports a published one does not get that.
    """

    @classmethod
    def of(cls, model: TimeSformer) -> AsPublished:
        """The same weights."""
        published = cls(model.config).eval()
        published.load_state_dict(model.state_dict())
        return published

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.attention_type == "space_only":  # a token a frame: there is no row
            return super().forward(frames)
        token, patches = self._embed(frames)
        for block in self.blocks:
            token, patches = block(token, patches)
        embedding = self.norm(torch.cat([token, patches.flatten(1, 3)], dim=1))[:, 0]
        return self.head(embedding), embedding


class PlainAttention(Attention):
    """Attention with its weights written out, not left to a kernel that never stores them."""

    def forward(self, x: Tensor) -> Tensor:
        _, tokens, dim = x.shape
        heads = self.qkv(x).reshape(-1, tokens, 3, self.num_heads, dim // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (query @ key.transpose(-2, -1)) * (dim // self.num_heads) ** -0.5
        mixed = scores.softmax(dim=-1) @ value
        return self.proj(mixed.transpose(1, 2).reshape(-1, tokens, dim))  # type: ignore[no-any-return] # nn.Module calls are untyped


def write_plainly(model: TimeSformer) -> TimeSformer:
    """Writes every attention of a network out, in place."""
    for module in model.modules():
        if type(module) is Attention:
            module.__class__ = PlainAttention
    return model
