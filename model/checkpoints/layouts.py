"""How each family of files names our tensors. Facts only; reading is in `files.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from model.config import AttentionType


@dataclass(frozen=True)
class Layout:
    """One family's names, without `.weight` and `.bias`: by our name, theirs.

    `top` are the tensors outside the blocks, `inner` those inside (where it is silent the names
    are the same), and `block` is the prefix of block number {}.
    """

    top: Mapping[str, str]
    block: str
    inner: Mapping[str, str]

    def name(self, ours: str) -> str:
        """The family's name of the tensor that we call `ours`."""
        if ours in self.top:
            return self.top[ours]
        stem, leaf = ours.rsplit(".", 1)
        if stem in self.top:
            return f"{self.top[stem]}.{leaf}"
        _, index, inner = stem.split(".", 2)
        return f"{self.block.format(index)}.{self.inner.get(inner, inner)}.{leaf}"


def _same_top(prefix: str) -> dict[str, str]:
    names = ("cls_token", "pos_embed", "time_embed", "patch_embed.proj", "norm", "head")
    return {name: prefix + name for name in names}


# timm names an image ViT as we name a space-only model: what they share, we call the same.
OURS = Layout(_same_top(""), "blocks.{}", {})

_OFFICIAL_INNER = {
    "before.temporal.norm": "temporal_norm1",
    "before.temporal.attn.qkv": "temporal_attn.qkv",
    "before.temporal.attn.proj": "temporal_attn.proj",
    "before.temporal.fc": "temporal_fc",
}
OFFICIAL = Layout(_same_top("model."), "model.blocks.{}", _OFFICIAL_INNER)
# Files passed on by third parties have often lost the wrapper's prefix.
OFFICIAL_BARE = Layout(_same_top(""), "blocks.{}", _OFFICIAL_INNER)


def _huggingface(prefix: str) -> Layout:
    return Layout(
        top={
            "cls_token": f"{prefix}embeddings.cls_token",
            "pos_embed": f"{prefix}embeddings.position_embeddings",
            "time_embed": f"{prefix}embeddings.time_embeddings",
            "patch_embed.proj": f"{prefix}embeddings.patch_embeddings.projection",
            "norm": f"{prefix}layernorm",
            "head": "classifier",
        },
        block=f"{prefix}encoder.layer.{{}}",
        inner={
            "before.temporal.norm": "temporal_layernorm",
            "before.temporal.attn.qkv": "temporal_attention.attention.qkv",
            "before.temporal.attn.proj": "temporal_attention.output.dense",
            "before.temporal.fc": "temporal_dense",
            "norm1": "layernorm_before",
            "attn.qkv": "attention.attention.qkv",
            "attn.proj": "attention.output.dense",
            "norm2": "layernorm_after",
            "mlp.fc1": "intermediate.dense",
            "mlp.fc2": "output.dense",
        },
    )


HUGGINGFACE = _huggingface("timesformer.")
# Image ViTs, as saved with a classifier and without. Their separate query, key and value are
# joined to `qkv` on reading.
HUGGINGFACE_VIT = _huggingface("vit.")
HUGGINGFACE_VIT_BARE = _huggingface("")

# The schemes that the official and the Hugging Face implementation have, and so can name.
PUBLISHED_SCHEMES: tuple[AttentionType, ...] = (
    "divided_space_time",
    "joint_space_time",
    "space_only",
)
