"""What a model costs, counted from its configuration alone: no torch, no weights, no measuring."""

from __future__ import annotations

from dataclasses import dataclass

from model.config import ModelConfig
from model.network.schemes import SCHEMES, Grouping

_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Cost:
    """The cost of one view, that is, of one clip through the network.

    Attributes:
        parameters: learned numbers.
        multiply_adds: of the linear layers, the patch projection, and both products of every
            attention (queries with keys, weights with values). The papers of the field count so
            and call it FLOPs; additions, norms, softmax and GELU are left out.
        activation_bytes: the most that float32 activations hold at one time in eager inference,
            without weights, the uint8 input and scratch space inside a kernel (attention is
            computed without keeping its weights). It is the largest of three moments: the input's
            normalisation, the last linear of a block's main attention, and the MLP's GELU. What is
            alive then was found by measuring; the test holds it to 15 %.
    """

    parameters: int
    multiply_adds: int
    activation_bytes: int


def cost(config: ModelConfig) -> Cost:
    """Counts one view of the model that is configured."""
    return Cost(_parameters(config), _multiply_adds(config), _activation_bytes(config))


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _parameters(config: ModelConfig) -> int:
    dim = config.embed_dim
    norm = 2 * dim
    attention = _linear(dim, 3 * dim) + _linear(dim, dim)
    mlp = _linear(dim, config.mlp_dim) + _linear(config.mlp_dim, dim)
    extra = len(SCHEMES[config.attention_type].before) * (norm + attention + _linear(dim, dim))
    blocks = config.depth * (extra + norm + attention + norm + mlp)
    timeless = config.attention_type == "space_only"
    positions = 1 + config.grid**2 + (0 if timeless else config.num_frames)
    embedding = _linear(3 * config.patch_size**2, dim) + dim * (1 + positions)
    return embedding + blocks + norm + _linear(dim, config.num_classes)


def _multiply_adds(config: ModelConfig) -> int:
    dim, patches = config.embed_dim, _patches(config)
    scheme = SCHEMES[config.attention_type]
    block = 2 * dim * config.mlp_dim * (patches + _class_tokens(config))
    for grouping in scheme.before.values():
        groups, tokens = _groups(config, grouping)
        block += _attention(dim, groups, tokens) + patches * dim**2
    groups, tokens = _groups(config, scheme.main)
    block += _attention(dim, groups, tokens + 1)
    embedding = patches * 3 * config.patch_size**2 * dim
    return embedding + config.depth * block + dim * config.num_classes


def _attention(dim: int, sequences: int, tokens: int) -> int:
    """Query, key, value and output linears, and the two products of `tokens` with `tokens`."""
    return sequences * (4 * tokens * dim**2 + 2 * tokens**2 * dim)


def _activation_bytes(config: ModelConfig) -> int:
    scheme = SCHEMES[config.attention_type]
    groups, tokens = _groups(config, scheme.main)
    patches = _patches(config) * config.embed_dim
    sequences = groups * (tokens + 1) * config.embed_dim
    pixels = config.num_frames * config.image_size**2 * 3
    # Two copies of the input; or one, and the patches before and after an embedding is added.
    normalising = max(2 * pixels, pixels + 2 * patches)
    # The residual stream at the block's input and, if there was an earlier attention, now; the
    # normalised patches and their groups; as sequences with class tokens: themselves, query, key,
    # value, mixed values and output.
    attending = patches * ((2 if scheme.before else 1) + 2) + 6 * sequences
    # The residual stream at the block's input and now, the last update, the normalised patches; and
    # GELU's input and output.
    gelu = patches * 4 + 2 * _patches(config) * config.mlp_dim
    return _FLOAT32_BYTES * max(normalising, attending, gelu)


def _patches(config: ModelConfig) -> int:
    return config.num_frames * config.grid**2


def _class_tokens(config: ModelConfig) -> int:
    """Space-only attention takes every frame alone, with a class token of its own."""
    return config.num_frames if config.attention_type == "space_only" else 1


def _groups(config: ModelConfig, grouping: Grouping) -> tuple[int, int]:
    """Number of groups in a clip, and tokens in each."""
    return grouping.counts(config.num_frames, config.grid, config.grid)
