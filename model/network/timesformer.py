"""TimeSformer (Bertasius, Wang and Torresani, ICML 2021): uint8 clips in, logits and embedding out.

A pre-norm vision transformer over the patches of all frames. `model/network/schemes.py` says which
tokens attend to each other, and `model/checkpoints/` how foreign checkpoints name the weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import ModelConfig
from model.network.attention import Attention, PatchAttention, attend_with_class_token
from model.network.schemes import SCHEMES, Scheme


class Mlp(nn.Module):
    """Two linears with exact GELU between."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))  # type: ignore[no-any-return] # nn.Module calls are untyped


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): in training, drops a residual branch per clip.

    Processes that share a batch draw for all its clips, from the same random state, what one alone
    would: `clips` is how many it has, `rows` which of them are here. None where all are.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.clips = 0
        self.rows: Tensor | None = None

    def forward(self, branches: int, like: Tensor) -> Tensor | None:
        """Draws which of so many branches are kept for each clip of `like` (clips, ...).

        Returns:
            Factors (branches, clips) of the dtype of `like`: 0 drops, the others scale up what is
            kept. None keeps all as they are.
        """
        if not self.training or self.rate == 0:
            return None
        if self.rows is None:
            keep = like.new_empty(branches, len(like)).bernoulli_(1 - self.rate)
        else:
            parts = len(like) // len(self.rows)  # space-only attends to each frame of a clip alone
            drawn = like.new_empty(branches, self.clips, parts).bernoulli_(1 - self.rate)
            keep = drawn[:, self.rows].flatten(1)
        return keep.div_(1 - self.rate)


def _scaled(update: Tensor, keep: Tensor | None, branch: int) -> Tensor:
    if keep is None:
        return update
    return update * keep[branch].to(update.dtype).reshape(-1, *[1] * (update.ndim - 1))


class Block(nn.Module):
    """The scheme's attentions in turn, then the MLP; every one of them a residual branch."""

    def __init__(self, config: ModelConfig, scheme: Scheme, drop_path_rate: float) -> None:
        super().__init__()
        dim = config.embed_dim
        self.grouping = scheme.main
        self.before = nn.ModuleDict(
            {
                name: PatchAttention(dim, config.num_heads, grouping)
                for name, grouping in scheme.before.items()
            }
        )
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, config.num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, config.mlp_dim)
        self.drop_path = DropPath(drop_path_rate)

    def draw(self, cls: Tensor) -> Tensor | None:
        """What `forward` keeps of clips like `cls`: factors (branches, clips), or None for all."""
        return self.drop_path(len(self.before) + 2, cls)  # type: ignore[no-any-return] # as above

    def forward(
        self, cls: Tensor, patches: Tensor, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One block; `keep` is what `draw` gave."""
        for number, attention in enumerate(self.before.values()):
            patches = patches + _scaled(attention(patches), keep, number)
        cls_update, patch_update = attend_with_class_token(
            self.attn, self.grouping, self.norm1(cls), self.norm1(patches)
        )
        cls = cls + _scaled(cls_update, keep, -2)
        patches = patches + _scaled(patch_update, keep, -2)
        cls_update, patch_update = self.mlp(self.norm2(cls)), self.mlp(self.norm2(patches))
        return cls + _scaled(cls_update, keep, -1), patches + _scaled(patch_update, keep, -1)


class PatchEmbed(nn.Module):
    """Linear projection of square, non-overlapping patches."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """(images, 3, height, width) -> (images, grid, grid, dim)."""
        return self.proj(images).permute(0, 2, 3, 1)  # type: ignore[no-any-return] # as above


class TimeSformer(nn.Module):
    """The network of one `ModelConfig`.

    Weights start as the paper's: truncated normal of std 0.02, biases, time embedding and the
    linears after the extra attentions zero.

    `recompute`: training keeps the input of each block alone, and computes what is inside once more
    for its gradients: less memory for a third more time, and the same gradients.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        scheme = SCHEMES[config.attention_type]
        dim, depth = config.embed_dim, config.depth
        self.patch_embed = PatchEmbed(config.patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid**2, dim))
        if config.attention_type != "space_only":
            self.time_embed = nn.Parameter(torch.zeros(1, config.num_frames, dim))
        rates = [config.drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(config, scheme, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, config.num_classes)
        # Derived from the config, so never part of the weights.
        self.register_buffer("mean", torch.tensor(config.preprocessing.mean), persistent=False)
        self.register_buffer("std", torch.tensor(config.preprocessing.std), persistent=False)
        self._initialise()

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Classifies clips.

        Args:
            frames: uint8 (batch, time, height, width, 3), RGB, of the config's size.

        Returns:
            Logits (batch, classes), and the embedding they are computed from (batch, dim): the
            class token after the final LayerNorm.
        """
        cls, patches = self._embed(frames)
        for block in cast(Iterable[Block], self.blocks):
            # Here and not in the block, which draws other numbers when it is computed once more:
            # `torch.compile` does not keep the random state for that.
            keep = block.draw(cls)
            if self.recompute and self.training:
                cls, patches = checkpoint(block, cls, patches, keep, use_reentrant=False)
            else:
                cls, patches = block(cls, patches, keep)
        if self.config.attention_type == "space_only":
            cls = cls.reshape(-1, self.config.num_frames, cls.shape[-1]).mean(dim=1, keepdim=True)
        embedding = self.norm(cls)[:, 0]
        return self.head(embedding), embedding

    def _embed(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Frames to the class token (clips, 1, dim) and patches (clips, time, grid, grid, dim).

        For space-only attention every frame is a clip of its own.
        """
        config = self.config
        expected = (config.num_frames, config.image_size, config.image_size, 3)
        if tuple(frames.shape[1:]) != expected or frames.dtype != torch.uint8:
            raise ValueError(
                f"frames are {frames.dtype} {tuple(frames.shape)}; "
                f"this model takes uint8 (batch, {', '.join(map(str, expected))})"
            )
        normalised = (frames.to(self.mean.dtype) / 255 - self.mean) / self.std
        patches = self.patch_embed(normalised.flatten(0, 1).permute(0, 3, 1, 2))
        patches = patches + self.pos_embed[:, 1:].reshape(1, *patches.shape[1:])
        if config.attention_type == "space_only":
            patches = patches[:, None]
        else:
            patches = patches.reshape(-1, config.num_frames, *patches.shape[1:])
            patches = patches + self.time_embed[:, :, None, None]
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(patches.shape[0], -1, -1)
        return cls, patches

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, PatchAttention):
                nn.init.zeros_(module.fc.weight)
