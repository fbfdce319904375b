"""Which bundle serves, and how another takes over without losing a request.

A newly activated bundle is checked, loaded and warmed up beside the one that serves, takes over
from one request to the next, and the old one is closed when its last request has been answered.
One that cannot be used is refused, and the old one stays.

On a GPU with TensorRT a bundle without a plan is served by ONNX Runtime while its plan is built in
the background; then the plan takes over in the same way.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from export.bundle import Bundle, BundleError
from export.runtime import RuntimeUnavailableError
from service.engines import BUILDING, OFF, SERVING, Engines, TensorRtState, find_tensorrt
from service.errors import BundleRefusedError
from service.loading import LoadedModel, find_bundle, largest_batch, load_model, store_of
from service.metrics import Metrics
from service.served import ServedModel
from service.settings import Settings

logger = logging.getLogger(__name__)


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
            largest = largest_batch(self._settings, "cuda")
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
