"""The clips that an export is calibrated and verified on. No torch, but to render."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.config import ModelConfig, Preprocessing
from model.training.errors import DataError
from model.training.sources import VIDEO_SUFFIXES, read_videos
from model.video import Crops, VideoError, load_clips

# More change the largest magnitudes little, and take seconds each.
_CALIBRATION_VIDEOS = 32


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
        return _rendered(config)
    if source.is_dir():
        videos = videos_in(source)
    else:
        videos = [Path(sample.path) for sample in read_videos(source).samples]
    count = min(len(videos), _CALIBRATION_VIDEOS)
    chosen = np.linspace(0, len(videos) - 1, count).round().astype(int)
    return np.concatenate(
        [_load(videos[index], config.preprocessing, 1, "calibrate") for index in chosen]
    )


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


def _rendered(config: ModelConfig) -> NDArray[np.uint8]:
    from model.demo.render import LABELS, render_frames

    times = np.arange(config.num_frames) * config.preprocessing.frame_stride / 30
    times -= times.mean()
    size = config.image_size, config.image_size
    return np.stack(
        [
            render_frames(label, np.random.default_rng(index), times, size)
            for index, label in enumerate(LABELS)
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
