"""Tiny sets of videos: what a clip shows says its class, its brightness says which video it is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

Painter = Callable[[int], np.ndarray]


def write_video(path: Path, frames: int = 40, paint: Painter | None = None) -> Path:
    """A 48 x 32 video, 30 fps; by default frame i is grey of level 5 i + 20."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.time_base = Fraction(1, 30)
        for number in range(frames):
            picture = np.full((32, 48, 3), min(5 * number + 20, 250), np.uint8)
            if paint is not None:
                picture = paint(number)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def flat(red: int, green: int, blue: int) -> Painter:
    picture = np.empty((32, 48, 3), np.uint8)
    picture[:] = red, green, blue
    return lambda number: picture


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """More only wait for each other in models this small. Some tests here need no torch."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
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
