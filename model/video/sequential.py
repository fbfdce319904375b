"""Decoding a file from end to end: the reference, and the way out for files that are not sound."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import av
import numpy as np
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from model.video.index import is_flush, to_timeline
from model.video.opening import OpenVideo
from model.video.sampling import Timeline
from model.video.selective import Keep, Tick


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


@dataclasses.dataclass(frozen=True)
class Survey:
    """What decodes, of a whole file.

    `order`: int64 (frames,), positions among the decoded frames, no two shown at the same time;
    `timeline`: theirs; `damaged`: something did not decode or is flagged corrupt.
    """

    order: NDArray[np.int64]
    timeline: Timeline
    damaged: bool

    def matches(self, expected: Timeline) -> bool:
        """Whether these are the frames that were expected, so that a choice of those holds."""
        enough = len(self.order) > 1 and self.order[-1] == len(self.order) - 1
        return enough and np.array_equal(self.timeline.times, expected.times)


def take_survey(
    video: OpenVideo, wanted: dict[int, int], keep: Keep, tick: Tick = lambda: None
) -> Survey:
    """Decodes all of a file, keeping some frames by their position: {position: index to keep as}.

    The order of decoded frames is right even where their times are not: these are sorted. Where
    times are missing, frames follow each other at the nominal rate.
    """
    pts: list[int | None] = []
    damaged = False
    for frame in decode_sequentially(video):
        tick()
        damaged = damaged or frame is None or frame.is_corrupt
        if frame is None:
            continue
        if len(pts) in wanted:
            keep(wanted[len(pts)], frame)
        pts.append(frame.pts)
    known = np.array([time for time in pts if time is not None], np.int64)
    if len(known) < len(pts):
        positions = np.arange(len(pts), dtype=np.int64)
        return Survey(positions, Timeline(positions / video.nominal_rate), damaged)
    distinct, first = np.unique(np.sort(known), return_index=True)
    return Survey(first.astype(np.int64), to_timeline(distinct, video.time_base), damaged)
