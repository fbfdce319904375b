"""The demo network starts able to see motion, before it has learned anything."""

from __future__ import annotations

import pytest
import torch

from model.config import VARIANTS
from model.demo.start import start_as_motion_energy
from model.network.timesformer import TimeSformer


def network_that_starts(scheme: str) -> tuple[TimeSformer, torch.Tensor]:
    torch.manual_seed(0)
    network = TimeSformer(VARIANTS["demo"].replace(attention_type=scheme))
    clips = torch.randint(0, 256, (2, 8, *[network.config.image_size] * 2, 3), dtype=torch.uint8)
    start_as_motion_energy(network, clips)
    return network, clips


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        ("divided_space_time", "temporal"),
        ("axial", "temporal"),
        ("sparse_local_global", "local"),
        ("joint_space_time", None),
    ],
)
def test_the_first_attention_over_time_starts_by_looking_at_the_next_frame(
    scheme: str, name: str | None
) -> None:
    network, clips = network_that_starts(scheme)
    block = network.blocks[0]
    before = block.before[name] if name else None
    attention, grouping, norm = (
        (before.attn, before.grouping, before.norm)
        if before
        else (block.attn, block.grouping, block.norm1)
    )
    with torch.no_grad():
        patches = network._embed(clips)[1]
        groups = grouping.split(norm(patches)).flatten(0, 1)
        query, key, _ = attention.qkv(groups).chunk(3, dim=-1)
        width = network.config.head_dim
        share = (query[..., :width] @ key[..., :width].mT / width**0.5).softmax(-1).mean(0)
    places = len(share) // 8  # tokens are in the order of time, then place
    token = torch.arange(len(share))
    asked = torch.where(token < 7 * places, token + places, token)
    assert share[token, asked].mean() > 0.8


def test_space_only_attention_starts_with_the_filters_alone() -> None:
    network, clips = network_that_starts("space_only")
    assert torch.isfinite(network(clips)[0]).all()


def test_later_heads_start_by_looking_at_one_side_each() -> None:
    network, clips = network_that_starts("divided_space_time")
    grid, width = network.config.grid, network.config.head_dim
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
