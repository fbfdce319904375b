"""From a video file to clips: exactly the frames that are wanted, decoding as little as possible.

Serving calls `load_clips`; training builds upon `read_frames`; `probe` tells the facts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from model.config import Preprocessing, Sampling
from model.video.facts import (
    Shape,
    VideoFacts,
    displayed,
    facts_of,
    is_reliable,
    nothing_decodes,
    overclaims,
    single_frame,
)
from model.video.index import scan_packets
from model.video.opening import Limits, OpenVideo, open_video
from model.video.sampling import Timeline, sample
from model.video.selective import decode_at
from model.video.sequential import Survey, decode_sequentially, take_survey
from model.video.transforms import Crops, crop_frame

Choose = Callable[[Timeline], NDArray[np.int64]]
Convert = Callable[[VideoFrame, float], NDArray[np.uint8]]


@dataclasses.dataclass(frozen=True)
class Reading:
    """Frames chosen from a file.

    `indices`: what was chosen, int64, any shape; `pictures`: what `convert` made of each chosen
    frame, by index; `timeline`: of all frames; `truncated`: see `Clips`.
    """

    indices: NDArray[np.int64]
    pictures: dict[int, NDArray[np.uint8]]
    timeline: Timeline
    facts: VideoFacts
    truncated: bool


@dataclasses.dataclass(frozen=True)
class Clips:
    """What goes into the network, and where in the video it comes from.

    `frames`: uint8 (views * crops, time, size, size, 3), RGB, C-contiguous; clip `view * crops +
    crop`. `times`: float64 (views, time), when each chosen frame appears, in seconds after the
    first frame of the video. `truncated`: the file ends early, or parts of it do not decode, yet
    what is there is enough. `sampling`: the one that was used, `uniform` for short videos.
    """

    frames: NDArray[np.uint8]
    times: NDArray[np.float64]
    facts: VideoFacts
    truncated: bool
    sampling: Sampling


def load_clips(
    path: str | Path,
    preprocessing: Preprocessing,
    *,
    views: int = 1,
    crops: Crops = 1,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    threads: int = 1,
) -> Clips:
    """Samples, decodes, scales and crops the clips of a local video file.

    Args:
        views: temporal views, spread evenly over the video; one lies in its middle.
        crops: 1 (centre) or 3 (the two ends and the centre of the long side).
        threads: of the decoder. Two take 15 to 20 % off a lone request for up to 19 % more CPU;
            under load, decode several files at a time instead.
    Raises:
        VideoError: the file gives no clips; see `errors.py`. Nothing else is raised for any file.
    """
    if views < 1 or crops not in (1, 3):
        raise ValueError(f"views is {views}, crops is {crops}; views >= 1, crops is 1 or 3")
    size = preprocessing.image_size

    def choose(timeline: Timeline) -> NDArray[np.int64]:
        return sample(timeline, preprocessing, views)[0]

    def convert(frame: VideoFrame, sar: float) -> NDArray[np.uint8]:
        return crop_frame(frame, size, crops, sar)

    reading = read_frames(path, choose, convert, limits=limits, threads=threads)
    return Clips(
        frames=_gather(reading, crops, size),
        times=reading.timeline.times[reading.indices],
        facts=reading.facts,
        truncated=reading.truncated,
        sampling=sample(reading.timeline, preprocessing, views)[1],
    )


def read_frames(
    path: str | Path,
    choose: Choose,
    convert: Convert,
    *,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    threads: int = 1,
) -> Reading:
    """Decodes the frames that `choose` picks from the timeline, and `convert`s only those.

    `convert` gets the decoded frame, not rotated, and the aspect ratio of its pixels.
    `choose` is called again on what really decodes, where that is less than the packets promise.

    Raises:
        VideoError: there are fewer than two frames, or none can be had; see `errors.py`.
    """
    with open_video(path, limits, threads) as video:
        index = scan_packets(video, limits)
        indices = choose(index.timeline) if len(index.frames) else np.empty(0, np.int64)
        album = _Album(video, convert)
        if is_reliable(video, index) and decode_at(video, index, np.unique(indices), album.keep):
            truncated = index.damaged or overclaims(video, index.timeline)
            return album.finish(indices, index.timeline, truncated)
    with open_video(path, limits, threads) as video:
        album = _Album(video, convert)
        survey = take_survey(
            video, {int(number): int(number) for number in indices.flat}, album.keep
        )
        if survey.matches(index.timeline):
            return album.finish(indices, survey.timeline, _is_truncated(video, survey))
    return _read_again(path, choose, convert, survey, limits, threads)


def probe(path: str | Path, limits: Limits = Limits()) -> VideoFacts:  # noqa: B008 (frozen)
    """The facts, from all packets and the first frame that decodes.

    Raises:
        VideoError: as `load_clips`, save that one frame is enough.
    """
    with open_video(path, limits) as video:
        timeline = scan_packets(video, limits).timeline
    with open_video(path, limits) as video:
        frame = next((frame for frame in decode_sequentially(video) if frame is not None), None)
        if frame is None or len(timeline.times) == 0:
            raise nothing_decodes()
        return facts_of(video, displayed(frame, video.sar), timeline)


def _read_again(
    path: str | Path,
    choose: Choose,
    convert: Convert,
    survey: Survey,
    limits: Limits,
    threads: int,
) -> Reading:
    """Chooses among the frames that really decode, and decodes from the beginning once more."""
    if len(survey.order) < 2:
        raise single_frame() if len(survey.order) else nothing_decodes()
    indices = choose(survey.timeline)
    wanted = {int(survey.order[number]): int(number) for number in indices.flat}
    with open_video(path, limits, threads) as video:
        album = _Album(video, convert)
        take_survey(video, wanted, album.keep)
        return album.finish(indices, survey.timeline, _is_truncated(video, survey))


def _is_truncated(video: OpenVideo, survey: Survey) -> bool:
    return survey.damaged or overclaims(video, survey.timeline)


class _Album:
    """Collects converted frames, and the first decoded frame's shape, which headers do not tell."""

    def __init__(self, video: OpenVideo, convert: Convert) -> None:
        self.video = video
        self.convert = convert
        self.pictures: dict[int, NDArray[np.uint8]] = {}
        self.shape: Shape | None = None

    def keep(self, number: int, frame: VideoFrame) -> None:
        self.shape = self.shape or displayed(frame, self.video.sar)
        self.pictures[number] = self.convert(frame, self.video.sar)

    def finish(self, indices: NDArray[np.int64], timeline: Timeline, truncated: bool) -> Reading:
        if self.shape is None or len(self.pictures) < len(np.unique(indices)):
            raise nothing_decodes()
        facts = facts_of(self.video, self.shape, timeline)
        return Reading(indices, self.pictures, timeline, facts, truncated)


def _gather(reading: Reading, crops: int, size: int) -> NDArray[np.uint8]:
    """Lays the crops of each frame where clips want them, letting go of each as it is done."""
    views, count = reading.indices.shape
    out = np.empty((views, crops, count, size, size, 3), np.uint8)
    for number in np.unique(reading.indices):
        picture = reading.pictures.pop(int(number))
        for view, time in np.argwhere(reading.indices == number):
            out[view, :, time] = picture
    return out.reshape(views * crops, count, size, size, 3)
