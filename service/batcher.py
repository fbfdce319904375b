"""Requests to batches: joins the clips of concurrent requests for one pass through the engine.

The rule: take what waits while the engine runs, and after a batch of more than one clip wait up
to `settle_s` for as many again. Without that wait a closed loop of clients locks into alternating
small batches. There is no polling: an idle batcher sleeps on an event.

Batches are counted in clips. A request's clips may be spread over several batches, and waiting
requests take turns clip by clip, so that a hundred-clip request delays a one-clip request by
about one batch, not by a hundred clips.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.runtime.interface import Outputs
from service.errors import InternalError, QueueFullError

logger = logging.getLogger(__name__)

# How much the newest batch counts in the drain rate: about the last ten batches.
_RATE_WEIGHT = 0.2


class Answer(NamedTuple):
    """What a request gets: one row per clip of its own, in its order."""

    logits: NDArray[np.float32]
    embedding: NDArray[np.float32]
    queue_s: float
    """From arrival to the start of its first batch."""
    inference_s: float
    """From there to the end of its last."""


class _Request:
    """Clips that one caller waits for."""

    def __init__(self, clips: NDArray[np.uint8], answer: asyncio.Future[Answer]) -> None:
        self.clips = clips
        self.answer = answer
        self.arrived = time.perf_counter()
        self.started: float | None = None
        self.taken = 0
        self.rows: list[tuple[NDArray[np.float32], NDArray[np.float32]] | None] = [None] * len(
            clips
        )
        self.missing = len(clips)

    @property
    def waiting(self) -> int:
        return len(self.clips) - self.taken

    def finish(self) -> None:
        now = time.perf_counter()
        started = self.started or now
        logits, embedding = zip(*(row for row in self.rows if row is not None), strict=True)
        self.answer.set_result(
            Answer(np.stack(logits), np.stack(embedding), started - self.arrived, now - started)
        )


class _Slot(NamedTuple):
    """One clip of a batch."""

    request: _Request
    clip: int


class Batcher:
    """The queue before one engine.

    Args:
        run: the engine; called in a thread of the batcher's own, one batch at a time, with uint8
            (batch, time, height, width, 3).
        max_batch: most clips in a batch.
        max_queue: most clips that wait.
        settle_s: see the module's text.
        on_batch: told the size of each batch as it starts.
        on_seconds: told how long each batch took.
        on_queue: told the number of waiting clips whenever it changes.
    """

    def __init__(
        self,
        run: Callable[[NDArray[np.uint8]], Outputs],
        *,
        max_batch: int,
        max_queue: int,
        settle_s: float = 0.002,
        on_batch: Callable[[int], None] = lambda clips: None,
        on_seconds: Callable[[float], None] = lambda seconds: None,
        on_queue: Callable[[int], None] = lambda clips: None,
    ) -> None:
        self._run = run
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._settle_s = settle_s
        self._on_batch = on_batch
        self._on_seconds = on_seconds
        self._on_queue = on_queue
        self._requests: deque[_Request] = deque()
        self._unanswered: set[asyncio.Future[Answer]] = set()
        self._waiting = 0
        self._arrived = asyncio.Event()
        self._seconds_per_clip = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._loop_task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to serve; needs a running event loop."""
        self._loop_task = asyncio.create_task(self._serve(), name="batcher")

    async def close(self) -> None:
        """Stops after the batch that runs; whoever has no answer yet gets `CancelledError`."""
        if self._loop_task is not None:
            self._loop_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop_task
        for answer in list(self._unanswered):
            answer.cancel()
        self._drop_abandoned()
        self._thread.shutdown(wait=True)

    async def submit(self, clips: NDArray[np.uint8]) -> Answer:
        """Runs clips through the network, in company; cancelling it drops what still waits.

        Args:
            clips: uint8 (clips, time, height, width, 3), one clip at least.

        Raises:
            QueueFullError: too many clips wait already.
            InternalError: the engine failed on these clips.
        """
        self._drop_abandoned()
        if self._waiting + len(clips) > self._max_queue:
            raise QueueFullError(self._retry_after_s())
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._unanswered.add(answer)
        answer.add_done_callback(self._unanswered.discard)
        self._requests.append(_Request(clips, answer))
        self._count(len(clips))
        self._arrived.set()
        return await answer

    def queue_age_s(self) -> float:
        """How long the oldest request with waiting clips has been here; 0 if none waits."""
        now = time.perf_counter()
        ages = (now - item.arrived for item in self._requests if not item.answer.done())
        return max(ages, default=0.0)

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        previous = 0
        while True:
            await self._wait_for(1)
            if previous > 1:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._settle_s):
                        await self._wait_for(previous)
            slots = self._take()
            previous = len(slots)
            if not slots:
                continue
            self._on_batch(len(slots))
            started = time.perf_counter()
            await self._answer(loop, slots)
            seconds = time.perf_counter() - started
            self._on_seconds(seconds)
            self._note_rate(seconds / len(slots))

    async def _wait_for(self, clips: int) -> None:
        while self._waiting < clips:
            self._arrived.clear()
            await self._arrived.wait()

    def _take(self) -> list[_Slot]:
        """The next batch: waiting requests take turns, one clip each, oldest first."""
        self._drop_abandoned()
        now = time.perf_counter()
        slots: list[_Slot] = []
        while self._requests and len(slots) < self._max_batch:
            request = self._requests.popleft()
            request.started = request.started or now
            slots.append(_Slot(request, request.taken))
            request.taken += 1
            if request.waiting:
                self._requests.append(request)
        self._count(-len(slots))
        return slots

    async def _answer(self, loop: asyncio.AbstractEventLoop, slots: Sequence[_Slot]) -> None:
        try:
            outputs = await loop.run_in_executor(self._thread, self._infer, slots)
        except Exception:
            requests = list(dict.fromkeys(slot.request for slot in slots))
            if len(requests) > 1:
                # One poisoned request must not fail its neighbours: each on its own.
                for request in requests:
                    await self._answer(loop, [slot for slot in slots if slot.request is request])
                return
            logger.exception("the engine failed on a batch", extra={"clips": len(slots)})
            self._fail(requests[0])
            return
        self._deliver(slots, outputs)

    def _infer(self, slots: Sequence[_Slot]) -> Outputs:
        outputs = self._run(np.stack([slot.request.clips[slot.clip] for slot in slots]))
        if not np.isfinite(outputs.logits).all():
            raise FloatingPointError("the network's logits are not finite")
        return outputs

    def _deliver(self, slots: Sequence[_Slot], outputs: Outputs) -> None:
        for slot, logits, embedding in zip(slots, outputs.logits, outputs.embedding, strict=True):
            request = slot.request
            request.rows[slot.clip] = (logits, embedding)
            request.missing -= 1
            # The caller may have gone: setting a result on its future would kill this task.
            if request.missing == 0 and not request.answer.done():
                request.finish()

    def _fail(self, request: _Request) -> None:
        if not request.answer.done():
            request.answer.set_exception(InternalError("The network failed on this video."))
        self._drop_abandoned()

    def _drop_abandoned(self) -> None:
        """Forgets the requests that nobody waits for, before they cost anything."""
        gone = [request for request in self._requests if request.answer.done()]
        if gone:
            self._requests = deque(
                request for request in self._requests if not request.answer.done()
            )
            self._count(-sum(request.waiting for request in gone))

    def _count(self, change: int) -> None:
        self._waiting += change
        self._on_queue(self._waiting)

    def _note_rate(self, seconds_per_clip: float) -> None:
        if self._seconds_per_clip == 0:
            self._seconds_per_clip = seconds_per_clip
        self._seconds_per_clip += _RATE_WEIGHT * (seconds_per_clip - self._seconds_per_clip)

    def _retry_after_s(self) -> int:
        """Seconds until half the queue is done, at the present rate."""
        return max(1, math.ceil(self._waiting / 2 * self._seconds_per_clip))
