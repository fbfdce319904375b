"""The demo model's clips: rendered once and kept, and sixteen made of each.

Training clips are drawn as the network sees them; held-out clips are real mp4 files that went
through the decoder of serving.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from model.config import ModelConfig
from model.demo import render
from model.demo.render import LABELS, Frames
from model.demo.textures import Array
from model.video import load_clips

HELD_OUT_SECONDS = 1.2  # a little over the span of a clip


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
    """Where clips of these facts, rendered by this very package, are kept."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    code = b"".join(source.read_bytes() for source in sources) + repr(facts).encode()
    folder = cache / hashlib.sha256(code).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def training_set(seed: int, count: int, config: ModelConfig, cache: Path, workers: int) -> Rendered:
    """Renders `count` training clips in `workers` processes, or finds them in `cache`."""
    folder = _folder(cache, "train", seed, count, config.preprocessing, config.grid)
    if not (folder / "done").exists():
        time_, size, grid = config.num_frames, config.image_size, config.grid
        create = functools.partial(np.lib.format.open_memmap, mode="w+")
        shape = (count, time_, size, size, 3)
        frames = create(folder / "frames.npy", dtype=np.uint8, shape=shape)
        shape = (count, time_ - 1, grid, grid, 2)
        flow = create(folder / "flow.npy", dtype=np.float16, shape=shape)
        task = functools.partial(_training_clip, seed=seed, config=config)
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            for index, clip in enumerate(pool.imap(task, range(count), chunksize=8)):
                frames[index], flow[index] = clip
        (folder / "done").touch()
    return Rendered(
        np.load(folder / "frames.npy", mmap_mode="r"), np.load(folder / "flow.npy", mmap_mode="r")
    )


def _held_out_clip(index: int, seed: int, config: ModelConfig) -> Frames:
    """A clip of other seeds than in training, by way of an mp4 file and the decoder of serving."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        label = LABELS[index % len(LABELS)]
        render.write_clip(path, label, [seed, 1 << 31, index], seconds=HELD_OUT_SECONDS)
        return cast(Frames, load_clips(path, config.preprocessing).frames[0])


def held_out_set(seed: int, count: int, config: ModelConfig, cache: Path, workers: int) -> Frames:
    """Held-out clips (n, time, size, size, 3), clip i of class i modulo the number of labels."""
    folder = _folder(cache, "held out", seed, count, config.preprocessing)
    if not (folder / "frames.npy").exists():
        task = functools.partial(_held_out_clip, seed=seed, config=config)
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            frames = np.stack(pool.map(task, range(count), chunksize=4))
        np.save(folder / "frames.npy", frames)
    return cast(Frames, np.load(folder / "frames.npy"))


def _relabel(*swaps: tuple[str, str]) -> tuple[int, ...]:
    """For each label the index of what it becomes when these pairs change places."""
    partner = dict(swaps) | {second: first for first, second in swaps}
    return tuple(LABELS.index(partner.get(label, label)) for label in LABELS)


_TURNS = ("turning clockwise", "turning counter-clockwise")
_SIDEWAYS = ("moving left", "moving right")
_UPRIGHT = ("moving up", "moving down")
MIRROR = _relabel(_SIDEWAYS, _TURNS)
UPSIDE_DOWN = _relabel(_UPRIGHT, _TURNS)
TRANSPOSE = _relabel(("moving left", "moving up"), ("moving right", "moving down"), _TURNS)
BACKWARDS = _relabel(_SIDEWAYS, _UPRIGHT, ("approaching", "receding"), _TURNS)

Example = tuple[Frames, npt.NDArray[np.floating[Any]], int]


def augment(example: Example, rng: np.random.Generator) -> Example:
    """Makes one of sixteen clips of each, the label and the flow with it; and other colours."""
    frames, flow, label = example
    if rng.random() < 0.5:
        frames, flow = frames[:, :, ::-1], flow[:, :, ::-1] * (-1, 1)
        label = MIRROR[label]
    if rng.random() < 0.5:
        frames, flow = frames[:, ::-1], flow[:, ::-1] * (1, -1)
        label = UPSIDE_DOWN[label]
    if rng.random() < 0.5:
        frames, flow = frames.swapaxes(1, 2), flow.swapaxes(1, 2)[..., ::-1]
        label = TRANSPOSE[label]
    if rng.random() < 0.5:
        frames, flow = frames[::-1], -flow[::-1]
        label = BACKWARDS[label]
    if rng.random() < 0.5:
        frames = frames[..., rng.permutation(3)]
    if rng.random() < 0.3:
        frames = 255 - frames
    return frames, flow, label
