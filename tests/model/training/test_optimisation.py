"""Rates, groups, freezing and the average are what the recipe says; presets are the paper's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.training.errors import RecipeError
from model.training.optimisation import (
    Average,
    Optimisation,
    build_optimizer,
    freeze,
    rate,
    set_rate,
)
from model.training.recipe import PRESETS, Recipe
from tests.model.conftest import random_frames, random_model, tiny_config


def test_the_paper_s_recipe() -> None:
    """15 epochs, 0.005 divided by 10 at 11 and 14, momentum 0.9, decay 1e-4, sides 256 to 320."""
    paper = PRESETS["paper"].optimisation
    assert (paper.epochs, paper.momentum, paper.weight_decay) == (15, 0.9, 1e-4)
    rates = [rate(epoch, paper) for epoch in (0, 10.99, 11, 13.99, 14, 15)]
    assert rates == pytest.approx([5e-3, 5e-3, 5e-4, 5e-4, 5e-5, 5e-5])
    assert [224 * scale for scale in PRESETS["paper"].view.scale] == [256, 320]


def test_warm_up_and_cosine() -> None:
    settings = Optimisation(schedule="cosine", warm_up=2, epochs=12, learning_rate=1.0)
    assert [rate(epoch, settings) for epoch in (0, 1, 2, 7, 12)] == pytest.approx(
        [0, 0.5, 1, 0.5, 0]
    )


def groups(**changes: Any) -> dict[str, dict[str, Any]]:
    model = random_model(tiny_config(depth=2))
    settings = Optimisation(**changes)
    freeze(model, settings.train)
    optimizer = build_optimizer(model, settings)
    set_rate(optimizer, 1.0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == sum(
        parameter.requires_grad for parameter in model.parameters()
    )
    return {name: group for group in optimizer.param_groups for name in group["names"]}


def test_biases_norms_and_embeddings_are_not_decayed() -> None:
    by_name = groups(weight_decay=0.3)
    decayed = {name for name, group in by_name.items() if group["weight_decay"]}
    assert {group["weight_decay"] for group in by_name.values()} == {0.0, 0.3}
    assert all(name.endswith(".weight") and "norm" not in name for name in decayed)
    assert {"patch_embed.proj.weight", "head.weight", "blocks.1.attn.qkv.weight"} <= decayed
    assert {"cls_token", "pos_embed", "time_embed", "head.bias", "blocks.0.norm1.weight"} <= (
        by_name.keys() - decayed
    )


def test_the_rate_falls_with_the_distance_from_the_head() -> None:
    by_name = groups(layer_decay=0.5, optimizer="adamw")
    rates = {
        name: by_name[name]["lr"]
        for name in ("head.weight", "norm.bias", "blocks.1.mlp.fc1.weight", "blocks.0.norm1.bias",
                     "pos_embed", "patch_embed.proj.weight")
    }  # fmt: skip
    assert list(rates.values()) == [1.0, 1.0, 0.5, 0.25, 0.125, 0.125]


def test_a_linear_probe_trains_the_head_alone() -> None:
    assert groups(train="head").keys() == {"head.weight", "head.bias"}
    parts = {name.split(".")[0] + name.split(".")[1] for name in groups(train=1)}
    assert parts == {"headweight", "headbias", "normweight", "normbias", "blocks1"}
    with pytest.raises(RecipeError, match="the model has 2"):
        groups(train=3)
    with pytest.raises(RecipeError, match="it must be all, head, lora or a number of blocks"):
        groups(train="tail")


def test_frozen_blocks_drop_no_paths() -> None:
    model = random_model(tiny_config(drop_path_rate=0.5))
    frames = random_frames(model.config, batch=16)
    freeze(model, "head")
    assert torch.equal(model(frames)[0], model(frames)[0])
    freeze(model, "all")
    assert not torch.equal(model(frames)[0], model(frames)[0])


def test_the_average_follows_and_forgets_its_beginning() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    average = Average(model, keep=0.99)
    for step in range(1, 400):
        model.weight.data.fill_(1.0 if step > 3 else 100.0)
        average.update(model)
        if step == 1:
            assert average.weights["weight"].item() == pytest.approx(100, rel=0.2)
    assert average.weights["weight"].item() == pytest.approx(1, abs=0.5)
    twin = Average(model, keep=0.99)
    twin.load_state_dict(average.state_dict())
    model.weight.data.fill_(7.0)
    average.update(model), twin.update(model)
    assert torch.equal(average.weights["weight"], twin.weights["weight"])


def test_a_recipe_is_changed_by_field_wherever_the_field_lies() -> None:
    changed = PRESETS["modern"].replace({"epochs": 3, "flip": 0.0, "seed": 4, "scale": (1.0, 1.0)})
    assert changed.optimisation.epochs == 3
    assert changed.augmentation.flip == 0
    assert changed.view.scale == (1.0, 1.0)
    assert changed.seed == 4
    assert changed.optimisation.ema == PRESETS["modern"].optimisation.ema
    with pytest.raises(RecipeError, match="no colours"):
        Recipe().replace({"colours": 1})


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"learning_rate": -1.0}, {"ema": 1.0}, {"accumulate": 0},
              {"clip_norm": -1.0}, {"batch_size": 0}, {"patience": -1}, {"watch": "top5"}],
)  # fmt: skip
def test_impossible_recipes_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        Recipe().replace(wrong)
