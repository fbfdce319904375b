"""The network that is exported: the trained one's answers, by fewer and larger products.

`rewrite(model)` turns a `TimeSformer` into an `InferenceTimeSformer` and applies `REWRITES`, each
of them an identity on the answers. Weights are folded in float64 and rounded to float32 once, at
the end. docs/export.md has what they save; tests/export/graph/test_rewrite.py compares each one,
and all together, with the original network, for every scheme.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model.network.attention import Attention, PatchAttention
from model.network.schemes import Grouping
from model.network.timesformer import Block, TimeSformer


class Normalise(nn.Module):
    """Pixels 0..255, channels last, to what the patch projection was trained on."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels / 255 - self.mean) / self.std


class SequenceAttention(nn.Module):
    """Multi-head self-attention up to, not including, its output linear `out`.

    Query, key and value are linears of their own, so that each can lose its bias.
    (batch, groups, tokens, dim) -> the same shape; tokens attend within their group.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        weights, biases = attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3)
        self.query, self.key, self.value = map(_linear, weights, biases)
        self.out = attention.proj
        self.num_heads = attention.num_heads
        self.scale = (attention.proj.in_features // attention.num_heads) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        # PyTorch makes a product a group of tokens that lie in another order; a graph has no order.
        x = x.contiguous()
        query, key, value = (
            self._heads(linear(x)) for linear in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(-1, -2)
        if self.scale != 1:
            scores = scores * self.scale
        mixed = scores.softmax(dim=-1) @ value
        return mixed.transpose(1, 2).reshape(-1, *x.shape[1:])

    def _heads(self, x: Tensor) -> Tensor:
        """(batch, groups, tokens, dim) -> (batch x groups, heads, tokens, dim of a head): products
        of more than four axes are not taken by every engine."""
        return x.reshape(-1, x.shape[2], self.num_heads, x.shape[3] // self.num_heads).transpose(
            1, 2
        )


class GroupAttention(nn.Module):
    """An attention of `Scheme.before`: (batch, time, height, width, dim) -> what is added to it."""

    def __init__(self, attention: PatchAttention) -> None:
        super().__init__()
        self.grouping = attention.grouping
        self.norm = attention.norm
        self.attention = SequenceAttention(attention.attn)
        self.fc: nn.Module = attention.fc

    def forward(self, patches: Tensor) -> Tensor:
        groups = self.grouping.split(self.norm(patches))
        update = self.fc(self.attention.out(self.attention(groups)))
        return self.grouping.join(update, patches.shape)


class MainAttention(nn.Module):
    """Attention within groups that each hold a copy of the class token, of tokens in one row.

    The copies are averaged before the output linear instead of after it, so that the linear sees
    every token once. (batch, 1 + patches, dim) -> the same shape, class token first.
    """

    def __init__(self, attention: Attention, grouping: Grouping, clip: tuple[int, ...]) -> None:
        super().__init__()
        self.attention = SequenceAttention(attention)
        self.grouping = grouping
        self.clip = clip

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.attention(self.groups(x))
        patches = self.grouping.join(mixed[:, :, 1:], torch.Size((-1, *self.clip, x.shape[-1])))
        tokens = torch.cat([mixed[:, :, 0].mean(dim=1, keepdim=True), patches.flatten(1, 3)], dim=1)
        return self.attention.out(tokens)  # type: ignore[no-any-return] # nn.Module calls are untyped

    def groups(self, x: Tensor) -> Tensor:
        """(batch, 1 + patches, dim) -> (batch, groups, 1 + tokens, dim)."""
        groups = self.grouping.split(x[:, 1:].reshape(-1, *self.clip, x.shape[-1]))
        copies = x[:, :1, None].transpose(1, 2).expand(-1, groups.shape[1], -1, -1)
        return torch.cat([copies, groups], dim=2)


class ClassTokenAttention(nn.Module):
    """What is left of a `MainAttention` when only the class token's answer is wanted.

    A score is q . (Wk x) = (Wk' q) . x, and the weighted sum of the values is Wv applied to the
    weighted sum of the tokens: keys and values, two linears over every token, are never computed.
    The key's bias adds the same to all scores of a query, which a softmax does not see.
    (batch, 1 + patches, dim) -> (batch, 1, dim).
    """

    key: Tensor
    value: Tensor

    def __init__(self, main: MainAttention) -> None:
        super().__init__()
        attention = main.attention
        heads, dim = attention.num_heads, attention.out.in_features
        self.groups = main.groups
        self.num_heads = heads
        self.query, self.out, self.scale = attention.query, attention.out, attention.scale
        by_head = (heads, dim // heads, dim)
        self.register_buffer("key", attention.key.weight.detach().reshape(by_head))
        values = attention.value.weight.detach().reshape(by_head).transpose(1, 2).contiguous()
        self.register_buffer("value", values)
        self.value_bias = attention.value.bias

    def forward(self, x: Tensor) -> Tensor:
        dim = x.shape[-1]
        query = self.query(x[:, :1]).reshape(-1, self.num_heads, 1, dim // self.num_heads)
        asked = (query @ self.key).reshape(-1, 1, self.num_heads, dim)
        tokens = self.groups(x)
        scores = asked @ tokens.transpose(-1, -2)
        if self.scale != 1:
            scores = scores * self.scale
        pooled = (scores.softmax(dim=-1) @ tokens).mean(dim=1)
        mixed = (pooled[:, :, None] @ self.value).reshape(-1, 1, dim)
        if self.value_bias is not None:
            mixed = mixed + self.value_bias
        return self.out(mixed)  # type: ignore[no-any-return] # as above


class InferenceBlock(nn.Module):
    """A block on tokens in one row: (batch, 1 + patches, dim) -> the same shape."""

    def __init__(self, block: Block, clip: tuple[int, ...]) -> None:
        super().__init__()
        self.clip = clip
        self.before = nn.ModuleList(
            GroupAttention(attention)
            for attention in block.before.values()
            if isinstance(attention, PatchAttention)
        )
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.main: MainAttention | ClassTokenAttention = MainAttention(
            block.attn, block.grouping, clip
        )
        self.mlp = block.mlp

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            patches = x[:, 1:].reshape(-1, *self.clip, x.shape[-1])
            for attention in self.before:
                patches = patches + attention(patches)
            x = torch.cat([x[:, :1], patches.flatten(1, 3)], dim=1)
        update = self.main(self.norm1(x))
        x = x[:, : update.shape[1]] + update
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return] # as above


class InferenceTimeSformer(nn.Module):
    """The layers of a `TimeSformer`, laid out for inference; shares its weights.

    By itself an identity already: one row of tokens instead of class token and patches apart, and
    a patch projection that is a plain product.
    """

    cls: Tensor
    positions: Tensor
    times: Tensor

    def __init__(self, model: TimeSformer) -> None:
        super().__init__()
        config = self.config = model.config
        self.alone = config.attention_type == "space_only"  # every frame a clip of its own
        clip = (1 if self.alone else config.num_frames, config.grid, config.grid)
        self.pixels: nn.Module = Normalise(model.mean, model.std)
        projection = model.patch_embed.proj
        # Within a patch: row, column, channel, as the pixels of a frame lie.
        by_pixel = projection.weight.detach().permute(0, 2, 3, 1).flatten(1)
        self.patch_embed = _linear(by_pixel, projection.bias)
        position = model.pos_embed.detach()
        self.register_buffer("cls", model.cls_token.detach() + position[:, :1])
        self.register_buffer("positions", position[:, None, 1:].clone())
        if not self.alone:
            self.register_buffer("times", model.time_embed.detach()[:, :, None])
        self.blocks = nn.ModuleList(
            InferenceBlock(block, clip) for block in model.blocks if isinstance(block, Block)
        )
        self.norm, self.head = model.norm, model.head

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Clips to logits and embedding, as `TimeSformer.forward` describes."""
        x = self._embed(frames)
        for block in self.blocks:
            x = block(x)
        cls = x[:, 0]
        if self.alone:
            cls = cls.reshape(-1, self.config.num_frames, cls.shape[-1]).mean(dim=1)
        embedding = self.norm(cls)
        return self.head(embedding), embedding

    def _embed(self, frames: Tensor) -> Tensor:
        """Frames to tokens (clips, 1 + patches, dim)."""
        config = self.config
        grid, side = config.grid, config.patch_size
        # Cast before anything is moved: TensorRT transposes no uint8.
        pixels = self.pixels(frames.to(self.cls.dtype))
        patches = pixels.reshape(-1, config.num_frames, grid, side, grid, side, 3)
        patches = patches.transpose(3, 4).reshape(-1, config.num_frames, grid**2, side**2 * 3)
        x = self.patch_embed(patches) + self.positions
        x = x.flatten(0, 1) if self.alone else (x + self.times).flatten(1, 2)
        return torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1)


def fold_normalisation(network: InferenceTimeSformer) -> None:
    """W((x / 255 - mean) / std) + b: one scale a channel for W, and a constant for b."""
    pixels, linear = network.pixels, network.patch_embed
    if not isinstance(pixels, Normalise):
        raise ValueError("the normalisation has been folded already")
    weight = linear.weight.reshape(linear.out_features, -1, 3) / pixels.std
    bias = linear.bias - (weight * pixels.mean).sum(dim=(1, 2))
    network.patch_embed = _linear(weight.flatten(1) / 255, bias)
    network.pixels = nn.Identity()


def fold_norms(network: InferenceTimeSformer) -> None:
    """W(g * n + b) = (W g) n + W b: the LayerNorms of the blocks keep no weights of their own.

    The final one keeps its: what comes out of it is the embedding.
    """
    for block in _blocks(network):
        for before in _before(block):
            before.norm = _fold_norm(before.norm, _inputs(before.attention))
        block.norm1 = _fold_norm(block.norm1, _inputs(_main(block).attention))
        block.norm2 = _fold_norm(block.norm2, [block.mlp.fc1])


def fold_scale(network: InferenceTimeSformer) -> None:
    """Scores are divided by the root of the head's size: so are the query's weights, once."""
    for attention in _attentions(network):
        attention.query.weight.mul_(attention.scale)
        attention.query.bias.mul_(attention.scale)
        attention.scale = 1.0


def drop_key_bias(network: InferenceTimeSformer) -> None:
    """q . (k + b) adds the same q . b to all scores of a query: a softmax does not see it."""
    for attention in _attentions(network):
        attention.key = _linear(attention.key.weight, None)


def move_value_bias(network: InferenceTimeSformer) -> None:
    """Attention weights sum to one, so a bias of the values goes through to the output linear."""
    for attention in _attentions(network):
        out, value = attention.out, attention.value
        attention.out = _linear(out.weight, out.bias + out.weight @ value.bias)
        attention.value = _linear(value.weight, None)


def merge_projections(network: InferenceTimeSformer) -> None:
    """An attention before the main one ends in two linears in a row: they become one."""
    for block in _blocks(network):
        for before in _before(block):
            first, second = before.attention.out, before.fc
            if not isinstance(second, nn.Linear):
                raise ValueError("the projections have been merged already")
            bias = second.weight @ first.bias + second.bias
            before.attention.out = _linear(second.weight @ first.weight, bias)
            before.fc = nn.Identity()


def shorten_last_block(network: InferenceTimeSformer) -> None:
    """Nothing looks at the last block's patches: only its class token goes on."""
    last = _blocks(network)[-1]
    last.main = ClassTokenAttention(_main(last))


# In this order: what a norm adds to a bias must be there when the bias is dropped or moved.
REWRITES: tuple[Callable[[InferenceTimeSformer], None], ...] = (
    fold_normalisation,
    fold_norms,
    fold_scale,
    drop_key_bias,
    move_value_bias,
    merge_projections,
    shorten_last_block,
)


def rewrite(
    model: TimeSformer, rewrites: Iterable[Callable[[InferenceTimeSformer], None]] = REWRITES
) -> InferenceTimeSformer:
    """The network to export, float32, in eval mode; `model` stays as it is."""
    with torch.no_grad():
        network = InferenceTimeSformer(copy.deepcopy(model).double())
        for apply in rewrites:
            apply(network)
    return network.float().eval().requires_grad_(False)


def multiply_adds(network: InferenceTimeSformer) -> int:
    """Of one clip, counted as `model.network.cost` counts; only shapes are run."""
    config = network.config
    shape = (1, config.num_frames, config.image_size, config.image_size, 3)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        copy.deepcopy(network).to("meta")(torch.zeros(shape, dtype=torch.uint8, device="meta"))
    return counter.get_total_flops() // 2


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def _fold_norm(norm: nn.LayerNorm, linears: Iterable[nn.Linear]) -> nn.LayerNorm:
    """Moves the norm's weights into the linears that read it; gives the norm without them."""
    for linear in linears:
        linear.bias = nn.Parameter(linear.bias + linear.weight @ norm.bias, requires_grad=False)
        linear.weight = nn.Parameter(linear.weight * norm.weight, requires_grad=False)
    return nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False)


def _inputs(attention: SequenceAttention) -> list[nn.Linear]:
    return [attention.query, attention.key, attention.value]


def _blocks(network: InferenceTimeSformer) -> list[InferenceBlock]:
    return [block for block in network.blocks if isinstance(block, InferenceBlock)]


def _before(block: InferenceBlock) -> list[GroupAttention]:
    return [before for before in block.before if isinstance(before, GroupAttention)]


def _main(block: InferenceBlock) -> MainAttention:
    if not isinstance(block.main, MainAttention):
        raise ValueError("the last block has been shortened already")
    return block.main


def _attentions(network: InferenceTimeSformer) -> list[SequenceAttention]:
    return [
        attention
        for block in _blocks(network)
        for attention in (*(before.attention for before in _before(block)), _main(block).attention)
    ]
