"""The one encoder of small videos for tests: pictures in, a file out."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def encode(
    path: Path,
    pictures: Iterable[np.ndarray],
    *,
    codec: str = "libx264",
    rate: int = 30,
    **options: str,
) -> Path:
    """Writes pictures, uint8 (height, width, 3), as a video; returns its path.

    Args:
        path: the file; its suffix decides the container.
        rate: frames per second.
        options: options of the encoder, such as `crf="10"`.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, rate)
        for number, picture in enumerate(pictures):
            if number == 0:
                stream.height, stream.width = picture.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path
