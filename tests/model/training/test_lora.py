"""Adapters change nothing at first, are all that is trained, and vanish into the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from model.checkpoints import load_checkpoint
from model.config import ATTENTION_TYPES, VARIANTS
from model.network.timesformer import TimeSformer
from model.training import checkpoint
from model.training.errors import RecipeError
from model.training.lora import adapt, is_adapter, merged
from model.training.optimisation import freeze
from model.training.trainer import CHECKPOINTS, WEIGHTS
from tests.model.conftest import random_frames, random_model, tiny_config
from tests.model.training.test_loop import first_model, run


def adapted(model: TimeSformer) -> TimeSformer:
    """With adapters that have learned something."""
    adapt(model, rank=3, alpha=6, seed=0)
    for name, weight in model.named_parameters():
        if is_adapter(name):
            nn.init.normal_(weight, std=0.1)
    return model


def test_at_first_the_network_is_as_it_was() -> None:
    config = tiny_config(depth=2)
    model, frames = random_model(config), random_frames(config)
    with torch.inference_mode():
        before = model(frames)[0]
        adapt(model, rank=3, alpha=6, seed=0)
        assert torch.equal(model(frames)[0], before)


@pytest.mark.parametrize("scheme", ATTENTION_TYPES)
def test_merged_it_is_a_plain_network_of_the_same_logits(scheme: str) -> None:
    config = tiny_config(attention_type=scheme, depth=2)
    frames, plain, model = random_frames(config), TimeSformer(config).eval(), random_model(config)
    with torch.no_grad():
        before = model(frames)[0]
        expected = adapted(model)(frames)[0]
        plain.load_state_dict(merged(model.state_dict(), rank=3, alpha=6))
        torch.testing.assert_close(plain(frames)[0], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, expected, rtol=1e-2)


def test_the_weights_are_added_in_float64_and_rounded_once() -> None:
    model = adapted(random_model(tiny_config()))
    state = model.state_dict()
    up, down, weight = (
        state[f"blocks.0.attn.qkv.{name}"].double()
        for name in ("adapter_up", "adapter_down", "weight")
    )
    exact = (weight + 2 * up @ down).float()
    assert torch.equal(merged(state, rank=3, alpha=6)["blocks.0.attn.qkv.weight"], exact)


def test_adapters_and_head_are_trained_and_few() -> None:
    """Of `base` less than a fiftieth."""
    with torch.device("meta"):
        base = TimeSformer(VARIANTS["base"])
    total, (dim, hidden) = sum(weight.numel() for weight in base.parameters()), (768, 3072)
    adapt(base, rank=8, alpha=16, seed=0)
    freeze(base, "lora")
    trained = sum(weight.numel() for weight in base.parameters() if weight.requires_grad)
    attention, mlp, fc = 4 * dim + 2 * dim, 2 * (dim + hidden), 2 * dim
    assert trained == 12 * 8 * (2 * attention + mlp + fc) + base.head.weight.numel() + 400
    assert trained < total / 50


def test_what_is_frozen_does_not_move_and_what_is_written_is_merged(
    colours: Path, tmp_path: Path
) -> None:
    run(colours, tmp_path, train="lora", lora_rank=2)
    found = checkpoint.load_newest(tmp_path / CHECKPOINTS)
    assert found is not None
    first, after = first_model().state_dict(), found[1]["model"]
    moved = {name for name in first if not torch.equal(first[name], after[name])}
    assert moved == {"head.weight", "head.bias"}
    assert all(bool(value.any()) for name, value in after.items() if is_adapter(name))

    written = load_checkpoint(tmp_path / WEIGHTS).state
    expected = merged({**after, **found[1]["average"]["weights"]}, rank=2, alpha=16)
    assert written.keys() == first.keys()
    for name, value in written.items():
        assert torch.equal(value, expected[name]), name
    assert not torch.equal(written["blocks.0.mlp.fc1.weight"], first["blocks.0.mlp.fc1.weight"])


def test_a_rank_that_saves_nothing_is_refused() -> None:
    model = random_model(tiny_config())
    with pytest.raises(RecipeError, match="need a rank below"):
        adapt(model, rank=model.config.embed_dim // 2, alpha=16, seed=0)
