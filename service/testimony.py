"""What a decoder says, checked before it is believed: a file may have taken the decoder over.

`ValueError`, `TypeError`, `KeyError` and `OSError` mean that it has.
"""

from __future__ import annotations

import math
from multiprocessing.connection import Connection
from typing import Any, get_args

import numpy as np
import orjson
from numpy.typing import NDArray

from model.config import Sampling
from model.video import VideoFacts
from service.errors import VIDEO_STATUS, VideoRejectedError

# The times of a thousand clips of 96 frames are two.
_MAX_BYTES = 8 * 1024 * 1024
_MAX_NAME, _MAX_DETAIL = 100, 1000


def receive(connection: Connection) -> dict[str, Any]:
    """The next message. JSON, never a pickle, which would let a file get further.

    Raises:
        VideoRejectedError: it is a refusal of the video.
    """
    message = orjson.loads(connection.recv_bytes(_MAX_BYTES))
    if not isinstance(message, dict):
        raise TypeError("the decoder sent no object")
    if "code" in message:
        if message["code"] not in VIDEO_STATUS:  # it becomes a label of a metric
            raise ValueError("the decoder sent a code that there is not")
        raise VideoRejectedError(message["code"], text(message["detail"], _MAX_DETAIL))
    return message


def pixels(connection: Connection, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The next message, as frames of this shape. A longer one is not read."""
    size = math.prod(shape)
    content = connection.recv_bytes(size)
    if len(content) != size:
        raise ValueError("the decoder sent fewer pixels than it should")
    return np.frombuffer(content, np.uint8).reshape(shape)


def facts(value: dict[str, Any]) -> VideoFacts:
    """What it found the video to be."""
    found = VideoFacts(**value)
    for number in (found.width, found.height, found.rotation, found.frames):
        whole(number)
    real(found.duration_s)
    if found.frame_rate is not None:
        real(found.frame_rate)
    for name in (found.codec, found.container):
        text(name, _MAX_NAME)
    return found


def times(value: object, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """When the frames that it chose appear."""
    found = np.array(value, np.float64)
    if found.shape != shape or not np.isfinite(found).all():
        raise ValueError("the decoder sent times that cannot be")
    return found


def sampling(value: object) -> Sampling:
    """How it chose them."""
    known: tuple[Sampling, ...] = get_args(Sampling)
    for name in known:
        if name == value:
            return name
    raise ValueError("the decoder sent a sampling that there is not")


def whole(value: object, most: int = 2**53) -> int:
    """A number from 0 on."""
    if not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError("the decoder sent a number that cannot be")
    return value


def real(value: object) -> float:
    """A number that is none of those that JSON has not."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("the decoder sent a number that cannot be")
    return float(value)


def text(value: object, most: int) -> str:
    """For people; not much of it."""
    if not isinstance(value, str) or len(value) > most:
        raise ValueError("the decoder sent a text that cannot be")
    return value
