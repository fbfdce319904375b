"""Requests to batches: joins the clips of concurrent requests for one pass through an engine.

The rule: take what waits while the engine runs, and after a batch of more than one clip wait up
to `settle_s` for as many again. Without that wait a closed loop of clients locks into alternating
small batches. A second batch is lined up behind the one that runs only when it is full, so that
it never gets smaller by it; what is in it is decided when it starts. There is no polling: with
nothing to do, threads and event loop sleep.

`service/inference/scheduler.py` decides whose clips go first; this module decides what engines do
with them. Each engine has threads of its own, and an idle engine gets the next batch. An engine
whose requests fail, and succeed on another engine, is taken out; an engine that fails otherwise is
tried until it works.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from service.errors import (
    DeadlineExceededError,
    DeadlineUnreachableError,
    InternalError,
    QueueFullError,
)
from service.inference.engine_worker import (
    DEPTH,
    FAILURES,
    TRY_EVERY_S,
    Batch,
    Engine,
    EngineWorker,
    Events,
    Piece,
    frames_of,
)
from service.inference.scheduler import Answer, Priority, Request, Turns

logger = logging.getLogger(__name__)

# How much the newest batch counts in the drain rate: about the last ten batches.
_RATE_WEIGHT = 0.2


class Batcher:
    """The queue before one or more engines with the same network.

    Args:
        engines: what runs batches.
        max_batch: most clips in a batch.
        max_queue: most clips that wait.
        settle_s: see the module's text.
        trial: clips that an engine which fails is tried with; without, only requests try it.
        events: is told what happens.
        threads: makes the threads of an engine, so many.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        max_batch: int,
        max_queue: int,
        settle_s: float = 0.002,
        trial: NDArray[np.uint8] | None = None,
        events: Events | None = None,
        threads: Callable[[int], Executor] = lambda slots: ThreadPoolExecutor(
            slots, thread_name_prefix="engine"
        ),
    ) -> None:
        self._workers = [
            EngineWorker(index, engine, max_batch, threads(min(DEPTH, engine.slots)))
            for index, engine in enumerate(engines)
        ]
        self._max_queue = max_queue
        self._settle_s = settle_s
        self._trial = trial
        self._events = events or Events()
        self._lock = threading.Lock()  # over turns, promised and retries
        self._turns = Turns()
        self._promised = 0
        """Clips that batches will take which have been started and have not taken theirs."""
        self._retries: list[Batch] = []
        """What one engine failed on, for one that has not tried it."""
        self._unanswered: set[Request] = set()
        self._seconds_per_clip = 0.0
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False

    def start(self) -> None:
        """Begins to serve; needs a running event loop."""
        self._loop = asyncio.get_running_loop()

    async def close(self) -> None:
        """Stops after the batches that run; whoever has no answer yet gets `CancelledError`.

        An engine that hangs lets this wait for ever, but blocks no thread besides its own.
        """
        self._closed = True
        for request in list(self._unanswered):
            request.answer.cancel()
        for worker in self._workers:
            self._stop_settling(worker)
            if worker.trying is not None:
                worker.trying.cancel()
            worker.threads.shutdown(wait=False)
        await self._idle.wait()

    async def submit(
        self,
        clips: NDArray[np.uint8],
        priority: Priority = "normal",
        deadline: float | None = None,
    ) -> Answer:
        """Runs clips through the network, in company; cancelling it drops what still waits.

        Args:
            clips: uint8 (clips, time, height, width, 3), one clip at least.
            deadline: by the clock of the event loop; what waits then is dropped.

        Raises:
            QueueFullError: too many clips wait already.
            DeadlineUnreachableError: so many wait that it could not be done in time.
            DeadlineExceededError: it was not done in time.
            InternalError: the engine failed on these clips.
        """
        now = self._loop.time()
        if deadline is not None and deadline <= now:
            raise DeadlineExceededError("The time that was given is over.")
        request = Request(clips, self._loop.create_future(), now, priority, deadline)
        self._admit(request)
        if deadline is not None:
            request.timer = self._loop.call_at(deadline, self._expire, request)
        self._unanswered.add(request)
        self._start_batches()
        try:
            answer = await request.answer
        except asyncio.CancelledError:
            self._drop(request, "left")
            raise
        finally:
            self._unanswered.discard(request)
            if request.timer is not None:
                request.timer.cancel()
        self._events.request_answered(priority, answer.queue_s)
        return answer

    async def idle(self) -> None:
        """Waits until no clip waits and no batch runs."""
        await self._idle.wait()

    @property
    def waiting(self) -> int:
        """Clips that wait for an engine."""
        return self._turns.waiting

    @property
    def running(self) -> tuple[int, ...]:
        """Batches that each engine has."""
        return tuple(worker.jobs for worker in self._workers)

    @property
    def healthy(self) -> tuple[bool, ...]:
        """For each engine, whether it is in use and does not fail on everything."""
        return tuple(worker.healthy for worker in self._workers)

    def check_room(self, clips: int, priority: Priority = "normal") -> None:
        """Asks, before a video is received or decoded for nothing, whether its clips may wait.

        Raises:
            QueueFullError: too many do, or will once they are decoded; see `Turns.would_fit`.
        """
        with self._lock:
            if not self._turns.would_fit(clips, priority, self._max_queue):
                raise self._full()

    def check_queue(self, clips: int, priority: Priority = "normal") -> None:
        """Asks whether clips that need no decoding would be taken now, whatever is being decoded.

        Raises:
            QueueFullError: too many wait.
        """
        with self._lock:
            if self._turns.room_for(clips, priority, self._max_queue) is None:
                raise self._full()

    @contextlib.contextmanager
    def reserved(self, clips: int, priority: Priority = "normal") -> Iterator[Callable[[], None]]:
        """Counts clips as being decoded, until the block ends or the function that it gives is
        called; that is to be done right before they are submitted.

        Raises:
            QueueFullError: as `check_room`.
        """
        self.check_room(clips, priority)
        coming = self._turns.coming
        coming[priority] += clips
        kept = clips

        def release() -> None:
            nonlocal kept
            coming[priority] -= kept
            kept = 0

        try:
            yield release
        finally:
            release()

    def queue_age_s(self) -> float:
        """How long the oldest request with waiting clips has been here; 0 if none waits."""
        with self._lock:
            oldest = self._turns.oldest()
        return 0.0 if oldest is None else self._loop.time() - oldest

    def _admit(self, request: Request) -> None:
        """Puts a request into the queue, or says why not."""
        clips, now, deadline = len(request.clips), request.arrived, request.deadline
        with self._lock:
            waiting = self._turns.waiting
            displaced = self._turns.room_for(clips, request.priority, self._max_queue)
            if displaced is None:
                raise self._full()
            # Never refused while nothing waits: a rate that was measured in bad times has to mend.
            if deadline is not None and waiting:
                ahead = self._turns.ahead_of(clips, request.priority)
                needed = ahead * self._seconds_per_clip
                if now + needed > deadline:
                    raise DeadlineUnreachableError(needed, math.ceil(now + needed - deadline))
            for other in displaced:
                self._turns.drop(other)
            self._turns.add(request)
        for other in displaced:
            self._events.request_dropped("displaced")
            if other.wanted:
                other.answer.set_exception(self._full())

    def _full(self) -> QueueFullError:
        """With the seconds until half of what waits and comes is done, at the present rate."""
        ahead = self._turns.waiting + sum(self._turns.coming.values())
        return QueueFullError(max(1, math.ceil(ahead / 2 * self._seconds_per_clip)))

    def _expire(self, request: Request) -> None:
        self._drop(request, "deadline")
        if request.wanted:
            request.answer.set_exception(
                DeadlineExceededError("There was no answer in the time that was given.")
            )

    def _drop(self, request: Request, reason: str) -> None:
        with self._lock:
            waited = self._turns.drop(request)
        # A batch may have met it first, and dropped it for the same reason.
        if waited or request.waiting:
            self._events.request_dropped(reason)
            self._note_idle()

    def _start_batches(self) -> None:
        """Gives work to engines that may have some; idle ones come first."""
        workers = self._workers
        if len(workers) > 1:
            workers = sorted(workers, key=lambda worker: worker.jobs)
        for worker in workers:
            self._start_batch(worker)
        self._note_idle()

    def _note_idle(self) -> None:
        if self._turns.waiting or any(worker.jobs for worker in self._workers):
            self._idle.clear()
        else:
            self._idle.set()

    def _start_batch(self, worker: EngineWorker) -> None:
        if worker.removed or self._closed or worker.jobs >= DEPTH:
            return
        free = self._turns.waiting - self._promised
        if worker.jobs:
            if free < worker.most:
                return
            promised = 0
        elif self._retries and self._has_retry(worker):
            promised = 0
        else:
            if free < 1 or not self._has_settled(worker, free):
                return
            promised = worker.size(free)
        self._stop_settling(worker)
        with self._lock:
            self._promised += promised
        least = worker.most if worker.jobs else 1
        worker.jobs += 1
        worker.threads.submit(self._work, worker, promised, least)

    def _has_retry(self, worker: EngineWorker) -> bool:
        with self._lock:
            return any(worker.index not in batch.tried for batch in self._retries)

    def _has_settled(self, worker: EngineWorker, waiting: int) -> bool:
        """Whether the wait for as many clips as the last batch had is over, or needless."""
        if waiting >= min(worker.previous, worker.most) or worker.previous <= 1:
            return True
        if worker.settling is None:
            worker.settling = self._loop.call_later(self._settle_s, self._settled, worker)
        return False

    def _settled(self, worker: EngineWorker) -> None:
        worker.settling, worker.previous = None, 0
        self._start_batches()

    def _stop_settling(self, worker: EngineWorker) -> None:
        if worker.settling is not None:
            worker.settling.cancel()
            worker.settling = None

    def _work(self, worker: EngineWorker, promised: int, least: int) -> None:
        """One batch, in a thread of the engine's."""
        batch = self._take(worker, promised, least)
        started = self._loop.time()
        pieces: list[Piece] = []
        if batch.slots:
            self._events.batch_started(worker.index, len(batch.slots))
            pieces = self._infer(worker, batch)
        ended = self._loop.time()
        self._tell(self._finish, worker, len(batch.slots), pieces, started, ended)

    def _tell(self, callback: Callable[..., None], *arguments: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, *arguments)

    def _take(self, worker: EngineWorker, promised: int, least: int) -> Batch:
        with self._lock:
            self._promised -= promised
            for batch in self._retries:
                if worker.index not in batch.tried:
                    self._retries.remove(batch)
                    return batch
            waiting = self._turns.waiting
            if waiting < least:
                return Batch(())
            return Batch(self._turns.take(worker.size(waiting), self._loop.time()))

    def _infer(self, worker: EngineWorker, batch: Batch) -> list[Piece]:
        try:
            outputs = worker.run(frames_of(batch.slots))
            if not np.isfinite(outputs.logits).all():
                raise FloatingPointError("the network's logits are not finite")
            return [Piece(batch, outputs)]
        except Exception:
            requests = list(dict.fromkeys(slot.request for slot in batch.slots))
            if len(requests) == 1:
                logger.exception(
                    "the engine failed on a batch",
                    extra={"clips": len(batch.slots), "engine": worker.index},
                )
                return [Piece(batch, None)]
        # One poisoned request must not fail its neighbours: each on its own.
        alone = [
            Batch([slot for slot in batch.slots if slot.request is request])
            for request in requests
            if request.wanted
        ]
        return [piece for own in alone for piece in self._infer(worker, own)]

    def _finish(
        self, worker: EngineWorker, clips: int, pieces: list[Piece], started: float, ended: float
    ) -> None:
        """Hands out what came of a batch; of one that failed, only what is wanted still."""
        worker.jobs -= 1
        if clips:
            worker.previous = clips
            # With two batches on their way, the time of one includes some of the other.
            seconds = ended - max(started, worker.free_since)
            worker.free_since = ended
            self._events.batch_ended(worker.index, seconds)
            self._note_rate(seconds / clips)
        for batch, outputs in pieces:
            if outputs is None:
                self._retry(worker, batch)
                continue
            worker.failures = 0
            for slot, *rows in zip(batch.slots, *outputs, strict=True):
                slot.request.give(slot.clip, rows, ended)
            for index in batch.tried:
                self._blame(self._workers[index])
        self._start_batches()

    def _retry(self, worker: EngineWorker, batch: Batch) -> None:
        """Leaves clips on which an engine failed to another one, if there is one left."""
        worker.failures += 1
        self._try_later(worker)
        batch = Batch(batch.slots, batch.tried | {worker.index})
        if self._can_be_tried(batch):
            with self._lock:
                self._retries.append(batch)
        else:
            self._fail(batch)

    def _can_be_tried(self, batch: Batch) -> bool:
        return any(
            not worker.removed and worker.index not in batch.tried for worker in self._workers
        )

    def _fail(self, batch: Batch) -> None:
        request = batch.slots[0].request
        with self._lock:
            self._turns.drop(request)
        if request.wanted:
            request.answer.set_exception(InternalError("The network failed on this video."))

    def _blame(self, worker: EngineWorker) -> None:
        """Another engine did what this one could not: the fault was not the clips'."""
        if worker.removed or worker.failures < FAILURES:
            return
        worker.removed = True
        self._stop_settling(worker)
        logger.error("engine taken out: it fails on what others do", extra={"engine": worker.index})
        self._events.engine_removed(worker.index)
        with self._lock:
            hopeless = [batch for batch in self._retries if not self._can_be_tried(batch)]
            self._retries = [batch for batch in self._retries if batch not in hopeless]
        for batch in hopeless:
            self._fail(batch)

    def _try_later(self, worker: EngineWorker) -> None:
        """Tries an engine in a while, if it fails on everything and nobody is to do so already."""
        done = worker.healthy or worker.removed or worker.trying is not None or self._closed
        if self._trial is not None and not done:
            worker.trying = self._loop.call_later(TRY_EVERY_S, self._try, worker, self._trial)

    def _try(self, worker: EngineWorker, trial: NDArray[np.uint8]) -> None:
        worker.trying = None
        if worker.healthy or worker.removed or worker.jobs:  # then it is requests that show it
            self._try_later(worker)
            return
        worker.jobs += 1
        self._note_idle()
        worker.threads.submit(lambda: self._tell(self._tried, worker, worker.works_on(trial)))

    def _tried(self, worker: EngineWorker, works: bool) -> None:
        worker.jobs -= 1
        if works:
            worker.failures = 0
            logger.info("an engine works again", extra={"engine": worker.index})
        self._try_later(worker)
        self._start_batches()

    def _note_rate(self, seconds_per_clip: float) -> None:
        """Of all engines together."""
        seconds_per_clip /= max(1, sum(not worker.removed for worker in self._workers))
        if self._seconds_per_clip == 0:
            self._seconds_per_clip = seconds_per_clip
        self._seconds_per_clip += _RATE_WEIGHT * (seconds_per_clip - self._seconds_per_clip)
