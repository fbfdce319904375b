"""Opening a file that may be hostile: what is let in, and how every failure becomes a `VideoError`.

In goes a path, out comes an `OpenVideo`: the container and its one video stream, within limits.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
from av.container import InputContainer
from av.stream import Discard, Disposition
from av.video.stream import VideoStream

from model.video.errors import (
    EmptyFile,
    NoVideoStream,
    UndecodableVideo,
    UnsupportedFormat,
    VideoError,
    VideoTooLarge,
)
from model.video.transforms import usable_sar

# Demuxers that read one file and nothing else. This list is what stops playlists: with FFmpeg's
# own choice, an HLS list or a concat script named `clip.mp4` makes requests and opens other files.
# The last four are sound, so that the answer to a song is that it holds no video.
FORMATS = (
    *("mov", "matroska", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "ogg", "asf"),
    *("mp3", "wav", "flac", "aac"),
)
FORMATS_IN_WORDS = "MP4, MOV, 3GP, MKV, WebM, AVI, MPEG, MPEG-TS, FLV, Ogg and ASF"

# Canonical names of what people's videos are made of. A decoder nobody needs is attack surface.
CODECS = frozenset(
    {
        *("h264", "hevc", "vp8", "vp9", "av1"),
        *(
            "mpeg1video",
            "mpeg2video",
            "mpeg4",
            "msmpeg4v1",
            "msmpeg4v2",
            "msmpeg4v3",
            "h263",
            "flv1",
        ),
        *("wmv1", "wmv2", "wmv3", "vc1", "theora", "mjpeg", "prores", "dnxhd", "ffv1"),
    }
)
_NOT_A_VIDEO = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much video one file may hold. More is `VideoTooLarge`, found before it is decoded.

    `max_pixels` in a frame: 8K by default. A 12000 x 12000 frame in a 424 KB file costs 615 MB to
    decode. `max_duration_s`: four hours, by presentation times. `max_frames`: packets of the
    video stream, four hours at 60 frames a second; the index takes 20 bytes for each.
    """

    max_pixels: int = 8192 * 4320
    max_duration_s: float = 4 * 3600.0
    max_frames: int = 4 * 3600 * 60


@dataclasses.dataclass(frozen=True)
class OpenVideo:
    """A container, its one video stream, and what the headers say.

    The facts are copies, as fields of a stream read after its container is closed are wrong.
    `sar`: width of a coded pixel over its height. `claimed_s` and `claimed_frames` are what the
    headers say; they often lie and decide nothing but `truncated`.
    """

    container: InputContainer
    stream: VideoStream
    codec: str
    format: str
    time_base: Fraction
    sar: float
    nominal_rate: float
    claimed_s: float | None
    claimed_frames: int


@contextlib.contextmanager
def typed_errors() -> Iterator[None]:
    """Turns whatever PyAV raises on bad input into a `VideoError`; its message names no path."""
    try:
        yield
    except VideoError:
        raise
    except MemoryError as error:
        raise VideoTooLarge("Decoding this video takes more memory than is allowed.") from error
    except (av.FFmpegError, OSError, ValueError, ArithmeticError, LookupError) as error:
        raise UndecodableVideo("This file cannot be read as a video; it may be damaged.") from error


@contextlib.contextmanager
def open_video(path: str | Path, limits: Limits, threads: int = 1) -> Iterator[OpenVideo]:
    """Opens the video stream of a local file; errors inside the block become `VideoError` too.

    Raises:
        VideoError: any but `TooFewFrames`.
    """
    with typed_errors():
        path = Path(path).absolute()
        if path.stat().st_size == 0:
            raise EmptyFile("The file is empty.")
        with _open_container(path, limits) as container:
            stream = _choose_stream(container)
            _check(stream, limits)
            _configure(container, stream, limits, threads)
            yield _describe(container, stream)


def _open_container(path: Path, limits: Limits) -> InputContainer:
    options = {
        "format_whitelist": ",".join(FORMATS),
        "protocol_whitelist": "file",
        # Opening decodes a few frames already: 333 MB for the bomb above, 50 MB with this.
        "max_pixels": str(limits.max_pixels),
    }
    try:
        return av.open(str(path), mode="r", options=options, metadata_errors="replace")
    except av.ArgumentError as error:  # what FFmpeg says of a demuxer that is not on the list
        raise UnsupportedFormat(
            f"This is not a video format that is read here; those are {FORMATS_IN_WORDS}."
        ) from error


def _choose_stream(container: InputContainer) -> VideoStream:
    """The first default video stream, else the first; cover art and thumbnails do not count."""
    moving = [s for s in container.streams.video if not s.disposition & _NOT_A_VIDEO]
    if not moving:
        raise NoVideoStream("This file holds no video; it may be sound only.")
    return next((s for s in moving if s.disposition & Disposition.default), moving[0])


def _check(stream: VideoStream, limits: Limits) -> None:
    codec = _codec_name(stream)
    if codec not in CODECS:
        raise UnsupportedFormat(f"Videos coded as {codec or 'an unknown codec'} are not read here.")
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > limits.max_pixels:
        raise VideoTooLarge(
            f"The video is {width} x {height} pixels; at most {limits.max_pixels} pixels a frame "
            "are read."
        )


def _configure(
    container: InputContainer, stream: VideoStream, limits: Limits, threads: int
) -> None:
    context = stream.codec_context
    context.options = {"max_pixels": str(limits.max_pixels)}
    context.thread_count = threads
    for other in container.streams:
        if other.index != stream.index:
            other.discard = Discard.all  # the demuxer need not even read them


def _describe(container: InputContainer, stream: VideoStream) -> OpenVideo:
    time_base = stream.time_base or Fraction(1, av.time_base)
    claimed: float | None = None
    if stream.duration:
        claimed = float(stream.duration * time_base)
    elif container.duration:
        claimed = container.duration / av.time_base
    return OpenVideo(
        container=container,
        stream=stream,
        codec=_codec_name(stream),
        format=container.format.name,
        time_base=time_base,
        sar=usable_sar(_ratio(stream.sample_aspect_ratio)),
        nominal_rate=_ratio(stream.average_rate) or 25.0,
        claimed_s=claimed,
        claimed_frames=stream.frames,
    )


def _codec_name(stream: VideoStream) -> str:
    # Without a decoder PyAV leaves the context out, whatever its type hints say.
    context = cast(Any, stream.codec_context)
    return str(context.codec.canonical_name) if context else ""


def _ratio(fraction: Fraction | None) -> float | None:
    return float(fraction) if fraction else None
