"""Messages between the server and a decoder: requests go in, clips or windows come out.

The server sends a request as a pickle. A decoder answers in JSON and raw pixels. The server checks
every answer, because a hostile file may have taken over the decoder: `ValueError`, `TypeError`,
`KeyError` and `OSError` mean that it has. A pickle of the decoder would give the file the server.
"""

from __future__ import annotations

import math
import os
import socket
import struct
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import orjson
from numpy.typing import NDArray

from model.config import Preprocessing, Sampling
from model.video import Clips, Cut, Ended, Limits, Opened, VideoFacts, Window
from service.errors import VIDEO_STATUS, VideoRejectedError

if TYPE_CHECKING:
    from service.settings import Settings

StreamMessage = Opened | Window | Ended
STARTED = b"started"
"""A decoder sends it before it opens a file. A crash after that is blamed on the file."""
# The times of a thousand clips of 96 frames are 2 MiB.
_MAX_BYTES = 8 * 1024 * 1024
_MAX_NAME, _MAX_DETAIL = 100, 1000


class DecodeRequest(NamedTuple):
    """One video to decode."""

    path: Path
    preprocessing: Preprocessing
    views: int
    crops: Literal[1, 3]


class StreamRequest(NamedTuple):
    """One long video to decode, window by window."""

    path: Path
    preprocessing: Preprocessing
    cut: Cut
    limits: Limits
    """Of this request, because a long video may be longer than one of a `DecodeRequest`."""


class DecoderLimits(NamedTuple):
    """What one decoder process may use and do."""

    memory_bytes: int
    timeout_s: float
    """For one video; for a long video, the time without any progress."""
    video: Limits
    sandboxed: bool = True
    folders: tuple[Path, ...] | None = None
    """What a sandboxed decoder may read, see `sandbox.enter`."""
    niceness: int = 0

    @classmethod
    def of(cls, settings: Settings, folders: tuple[Path, ...] | None = None) -> DecoderLimits:
        """Returns the limits of the settings; decoders may read `folders`, or any file."""
        video = Limits(
            max_pixels=settings.max_video_pixels, max_duration_s=settings.max_video_duration_s
        )
        sandboxed = settings.decode_sandbox != "off"
        return cls(
            settings.decode_memory_bytes, settings.decode_timeout_s, video, sandboxed, folders
        )


class StalledError(Exception):
    """The decoder has reported no progress for too long."""


def receive_clips(connection: Connection, request: DecodeRequest, timeout_s: float) -> Clips:
    """Waits for the clips of a video.

    Raises:
        VideoRejectedError: the decoder rejects the video.
        StalledError: the decoder took longer than `timeout_s`.
        EOFError, OSError, ValueError, KeyError, TypeError: the decoder crashed or was taken over.
    """
    answer = _receive(connection, timeout_s)
    seen = request.preprocessing
    shape = (request.views * request.crops, *_clip_shape(seen))
    return Clips(
        frames=_receive_pixels(connection, shape, timeout_s),
        times=_check_times(answer["times"], (request.views, seen.num_frames)),
        facts=_check_facts(answer["facts"]),
        truncated=bool(answer["truncated"]),
        sampling=_check_sampling(answer["sampling"]),
    )


def receive_stream_message(
    connection: Connection, request: StreamRequest, stall_s: float
) -> StreamMessage:
    """Waits for the next message of a long video.

    Raises:
        VideoRejectedError: the decoder rejects the video.
        StalledError: there was no progress for `stall_s`.
        EOFError, OSError, ValueError, KeyError, TypeError: the decoder crashed or was taken over.
    """
    message = _receive(connection, stall_s)
    while message["kind"] == "progress":
        message = _receive(connection, stall_s)
    most = request.cut.max_windows
    match message["kind"]:
        case "opened":
            return Opened(_check_facts(message["facts"]), _check_int(message["windows"], most))
        case "window":
            shape = (request.cut.crops, *_clip_shape(request.preprocessing))
            return Window(
                number=_check_int(message["number"], most),
                start_s=_check_float(message["start_s"]),
                end_s=_check_float(message["end_s"]),
                times=tuple(map(_check_float, message["times"])),
                frames=_receive_pixels(connection, shape, stall_s),
            )
        case "ended":
            count = _check_int(message["windows"], most)
            return Ended(_check_facts(message["facts"]), count, bool(message["truncated"]))
    raise ValueError("the decoder sent a message of an unknown kind")


def _clip_shape(seen: Preprocessing) -> tuple[int, int, int, int]:
    return (seen.num_frames, seen.image_size, seen.image_size, 3)


def _receive_bytes(connection: Connection, max_bytes: int, timeout_s: float) -> bytes:
    """Returns the next message. A longer message is not read.

    A decoder that is ahead of the server waits in the middle of a message and may stop there, so
    the time limit is also one of the socket, for each part of the message.
    """
    if not connection.poll(timeout_s):
        raise StalledError
    whole_s = int(timeout_s)
    limit = struct.pack("@ll", whole_s, max(1, int((timeout_s - whole_s) * 1e6)))
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    try:
        return connection.recv_bytes(max_bytes)
    except BlockingIOError:
        raise StalledError from None


def _receive(connection: Connection, timeout_s: float) -> dict[str, Any]:
    message = orjson.loads(_receive_bytes(connection, _MAX_BYTES, timeout_s))
    if not isinstance(message, dict):
        raise TypeError("the decoder sent no object")
    if "code" in message:
        if message["code"] not in VIDEO_STATUS:  # the code becomes a label of a metric
            raise ValueError("the decoder sent an unknown code")
        raise VideoRejectedError(message["code"], _check_str(message["detail"], _MAX_DETAIL))
    return message


def _receive_pixels(
    connection: Connection, shape: tuple[int, ...], timeout_s: float
) -> NDArray[np.uint8]:
    size = math.prod(shape)
    content = _receive_bytes(connection, size, timeout_s)
    if len(content) != size:
        raise ValueError("the decoder sent fewer pixels than the shape needs")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _check_facts(value: dict[str, Any]) -> VideoFacts:
    facts = VideoFacts(**value)
    for number in (facts.width, facts.height, facts.rotation, facts.frames):
        _check_int(number)
    _check_float(facts.duration_s)
    if facts.frame_rate is not None:
        _check_float(facts.frame_rate)
    for name in (facts.codec, facts.container):
        _check_str(name, _MAX_NAME)
    return facts


def _check_times(value: object, shape: tuple[int, ...]) -> NDArray[np.float64]:
    times = np.array(value, np.float64)
    if times.shape != shape or not np.isfinite(times).all():
        raise ValueError("the decoder sent impossible times")
    return times


def _check_sampling(value: object) -> Sampling:
    known: tuple[Sampling, ...] = get_args(Sampling)
    for name in known:
        if name == value:
            return name
    raise ValueError("the decoder sent an unknown sampling")


def _check_int(value: object, most: int = 2**53) -> int:
    if not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError("the decoder sent an impossible number")
    return value


def _check_float(value: object) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("the decoder sent an impossible number")
    return float(value)


def _check_str(value: object, most: int) -> str:
    if not isinstance(value, str) or len(value) > most:
        raise ValueError("the decoder sent an impossible text")
    return value
