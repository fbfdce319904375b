"""Windows of a long video over the pipe of a decoder worker, and what each side does for it.

Messages of the worker: `progress`, `opened`, `window` with the pixels in a message of their own,
`ended`, or a refusal as of a single video. The pipe holds less than a window, so a worker decodes
no further than a window beyond what has been taken from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from model.config import Preprocessing
from model.video import (
    Cut,
    Ended,
    Limits,
    Opened,
    Window,
    stream_windows,
)
from service import testimony

Piece = Opened | Window | Ended
_PROGRESS_EVERY_S = 1.0


class StreamJob(NamedTuple):
    """One long video to decode, window by window."""

    path: Path
    preprocessing: Preprocessing
    cut: Cut
    limits: Limits
    """Of their own: a long video may be longer than one that is classified at once."""


class StalledError(Exception):
    """The worker has told of no progress for too long."""


def send_windows(connection: Connection, job: StreamJob, on_progress: Callable[[], object]) -> None:
    """The worker's side: decodes the video, sending each window as it is complete.

    Args:
        on_progress: called about once a second while frames decode.
    Raises:
        VideoError: the file gives no windows, or no more.
    """
    last = time.monotonic()

    def tick() -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= _PROGRESS_EVERY_S:
            last = now
            on_progress()
            connection.send_bytes(b'{"kind":"progress"}')

    def emit(piece: Opened | Window) -> None:
        if isinstance(piece, Opened):
            connection.send_bytes(orjson.dumps({"kind": "opened", **asdict(piece)}))
            return
        header = {
            "kind": "window",
            "number": piece.number,
            "start_s": piece.start_s,
            "end_s": piece.end_s,
            "times": piece.times,
        }
        connection.send_bytes(orjson.dumps(header))
        connection.send_bytes(np.ascontiguousarray(piece.frames).reshape(-1).data)

    ended = stream_windows(job.path, job.preprocessing, job.cut, emit, tick=tick, limits=job.limits)
    connection.send_bytes(orjson.dumps({"kind": "ended", **asdict(ended)}))


def receive_piece(connection: Connection, job: StreamJob, stall_s: float) -> Piece:
    """The server's side: the next piece. Sleeps until it is there.

    Raises:
        VideoRejectedError: the worker refuses the video.
        StalledError: there was no progress for `stall_s`.
        EOFError, OSError, ValueError, KeyError, TypeError: the worker is gone, or was taken over by
            the file.
    """
    while True:
        if not connection.poll(stall_s):
            raise StalledError
        message = testimony.receive(connection)
        kind = message["kind"]
        if kind == "opened":
            return Opened(testimony.facts(message["facts"]), _count(message["windows"], job))
        if kind == "ended":
            count = _count(message["windows"], job)
            return Ended(testimony.facts(message["facts"]), count, bool(message["truncated"]))
        if kind == "window":
            return Window(
                number=_count(message["number"], job),
                start_s=testimony.real(message["start_s"]),
                end_s=testimony.real(message["end_s"]),
                times=tuple(map(testimony.real, message["times"])),
                frames=_receive_frames(connection, job, stall_s),
            )
        if kind != "progress":
            raise ValueError("the worker sent something else")


def _receive_frames(connection: Connection, job: StreamJob, stall_s: float) -> NDArray[np.uint8]:
    seen = job.preprocessing
    shape = (job.cut.crops, seen.num_frames, seen.image_size, seen.image_size, 3)
    if not connection.poll(stall_s):
        raise StalledError
    return testimony.pixels(connection, shape)


def _count(value: object, job: StreamJob) -> int:
    return testimony.whole(value, job.cut.max_windows)
