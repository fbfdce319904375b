"""A clip as a strip of small pictures, JPEG in a `data:` URL, by PyAV alone."""

from __future__ import annotations

import base64
from fractions import Fraction

import av
import numpy as np
from numpy.typing import NDArray

from model.config import Preprocessing
from model.data.remote import local_video
from model.video import VideoError, load_clips, resize_crop

FRAMES, SIDE = 4, 96  # of a strip, and of each picture in pixels
_QUANTISER = "4"  # of the JPEG; about 8 KB a strip


def load_strip(path: str, preprocessing: Preprocessing) -> str | VideoError:
    """The middle clip of a video as `film_strip`, or why there is none."""
    try:
        with local_video(path) as local:
            frames = load_clips(local, preprocessing).frames[0]
    except VideoError as error:
        return error
    return film_strip(frames)


def film_strip(frames: NDArray[np.uint8]) -> str:
    """Some of the frames (time, size, size, 3), evenly spread, side by side."""
    chosen = np.linspace(0, len(frames) - 1, min(len(frames), FRAMES)).round().astype(int)
    pictures = [resize_crop(frames[index], (SIDE, SIDE)) for index in chosen]
    return f"data:image/jpeg;base64,{base64.b64encode(_jpeg(np.hstack(pictures))).decode()}"


def _jpeg(picture: NDArray[np.uint8]) -> bytes:
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.height, encoder.width = picture.shape[:2]
    encoder.pix_fmt, encoder.time_base = "yuvj420p", Fraction(1, 25)
    encoder.options = {"qmin": _QUANTISER, "qmax": _QUANTISER}
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    packets = [*encoder.encode(frame.reformat(format="yuvj420p")), *encoder.encode(None)]
    return b"".join(map(bytes, packets))
