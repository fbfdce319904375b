"""From a video file to clips: exactly the frames that are wanted, decoding as little as possible.

Serving calls `load_clips`; training builds upon `read_frames`; `probe` tells the facts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from model.config import Preprocessing, Sampling
from model.video.errors import TooFewFrames, UndecodableVideo
from model.video.index import NO_TIME, PacketIndex, is_flush, scan_packets, to_timeline
from model.video.opening import Limits, OpenVideo, open_video
from model.video.sampling import Timeline, sample
from model.video.transforms import Crops, crop_frame, upright_turns

Choose = Callable[[Timeline], NDArray[np.int64]]
Convert = Callable[[VideoFrame, float], NDArray[np.uint8]]
Keep = Callable[[int, VideoFrame], None]

# A claim is called a lie when it is off by half and by more than a second: sound often outlasts
# the picture a little.
_CLAIM_FACTOR, _CLAIM_SLACK_S = 1.5, 1.0


@dataclasses.dataclass(frozen=True)
class VideoFacts:
    """What the file really holds, by its packets and one decoded frame, not by its headers.

    `width`, `height`: as displayed, after rotation and with square pixels. `rotation`: clockwise
    degrees that set the coded frames upright (0, 90, 180, 270). `frame_rate`: mean, by presentation
    times; None where they do not advance. `duration_s`: from the first frame to the end of the
    last, which is taken to stay as long as the median frame.
    """

    width: int
    height: int
    rotation: int
    frame_rate: float | None
    frames: int
    duration_s: float
    codec: str
    container: str


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
        album = _Album(video, convert)
        if index.complete and len(index.frames) > 1:
            indices = choose(index.timeline)
            if decode_at(video, index, np.unique(indices), album.keep):
                truncated = index.damaged or _overclaims(video, index.timeline)
                return album.finish(indices, index.timeline, truncated)
    return _read_sequentially(path, choose, convert, limits, threads)


def probe(path: str | Path, limits: Limits = Limits()) -> VideoFacts:  # noqa: B008 (frozen)
    """The facts, from all packets and the first frame that decodes.

    Raises:
        VideoError: as `load_clips`, save that one frame is enough.
    """
    with open_video(path, limits) as video:
        timeline = scan_packets(video, limits).timeline
    with open_video(path, limits) as video:
        frame = next((frame for frame in decode_sequentially(video) if frame is not None), None)
        if frame is None:
            raise _nothing_decodes()
        return _facts(video, _displayed(frame, video.sar), timeline)


def decode_at(video: OpenVideo, index: PacketIndex, wanted: NDArray[np.int64], keep: Keep) -> bool:
    """Decodes only what the wanted frames depend on, and `keep`s exactly those.

    Bit-identical to the sequential pass: it enters at the keyframe before each wanted frame, and
    of the frames between skips only those that no other frame refers to. Takes 0.05 to 0.9 of the
    CPU time of that pass (one clip of eight frames of five minutes; ten seconds of small video).

    Args:
        wanted: int64 (n,), ascending indices into `index.frames`.
    Returns:
        False if anything looks wrong (a frame is missing or flagged corrupt, packets differ from
        the index, an error): the caller then reads the file from end to end.
    """
    try:
        return all(_decode_run(video, index, run, keep) for run in plan_runs(index, wanted))
    except MemoryError:
        raise
    except av.FFmpegError:
        return False


@dataclasses.dataclass
class Run:
    """Packets `first` to `last` of the index, and the frames wanted of them, by pts."""

    first: int
    last: int
    wanted: dict[int, int]


def plan_runs(index: PacketIndex, wanted: NDArray[np.int64]) -> list[Run]:
    """The stretches of packets to decode, in order; those that touch are one.

    A run enters at the last keyframe that neither comes after the wanted packet nor shows after
    it: the leading frames of an open GOP show before its keyframe and need the GOP before.
    """
    keys = np.flatnonzero(index.key)
    runs: list[Run] = []
    for number in wanted:
        packet = int(index.frames[number])
        pts = int(index.pts[packet])
        before = keys[: np.searchsorted(keys, packet, side="right")]
        entries = before[index.pts[before] <= pts]
        first = int(entries[-1]) if len(entries) else 0
        runs.append(Run(first, packet, {pts: int(number)}))
    return _merge(sorted(runs, key=lambda run: run.first))


def _merge(runs: list[Run]) -> list[Run]:
    merged = runs[:1]
    for run in runs[1:]:
        if run.first <= merged[-1].last:
            merged[-1].last = max(merged[-1].last, run.last)
            merged[-1].wanted.update(run.wanted)
        else:
            merged.append(run)
    return merged


def _decode_run(video: OpenVideo, index: PacketIndex, run: Run, keep: Keep) -> bool:
    if index.corrupt[run.first : run.last + 1].any():
        return False
    missing = dict(run.wanted)
    latest = NO_TIME
    for frame in _frames_of_run(video, index, run):
        if frame is None or frame.is_corrupt or frame.pts is None or frame.pts <= latest:
            return False
        latest = frame.pts
        number = missing.pop(frame.pts, None)
        if number is not None:
            keep(number, frame)
        if not missing:
            return True
    return False


def _frames_of_run(video: OpenVideo, index: PacketIndex, run: Run) -> Iterator[VideoFrame | None]:
    """Frames of a run, wanted or not; None where the packets are not those of the index."""
    context = video.stream.codec_context
    entry = int(index.dts[run.first])
    if entry == NO_TIME:
        entry = int(index.pts[run.first])
    video.container.seek(entry, stream=video.stream)
    # AVI has no presentation times, only FFmpeg's guess at them. Where B-frames are packed the
    # guess is wrong, which shows in the order of frames, but only if none is left out.
    may_skip = video.format != "avi"
    position = run.first
    entered = False
    for packet in video.container.demux(video.stream):
        if is_flush(packet):
            break
        same = _same_packet(index, position, packet.pts, packet.dts)
        if not entered and not same:
            if packet.dts is not None and packet.dts > entry:
                break  # the seek went too far
            continue
        if not same:
            yield None
            return
        entered = True
        context.skip_frame = "NONREF" if may_skip and packet.pts not in run.wanted else "DEFAULT"
        yield from context.decode(packet)
        position += 1
        if position > run.last:
            break
    yield from context.decode(None)


def _same_packet(index: PacketIndex, position: int, pts: int | None, dts: int | None) -> bool:
    """Whether a demuxed packet is the one at `position`; seeking may lose its dts."""
    if index.pts[position] != (NO_TIME if pts is None else pts):
        return False
    return dts is None or index.dts[position] in (NO_TIME, dts)


def decode_sequentially(video: OpenVideo) -> Iterator[VideoFrame | None]:
    """Every frame that decodes, in order of presentation; None for each error on the way."""
    try:
        for packet in video.container.demux(video.stream):
            if not is_flush(packet):
                yield from _decode(video, packet)
    except MemoryError:
        raise
    except av.FFmpegError:  # of the demuxer: what follows cannot be found
        yield None
    yield from _decode(video, None)


def _decode(video: OpenVideo, packet: Packet[VideoStream] | None) -> list[VideoFrame | None]:
    try:
        return list(video.stream.codec_context.decode(packet))
    except MemoryError:
        raise
    except av.FFmpegError:
        return [None]


def _read_sequentially(
    path: str | Path, choose: Choose, convert: Convert, limits: Limits, threads: int
) -> Reading:
    """Decodes everything twice: to learn what there is, then to convert what is chosen of it."""
    with open_video(path, limits, threads) as video:
        order, timeline, damaged = _survey(video)
    if len(order) < 2:
        raise _nothing_decodes() if len(order) == 0 else _single_frame()
    indices = choose(timeline)
    wanted = {int(order[n]): int(n) for n in np.unique(indices)}
    with open_video(path, limits, threads) as video:
        album = _Album(video, convert)
        frames = (frame for frame in decode_sequentially(video) if frame is not None)
        for position, frame in enumerate(frames):
            if position in wanted:
                album.keep(wanted[position], frame)
            if len(album.pictures) == len(wanted):
                break
        return album.finish(indices, timeline, damaged or _overclaims(video, timeline))


def _survey(video: OpenVideo) -> tuple[NDArray[np.int64], Timeline, bool]:
    """Which of the decoded frames come when; whether any did not decode or is flagged corrupt.

    Returns:
        int64 (frames,) positions among the frames that decode, no two at the same time; their
        timeline; and whether there is damage. The order of decoded frames is right even where their
        times are not: these are sorted. Where times are missing, frames follow each other at the
        nominal rate.
    """
    pts: list[int | None] = []
    damaged = False
    for frame in decode_sequentially(video):
        damaged = damaged or frame is None or frame.is_corrupt
        if frame is not None:
            pts.append(frame.pts)
    known = np.array([time for time in pts if time is not None], np.int64)
    if len(known) < len(pts):
        return np.arange(len(pts)), Timeline(np.arange(len(pts)) / video.nominal_rate), damaged
    distinct, first = np.unique(np.sort(known), return_index=True)
    return first.astype(np.int64), to_timeline(distinct, video.time_base), damaged


class _Album:
    """Collects converted frames, and the first decoded frame's shape, which headers do not tell."""

    def __init__(self, video: OpenVideo, convert: Convert) -> None:
        self.video = video
        self.convert = convert
        self.pictures: dict[int, NDArray[np.uint8]] = {}
        self.shape: _Shape | None = None

    def keep(self, number: int, frame: VideoFrame) -> None:
        self.shape = self.shape or _displayed(frame, self.video.sar)
        self.pictures[number] = self.convert(frame, self.video.sar)

    def finish(self, indices: NDArray[np.int64], timeline: Timeline, truncated: bool) -> Reading:
        if self.shape is None or len(self.pictures) < len(np.unique(indices)):
            raise _nothing_decodes()
        facts = _facts(self.video, self.shape, timeline)
        return Reading(indices, self.pictures, timeline, facts, truncated)


_Shape = tuple[int, int, int]  # width and height as displayed, clockwise rotation


def _displayed(frame: VideoFrame, sar: float) -> _Shape:
    turns = upright_turns(frame.rotation)
    width, height = max(round(frame.width * sar), 1), frame.height
    if turns % 2:
        width, height = height, width
    return width, height, -90 * turns % 360


def _facts(video: OpenVideo, shape: _Shape, timeline: Timeline) -> VideoFacts:
    return VideoFacts(
        *shape,
        frame_rate=timeline.frame_rate,
        frames=len(timeline.times),
        duration_s=timeline.duration,
        codec=video.codec,
        container=video.format,
    )


def _overclaims(video: OpenVideo, timeline: Timeline) -> bool:
    """Whether the headers promise far more than the file holds: it was cut off."""
    if video.claimed_frames > _CLAIM_FACTOR * len(timeline.times):
        return True
    longest = _CLAIM_FACTOR * timeline.duration + _CLAIM_SLACK_S
    return video.claimed_s is not None and video.claimed_s > longest


def _gather(reading: Reading, crops: int, size: int) -> NDArray[np.uint8]:
    """Lays the crops of each frame where clips want them, letting go of each as it is done."""
    views, count = reading.indices.shape
    out = np.empty((views, crops, count, size, size, 3), np.uint8)
    for number in np.unique(reading.indices):
        picture = reading.pictures.pop(int(number))
        for view, time in np.argwhere(reading.indices == number):
            out[view, :, time] = picture
    return out.reshape(views * crops, count, size, size, 3)


def _nothing_decodes() -> UndecodableVideo:
    return UndecodableVideo("No frame of this video can be decoded; the file may be damaged.")


def _single_frame() -> TooFewFrames:
    return TooFewFrames("This file holds a single frame; recognising an action takes a video.")
