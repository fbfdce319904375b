"""Clips for training: in which order videos come, and how each is decoded. Needs torch.

Everything random about a clip is drawn from (seed, place in the order), so that the state of the
data is one number, the batches taken so far, whatever the worker processes have prefetched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from av.video.frame import VideoFrame
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from model.config import Preprocessing
from model.data.lists import Sample, VideoList
from model.data.remote import local_video
from model.processes import die_with_parent
from model.training.errors import DataError, RecipeError
from model.video import Timeline, VideoError, read_frames, resize_crop, to_rgb
from model.video.sampling import TIMELINE_FPS, frames_at
from model.video.transforms import upright_turns

_ATTEMPTS = 20  # videos tried for one clip, before the list is called unusable
_MAX_WHOLE_PICTURE = 16  # squares of its short side that a picture is scaled up to as a whole
# What draws are for; with the seed and the place they seed a generator of their own.
_ORDER, _CLIP, _VIEW = 0, 1, 3  # 2 is augmentation, in run.py


@dataclasses.dataclass(frozen=True)
class View:
    """How the view of a training clip is drawn: anywhere in the video, and in the picture.

    `scale`: the range of the short side, in multiples of the input size; the paper's is 256 to 320
    pixels for 224. `temporal_jitter`: by what share the time between the frames of a dense clip
    may differ from `frame_stride`. `cached`: how many views a video has in all, taken in turn from
    epoch to epoch, so that they can be decoded once and kept; 0 for a new one each time.
    """

    scale: tuple[float, float] = (256 / 224, 320 / 224)
    temporal_jitter: float = 0.0
    cached: int = 0

    def __post_init__(self) -> None:
        if self.cached < 0:
            raise RecipeError(f"cached is {self.cached}; it must not be negative")


class Draw(NamedTuple):
    """One clip to be made: of which video, and from which place in the order."""

    place: int
    video: int


class Replaced(NamedTuple):
    """A video that gave no clip, and why; another one stands in for it."""

    path: str
    code: str
    detail: str


class Batch(NamedTuple):
    """`frames` uint8 (batch, time, size, size, 3), `labels` int64 (batch,), and what failed."""

    frames: Tensor
    labels: Tensor
    replaced: tuple[Replaced, ...]


# ---- order ------------------------------------------------------------------------------------


class BatchOrder(Sampler[list[Draw]]):
    """An endless order of videos, epoch after epoch, cut in batches; yields those of a range.

    Every epoch is a permutation of its own, or, `balanced`, as many draws with every class as
    likely as any other. A batch may reach over the end of an epoch: no video is left out, and
    a set may be smaller than a batch.

    `rows`: which clips of each batch are yielded, where processes share it; None for all.
    """

    def __init__(
        self,
        labels: NDArray[np.int64],
        batch_size: int,
        seed: int,
        batches: range,
        balanced: bool = False,
        rows: Sequence[int] | None = None,
    ) -> None:
        self.batch_size = batch_size
        self.rows = range(batch_size) if rows is None else rows
        self.seed = seed
        self.batches = batches
        self.count = len(labels)
        self.weights = _class_weights(labels) if balanced else None

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, order = -1, np.empty(0, np.int64)
        for number in self.batches:
            batch = []
            for place in range(number * self.batch_size, (number + 1) * self.batch_size):
                if place // self.count != epoch:
                    epoch = place // self.count
                    order = self._epoch(epoch)
                batch.append(Draw(place, int(order[place % self.count])))
            yield [batch[row] for row in self.rows]

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        rng = np.random.default_rng([self.seed, _ORDER, epoch])
        if self.weights is None:
            return rng.permutation(self.count)
        return rng.choice(self.count, self.count, p=self.weights)


def _class_weights(labels: NDArray[np.int64]) -> NDArray[np.float64]:
    counts = np.bincount(labels)
    weights = 1.0 / counts[labels]
    return np.asarray(weights / weights.sum(), np.float64)


# ---- clips ------------------------------------------------------------------------------------


class TrainingClips(Dataset[tuple[NDArray[np.uint8], int, list[Replaced]]]):
    """From a `Draw` to the frames and label of a clip, and the videos that failed before it.

    With `view.cached`, clips are those of `view_clip`, and read from `cache` where it is given.
    """

    def __init__(
        self,
        videos: VideoList,
        preprocessing: Preprocessing,
        view: View,
        seed: int,
        cache: Callable[[int, int], NDArray[np.uint8] | Replaced] | None = None,
    ) -> None:
        self.samples = videos.samples
        self.preprocessing = preprocessing
        self.view = view
        self.seed = seed
        self.cache = cache

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, draw: Draw) -> tuple[NDArray[np.uint8], int, list[Replaced]]:
        """Decodes; a video that cannot be decoded is replaced by another, drawn at random.

        Raises:
            DataError: many videos in a row could not be decoded.
        """
        rng = np.random.default_rng([self.seed, _CLIP, draw.place])
        index, replaced = draw.video, list[Replaced]()
        for _ in range(_ATTEMPTS):
            clip = self._clip(index, draw.place, rng)
            if not isinstance(clip, Replaced):
                return clip, self.samples[index].label, replaced
            replaced.append(clip)
            index = int(rng.integers(len(self.samples)))
        path, _, detail = replaced[-1]
        raise DataError(
            f"{_ATTEMPTS} videos in a row could not be decoded, the last {path}: {detail} "
            "`timesformer data check` says which can be"
        )

    def _clip(
        self, video: int, place: int, rng: np.random.Generator
    ) -> NDArray[np.uint8] | Replaced:
        sample = self.samples[video]
        if not self.view.cached:
            return _clip_or_failure(sample, self.preprocessing, self.view, rng)
        number = place // len(self.samples) % self.view.cached  # by epoch
        if self.cache is not None:
            return self.cache(video, number)
        return view_clip(sample, self.preprocessing, self.view, self.seed, video, number)


def view_clip(
    sample: Sample, preprocessing: Preprocessing, view: View, seed: int, video: int, number: int
) -> NDArray[np.uint8] | Replaced:
    """View `number` of the video that is `video`-th in its list: always the same; or why not."""
    rng = np.random.default_rng([seed, _VIEW, video, number])
    return _clip_or_failure(sample, preprocessing, view, rng)


def _clip_or_failure(
    sample: Sample, preprocessing: Preprocessing, view: View, rng: np.random.Generator
) -> NDArray[np.uint8] | Replaced:
    try:
        with local_video(sample.path) as path:
            return training_clip(path, preprocessing, view, rng)
    except VideoError as error:
        return Replaced(sample.path, error.code, str(error))


def training_clip(
    path: str, preprocessing: Preprocessing, view: View, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """One clip at a random time and place, by the sampling rules and the scaling of serving.

    Scale and crop are drawn once per clip and done in the one resampling from the decoded frame,
    so that pixels in training are as sharp as those in serving.

    Returns:
        uint8 (time, size, size, 3), RGB.

    Raises:
        VideoError: the file gives no clip.
    """
    size = preprocessing.image_size
    short = round(size * rng.uniform(*view.scale))
    down, right = rng.random(2)
    clip_seed = int(rng.integers(2**63))

    def choose(timeline: Timeline) -> NDArray[np.int64]:
        # A generator of its own: a damaged file is asked twice, an intact one once.
        own = np.random.default_rng(clip_seed)
        return training_frames(timeline, preprocessing, view.temporal_jitter, own)

    def convert(frame: VideoFrame, sar: float) -> NDArray[np.uint8]:
        return _random_crop(frame, sar, size, short, (float(down), float(right)))

    reading = read_frames(path, choose, convert)
    return np.stack([reading.pictures[int(index)] for index in reading.indices])


def training_frames(
    timeline: Timeline, preprocessing: Preprocessing, jitter: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """`model.video.sample` with its fixed times drawn at random instead.

    A dense clip begins anywhere in the video; of a uniform one, each frame lies anywhere in its
    segment. Videos shorter than the dense clip are sampled uniformly, as in serving.

    Returns:
        int64 (num_frames,), indices into `timeline.times`.
    """
    count = preprocessing.num_frames
    spacing = preprocessing.frame_stride / TIMELINE_FPS
    if preprocessing.sampling == "dense" and timeline.duration > (count - 1) * spacing:
        spacing *= rng.uniform(1 - jitter, 1 + jitter)
        spacing = min(spacing, timeline.last / max(count - 1, 1))
        start = rng.uniform(0.0, max(timeline.last - (count - 1) * spacing, 0.0))
        times = start + np.arange(count) * spacing
    else:
        times = (np.arange(count) + rng.random(count)) * (timeline.duration / count)
    return frames_at(timeline, np.asarray(times, np.float64))


def _random_crop(
    frame: VideoFrame, sar: float, size: int, short: int, position: tuple[float, float]
) -> NDArray[np.uint8]:
    """A square of `size` out of the upright frame scaled to a short side of `short`.

    `position` in [0, 1): how far down and right of the room that there is.
    """
    turns = upright_turns(frame.rotation)
    sideways = turns % 2 == 1
    width, height = frame.width * sar, float(frame.height)
    scale = short / min(width, height)
    coded = max(round(height * scale), short), max(round(width * scale), short)
    upright = coded[::-1] if sideways else coded
    top, left = (int(p * (side - size + 1)) for p, side in zip(position, upright, strict=True))
    if max(coded) > _MAX_WHOLE_PICTURE * short:
        picture = np.rot90(to_rgb(frame), turns)
        return resize_crop(picture, upright, (top, left, size, size))
    scaled = np.rot90(to_rgb(frame, coded[1], coded[0]), turns)
    return np.ascontiguousarray(scaled[top : top + size, left : left + size])


# ---- loading ----------------------------------------------------------------------------------


def load_batches(clips: TrainingClips, order: BatchOrder, workers: int) -> DataLoader[Batch]:
    """Batches in `order`, decoded by `workers` processes; 0 decodes in this one."""
    return DataLoader(
        clips,  # type: ignore[arg-type] # indexed by what the sampler yields
        batch_sampler=order,
        num_workers=workers,
        collate_fn=_collate,
        # An iterator takes a number from its generator; the global one's state is part of a run.
        generator=torch.Generator(),
        worker_init_fn=_start_worker,
        multiprocessing_context="spawn" if workers else None,
    )


def _start_worker(number: int) -> None:
    die_with_parent()


def _collate(clips: list[tuple[NDArray[np.uint8], int, list[Replaced]]]) -> Batch:
    frames, labels, replaced = zip(*clips, strict=True)
    return Batch(
        torch.from_numpy(np.stack(frames)),
        torch.tensor(labels),
        tuple(each for some in replaced for each in some),
    )
