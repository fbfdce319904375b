"""The packets of a video without decoding any: which are frames, when they show, where to enter.

5 ms for a short clip, about 100 ms for five minutes. Headers are not asked: they lie.
"""

from __future__ import annotations

import dataclasses
from array import array
from fractions import Fraction

import av
import numpy as np
from av.packet import Packet
from av.video.stream import VideoStream
from numpy.typing import NDArray

from model.video.errors import VideoTooLarge
from model.video.opening import Limits, OpenVideo
from model.video.sampling import Timeline

NO_TIME = -(2**63)  # AV_NOPTS_VALUE


@dataclasses.dataclass(frozen=True)
class PacketIndex:
    """All packets in the order they are stored, which is the order they are decoded in.

    Arrays of (packets,): `pts` and `dts` int64 in units of the stream's time base, `NO_TIME` where
    missing; `key`, decoding can start here; `corrupt`, the demuxer saw damage.
    `frames`: int64 (frames,), the packets that put a frame on screen, in order of presentation, no
    two at the same time. `orderly`: each of them has a time of its own, and decoding times never go
    back; otherwise times are not to be trusted. `damaged`: demuxing stopped at an error.
    """

    pts: NDArray[np.int64]
    dts: NDArray[np.int64]
    key: NDArray[np.bool_]
    corrupt: NDArray[np.bool_]
    frames: NDArray[np.int64]
    timeline: Timeline
    orderly: bool
    damaged: bool


def scan_packets(video: OpenVideo, limits: Limits) -> PacketIndex:
    """Demuxes the whole stream.

    Raises:
        VideoTooLarge: more packets or a longer time than `limits` allow.
    """
    pts, dts = array("q"), array("q")
    key, shown, corrupt = bytearray(), bytearray(), bytearray()
    span = _Span(video.time_base, limits.max_duration_s)
    damaged = False
    try:
        for packet in video.container.demux(video.stream):
            if is_flush(packet):
                continue
            if len(pts) >= limits.max_frames:
                raise VideoTooLarge(f"The video has more than {limits.max_frames} frames.")
            is_shown = not packet.is_discard and not is_hidden(video.codec, packet)
            if is_shown and packet.pts is not None:
                span.add(packet.pts)
            pts.append(NO_TIME if packet.pts is None else packet.pts)
            dts.append(NO_TIME if packet.dts is None else packet.dts)
            key.append(packet.is_keyframe)
            shown.append(is_shown)
            corrupt.append(packet.is_corrupt)
    except MemoryError:
        raise
    except av.FFmpegError:
        damaged = True
    times = np.array(pts, np.int64)
    visible = np.frombuffer(shown, np.bool_)
    timed = np.flatnonzero(visible & (times != NO_TIME))
    distinct, first = np.unique(times[timed], return_index=True)
    decoding = np.array(dts, np.int64)
    in_order = bool(np.all(np.diff(decoding[decoding != NO_TIME]) >= 0))
    return PacketIndex(
        pts=times,
        dts=decoding,
        key=np.frombuffer(key, np.bool_),
        corrupt=np.frombuffer(corrupt, np.bool_),
        frames=timed[first],
        timeline=to_timeline(distinct, video.time_base),
        orderly=in_order and len(distinct) == np.count_nonzero(visible),
        damaged=damaged,
    )


def to_timeline(pts: NDArray[np.int64], time_base: Fraction) -> Timeline:
    """Seconds since the first of some ascending pts."""
    return Timeline((pts - pts[:1]).astype(np.float64) * float(time_base))


def is_flush(packet: Packet[VideoStream]) -> bool:
    """Whether this is the empty packet that PyAV appends to every stream."""
    return packet.size == 0 and packet.pts is None and packet.dts is None


def is_hidden(codec: str, packet: Packet[VideoStream]) -> bool:
    """Whether a packet holds only a reference frame that is never shown, with a time of its own.

    VP8: RFC 6386, section 9.1. VP9: bitstream specification, section 6.2; a superframe (annex B)
    brings the frame that is shown along. AV1 has no such packets.
    """
    if codec not in ("vp8", "vp9") or packet.size == 0:
        return False
    data = memoryview(packet)
    head, tail = data[0], data[-1]
    if codec == "vp8":
        return not head & 0x10
    if head >> 6 != 0b10 or tail & 0xE0 == 0xC0:
        return False
    after_profile = head >> 1 if head & 0x30 != 0x30 else head  # profile 3 has a bit more
    show_existing, show = after_profile & 0b100, after_profile & 0b1
    return not show_existing and not show


class _Span:
    """First to last pts seen, checked against the limit in exact integers: pts may be hostile."""

    def __init__(self, time_base: Fraction, max_duration_s: float) -> None:
        self.limit = max_duration_s
        self.longest = int(max_duration_s / time_base)
        self.low: int | None = None
        self.high = 0

    def add(self, pts: int) -> None:
        """Raises `VideoTooLarge` when the video has become too long."""
        if self.low is None:
            self.low = self.high = pts
        self.low, self.high = min(self.low, pts), max(self.high, pts)
        if self.high - self.low > self.longest:
            raise VideoTooLarge(f"The video is longer than {self.limit:g} seconds.")
