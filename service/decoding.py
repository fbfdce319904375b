"""Isolated decoder workers: processes that turn a spooled video into clips, or, if it is long, into
windows one after the other (`streaming.py`).

A hostile or broken file may crash, hang or swell a worker; it costs that request a clear error
and the pool a new worker, never the service. Workers import numpy and PyAV only. Frames come back
as raw bytes over a pipe (pickling them costs four times as much).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import multiprocessing
import os
import pickle
import resource
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from multiprocessing import BufferTooShort
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import orjson

from model.config import Preprocessing
from model.video import Clips, Ended, Limits, VideoError, VideoFacts, load_clips
from service import sandbox
from service.errors import DecoderUnavailableError, QueueFullError, VideoRejectedError
from service.streaming import Piece, StalledError, StreamJob, receive_piece, send_windows

if TYPE_CHECKING:
    from service.settings import Settings

logger = logging.getLogger(__name__)

# A worker is replaced after so many videos, so that a leak in a codec never adds up.
_RECYCLE_AFTER = 500
_START_TIMEOUT_S = 60.0
_START_TRIES = 3
# How much the newest video counts in the rate: about the last ten.
_RATE_WEIGHT = 0.1
_DIED = "decoder_died"  # between two videos: killed from outside, for memory it may be
LOSSES = ("decoding_timeout", "decoder_crashed", _DIED)
"""Why a worker is replaced."""


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


class DecoderPool:
    """A fixed number of decoder processes behind an awaitable `decode`.

    Args:
        on_restart: called with the reason each time a worker is replaced after a failure.
        lazy: starts each process when it is first needed.
        max_waiting: most videos that wait for a worker; None: any number.
    """

    def __init__(
        self,
        workers: int,
        limits: WorkerLimits,
        on_restart: Callable[[str], None],
        lazy: bool = False,
        max_waiting: int | None = None,
    ) -> None:
        self._limits = limits
        self._on_restart = on_restart
        self._lazy = lazy
        self._max_waiting = max_waiting
        self._seconds_per_video = 0.0
        self._closing = False
        self.waiting = 0
        """Videos that wait for a worker."""
        self.sandbox: tuple[str, ...] = ()
        """The layers of the sandbox that hold all workers in."""
        self._workers = [_Worker(limits) for _ in range(workers)]
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        # One thread per worker: it sleeps in a read while the worker works. They start the workers
        # too, which end with the thread that started them, so none may end before `close`.
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decoder")

    @property
    def busy(self) -> int:
        """Workers at a video."""
        return len(self._workers) - self._idle.qsize()

    async def start(self) -> None:
        """Starts the workers, side by side, and waits until each has answered."""
        # For the workers: a thread of numpy's would be left out of their sandbox.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        if not self._lazy:
            starting = [self._threads.submit(worker.start) for worker in self._workers]
            await asyncio.gather(*map(asyncio.wrap_future, starting))
        for worker in self._workers:
            self._idle.put_nowait(worker)
        self.sandbox = tuple(
            layer
            for layer in sandbox.LAYERS
            if all(layer in worker.sandbox for worker in self._workers)
        )

    def missing_layers(self, settings: Settings) -> str:
        """In words, what the sandbox lacks here; nothing if it is whole.

        Raises:
            SettingsError: less than what is required.
        """
        missing = " and ".join(sorted(set(sandbox.LAYERS) - set(self.sandbox)))
        if settings.decode_sandbox == "required" and missing:
            from service.settings import SettingsError  # not above: workers need none of it

            raise SettingsError(
                f"TIMESFORMER_DECODE_SANDBOX: this kernel or container does not let {missing} be "
                "used; set it to auto to serve without"
            )
        return missing

    async def decode(self, job: Job) -> Clips:
        """Decodes a video once a worker is free.

        A caller that is cancelled while it waits costs nothing; one that is cancelled while its
        video decodes gives the worker back when that is done.

        Raises:
            QueueFullError: too many videos wait already.
            DecoderUnavailableError: no worker can be started.
            VideoRejectedError: the video cannot be used, or broke its worker.
        """
        worker = await self._free_worker()
        loop = asyncio.get_running_loop()
        exchange = self._threads.submit(self._exchange, worker, job)
        exchange.add_done_callback(
            lambda _: loop.call_soon_threadsafe(self._idle.put_nowait, worker)
        )
        return await asyncio.wrap_future(exchange)

    @contextlib.asynccontextmanager
    async def stream(self, job: StreamJob) -> AsyncIterator[AsyncIterator[Piece]]:
        """The pieces of a long video, decoded as they are taken; at the block's end it is given up.

        Raises:
            QueueFullError: too many videos wait already.
            DecoderUnavailableError, VideoRejectedError: as `decode`, while pieces are taken.
        """
        worker = await self._free_worker()
        pieces = _Pieces(worker, job, self._threads, self._note_loss, self._note_death)
        try:
            yield pieces
        finally:
            self._take_back(worker, pieces)

    def _take_back(self, worker: _Worker, pieces: _Pieces) -> None:
        """Ends what the worker is at, at once, and has it ready for the next video."""
        if self._closing:
            return
        loop = asyncio.get_running_loop()
        if not pieces.over:
            worker.kill()  # a thread that waits for it wakes up
        renewing = pieces.after_last_read(
            lambda: None if pieces.over and worker.decoded < _RECYCLE_AFTER else worker.restart()
        )
        renewing.add_done_callback(
            lambda _: loop.call_soon_threadsafe(self._idle.put_nowait, worker)
        )

    def check_room(self) -> None:
        """Asks, before it costs anything, whether one more video may wait.

        Raises:
            QueueFullError: too many do.
        """
        if self._max_waiting is not None and self.waiting >= self._max_waiting:
            at_once = self.waiting / len(self._workers)
            raise QueueFullError(max(1, math.ceil(at_once / 2 * self._seconds_per_video)))

    async def _free_worker(self) -> _Worker:
        if self._idle.empty():
            self.check_room()
        self.waiting += 1
        try:
            return await self._idle.get()
        finally:
            self.waiting -= 1

    def _note_loss(self, error: _WorkerLostError) -> None:
        self._note_restart(error.code)

    def _note_rate(self, seconds: float) -> None:
        if self._seconds_per_video == 0:
            self._seconds_per_video = seconds
        self._seconds_per_video += _RATE_WEIGHT * (seconds - self._seconds_per_video)

    def _note_death(self) -> None:
        self._note_restart(_DIED)

    def _note_restart(self, reason: str) -> None:
        if not self._closing:
            logger.warning("decoder worker replaced", extra={"reason": reason})
            self._on_restart(reason)

    def _exchange(self, worker: _Worker, job: Job) -> Clips:
        worker.make_ready(self._note_death)
        began = time.perf_counter()
        try:
            clips = worker.decode(job)
            self._note_rate(time.perf_counter() - began)
            return clips
        except _WorkerLostError as error:
            self._note_loss(error)
            if not self._closing:
                worker.restart()
            raise VideoRejectedError(error.code, str(error)) from error
        finally:
            if worker.decoded >= _RECYCLE_AFTER and not self._closing:
                worker.restart()

    def close(self) -> None:
        """Ends all workers, at once."""
        self._closing = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.kill()  # its thread, if it waits for an answer, wakes up
        self._threads.shutdown(wait=True)
        for worker in self._workers:
            worker.stop()


class _Pieces:
    """What a worker sends of a long video; each is read by a thread when it is asked for."""

    def __init__(
        self,
        worker: _Worker,
        job: StreamJob,
        threads: ThreadPoolExecutor,
        on_loss: Callable[[_WorkerLostError], None],
        on_death: Callable[[], None],
    ) -> None:
        self._worker = worker
        self._on_loss = on_loss
        self._on_death = on_death
        self._job = job
        self._threads = threads
        self._reading: Future[Piece] | None = None
        self.over = False
        """The worker has sent its last message."""

    def __aiter__(self) -> _Pieces:
        return self

    async def __anext__(self) -> Piece:
        if self.over:
            raise StopAsyncIteration
        self._reading = self._threads.submit(self._read, first=self._reading is None)
        try:
            return await asyncio.wrap_future(self._reading)
        except _WorkerLostError as error:
            self._on_loss(error)
            raise VideoRejectedError(error.code, str(error)) from error

    def after_last_read(self, then: Callable[[], None]) -> Future[None]:
        """Runs `then` in a thread once no thread reads from the worker any more."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                then()
            finally:
                done.set_result(None)

        def submit(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the pool is closed
                self._threads.submit(run)

        if self._reading is None:
            submit(None)
        else:
            self._reading.add_done_callback(submit)
        return done

    def _read(self, first: bool) -> Piece:
        if first:
            self._worker.make_ready(self._on_death)
            self._worker.begin(self._job)
        try:
            piece = self._worker.next_piece(self._job)
        except VideoRejectedError:
            self.over = True
            raise
        self.over = isinstance(piece, Ended)
        return piece


class WorkerStartError(RuntimeError):
    """A decoder process does not come up."""


class _WorkerLostError(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Worker:
    """One decoder process, used by one thread at a time."""

    def __init__(self, limits: WorkerLimits) -> None:
        self._limits = limits
        self._process: BaseProcess | None = None
        self._lock = threading.Lock()  # over which process is ours
        self.decoded = 0
        self.sandbox: list[str] = []

    def start(self) -> None:
        """Starts the process; one that is killed while it starts is started again.

        Raises:
            WorkerStartError: none came up.
        """
        for _ in range(_START_TRIES):
            with contextlib.suppress(EOFError, OSError, ValueError):
                self._start_once()
                return
            self.stop()
        raise WorkerStartError("a decoder worker did not start")

    def _start_once(self) -> None:
        # Spawned, not forked: a fork of a process with engine threads and GPU handles is a trap.
        context = multiprocessing.get_context("spawn")
        with self._lock:
            self._connection, theirs = context.Pipe()
            self._process = context.Process(
                target=_worker_main,
                args=(theirs, self._limits, os.getpid()),
                daemon=True,
                name="decoder",
            )
            self._process.start()
            theirs.close()
        self.decoded = 0
        if not self._connection.poll(_START_TIMEOUT_S):
            raise TimeoutError
        self.sandbox = orjson.loads(self._connection.recv_bytes())

    def make_ready(self, on_death: Callable[[], None]) -> None:
        """Starts a process that is new, or has died since its last video, which is told.

        Raises:
            DecoderUnavailableError: it cannot be started.
        """
        with self._lock:
            dead = self._process is not None and not self._process.is_alive()
        if dead:
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
            if self._process is not None:
                self._process.kill()

    def stop(self) -> None:
        self.kill()
        if self._process is not None:
            self._connection.close()
            self._process.join()
            self._process.close()
            self._process = None

    def begin(self, job: StreamJob) -> None:
        """Sets the worker to a long video."""
        self.decoded += 1
        with _loss():
            self._connection.send_bytes(pickle.dumps(job))

    def next_piece(self, job: StreamJob) -> Piece:
        """Waits for what comes next of it."""
        with _loss():
            try:
                piece = receive_piece(self._connection, job, self._limits.timeout_s)
            except StalledError:
                raise _WorkerLostError(
                    "decoding_timeout",
                    f"Decoding the video made no progress for {self._limits.timeout_s:g} s.",
                ) from None
            if isinstance(piece, dict):
                raise VideoRejectedError(piece["code"], piece["detail"])
            return piece

    def decode(self, job: Job) -> Clips:
        self.decoded += 1
        with _loss():
            self._connection.send_bytes(pickle.dumps(job))
            if not self._connection.poll(self._limits.timeout_s):
                raise _WorkerLostError(
                    "decoding_timeout",
                    f"The video took longer than {self._limits.timeout_s:g} s to decode.",
                )
            # JSON, never a pickle: a file that takes its worker over must not get further.
            answer = orjson.loads(self._connection.recv_bytes())
            if "code" in answer:
                raise VideoRejectedError(answer["code"], answer["detail"])
            seen = job.preprocessing
            size = (seen.image_size, seen.image_size)
            frames = np.empty((job.views * job.crops, seen.num_frames, *size, 3), np.uint8)
            # Flat, as a 4-D buffer desynchronises the pipe; the bytes land where they are used.
            if not self._connection.poll(self._limits.timeout_s):
                raise ValueError("the worker sent no pixels")
            if self._connection.recv_bytes_into(frames.reshape(-1)) != frames.nbytes:
                raise ValueError("the worker sent fewer pixels than it should")
            return Clips(
                frames=frames,
                times=np.array(answer["times"], np.float64),
                facts=VideoFacts(**answer["facts"]),
                truncated=answer["truncated"],
                sampling=answer["sampling"],
            )


@contextlib.contextmanager
def _loss() -> Iterator[None]:
    """Whatever goes wrong in talking to a worker means that it is lost."""
    try:
        yield
    except (EOFError, OSError, ValueError, KeyError, TypeError, BufferTooShort) as error:
        raise _WorkerLostError(
            "decoder_crashed", "The video broke its decoder; it is damaged or hostile."
        ) from error


def _worker_main(connection: Connection, limits: WorkerLimits, parent: int) -> None:
    """Answers jobs until the pipe closes: a header, then the frames' bytes if there are any."""
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
