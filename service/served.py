"""A version that is loaded: its bundle, its engine, the queue before it, and who uses it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from export.bundle import BundleError
from export.runtime import RuntimeUnavailableError
from service.batcher import Batcher
from service.loading import LoadedModel, max_batch
from service.metrics import Metrics
from service.settings import Settings

UNUSABLE = (BundleError, RuntimeUnavailableError)
"""What loading a version may raise."""


class ServedModel:
    """A loaded model with the queue before it, and how many requests use it."""

    def __init__(self, loaded: LoadedModel, settings: Settings, metrics: Metrics) -> None:
        self.bundle, self.runtime, self.tensorrt = loaded
        self.is_serving = False
        """Whether the metrics of the model's queue and batches are of this version."""
        self.is_candidate = False
        """Whether it is tried, or was and has not served since."""
        name = self.bundle.name
        self._batch_clips = metrics.batch_clips.labels(name)
        self._batch_seconds = metrics.batch_seconds.labels(name)
        self._queue_clips = metrics.queue_clips.labels(name)
        self.max_batch = max_batch(settings, self.runtime)
        self.batcher = Batcher(
            loaded.runtime.run,
            max_batch=self.max_batch,
            max_queue=settings.max_queue_clips,
            settle_s=settings.batch_settle_ms / 1e3,
            on_batch=self._batch_started,
            on_seconds=self._batch_ended,
            on_queue=self._queue_changed,
        )
        self.batcher.start()
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()
        self._batches, self._waiting = 0, 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[ServedModel]:
        """Keeps the model open for as long as the block runs."""
        self._users += 1
        self._unused.clear()
        try:
            yield self
        finally:
            self._users -= 1
            if self._users == 0:
                self._unused.set()

    async def idle(self) -> None:
        """Waits until no clip waits for the engine and it runs none."""
        await self._idle.wait()

    async def close(self) -> None:
        """Frees the engine, once nobody uses it any more."""
        await self._unused.wait()
        await self.batcher.close()
        await asyncio.to_thread(self.runtime.close)

    def _batch_started(self, clips: int) -> None:
        self._batches += 1
        self._note_idle()
        if self.is_serving:
            self._batch_clips.observe(clips)

    def _batch_ended(self, seconds: float) -> None:
        self._batches -= 1
        self._note_idle()
        if self.is_serving:
            self._batch_seconds.observe(seconds)

    def _queue_changed(self, clips: int) -> None:
        self._waiting = clips
        self._note_idle()
        if self.is_serving:
            self._queue_clips.set(clips)

    def _note_idle(self) -> None:
        if self._batches or self._waiting:
            self._idle.clear()
        else:
            self._idle.set()
