"""A model that serves: its bundle, its engine, the queue before it, and who uses it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from service.batcher import Batcher
from service.loading import LoadedModel, max_batch
from service.metrics import Metrics
from service.settings import Settings


class ServedModel:
    """A loaded model with the queue before it, and how many requests use it."""

    def __init__(self, loaded: LoadedModel, settings: Settings, metrics: Metrics) -> None:
        self.bundle, self.runtime, _ = loaded
        self.batcher = Batcher(
            loaded.runtime.run,
            max_batch=max_batch(settings, self.runtime),
            max_queue=settings.max_queue_clips,
            settle_s=settings.batch_settle_ms / 1e3,
            on_batch=metrics.batch_clips.observe,
            on_seconds=metrics.batch_seconds.observe,
            on_queue=metrics.queue_clips.set,
        )
        self.batcher.start()
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()

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

    async def close(self) -> None:
        """Frees the engine, once nobody uses it any more."""
        await self._unused.wait()
        await self.batcher.close()
        await asyncio.to_thread(self.runtime.close)
