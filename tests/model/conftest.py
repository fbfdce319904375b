"""Tiny models whose every weight matters, and where the shared fixtures lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.network.timesformer import TimeSformer

SHARED_FIXTURES = Path(__file__).parents[2].parent / "shared" / "fixtures"


@pytest.fixture
def shared_fixtures() -> Path:
    """Tiny checkpoints with the outputs of the original implementations."""
    if not SHARED_FIXTURES.is_dir():
        pytest.skip("shared fixtures are not here")
    return SHARED_FIXTURES


def tiny_config(attention_type: str = "divided_space_time", **changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 5,
        "num_frames": 4,
        "image_size": 32,
        "drop_path_rate": 0.0,
    }
    return ModelConfig().replace(attention_type=attention_type, **{**fields, **changes})


def random_model(config: ModelConfig, seed: int = 0) -> TimeSformer:
    """Eval mode; no weight zero or one, so that losing or swapping any of them shows.

    The same for a seed in every run, the weights that the constructor draws included.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TimeSformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def random_frames(config: ModelConfig, batch: int = 2, seed: int = 0) -> torch.Tensor:
    shape = (batch, config.num_frames, config.image_size, config.image_size, 3)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
