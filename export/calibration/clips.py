"""The clips that an export is calibrated and verified on. No torch, but to render."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.config import ModelConfig, Preprocessing
from model.data.lists import VIDEO_SUFFIXES, read_videos
from model.training.errors import DataError
from model.video import Crops, VideoError, load_clips

# More change the largest magnitudes little, and take seconds each.
_CALIBRATION_VIDEOS = 32
# Of the videos to calibrate on one in five, but no more than this, is kept for the gate.
_HELD_OUT = 4
_HELD_OUT_OF = 5


def verification_clips(config: ModelConfig, videos: Sequence[Path]) -> NDArray[np.uint8]:
    """Clips to compare engines on: the videos' crops, and one of noise, the hardest to round.

    Returns:
        uint8 (clips, time, height, width, 3); at least two clips.

    Raises:
        VideoError: names the video that cannot be read.
    """
    noise = np.random.default_rng(0).integers(0, 256, (1, *_shape(config)), dtype=np.uint8)
    seen = [_load(video, config.preprocessing, 3, "verify") for video in videos]
    return np.concatenate([*seen, noise])


def calibration_clips(config: ModelConfig, source: Path | None) -> NDArray[np.uint8]:
    """Clips to measure the ranges of a network's numbers on.

    Args:
        source: a folder of videos, labelled or not, or a list that training reads; up to 32 of
            them are taken, spread evenly. None renders a clip of each motion of the
            demo model.

    Returns:
        uint8 (clips, time, height, width, 3).

    Raises:
        DataError: there is no video in it, or the list cannot be read.
        VideoError: names the video that cannot be read.
    """
    if source is None:
        return _rendered(config, np.arange(len(_motions())))
    videos, _ = _split(source)
    chosen = _spread(len(videos), _CALIBRATION_VIDEOS)
    return np.concatenate(
        [_load(videos[index], config.preprocessing, 1, "calibrate") for index in chosen]
    )


def held_out_clips(config: ModelConfig, source: Path | None) -> NDArray[np.uint8]:
    """Clips of the same source that `calibration_clips` leaves alone: what was chosen by those
    clips is judged by these.

    Returns:
        uint8 (clips, time, height, width, 3); none of a source of fewer than five videos.

    Raises:
        DataError, VideoError: as `calibration_clips`.
    """
    if source is None:
        motions = len(_motions())
        return _rendered(config, motions + _spread(motions, _HELD_OUT))
    _, videos = _split(source)
    clips = [_load(video, config.preprocessing, 1, "verify") for video in videos]
    return np.concatenate([np.empty((0, *_shape(config)), np.uint8), *clips])


def _split(source: Path) -> tuple[list[Path], list[Path]]:
    """The videos to calibrate on, and those that are held out."""
    if source.is_dir():
        videos = videos_in(source)
    else:
        videos = [Path(sample.path) for sample in read_videos(source).samples]
    held_out = set(_spread(len(videos), min(_HELD_OUT, len(videos) // _HELD_OUT_OF)).tolist())
    return (
        [video for index, video in enumerate(videos) if index not in held_out],
        [video for index, video in enumerate(videos) if index in held_out],
    )


def _spread(number: int, most: int) -> NDArray[np.intp]:
    """Indices of up to `most` of so many, spread evenly."""
    return np.linspace(0, number - 1, min(number, most)).round().astype(np.intp)


def videos_in(folder: Path) -> list[Path]:
    """The videos in a folder and the folders in it, by name.

    Raises:
        DataError: there is none.
    """
    files = (path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    videos = sorted(path for path in files if path.is_file())
    if not videos:
        raise DataError(f"there is no video in {folder}")
    return videos


def _motions() -> tuple[str, ...]:
    from model.demo.render import LABELS

    return tuple(LABELS)


def _rendered(config: ModelConfig, seeds: NDArray[np.intp]) -> NDArray[np.uint8]:
    """A clip for each seed, of the motions in turn."""
    from model.demo.render import render_frames

    motions = _motions()
    times = np.arange(config.num_frames) * config.preprocessing.frame_stride / 30
    times -= times.mean()
    size = config.image_size, config.image_size
    return np.stack(
        [
            render_frames(motions[seed % len(motions)], np.random.default_rng(seed), times, size)
            for seed in seeds
        ]
    )


def _load(
    video: Path, preprocessing: Preprocessing, crops: Crops, purpose: str
) -> NDArray[np.uint8]:
    try:
        return load_clips(video, preprocessing, crops=crops).frames
    except VideoError as error:
        raise type(error)(f"cannot {purpose} on {video}: {error}") from error


def _shape(config: ModelConfig) -> tuple[int, ...]:
    return config.num_frames, config.image_size, config.image_size, 3
