"""Tiny models whose every weight matters, tiny sets of videos, and where the shared fixtures lie.

In the sets, what a clip shows says its class, and its brightness says which video it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.network.timesformer import TimeSformer
from tests.videos import encode

Painter = Callable[[int], np.ndarray]
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


def write_video(path: Path, frames: int = 40, paint: Painter | None = None) -> Path:
    """A 48 x 32 video, 30 fps; by default frame i is grey of level 5 i + 20."""
    paint = paint or (lambda number: np.full((32, 48, 3), min(5 * number + 20, 250), np.uint8))
    return encode(path, map(paint, range(frames)), crf="10")


def flat(red: int, green: int, blue: int) -> Painter:
    picture = np.empty((32, 48, 3), np.uint8)
    picture[:] = red, green, blue
    return lambda number: picture


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Limits torch to one thread: in models this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per class, four videos in each: `red` and `blue` of different brightness."""
    folder = tmp_path_factory.mktemp("colours")
    for name in ("red", "blue"):
        (folder / name).mkdir()
        for index in range(4):
            level = 120 + 30 * index
            paint = flat(level, 20, 20) if name == "red" else flat(20, 20, level)
            write_video(folder / name / f"{index}.mp4", paint=paint)
    return folder
