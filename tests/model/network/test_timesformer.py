from __future__ import annotations

from typing import cast

import pytest
import torch

from model.config import ATTENTION_TYPES
from model.network.timesformer import Block, DropPath, TimeSformer
from tests.model.conftest import random_frames, random_model, tiny_config


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_logits_and_the_embedding_they_come_from(attention_type: str) -> None:
    config = tiny_config(attention_type)
    model = random_model(config)
    with torch.no_grad():
        logits, embedding = model(random_frames(config, batch=3))
        assert logits.shape == (3, 5)
        assert embedding.shape == (3, 24)
        torch.testing.assert_close(model.head(embedding), logits)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_clips_of_a_batch_do_not_touch_each_other(attention_type: str) -> None:
    config = tiny_config(attention_type)
    model, frames = random_model(config), random_frames(config, batch=3)
    with torch.no_grad():
        together = model(frames)[0]
        alone = torch.cat([model(clip[None])[0] for clip in frames])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_only_space_only_attention_is_blind_to_the_order_of_frames(attention_type: str) -> None:
    config = tiny_config(attention_type)
    model, frames = random_model(config), random_frames(config)
    with torch.no_grad():
        difference = (model(frames)[0] - model(frames.flip(1))[0]).abs().max()
    assert (difference < 1e-5) == (attention_type == "space_only")


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_every_weight_matters(attention_type: str) -> None:
    config = tiny_config(attention_type)
    model = random_model(config)
    model(random_frames(config))[0].square().sum().backward()
    silent = [
        name
        for name, weight in model.named_parameters()
        if weight.grad is None or not weight.grad.any()
    ]
    assert silent == []


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_a_new_model_is_the_image_model_of_its_scheme(attention_type: str) -> None:
    """The further attentions and the time embedding start without effect."""
    model = TimeSformer(tiny_config(attention_type)).eval()
    frames = random_frames(model.config)
    with torch.no_grad():
        before = model(frames)[0]
        for name, weight in model.named_parameters():
            if ".before." in name and ".fc." not in name:
                weight.normal_()
        torch.testing.assert_close(model(frames)[0], before)
    if attention_type != "space_only":
        assert not model.time_embed.any()


def test_normalisation_is_part_of_the_network() -> None:
    config = tiny_config()
    model = random_model(config)
    shifted = random_model(config.replace(mean=[0.1, 0.2, 0.3]))
    frames = random_frames(config)
    with torch.no_grad():
        assert not torch.allclose(model(frames)[0], shifted(frames)[0], atol=1e-4)
    assert not {"mean", "std"} & model.state_dict().keys()


@pytest.mark.parametrize(
    "frames",
    [
        torch.zeros(1, 3, 32, 32, 3, dtype=torch.uint8),
        torch.zeros(1, 4, 40, 32, 3, dtype=torch.uint8),
        torch.zeros(1, 4, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(4, 32, 32, 3, dtype=torch.uint8),
        torch.zeros(1, 4, 32, 32, 3),
    ],
    ids=["frames", "size", "channels first", "no batch", "float"],
)
def test_frames_of_another_shape_or_type_are_refused(frames: torch.Tensor) -> None:
    model = TimeSformer(tiny_config())
    with pytest.raises(ValueError, match=r"this model takes uint8 \(batch, 4, 32, 32, 3\)"):
        model(frames)


def test_stochastic_depth_works_in_training_only() -> None:
    config = tiny_config(drop_path_rate=0.9, depth=4)
    model, frames = random_model(config), random_frames(config)
    with torch.no_grad():
        assert torch.equal(model(frames)[0], model(frames)[0])
        model.train()
        torch.manual_seed(0)
        assert not torch.equal(model(frames)[0], model(frames)[0])


def test_stochastic_depth_rises_linearly() -> None:
    model = TimeSformer(tiny_config(drop_path_rate=0.3, depth=4))
    rates = [block.drop_path.rate for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_branches_are_dropped_per_clip_and_the_kept_ones_scaled_up() -> None:
    torch.manual_seed(0)
    keep = DropPath(0.25).train()(3, torch.ones(4000, 1, 8))
    assert keep is not None
    assert keep.shape == (3, 4000)
    assert keep.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert keep.mean().item() == pytest.approx(1.0, abs=0.05)
    assert not torch.equal(keep[0], keep[1])


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_a_dropped_branch_adds_nothing_to_its_clip(attention_type: str) -> None:
    config = tiny_config(attention_type)
    model = random_model(config)
    block = cast(Block, model.blocks[0])
    with torch.no_grad():
        before = model._embed(random_frames(config))
        after = block(*before)
        keep = torch.ones(len(block.before) + 2, len(before[0]))
        keep[:, 0] = 0
        for tensor, whole, kept in zip(before, after, block(*before, keep), strict=True):
            assert torch.equal(kept[0], tensor[0])
            assert torch.equal(kept[1:], whole[1:])
            assert not torch.equal(whole[0], tensor[0])
        for branch in range(len(keep)):
            keep = torch.ones_like(keep)
            keep[branch] = 0
            assert not torch.equal(block(*before, keep)[1], after[1])
