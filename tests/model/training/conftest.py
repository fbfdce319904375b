"""Tiny sets of videos: what a clip shows says its class, its brightness says which video it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.videos import encode

Painter = Callable[[int], np.ndarray]


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
