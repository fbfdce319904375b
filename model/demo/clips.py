"""Clips drawn as the demo network sees them, with how everything in them moves; kept on disk."""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from model.config import ModelConfig
from model.demo import render
from model.demo.render import LABELS, Frames
from model.demo.textures import Array


class Rendered(NamedTuple):
    """Clips (n, time, size, size, 3) uint8 and their flow (n, time - 1, grid, grid, 2) in pixels.

    Clip i is of class i modulo the number of labels.
    """

    frames: Frames
    flow: npt.NDArray[np.float16]


def _training_clip(index: int, seed: int, config: ModelConfig) -> tuple[Frames, Array]:
    rng = np.random.default_rng([seed, index])
    label = LABELS[index % len(LABELS)]
    return render.training_clip(label, rng, config.preprocessing, config.grid)


def _folder(cache: Path, *facts: object) -> Path:
    """Where clips of these facts, rendered by this very code, are kept."""
    here = Path(__file__).parent
    sources = [here / name for name in ("clips.py", "render.py", "textures.py")]
    code = b"".join(source.read_bytes() for source in sources) + repr(facts).encode()
    folder = cache / hashlib.sha256(code).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def training_set(seed: int, count: int, config: ModelConfig, cache: Path, workers: int) -> Rendered:
    """Renders `count` training clips in `workers` processes, or finds them in `cache`."""
    folder = _folder(cache, seed, count, config.preprocessing, config.grid)
    if not (folder / "done").exists():
        time_, size, grid = config.num_frames, config.image_size, config.grid
        create = functools.partial(np.lib.format.open_memmap, mode="w+")
        shape = (count, time_, size, size, 3)
        frames = create(folder / "frames.npy", dtype=np.uint8, shape=shape)
        shape = (count, time_ - 1, grid, grid, 2)
        flow = create(folder / "flow.npy", dtype=np.float16, shape=shape)
        task = functools.partial(_training_clip, seed=seed, config=config)
        context = multiprocessing.get_context("spawn")
        with context.Pool(workers, torch.set_num_threads, (1,)) as pool:
            for index, clip in enumerate(pool.imap(task, range(count), chunksize=8)):
                frames[index], flow[index] = clip
        (folder / "done").touch()
    return Rendered(
        np.load(folder / "frames.npy", mmap_mode="r"), np.load(folder / "flow.npy", mmap_mode="r")
    )


Example = tuple[Frames, npt.NDArray[np.floating[Any]]]


def augment(example: Example, rng: np.random.Generator) -> Example:
    """Makes one of sixteen clips of each, the flow with it; and other colours."""
    frames, flow = example
    if rng.random() < 0.5:
        frames, flow = frames[:, :, ::-1], flow[:, :, ::-1] * (-1, 1)
    if rng.random() < 0.5:
        frames, flow = frames[:, ::-1], flow[:, ::-1] * (1, -1)
    if rng.random() < 0.5:
        frames, flow = frames.swapaxes(1, 2), flow.swapaxes(1, 2)[..., ::-1]
    if rng.random() < 0.5:
        frames, flow = frames[::-1], -flow[::-1]
    if rng.random() < 0.5:
        frames = frames[..., rng.permutation(3)]
    if rng.random() < 0.3:
        frames = 255 - frames
    return frames, flow
