"""What goes through an engine at a time, and the engine's side of the queue; the queue itself is in
`service/inference/batcher.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from export.runtime.interface import Outputs
from service.inference.scheduler import Priority, Slot

# Batches that an engine has at once: one that runs, one that is copied or lined up behind it.
DEPTH = 2
# Requests in a row that an engine failed, none done between them, before it counts as broken.
FAILURES = 3
# How often a broken engine is tried while it has nothing to do. Nobody sends it requests any more
# once readiness says so, so they cannot show that it works again.
TRY_EVERY_S = 5.0


class Engine(Protocol):
    """The part of a `Runtime` that batches need."""

    @property
    def slots(self) -> int:
        """Batches that `run` can have on their way at once, from as many threads."""

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes that it was built for, rising, with the largest last; empty: any."""

    def run(self, frames: NDArray[np.uint8]) -> Outputs:
        """uint8 (batch, time, height, width, 3) to `Outputs`."""


class Events:
    """Is told what happens in a batcher; by itself does nothing. Called from several threads."""

    def batch_started(self, engine: int, clips: int) -> None:
        """A batch is about to run."""

    def batch_ended(self, engine: int, seconds: float) -> None:
        """`seconds`: that the engine was at it, without those it spent on the batch before."""

    def request_answered(self, priority: Priority, queue_s: float) -> None:
        """The first batch with clips of it came after `queue_s`."""

    def request_dropped(self, reason: str) -> None:
        """Clips of it were waiting and will not be run; the reason is one of `DROPPED`."""

    def engine_removed(self, engine: int) -> None:
        """It fails on what others can do, and gets no more work."""


class Batch(NamedTuple):
    """Clips that go through an engine together."""

    slots: Sequence[Slot]
    tried: frozenset[int] = frozenset()
    """Engines that failed on them; they are of one request then."""


class Piece(NamedTuple):
    """A batch or a part of one, with what came of it; None: the engine failed on it."""

    batch: Batch
    outputs: Outputs | None


class EngineWorker:
    """An engine, its threads, and what it is at."""

    def __init__(self, index: int, engine: Engine, most: int, threads: Executor) -> None:
        self.index = index
        self.run = engine.run
        self.most = min(most, *engine.batches[-1:]) if engine.batches else most
        self.sizes = tuple(size for size in engine.batches if 1 < size < self.most)
        self.threads = threads
        self.jobs = 0
        """Batches that it was given and has not brought back."""
        self.previous = 0
        """Clips of its last batch."""
        self.settling: asyncio.TimerHandle | None = None
        self.trying: asyncio.TimerHandle | None = None
        self.free_since = 0.0
        self.failures = 0
        self.removed = False

    @property
    def healthy(self) -> bool:
        return not self.removed and self.failures < FAILURES

    def works_on(self, clips: NDArray[np.uint8]) -> bool:
        """Runs clips for the sake of it."""
        try:
            return bool(np.isfinite(self.run(clips).logits).all())
        except Exception:  # engines' exceptions share no base but Exception
            return False

    def size(self, waiting: int) -> int:
        """How many of so many clips it takes: all it can, but a number just above a size that it
        was built for is cut down to it; the rest would run on what was made for many more.
        """
        if waiting >= self.most:
            return self.most
        lower = max((size for size in self.sizes if size <= waiting), default=0)
        upper = min((size for size in self.sizes if size > waiting), default=self.most)
        return lower if lower and 2 * waiting < lower + upper else waiting


def frames_of(slots: Sequence[Slot]) -> NDArray[np.uint8]:
    """The clips of a batch as one array; a view of a request's own if they are all from it."""
    first, last = slots[0], slots[-1]
    if first.request is last.request and last.clip - first.clip == len(slots) - 1:
        return first.request.clips[first.clip : last.clip + 1]
    return np.stack([slot.request.clips[slot.clip] for slot in slots])
