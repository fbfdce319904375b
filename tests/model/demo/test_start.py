"""The demo network starts able to see motion, before it has learned anything."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from model.config import VARIANTS  # noqa: E402
from model.demo.start import start_as_motion_energy  # noqa: E402
from model.timesformer import TimeSformer  # noqa: E402


def test_the_first_attention_starts_by_looking_at_the_next_frame() -> None:
    torch.manual_seed(0)
    network = TimeSformer(VARIANTS["demo"])
    clips = torch.randint(0, 256, (2, 8, *[network.config.image_size] * 2, 3), dtype=torch.uint8)
    start_as_motion_energy(network, clips)
    temporal = network.blocks[0].before["temporal"]
    with torch.no_grad():
        patches = network._embed(clips)[1]
        groups = temporal.grouping.split(temporal.norm(patches)).flatten(0, 1)
        query, key, _ = temporal.attn.qkv(groups).chunk(3, dim=-1)
        width = network.config.head_dim
        weights = query[..., :width] @ key[..., :width].mT / width**0.5
    share = weights.softmax(-1).mean(0)
    asked = torch.arange(8).add(1).clamp(max=7)
    assert share[torch.arange(8), asked].min() > 0.9


def test_later_heads_start_by_looking_at_one_side_each() -> None:
    torch.manual_seed(0)
    network = TimeSformer(VARIANTS["demo"])
    grid, width = network.config.grid, network.config.head_dim
    clips = torch.randint(0, 256, (2, 8, *[network.config.image_size] * 2, 3), dtype=torch.uint8)
    start_as_motion_energy(network, clips)
    with torch.no_grad():
        cls, patches = network.blocks[0](*network._embed(clips))
        block = network.blocks[1]
        query = block.attn.qkv(block.norm1(cls)).chunk(3, dim=-1)[0][:, None, None]
        key = block.attn.qkv(block.norm1(patches)).chunk(3, dim=-1)[1]
        logits = (query * key).unflatten(-1, (-1, width)).sum(-1) / width**0.5
    share = logits.flatten(2, 3).softmax(2).mean((0, 1)).unflatten(0, (grid, grid))
    bottom, top, right, left = share[..., :4].unbind(-1)
    half = grid // 2
    assert bottom[half:].sum() > 0.7
    assert top[:half].sum() > 0.7
    assert right[:, half:].sum() > 0.7
    assert left[:, :half].sum() > 0.7
