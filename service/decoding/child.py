"""What runs in a decoder process: a file goes in, clips or windows come out over a pipe.

Imports `messages`, `sandbox`, `model.video`, numpy, PyAV and orjson only, because every import
costs each decoder memory, start time and a wider target for hostile files
(tests/service/decoding/test_child.py). Pixels are sent as raw bytes, because a pickle of them costs
four times as much.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection

import numpy as np
import orjson

from model.processes import die_with_parent
from model.video import Limits, Opened, VideoError, Window, load_clips, stream_windows
from service.decoding import sandbox
from service.decoding.messages import STARTED, DecodeRequest, DecoderLimits, StreamRequest

_PROGRESS_EVERY_S = 1.0


def decoder_main(connection: Connection, limits: DecoderLimits) -> None:
    """Answers requests until the pipe closes: `STARTED`, then messages and pixels.

    The first message lists the layers of the sandbox that are in force.
    """
    die_with_parent()
    _close_files_except(connection)
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(limits.niceness)
    layers = sandbox.enter(limits.folders) if limits.sandboxed else ()
    with contextlib.suppress(EOFError, OSError):  # the server has ended
        connection.send_bytes(orjson.dumps(layers))
        while True:
            request: DecodeRequest | StreamRequest = pickle.loads(connection.recv_bytes())  # noqa: S301 - sent by our parent
            connection.send_bytes(STARTED)
            _limit_cpu_time(limits.timeout_s)
            with _rejections(connection):
                if isinstance(request, StreamRequest):
                    _send_windows(connection, request, limits.timeout_s)
                else:
                    _send_clips(connection, request, limits.video)


def _close_files_except(connection: Connection) -> None:
    """Closes what `multiprocessing` hands to its children. The fork server ends when nobody holds
    its pipe any more, so a decoder that kept the pipe would outlive a server that is killed.
    """
    kept = connection.fileno()
    os.closerange(3, kept)
    os.closerange(kept + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


@contextlib.contextmanager
def _rejections(connection: Connection) -> Iterator[None]:
    """Sends the reason why a file is rejected."""
    try:
        yield
    except VideoError as error:
        connection.send_bytes(orjson.dumps({"code": error.code, "detail": str(error)}))
    except MemoryError:
        detail = "Decoding the video takes more memory than one video may have."
        connection.send_bytes(orjson.dumps({"code": "video_too_large", "detail": detail}))


def _send_clips(connection: Connection, request: DecodeRequest, limits: Limits) -> None:
    clips = load_clips(
        request.path,
        request.preprocessing,
        views=request.views,
        crops=request.crops,
        limits=limits,
    )
    header = {
        "times": clips.times.tolist(),
        "facts": asdict(clips.facts),
        "truncated": clips.truncated,
        "sampling": clips.sampling,
    }
    connection.send_bytes(orjson.dumps(header))
    connection.send_bytes(clips.frames.reshape(-1).data)


def _send_windows(connection: Connection, request: StreamRequest, timeout_s: float) -> None:
    """Sends each window as soon as it is complete, and `progress` about once a second.

    The pipe holds less than a window, so the decoder is at most one window ahead of the server.
    """
    last = time.monotonic()

    def tick() -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= _PROGRESS_EVERY_S:
            last = now
            _limit_cpu_time(timeout_s)
            connection.send_bytes(b'{"kind":"progress"}')

    def emit(message: Opened | Window) -> None:
        if isinstance(message, Opened):
            connection.send_bytes(orjson.dumps({"kind": "opened", **asdict(message)}))
            return
        header = {
            "kind": "window",
            "number": message.number,
            "start_s": message.start_s,
            "end_s": message.end_s,
            "times": message.times,
        }
        connection.send_bytes(orjson.dumps(header))
        connection.send_bytes(np.ascontiguousarray(message.frames).reshape(-1).data)

    ended = stream_windows(
        request.path, request.preprocessing, request.cut, emit, tick=tick, limits=request.limits
    )
    connection.send_bytes(orjson.dumps({"kind": "ended", **asdict(ended)}))


def _limit_cpu_time(seconds: float) -> None:
    """Makes the kernel kill this process once it has used `seconds` more of CPU time."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime + seconds) + 2
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))
