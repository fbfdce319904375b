"""Which bundle serves, and how another takes over without losing a request.

A newly activated bundle is checked, loaded and warmed up beside the one that serves, takes over
from one request to the next, and the old one is closed when its last request has been answered.
One that cannot be used is refused, and the old one stays.

On a GPU with TensorRT a bundle without a plan is served by ONNX Runtime while its plan is built in
the background; then the plan takes over in the same way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from export.bundle import Bundle, BundleError, BundleStore
from export.runtime import Runtime, RuntimeUnavailableError, load_runtime
from export.runtime.plans import PlanError
from model.demo import STORE as DEMO_STORE
from service.batcher import Batcher
from service.engines import BUILDING, OFF, SERVING, Engines, TensorRtState, find_tensorrt
from service.errors import BundleRefusedError
from service.metrics import Metrics
from service.settings import Settings

logger = logging.getLogger(__name__)

# On two CPU cores the service kept 0.96 of the engine's best rate on `tiny` with batches of 1,
# 0.92 with 2, 0.85 with 4 (docs/measurements.md).
_MAX_BATCH = {"cpu": 2, "cuda": 16}


class LoadedModel(NamedTuple):
    """A bundle and the engine that runs it."""

    bundle: Bundle
    runtime: Runtime
    tensorrt: TensorRtState = OFF
    """`building`: a plan is to be built."""


def find_bundle(settings: Settings) -> Bundle:
    """The bundle that the settings name.

    Raises:
        BundleError: it is not there or cannot be read; the message says what to do.
    """
    store = store_of(settings)
    return store.open(settings.model or _only_name(store))


def store_of(settings: Settings) -> BundleStore:
    """The store that is served from."""
    return BundleStore(settings.store or DEMO_STORE)


def load_model(bundle: Bundle, settings: Settings, engines: Engines | None = None) -> LoadedModel:
    """Checks, loads and warms a bundle up; takes seconds, so not for the event loop.

    Args:
        engines: plans to look among; without it ONNX Runtime runs the bundle.

    Raises:
        BundleError: the bundle cannot be used.
        RuntimeUnavailableError: the device cannot run it.
    """
    started = time.perf_counter()
    bundle.verify()
    runtime, tensorrt = _load_plan(bundle, engines) if engines else (None, OFF)
    if runtime is None:
        runtime = load_runtime(bundle, settings.device, settings.engine_threads, settings.precision)
    try:
        _warm_up(bundle, runtime, max_batch(settings, runtime))
    except Exception as error:  # engines' exceptions share no base but Exception
        runtime.close()
        raise RuntimeUnavailableError(
            f"{bundle.name} version {bundle.version} failed its warm-up: {error}"
        ) from error
    logger.info(
        "model loaded",
        extra={
            "model": bundle.name,
            "version": bundle.version,
            "engine": runtime.engine,
            "provider": runtime.provider,
            "device": runtime.device,
            "precision": runtime.precision,
            "seconds": round(time.perf_counter() - started, 2),
        },
    )
    return LoadedModel(bundle, runtime, tensorrt)


def _load_plan(bundle: Bundle, engines: Engines) -> tuple[Runtime | None, TensorRtState]:
    """The bundle's plan, loaded and proven; or None, and what to tell of it."""
    try:
        plan = engines.find(bundle)
        if plan is None:
            return None, BUILDING
        return engines.load(plan, bundle), SERVING
    except (PlanError, RuntimeUnavailableError) as error:
        return None, TensorRtState("failed", str(error))


def max_batch(settings: Settings, runtime: Runtime) -> int:
    """Most clips in a batch, on the device that was found."""
    return settings.max_batch_clips or _MAX_BATCH[runtime.device]


def _warm_up(bundle: Bundle, runtime: Runtime, largest: int) -> None:
    """Runs the smallest and the largest batch: the engine's memory grows now, not under load."""
    config = bundle.config
    shape = (config.num_frames, config.image_size, config.image_size, 3)
    for clips in {1, largest}:
        outputs = runtime.run(np.zeros((clips, *shape), np.uint8))
        if not np.isfinite(outputs.logits).all():
            raise FloatingPointError("its logits are not finite")


def _only_name(store: BundleStore) -> str:
    names = store.names()
    if len(names) != 1:
        found = f"holds {', '.join(names)}: set TIMESFORMER_MODEL to one" if names else "is empty"
        raise BundleError(f"the bundle store {store.root} {found}")
    return names[0]


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


class ModelHost:
    """The model that serves now, and the watch on the store for the next one."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._current: ServedModel | None = None
        self._refusal: tuple[str | None, str] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._swapping = asyncio.Lock()
        self._engines: Engines | None = None
        self._tensorrt = OFF
        self._building: asyncio.Task[None] | None = None

    @property
    def current(self) -> ServedModel:
        if self._current is None:
            raise RuntimeError("no model is loaded yet")
        return self._current

    @property
    def tensorrt(self) -> str:
        """What TensorRT is at, and why if it does not serve."""
        return str(self._tensorrt)

    async def start(self) -> None:
        """Loads the active bundle.

        Raises:
            BundleError, RuntimeUnavailableError: it cannot be served.
        """
        bundle = await asyncio.to_thread(find_bundle, self._settings)
        here, self._tensorrt = await asyncio.to_thread(find_tensorrt, self._settings)
        if here is not None:
            largest = self._settings.max_batch_clips or _MAX_BATCH["cuda"]
            self._engines = Engines(here, largest, self._settings.precision)
        self._take_over(await self._load(bundle))
        if self._settings.watch_interval_s:
            self._watcher = asyncio.create_task(self._watch(), name="watch on the store")

    async def refresh(self) -> bool:
        """Takes the store's active bundle if it is another; says whether it did.

        A bundle that cannot be used is logged, counted and not tried again until another is
        activated.
        """
        version = None
        async with self._swapping:
            try:
                bundle = await asyncio.to_thread(find_bundle, self._settings)
                version = bundle.version
                refused = self._refusal is not None and self._refusal[0] == version
                self._metrics.active_bundle_refused.set(refused)
                if refused or version == self.current.bundle.version:
                    return False
                loaded = await self._load(bundle)
            except (BundleError, RuntimeUnavailableError) as error:
                self._refuse(version, str(error))
                return False
            self._refusal = None
            self._take_over(loaded)
        return True

    async def activate(self, version: str) -> None:
        """Makes a version of the served name the active one, once it has been loaded and warmed.

        Raises:
            BundleRefusedError: it cannot be used; store and service are as they were.
        """
        store, name = store_of(self._settings), self.current.bundle.name
        await self._switch(version, lambda: store.activate(name, version))

    async def roll_back(self) -> None:
        """Goes back to the version that was active before, in the same way.

        Raises:
            BundleRefusedError: there is none, or it cannot be used.
        """
        store, name = store_of(self._settings), self.current.bundle.name
        try:
            history = await asyncio.to_thread(store.history, name)
        except BundleError as error:
            raise BundleRefusedError(str(error)) from error
        if len(history) < 2:
            raise BundleRefusedError(f"{name} has no earlier active version.")
        await self._switch(history[1], lambda: store.rollback(name))

    async def _switch(self, version: str, point: Callable[[], Bundle]) -> None:
        store, serving = store_of(self._settings), self.current.bundle
        async with self._swapping:
            try:
                bundle = await asyncio.to_thread(store.open, serving.name, version)
                if version == serving.version:
                    await asyncio.to_thread(point)
                    return
                loaded = await self._load(bundle)
                await asyncio.to_thread(point)
            except (BundleError, RuntimeUnavailableError) as error:
                self._metrics.swaps.labels("refused").inc()
                raise BundleRefusedError(str(error)) from error
            self._refusal = None
            self._take_over(loaded)

    async def _load(self, bundle: Bundle) -> LoadedModel:
        return await asyncio.to_thread(load_model, bundle, self._settings, self._engines)

    def _refuse(self, version: str | None, reason: str) -> None:
        if self._refusal == (version, reason):
            return  # said already; the watch would repeat it for ever
        self._refusal = (version, reason)
        self._metrics.active_bundle_refused.set(1)
        serving = self.current.bundle.version
        logger.error("swap refused", extra={"to": version, "serving": serving, "reason": reason})
        self._metrics.swaps.labels("refused").inc()

    async def close(self) -> None:
        """Stops the watch and frees the models."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        if self._building is not None and self._engines is not None:
            self._engines.stop()
            await self._building
        await asyncio.gather(*self._closing)
        if self._current is not None:
            await self._current.close()

    def _take_over(self, loaded: LoadedModel) -> None:
        """From here on requests go to the new model; between two lines of the event loop."""
        old, self._current = self._current, ServedModel(loaded, self._settings, self._metrics)
        bundle, runtime, tensorrt = loaded
        self._metrics.model_info.clear()
        self._metrics.model_info.labels(
            bundle.name,
            bundle.version,
            runtime.engine,
            runtime.provider,
            runtime.device,
            runtime.precision,
        ).set(1)
        self._tell(tensorrt if self._engines else self._tensorrt)
        if tensorrt == BUILDING and self._building is None:
            self._building = asyncio.create_task(self._build(), name="build of plans")
        if old is not None:
            if old.bundle.version == bundle.version:
                logger.info("engine swapped", extra={"to": runtime.engine})
            else:
                self._metrics.swaps.labels("done").inc()
                logger.info("swapped", extra={"from": old.bundle.version, "to": bundle.version})
            closing = asyncio.create_task(old.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    def _tell(self, tensorrt: TensorRtState) -> None:
        self._tensorrt = tensorrt
        self._metrics.tensorrt.clear()
        self._metrics.tensorrt.labels(tensorrt.state).set(1)
        level = logging.ERROR if tensorrt.state == "failed" else logging.INFO
        logger.log(level, "TensorRT", extra={"state": tensorrt.state, "reason": tensorrt.reason})

    async def _build(self) -> None:
        """Builds the plan of what serves, until what serves has one or cannot have one."""
        while self._tensorrt == BUILDING and (engines := self._engines):
            bundle = self.current.bundle
            try:
                plan = await asyncio.to_thread(engines.build, bundle)
                async with self._swapping:
                    if self.current.bundle.version == bundle.version:
                        runtime = await asyncio.to_thread(engines.load, plan, bundle)
                        self._take_over(LoadedModel(bundle, runtime, SERVING))
            except Exception as error:  # whatever it is, the service goes on without
                if engines.stopped:
                    break
                if self.current.bundle.version == bundle.version:
                    self._tell(TensorRtState("failed", str(error)))
        self._building = None

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._settings.watch_interval_s)
            await self.refresh()
