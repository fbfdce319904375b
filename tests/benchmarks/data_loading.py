"""How many cores of decoding keep a training step fed: clips a second on both sides.

    python -m tests.benchmarks.data_loading [--variant demo] [--source SOURCE] [--workers 0 1 2]

Without a source, 60 videos of the demo set are rendered first. Decoding, reading from a cache and
the training step (forward, backward, AdamW) each run on one thread, and what counts is processor
time, which hardly sees the neighbours on a shared machine. Loading in worker processes is timed by
the clock, start of the processes left out, and does see them. `--files` times every video.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812 - the name the field uses

from model.config import VARIANTS, ModelConfig
from model.demo.dataset import write_demo_set
from model.timesformer import TimeSformer
from model.training.cache import Draws, open_cache
from model.training.data import (
    BatchOrder,
    Replaced,
    TrainingClips,
    View,
    load_batches,
    view_clip,
)
from model.training.sources import Sample, VideoList, read_videos

DEMO_VIDEOS = 60
VIEWS = 2
BATCH = 8


def main() -> None:
    """Prints a line for each way to get clips: its rate, and how many steps it could feed."""
    options = parse()
    torch.set_num_threads(1)
    config = VARIANTS[options.variant]
    with tempfile.TemporaryDirectory() as folder:
        videos = readable(read(options.source, Path(folder)), config, options.files)
        draws = Draws(videos, config.preprocessing, View(cached=VIEWS), 0)
        rates = {"decoding, on one core": decoding(draws)}
        rates["from the cache, on one core"] = from_cache(draws, Path(folder) / "cache")
        for workers in options.workers:
            rates[f"loader, {workers} workers, by the clock"] = loading(draws, workers)
    step = training(config, options.batch, options.steps)
    print(f"{options.variant}, {len(videos.samples)} videos, {VIEWS} views of each")
    print(f"{'':36s}   clips/s   training steps that it feeds, of one core each")
    for name, rate in rates.items():
        print(f"{name:36s} {rate:9.2f}   {rate / step:9.2f}")
    print(f"{'training step, on one core':36s} {step:9.2f}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=sorted(VARIANTS), default="demo")
    parser.add_argument("--source", help="a list or folder of videos, as `timesformer train` reads")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--batch", type=int, default=BATCH, help="clips of a training step")
    parser.add_argument("--steps", type=int, default=5, help="training steps that are timed")
    parser.add_argument("--files", action="store_true", help="a line for each video, too")
    return parser.parse_args()


def read(source: str | None, folder: Path) -> VideoList:
    if source is not None:
        return read_videos(source)
    write_demo_set(folder, DEMO_VIDEOS, 0, processes=2)
    return read_videos(folder / "train.csv")


def readable(videos: VideoList, config: ModelConfig, tell: bool) -> VideoList:
    """The videos that give clips; each is decoded once here, so that its file is in memory."""
    kept = list[Sample]()
    for number, sample in enumerate(videos.samples):
        began = time.process_time()
        clip = view_clip(sample, config.preprocessing, View(), 0, number, 0)
        took = time.process_time() - began
        if not isinstance(clip, Replaced):
            kept.append(sample)
        if tell:
            result = clip.code if isinstance(clip, Replaced) else f"{took:.3f} s of one core"
            print(f"{Path(sample.path).name}: {result}")
    return VideoList(tuple(kept), videos.labels)


def decoding(draws: Draws) -> float:
    """Clips a second of processor time, decoded as training does."""
    samples = draws.videos.samples
    began = time.process_time()
    for view in range(VIEWS):
        for number, sample in enumerate(samples):
            view_clip(sample, draws.preprocessing, draws.view, draws.seed, number, view)
    return VIEWS * len(samples) / (time.process_time() - began)


def from_cache(draws: Draws, folder: Path) -> float:
    """Clips a second of processor time, of full epochs in batches, out of a cache in memory."""
    cache = open_cache(folder, draws)
    clips = TrainingClips(draws.videos, draws.preprocessing, draws.view, draws.seed, cache.clip)
    batches = range(max(40, VIEWS * len(clips) // BATCH))
    began = time.process_time()
    for _ in load_batches(clips, order(draws, batches), 0):
        pass
    return len(batches) * BATCH / (time.process_time() - began)


def loading(draws: Draws, workers: int) -> float:
    """Clips a second by the clock, of what comes after the first batch of every process."""
    clips = TrainingClips(draws.videos, draws.preprocessing, draws.view, draws.seed)
    start = 2 * workers  # the loader keeps two batches of each process ahead
    batches = range(start + VIEWS * len(clips) // BATCH + 1)
    loader = iter(load_batches(clips, order(draws, batches), workers))
    for _ in range(start):
        next(loader)
    began = time.perf_counter()
    count = sum(len(batch.labels) for batch in loader)
    return count / (time.perf_counter() - began)


def order(draws: Draws, batches: range) -> BatchOrder:
    labels = np.array([sample.label for sample in draws.videos.samples])
    return BatchOrder(labels, BATCH, draws.seed, batches)


def training(config: ModelConfig, batch: int, steps: int) -> float:
    """Clips a second of processor time that go through forward, backward and optimiser."""
    model = TimeSformer(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    shape = (batch, config.num_frames, config.image_size, config.image_size, 3)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8)
    targets = torch.arange(batch) % config.num_classes

    def step() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(frames)[0], targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return batch * steps / processor_time(step, steps)


def processor_time(work: Callable[[], None], times: int) -> float:
    """Seconds of all processors for some runs, after one to warm up."""
    work()
    began = time.process_time()
    for _ in range(times):
        work()
    return time.process_time() - began


if __name__ == "__main__":
    main()
