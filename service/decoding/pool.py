"""The pool of decoder processes: a video goes in, its clips come out, or the windows of a long one.

A hostile or broken file may crash or hang its decoder, or make it swell. The file's request gets an
error, the decoder is replaced, and the service goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from model.video import Clips, Ended
from service.decoding import sandbox
from service.decoding.messages import DecodeRequest, DecoderLimits, StreamMessage, StreamRequest
from service.decoding.process import DecoderCrashedError, DecoderProcess
from service.errors import QueueFullError, VideoRejectedError

if TYPE_CHECKING:
    from service.settings import Settings

logger = logging.getLogger(__name__)
_Result = TypeVar("_Result")

# A decoder is replaced after so many videos, so that a leak in a codec never adds up.
_RECYCLE_AFTER = 500
# Weight of the newest video in the mean time of a video: about the last ten count.
_RATE_WEIGHT = 0.1
_DIED = "decoder_died"  # between two videos, for example killed by the kernel for memory
LOSS_REASONS = ("decoding_timeout", "decoder_crashed", _DIED)
"""Why a decoder is replaced after a failure."""


class DecoderPool:
    """A fixed number of decoder processes behind an awaitable `decode`.

    Args:
        on_restart: called with the reason each time a decoder is replaced after a failure.
        lazy: starts each process when a video first needs it.
        max_waiting: limit on the videos that wait for a decoder; None means no limit.
    """

    def __init__(
        self,
        workers: int,
        limits: DecoderLimits,
        on_restart: Callable[[str], None],
        lazy: bool = False,
        max_waiting: int | None = None,
    ) -> None:
        self._on_restart = on_restart
        self._lazy = lazy
        self._max_waiting = max_waiting
        self._seconds_per_video = 0.0
        self._closing = False
        self.waiting = 0
        """Videos that wait for a decoder."""
        self.sandbox: tuple[str, ...] = ()
        """The layers of the sandbox that are in force in all decoders."""
        self._decoders = [DecoderProcess(limits) for _ in range(workers)]
        self._idle: asyncio.Queue[DecoderProcess] = asyncio.Queue()
        # One thread per decoder, which sleeps in a read while the decoder works. A spawned decoder
        # ends with the thread that started it, so no thread may end before `close`.
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decoder")

    @property
    def busy(self) -> int:
        """Decoders that decode a video, or are being replaced."""
        return len(self._decoders) - self._idle.qsize()

    async def start(self) -> None:
        """Starts the decoders, side by side, and waits until each has answered."""
        self._loop = asyncio.get_running_loop()
        if not self._lazy:
            starting = [self._threads.submit(decoder.start) for decoder in self._decoders]
            await asyncio.gather(*map(asyncio.wrap_future, starting))
        for decoder in self._decoders:
            self._idle.put_nowait(decoder)
        self.sandbox = tuple(
            layer
            for layer in sandbox.LAYERS
            if all(layer in decoder.sandbox for decoder in self._decoders)
        )

    def missing_layers(self, settings: Settings) -> str:
        """Returns the layers that the sandbox lacks here, in words; empty if it is complete.

        Raises:
            SettingsError: the settings require more than the sandbox has.
        """
        missing = " and ".join(sorted(set(sandbox.LAYERS) - set(self.sandbox)))
        if settings.decode_sandbox == "required" and missing:
            from service.settings import SettingsError

            raise SettingsError(
                f"TIMESFORMER_DECODE_SANDBOX: this kernel or container does not let {missing} be "
                "used; set it to auto to serve without"
            )
        return missing

    async def decode(self, request: DecodeRequest) -> Clips:
        """Decodes a video as soon as a decoder is free.

        Raises:
            QueueFullError, DecoderUnavailableError, VideoRejectedError: as `acquire`.
        """
        async with self.acquire() as decode:
            return await decode(request)

    @contextlib.asynccontextmanager
    async def acquire(self) -> AsyncIterator[Callable[[DecodeRequest], Awaitable[Clips]]]:
        """Waits for a decoder, and yields the function that decodes one video with it.

        If the function is cancelled, the decoder is killed and replaced.

        Raises:
            QueueFullError: too many videos wait already.
            DecoderUnavailableError: by the function, no decoder can be started.
            VideoRejectedError: by the function, the video is rejected, or broke its decoder.
        """
        decoder = await self._free_decoder()
        used = False

        async def decode(request: DecodeRequest) -> Clips:
            nonlocal used
            used = True
            running = self._threads.submit(self._decode, decoder, request)
            running.add_done_callback(lambda _: self._call_soon(self._release, decoder))
            return await self._result(decoder, running)

        try:
            yield decode
        finally:
            if not used:
                self._idle.put_nowait(decoder)

    @contextlib.asynccontextmanager
    async def stream(self, request: StreamRequest) -> AsyncIterator[AsyncIterator[StreamMessage]]:
        """Yields the messages of a long video, decoded as they are read.

        If the block ends before the video does, the decoder is killed and replaced.

        Raises:
            QueueFullError: too many videos wait already.
            DecoderUnavailableError, VideoRejectedError: as `acquire`, while messages are read.
        """
        decoder = await self._free_decoder()
        messages = _Messages(self, decoder, request)
        try:
            yield messages
        finally:
            if not messages.over:
                decoder.kill()  # a thread that waits for it wakes up
            if messages.reading is None:
                self._release(decoder)
            else:
                messages.reading.add_done_callback(
                    lambda _: self._call_soon(self._release, decoder)
                )

    async def _result(self, decoder: DecoderProcess, running: Future[_Result]) -> _Result:
        """Waits for a thread that uses the decoder; being cancelled kills the decoder."""
        try:
            return await asyncio.wrap_future(running)
        except asyncio.CancelledError:
            if not running.cancel() and not running.done():
                decoder.kill()
            raise
        except DecoderCrashedError as error:
            if not decoder.killed:
                self._report_restart(error.code)
            raise VideoRejectedError(error.code, str(error)) from error

    def _call_soon(
        self, function: Callable[[DecoderProcess], None], decoder: DecoderProcess
    ) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(function, decoder)

    def _release(self, decoder: DecoderProcess) -> None:
        """Makes the decoder idle, once it is replaced if that is necessary.

        Runs in the event loop, as `kill` does, so that no decoder is killed after it was released.
        """
        worn = decoder.killed or decoder.lost or decoder.decoded >= _RECYCLE_AFTER
        if not worn or self._closing:
            self._idle.put_nowait(decoder)
            return
        restarting = self._threads.submit(decoder.restart)
        restarting.add_done_callback(lambda _: self._call_soon(self._idle.put_nowait, decoder))

    def check_room(self) -> None:
        """Checks, before a request costs anything, whether one more video may wait.

        Raises:
            QueueFullError: too many videos wait already.
        """
        if self._max_waiting is not None and self.waiting >= self._max_waiting:
            at_once = self.waiting / len(self._decoders)
            raise QueueFullError(max(1, math.ceil(at_once / 2 * self._seconds_per_video)))

    async def _free_decoder(self) -> DecoderProcess:
        if self._idle.empty():
            self.check_room()
        self.waiting += 1
        try:
            return await self._idle.get()
        finally:
            self.waiting -= 1

    def _report_restart(self, reason: str) -> None:
        if not self._closing:
            logger.warning("decoder worker replaced", extra={"reason": reason})
            self._on_restart(reason)

    def _report_death(self) -> None:
        self._report_restart(_DIED)

    def _decode(self, decoder: DecoderProcess, request: DecodeRequest) -> Clips:
        started = time.perf_counter()
        decoder.begin(request, self._report_death)
        clips = decoder.clips(request)
        seconds = time.perf_counter() - started
        if self._seconds_per_video == 0:
            self._seconds_per_video = seconds
        self._seconds_per_video += _RATE_WEIGHT * (seconds - self._seconds_per_video)
        return clips

    def close(self) -> None:
        """Ends all decoders, at once."""
        self._closing = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for decoder in self._decoders:
            decoder.kill()  # its thread, if it waits for an answer, wakes up
        self._threads.shutdown(wait=True)
        for decoder in self._decoders:
            decoder.stop()


class _Messages:
    """The messages of a long video; a thread reads each when the consumer asks for it."""

    def __init__(self, pool: DecoderPool, decoder: DecoderProcess, request: StreamRequest) -> None:
        self._pool = pool
        self._decoder = decoder
        self._request = request
        self.reading: Future[StreamMessage] | None = None
        self.over = False
        """The decoder has sent its last message."""

    def __aiter__(self) -> _Messages:
        return self

    async def __anext__(self) -> StreamMessage:
        if self.over:
            raise StopAsyncIteration
        first = self.reading is None
        self.reading = self._pool._threads.submit(self._read, first)
        return await self._pool._result(self._decoder, self.reading)

    def _read(self, first: bool) -> StreamMessage:
        if first:
            self._decoder.begin(self._request, self._pool._report_death)
        try:
            message = self._decoder.next_message(self._request)
        except VideoRejectedError:
            self.over = True
            raise
        self.over = isinstance(message, Ended)
        return message
