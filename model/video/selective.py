"""Decoding a few frames of a file, exactly, at a fraction of the cost of decoding it all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import av
import numpy as np
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from model.video.index import NO_TIME, PacketIndex, is_flush
from model.video.opening import OpenVideo

Keep = Callable[[int, VideoFrame], None]
Tick = Callable[[], None]


def decode_at(
    video: OpenVideo,
    index: PacketIndex,
    wanted: NDArray[np.int64],
    keep: Keep,
    tick: Tick = lambda: None,
) -> bool:
    """Decodes only what the wanted frames depend on, and `keep`s exactly those.

    Bit-identical to the sequential pass on sound files: it enters at the keyframe before each
    wanted frame, and of the frames between skips only those that no other frame refers to. For one
    clip of eight frames it takes 0.21 of the CPU time of that pass on 30 s of VP8 720p, 0.34 on
    10 s of H.264, and as much where one GOP holds all and every frame is referred to.

    Args:
        wanted: int64 (n,), ascending indices into `index.frames`.
        tick: called after each decoded frame, wanted or not.
    Returns:
        False if anything looks wrong (a frame is missing or flagged corrupt, packets differ from
        the index, an error): the caller then reads the file from end to end.
    """
    try:
        return all(_decode_run(video, index, run, keep, tick) for run in plan_runs(index, wanted))
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
    packets = index.frames[wanted]
    pts = index.pts[packets]
    first = _entries(index, packets, pts)
    order = np.argsort(first, kind="stable")
    runs: list[Run] = []
    columns = (column[order].tolist() for column in (first, packets, pts, wanted))
    for entry, packet, time, number in zip(*columns, strict=True):
        if runs and entry <= runs[-1].last:
            runs[-1].last = max(runs[-1].last, packet)
            runs[-1].wanted[time] = number
        else:
            runs.append(Run(entry, packet, {time: number}))
    return runs


def _entries(
    index: PacketIndex, packets: NDArray[np.int64], pts: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The packet to enter at for each wanted packet, 0 where no keyframe is early enough."""
    keys = np.flatnonzero(index.key)
    if len(keys) == 0:
        return np.zeros_like(packets)
    entry = np.searchsorted(keys, packets, side="right") - 1
    while (late := (entry >= 0) & (index.pts[keys[entry]] > pts)).any():
        entry[late] -= 1
    return np.where(entry >= 0, keys[entry], 0)


def _decode_run(video: OpenVideo, index: PacketIndex, run: Run, keep: Keep, tick: Tick) -> bool:
    if index.corrupt[run.first : run.last + 1].any():
        return False
    missing = dict(run.wanted)
    latest = NO_TIME
    for frame in _frames_of_run(video, index, run):
        if frame is None or frame.is_corrupt or frame.pts is None or frame.pts <= latest:
            return False
        latest = frame.pts
        tick()
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
        context.skip_frame = "DEFAULT" if packet.pts in run.wanted else "NONREF"
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
