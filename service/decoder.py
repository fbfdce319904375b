"""One decoder process: a spooled video in, its clips out, or the windows of a long one.

Workers import numpy and PyAV only. Frames come back as raw bytes over a pipe (pickling them costs
four times as much). A worker says that it has begun before it looks at a file, so that its death is
laid at the file's door only from then on.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import orjson

from model.config import Preprocessing
from model.video import Clips, Limits, VideoError, load_clips
from service import sandbox, testimony
from service.errors import DecoderUnavailableError
from service.streaming import Piece, StalledError, StreamJob, receive_piece, send_windows

if TYPE_CHECKING:
    from service.settings import Settings

logger = logging.getLogger(__name__)
_START_TIMEOUT_S = 60.0
_TRIES = 3
_BEGUN = b"begun"


class Job(NamedTuple):
    """One video to decode."""

    path: Path
    preprocessing: Preprocessing
    views: int
    crops: Literal[1, 3]


class WorkerLimits(NamedTuple):
    """What one worker may use and do."""

    memory_bytes: int
    timeout_s: float
    """For one video; of a long one, without any progress."""
    video: Limits
    sandboxed: bool = True
    folders: tuple[Path, ...] | None = None
    """What a sandboxed worker may read, see `sandbox.enter`."""
    niceness: int = 0
    """By how much its processes stand back for others."""

    @classmethod
    def of(cls, settings: Settings, folders: tuple[Path, ...] | None = None) -> WorkerLimits:
        """As the settings have them; workers may read `folders`, or any file."""
        video = Limits(
            max_pixels=settings.max_video_pixels, max_duration_s=settings.max_video_duration_s
        )
        sandboxed = settings.decode_sandbox != "off"
        return cls(
            settings.decode_memory_bytes, settings.decode_timeout_s, video, sandboxed, folders
        )


class WorkerStartError(RuntimeError):
    """A decoder process does not come up."""


class WorkerLostError(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Worker:
    """One decoder process, used by one thread at a time."""

    def __init__(self, limits: WorkerLimits) -> None:
        self._limits = limits
        self._process: BaseProcess | None = None
        self._lock = threading.Lock()  # over which process is ours
        self._killed = False
        self.decoded = 0
        self.sandbox: list[str] = []

    def start(self) -> None:
        """Starts the process; one that is killed while it starts is started again.

        Raises:
            WorkerStartError: none came up.
        """
        for _ in range(_TRIES):
            with contextlib.suppress(EOFError, OSError, ValueError):
                self._start_once()
                return
            self.stop()
        raise WorkerStartError("a decoder worker did not start")

    def _start_once(self) -> None:
        # Spawned, not forked: a fork of a process with engine threads and GPU handles is a trap.
        context = multiprocessing.get_context("spawn")
        with contextlib.ExitStack() as unless_started, self._lock:
            ours, theirs = context.Pipe()
            unless_started.enter_context(ours)
            with theirs:
                process = context.Process(
                    target=worker_main,
                    args=(theirs, self._limits, os.getpid()),
                    daemon=True,
                    name="decoder",
                )
                process.start()
            unless_started.pop_all()
            self._connection, self._process = ours, process
        self.decoded = 0
        if not self._connection.poll(_START_TIMEOUT_S):
            raise TimeoutError
        self.sandbox = orjson.loads(self._connection.recv_bytes())

    def begin(self, job: Job | StreamJob, on_death: Callable[[], None]) -> None:
        """Sets the process to a video; one that dies before it looks at it is replaced, and told.

        Raises:
            DecoderUnavailableError: none can be started, or lives for long enough.
            WorkerLostError: it does not take the video in time, or was killed by us.
        """
        self.decoded += 1
        for _ in range(_TRIES):
            self._make_ready(on_death)
            with contextlib.suppress(EOFError, OSError):
                self._connection.send_bytes(pickle.dumps(job))
                if not self._connection.poll(self._limits.timeout_s):
                    raise WorkerLostError(
                        "decoding_timeout",
                        f"No decoder took the video within {self._limits.timeout_s:g} s.",
                    )
                if self._connection.recv_bytes(len(_BEGUN)) == _BEGUN:
                    return
            if self._killed:
                raise WorkerLostError("decoder_crashed", "The video was given up.")
            on_death()
            self.stop()
        raise DecoderUnavailableError("Decoders do not live for long enough at present.")

    def _make_ready(self, on_death: Callable[[], None]) -> None:
        """Starts a process that is new, or has died since its last video."""
        with self._lock:
            dead = self._process is not None and not self._process.is_alive()
        if dead and not self._killed:
            on_death()
            self.stop()
        if self._process is None:
            try:
                self.start()
            except WorkerStartError as error:
                raise DecoderUnavailableError("No decoder can be started at present.") from error

    def restart(self) -> None:
        """Replaces the process now, so that the next video need not wait for it."""
        self.stop()
        try:
            self.start()
        except WorkerStartError:
            logger.exception("a lost decoder cannot be replaced; the next video tries again")

    def kill(self) -> None:
        """Ends the process; may be called while another thread waits for its answer."""
        with self._lock:
            self._killed = True
            if self._process is not None:
                self._process.kill()

    def stop(self) -> None:
        """Ends the process and waits for that."""
        self.kill()
        if self._process is not None:
            self._connection.close()
            self._process.join()
            self._process.close()
            self._process = None
        self._killed = False

    def next_piece(self, job: StreamJob) -> Piece:
        """Waits for what comes next of the long video it was set to."""
        with _loss():
            try:
                piece = receive_piece(self._connection, job, self._limits.timeout_s)
            except StalledError:
                raise WorkerLostError(
                    "decoding_timeout",
                    f"Decoding the video made no progress for {self._limits.timeout_s:g} s.",
                ) from None
            return piece

    def clips(self, job: Job) -> Clips:
        """Waits for the clips of the video it was set to."""
        with _loss():
            if not self._connection.poll(self._limits.timeout_s):
                raise WorkerLostError(
                    "decoding_timeout",
                    f"The video took longer than {self._limits.timeout_s:g} s to decode.",
                )
            answer = testimony.receive(self._connection)
            seen = job.preprocessing
            size = (seen.image_size, seen.image_size)
            if not self._connection.poll(self._limits.timeout_s):
                raise ValueError("the worker sent no pixels")
            shape = (job.views * job.crops, seen.num_frames, *size, 3)
            return Clips(
                frames=testimony.pixels(self._connection, shape),
                times=testimony.times(answer["times"], (job.views, seen.num_frames)),
                facts=testimony.facts(answer["facts"]),
                truncated=bool(answer["truncated"]),
                sampling=testimony.sampling(answer["sampling"]),
            )


@contextlib.contextmanager
def _loss() -> Iterator[None]:
    """Whatever goes wrong in talking to a worker means that it is lost."""
    try:
        yield
    except (EOFError, OSError, ValueError, KeyError, TypeError) as error:
        raise WorkerLostError(
            "decoder_crashed", "The video broke its decoder; it is damaged or hostile."
        ) from error


def worker_main(connection: Connection, limits: WorkerLimits, parent: int) -> None:
    """Answers jobs until the pipe closes: `_BEGUN`, a header, and the frames' bytes."""
    sandbox.end_with(parent)
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    os.nice(limits.niceness)
    layers = sandbox.enter(limits.folders) if limits.sandboxed else ()
    connection.send_bytes(orjson.dumps(layers))
    with contextlib.suppress(EOFError, OSError):  # the server is gone
        while True:
            job: Job | StreamJob = pickle.loads(connection.recv_bytes())  # noqa: S301 - sent by our parent
            connection.send_bytes(_BEGUN)
            _limit_cpu_time(limits.timeout_s)
            with _refusals(connection):
                if isinstance(job, StreamJob):
                    send_windows(connection, job, lambda: _limit_cpu_time(limits.timeout_s))
                else:
                    _answer(connection, job, limits.video)


@contextlib.contextmanager
def _refusals(connection: Connection) -> Iterator[None]:
    """Sends what is wrong with a file."""
    try:
        yield
    except VideoError as error:
        connection.send_bytes(orjson.dumps({"code": error.code, "detail": str(error)}))
    except MemoryError:
        detail = "Decoding the video takes more memory than one video may have."
        connection.send_bytes(orjson.dumps({"code": "video_too_large", "detail": detail}))


def _answer(connection: Connection, job: Job, limits: Limits) -> None:
    clips = load_clips(job.path, job.preprocessing, views=job.views, crops=job.crops, limits=limits)
    header = {
        "times": clips.times.tolist(),
        "facts": asdict(clips.facts),
        "truncated": clips.truncated,
        "sampling": clips.sampling,
    }
    connection.send_bytes(orjson.dumps(header))
    connection.send_bytes(clips.frames.reshape(-1).data)


def _limit_cpu_time(seconds: float) -> None:
    """Lets the kernel kill this process once it has used `seconds` more of CPU time."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime + seconds) + 2
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))
