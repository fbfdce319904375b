"""Tiny videos whose frames say their own number, so that the right frame can be proved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import OutputContainer
from av.video.stream import VideoStream
from numpy.typing import NDArray

from model.video import Timeline, read_frames, to_rgb

SIDE, BITS = 64, 8


def draw(number: int) -> NDArray[np.uint8]:
    """RGB (64, 64, 3): the number as eight bars, high bit first, white for 1."""
    bars = [(number >> bit & 1) * 255 for bit in reversed(range(BITS))]
    row = np.repeat(np.array(bars, np.uint8), SIDE // BITS)
    return np.ascontiguousarray(np.broadcast_to(row[None, :, None], (SIDE, SIDE, 3)))


def number_in(frame: NDArray[np.uint8]) -> int:
    """What `draw` drew, after compression and, if square, after any scaling."""
    bars = np.array_split(frame.mean(axis=(0, 2)), BITS)
    return int("".join("1" if bar.mean() > 127 else "0" for bar in bars), 2)


def write_video(
    path: Path,
    frames: int = 60,
    *,
    codec: str = "libx264",
    rate: int = 30,
    pts: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    before: Callable[[OutputContainer], object] | None = None,
    change: Callable[[VideoStream], object] | None = None,
) -> Path:
    """Encodes frames 0, 1, 2, ... at `pts` in units of `time_base` (default: one each 1/rate)."""
    with av.open(str(path), "w", options=container_options) as container:
        if before is not None:
            before(container)
        stream = container.add_stream(codec, rate=rate, options=options or {})
        assert isinstance(stream, VideoStream)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        base = time_base or Fraction(1, rate)
        stream.codec_context.time_base = base
        if change is not None:
            change(stream)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(draw(number), "rgb24")
            frame.pts = number if pts is None else pts[number]
            frame.time_base = base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def numbers_of_all(path: Path) -> tuple[list[int], Timeline]:
    """The number on every frame, in order of presentation, and the timeline."""

    def everything(timeline: Timeline) -> NDArray[np.int64]:
        return np.arange(len(timeline.times), dtype=np.int64)

    reading = read_frames(path, everything, lambda frame, _: to_rgb(frame))
    numbers = [number_in(reading.pictures[n]) for n in range(len(reading.pictures))]
    return numbers, reading.timeline
