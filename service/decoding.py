"""The pool of isolated decoders (`decoder.py`): a spooled video in, its clips out, or, if it is
long, windows one after the other (`streaming.py`).

A hostile or broken file may crash, hang or swell a worker; it costs that request a clear error
and the pool a new worker, never the service.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from model.video import Clips, Ended
from service import sandbox
from service.decoder import Job, Worker, WorkerLimits, WorkerLostError
from service.errors import QueueFullError, VideoRejectedError
from service.lingering import leave_running
from service.streaming import Piece, StreamJob

if TYPE_CHECKING:
    from service.settings import Settings

logger = logging.getLogger(__name__)

# A worker is replaced after so many videos, so that a leak in a codec never adds up.
_RECYCLE_AFTER = 500
# How long a video that nobody waits for any more may still decode: most end by themselves, and to
# replace a worker takes as long (1.2 to 1.5 s on two busy cores).
_PATIENCE_S = 1.0
# How much the newest video counts in the rate: about the last ten.
_RATE_WEIGHT = 0.1
_DIED = "decoder_died"  # between two videos: killed from outside, for memory it may be
LOSSES = ("decoding_timeout", "decoder_crashed", _DIED)
"""Why a worker is replaced."""


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
        self._workers = [Worker(limits) for _ in range(workers)]
        self._idle: asyncio.Queue[Worker] = asyncio.Queue()
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

        Raises:
            QueueFullError: too many videos wait already.
            DecoderUnavailableError, VideoRejectedError, asyncio.CancelledError: as `turn`'s.
        """
        async with self.turn() as decode:
            return await decode(job)

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[Callable[[Job], Awaitable[Clips]]]:
        """Waits for a worker, and gives the function with which it decodes one video.

        Being cancelled costs nothing while it waits. A video whose function is cancelled may decode
        for a moment more; then its worker is killed and replaced, see also `service/lingering.py`.

        Raises:
            QueueFullError: too many videos wait already.
            DecoderUnavailableError: by the function, no worker can be started.
            VideoRejectedError: by the function, the video cannot be used, or broke its worker.
        """
        worker = await self._free_worker()
        begun = False

        async def decode(job: Job) -> Clips:
            nonlocal begun
            begun = True
            return await self._decode(worker, job)

        try:
            yield decode
        finally:
            if not begun:
                self._idle.put_nowait(worker)

    async def _decode(self, worker: Worker, job: Job) -> Clips:
        loop = asyncio.get_running_loop()
        given_up, back = threading.Event(), asyncio.Event()

        def give_up() -> None:
            if not exchange.done():
                given_up.set()
                worker.kill()

        def put_back() -> None:
            self._idle.put_nowait(worker)
            back.set()

        def ended() -> None:
            if not given_up.is_set() or self._closing:
                put_back()
                return
            renewing = self._threads.submit(worker.restart)
            renewing.add_done_callback(lambda _: loop.call_soon_threadsafe(put_back))

        exchange = self._threads.submit(self._exchange, worker, job, given_up)
        exchange.add_done_callback(lambda _: loop.call_soon_threadsafe(ended))
        decoding = asyncio.wrap_future(exchange)
        try:
            return await asyncio.shield(decoding)
        except asyncio.CancelledError:
            decoding.add_done_callback(_failed)
            exchange.cancel()
            loop.call_later(_PATIENCE_S, give_up)
            leave_running(back)
            raise

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

    def _take_back(self, worker: Worker, pieces: _Pieces) -> None:
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

    async def _free_worker(self) -> Worker:
        if self._idle.empty():
            self.check_room()
        self.waiting += 1
        try:
            return await self._idle.get()
        finally:
            self.waiting -= 1

    def _note_loss(self, error: WorkerLostError) -> None:
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

    def _exchange(self, worker: Worker, job: Job, given_up: threading.Event) -> Clips:
        began = time.perf_counter()
        try:
            worker.begin(job, self._note_death)
            clips = worker.clips(job)
            self._note_rate(time.perf_counter() - began)
            return clips
        except WorkerLostError as error:
            if not given_up.is_set():
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
        worker: Worker,
        job: StreamJob,
        threads: ThreadPoolExecutor,
        on_loss: Callable[[WorkerLostError], None],
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
        except WorkerLostError as error:
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
            self._worker.begin(self._job, self._on_death)
        try:
            piece = self._worker.next_piece(self._job)
        except VideoRejectedError:
            self.over = True
            raise
        self.over = isinstance(piece, Ended)
        return piece


def _failed(decoding: asyncio.Future[Clips]) -> bool:
    """Takes note of an error that nobody waits for any more."""
    return not decoding.cancelled() and decoding.exception() is not None
