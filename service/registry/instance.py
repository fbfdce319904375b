"""A version that is loaded: its bundle, its engine, the queue before it, and who uses it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from export.bundle.bundle import Bundle, BundleError
from export.runtime import RuntimeUnavailableError, device_name
from service.inference.batcher import Batcher
from service.inference.engine_worker import Events
from service.inference.scheduler import DROPPED, PRIORITIES, Priority
from service.observability.metrics import Metrics
from service.registry.loading import LoadedModel, max_batch
from service.settings import Settings

UNUSABLE = (BundleError, RuntimeUnavailableError)
"""What loading a version may raise."""


class ServedModel:
    """A loaded model with the queue before it, and how many requests use it."""

    def __init__(self, loaded: LoadedModel, settings: Settings, metrics: Metrics) -> None:
        self.bundle, self.runtimes, self.tensorrt = loaded
        self.runtime = loaded.runtime
        """The first of its engines; the others differ from it in their GPU only."""
        self.is_serving = False
        """Whether the metrics of the model's queue and batches are of this version."""
        self.is_candidate = False
        """Whether it is tried, or was and has not served since."""
        self.max_batch = max_batch(settings, self.runtime)
        self.ahead = 2 * self.max_batch * len(self.runtimes)
        """Clips of one long video that keep the engines busy."""
        self.batcher = Batcher(
            self.runtimes,
            max_batch=self.max_batch,
            max_queue=settings.max_queue_clips,
            trial=_noise(self.bundle),
            events=_Counted(self, metrics),
        )
        self.batcher.start()
        self._loaded = loaded
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
        """Frees the engines, once nobody uses them any more."""
        await self._unused.wait()
        await self.batcher.close()
        await asyncio.to_thread(self._loaded.close)


def _noise(bundle: Bundle) -> NDArray[np.uint8]:
    """A clip that tries an engine: of all values, as videos are. A black one shows less."""
    config = bundle.config
    shape = (1, config.num_frames, config.image_size, config.image_size, 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


class _Counted(Events):
    """What happens in the queue of a model, as metrics; but for what runs, of what serves only."""

    def __init__(self, model: ServedModel, metrics: Metrics) -> None:
        name = model.bundle.name
        self._model = model
        self._batch_clips = metrics.batch_clips.labels(name)
        self._batch_seconds = metrics.batch_seconds.labels(name)
        self._running = [
            metrics.batches_running.labels(name, str(index), device_name(runtime))
            for index, runtime in enumerate(model.runtimes)
        ]
        self._queue_seconds = {
            priority: metrics.queue_seconds.labels(priority) for priority in PRIORITIES
        }
        self._dropped = {reason: metrics.dropped.labels(reason) for reason in DROPPED}
        self._removed = metrics.engines_removed.labels(name)

    def batch_started(self, engine: int, clips: int) -> None:
        self._running[engine].inc()
        if self._model.is_serving:
            self._batch_clips.observe(clips)

    def batch_ended(self, engine: int, seconds: float) -> None:
        self._running[engine].dec()
        if self._model.is_serving:
            self._batch_seconds.observe(seconds)

    def request_answered(self, priority: Priority, queue_s: float) -> None:
        if self._model.is_serving:
            self._queue_seconds[priority].observe(queue_s)

    def request_dropped(self, reason: str) -> None:
        self._dropped[reason].inc()

    def engine_removed(self, engine: int) -> None:
        self._removed.inc()
