"""One model by name: which version of it serves, and how another takes over without losing a
request.

A newly activated version is checked, loaded and warmed up beside the one that serves, takes over
from one request to the next, and the old one is closed when its last request has been answered.
One that cannot be used is refused, and the old one stays.

On a GPU with TensorRT a version without a plan is served by ONNX Runtime while its plan is built in
the background; then the plan takes over in the same way. A candidate gets its plan likewise.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable

from export.bundle.bundle import Bundle, BundleError, Candidate
from export.runtime import device_name
from service.errors import BundleRefusedError, ModelUnavailableError
from service.observability.metrics import Metrics
from service.registry.instance import UNUSABLE, ServedModel
from service.registry.loading import LoadedModel, load_model, store_of
from service.registry.rollout import Candidates
from service.registry.tensorrt_plans import SERVING, Engines, TensorRtState
from service.settings import Settings

logger = logging.getLogger(__name__)
# For batches that still run when the requests' own grace is over; pods get 10 s beyond that.
_LAST_BATCHES_S = 5.0


class ModelHost:
    """The version of one name that serves now, and the watch on the store for the next one.

    Args:
        engines: where TensorRT's plans are; without it ONNX Runtime runs the model.
        tensorrt: what TensorRT is at, if it is not used.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        metrics: Metrics,
        engines: Engines | None,
        tensorrt: TensorRtState,
    ) -> None:
        self.name = name
        self._settings = settings
        self._metrics = metrics
        self._store = store_of(settings)
        self._engines = engines
        self._tensorrt = tensorrt
        self._current: ServedModel | None = None
        self._looked_at: str | None = None
        self._refusal: tuple[str | None, str] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._building: asyncio.Task[None] | None = None
        self._info: list[tuple[str, ...]] = []
        self._told: str | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._swapping = asyncio.Lock()
        self.candidates = Candidates(
            name,
            self._store,
            metrics,
            current=lambda: self.current,
            load=self._load,
            discard=self._discard,
        )
        metrics.add_model(name)
        metrics.queue_limit_clips.labels(name).set(settings.max_queue_clips)
        metrics.queue_clips.labels(name).set_function(self._queue_clips)
        metrics.queue_age_seconds.labels(name).set_function(self._queue_age_s)
        metrics.engines_healthy.labels(name).set_function(self._engines_healthy)

    @property
    def current(self) -> ServedModel:
        """The version that serves.

        Raises:
            ModelUnavailableError: none could be loaded yet.
        """
        if self._current is None:
            raise ModelUnavailableError(f"The model '{self.name}' could not be loaded.")
        return self._current

    @property
    def is_serving(self) -> bool:
        return self._current is not None

    @property
    def is_ready(self) -> bool:
        """Whether a version serves, and not all of its engines fail."""
        return self._current is not None and any(self._current.batcher.healthy)

    @property
    def refusal(self) -> str | None:
        """Why the store's active version does not serve, while it does not."""
        return self._refusal[1] if self._refusal else None

    @property
    def tensorrt(self) -> str:
        """What TensorRT is at, and why if it does not serve."""
        return str(self._tensorrt)

    # ---- following the store --------------------------------------------------------------------

    async def start(self) -> None:
        """Loads the active version.

        Raises:
            BundleError, RuntimeUnavailableError: it cannot be served.
        """
        async with self._swapping:
            await self._follow()
            await self._follow_candidate()

    def watch(self) -> None:
        """Follows the store from here on."""
        self._watcher = asyncio.create_task(self._watch(), name=f"watch on {self.name}")

    async def refresh(self) -> None:
        """Takes the store's active version and its candidate, if they are others.

        A version that cannot be used is logged, counted and not tried again until another is
        activated.
        """
        async with self._swapping:
            try:
                await self._follow()
            except UNUSABLE as error:
                self.refuse(str(error))
            await self._follow_candidate()

    def refuse(self, reason: str) -> None:
        """Notes that the store's active version cannot be used, once."""
        if self._refusal == (self._looked_at, reason):
            return  # said already; the watch would repeat it for ever
        self._refusal = (self._looked_at, reason)
        self._metrics.active_bundle_refused.labels(self.name).set(1)
        serving = self._current.bundle.version if self._current else None
        logger.error(
            "swap refused" if self._current else "model not loaded",
            extra={
                "model": self.name,
                "to": self._looked_at,
                "serving": serving,
                "reason": reason,
            },
        )
        self._metrics.swaps.labels(self.name, "refused").inc()

    async def _follow(self) -> None:
        self._looked_at = None
        bundle = await asyncio.to_thread(self._store.open, self.name)
        self._looked_at = bundle.version
        if self._refusal is not None and self._refusal[0] == bundle.version:
            self._metrics.active_bundle_refused.labels(self.name).set(1)
            return
        if self._current is None or self._current.bundle.version != bundle.version:
            self._take_over(await self.candidates.loaded(bundle))
        self._refusal = None
        self._metrics.active_bundle_refused.labels(self.name).set(0)

    async def _follow_candidate(self) -> None:
        if self._current is not None:
            await self.candidates.follow()
            self._build_missing()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._settings.watch_interval_s)
            try:
                await self.refresh()
            except Exception:  # a disk that fails for a moment must not end the watch
                logger.exception("the store cannot be followed", extra={"model": self.name})

    # ---- by order of an administrator -----------------------------------------------------------

    async def activate(self, version: str) -> None:
        """Makes a version the active one, once it has been loaded and warmed up.

        Raises:
            BundleRefusedError: it cannot be used; store and service are as they were.
        """
        await self._switch(version, lambda: self._store.activate(self.name, version))

    async def roll_back(self) -> None:
        """Goes back to the version that was active before, in the same way.

        Raises:
            BundleRefusedError: there is none, or it cannot be used.
        """
        try:
            history = await asyncio.to_thread(self._store.history, self.name)
        except BundleError as error:
            raise BundleRefusedError(str(error)) from error
        if len(history) < 2:
            raise BundleRefusedError(f"{self.name} has no earlier active version.")
        await self._switch(history[1], lambda: self._store.rollback(self.name))

    async def _switch(self, version: str, point: Callable[[], Bundle]) -> None:
        async with self._swapping:
            try:
                bundle = await asyncio.to_thread(self._store.open, self.name, version)
                if self._current is not None and version == self._current.bundle.version:
                    await asyncio.to_thread(point)
                    return
                model = await self.candidates.loaded(bundle)
                await self._point(point, model)
            except UNUSABLE as error:
                self._metrics.swaps.labels(self.name, "refused").inc()
                raise BundleRefusedError(str(error)) from error
            self._refusal = None
            self._metrics.active_bundle_refused.labels(self.name).set(0)
            self._take_over(model)

    async def _point(self, point: Callable[[], Bundle], model: ServedModel) -> None:
        try:
            await asyncio.to_thread(point)
        except BundleError:
            trial = self.candidates.trial
            if trial is None or trial.model is not model:
                self._discard(model)
            raise

    async def try_candidate(self, candidate: Candidate) -> None:
        """Lets a version be tried beside the one that serves.

        Raises:
            BundleRefusedError: it cannot be used; store and service are as they were.
        """
        async with self._swapping:
            await self.candidates.begin(candidate)
            self._build_missing()

    async def withdraw_candidate(self) -> None:
        """Lets none be tried.

        Raises:
            BundleRefusedError: the store cannot be written to.
        """
        async with self._swapping:
            await self.candidates.withdraw()

    async def promote(self) -> None:
        """Makes the candidate the active version; it is loaded already.

        Raises:
            BundleRefusedError: there is none, or it cannot be activated.
        """
        trial = self.candidates.trial
        if trial is None:
            raise BundleRefusedError(f"No candidate of {self.name} is tried.")
        await self.activate(trial.candidate.version)

    # ---- taking over ----------------------------------------------------------------------------

    async def _load(self, bundle: Bundle) -> ServedModel:
        loaded = await asyncio.to_thread(load_model, bundle, self._settings, self._engines)
        _warn_of_large_requests(bundle, self._settings)
        return ServedModel(loaded, self._settings, self._metrics)

    def _take_over(self, model: ServedModel) -> None:
        """From here on requests go to this version; between two lines of the event loop."""
        trial = self.candidates.trial
        if trial is not None and trial.model is model:
            self.candidates.end(keep=model)
        old, self._current = self._current, model
        bundle, runtime = model.bundle, model.runtime
        if old is not None:
            old.is_serving = False
        model.is_serving, model.is_candidate = True, False
        self._show_info()
        self._tell(model.tensorrt if self._engines else self._tensorrt)
        self._build_missing()
        if old is not None:
            facts: dict[str, str] = {"model": self.name}
            if old.bundle.version == bundle.version:
                logger.info("engine swapped", extra={**facts, "to": runtime.engine})
            else:
                self._metrics.swaps.labels(self.name, "done").inc()
                change = {"from": old.bundle.version, "to": bundle.version}
                logger.info("swapped", extra={**facts, **change})
            self._discard(old)

    def _discard(self, model: ServedModel) -> None:
        """Frees a version once its last request has been answered."""
        closing = asyncio.create_task(model.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def close(self) -> bool:
        """Stops the watch and frees the versions; False if an engine hangs, which then stays."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        try:
            async with asyncio.timeout(_LAST_BATCHES_S):
                if self._building is not None:
                    await self._building  # `Engines.stop` has ended what it waits for
                self.candidates.end()
                if self._current is not None:
                    self._discard(self._current)
                await asyncio.gather(*self._closing)
        except TimeoutError:
            logger.error("an engine does not end and is left", extra={"model": self.name})
            return False
        return True

    def _show_info(self) -> None:
        """Shows in the metrics what serves, and what it runs on."""
        for labels in self._info:
            self._metrics.model_info.remove(*labels)
        version = self.current.bundle.version
        self._info = [
            (
                self.name,
                version,
                runtime.engine,
                runtime.provider,
                device_name(runtime),
                runtime.precision,
            )
            for runtime in self.current.runtimes
        ]
        for labels in self._info:
            self._metrics.model_info.labels(*labels).set(1)

    def _tell(self, tensorrt: TensorRtState) -> None:
        if self._told is not None:
            self._metrics.tensorrt.remove(self.name, self._told)
        self._tensorrt, self._told = tensorrt, tensorrt.state
        self._metrics.tensorrt.labels(self.name, tensorrt.state).set(1)
        facts = {"model": self.name, "state": tensorrt.state, "reason": tensorrt.reason}
        logger.log(_level(tensorrt), "TensorRT", extra=facts)

    def _build_missing(self) -> None:
        """Begins to build, unless that goes on already."""
        if self._building is None and self._without_plan() is not None:
            self._building = asyncio.create_task(self._build(), name="build of plans")

    def _without_plan(self) -> ServedModel | None:
        """What serves, else what is tried, if it waits for its plan."""
        if self._engines is None:
            return None
        trial = self.candidates.trial
        used = (self._current, trial.model if trial else None)
        return next((model for model in used if model and model.tensorrt.is_building), None)

    async def _build(self) -> None:
        """Builds plans until what serves and what is tried have theirs or cannot have any."""
        while (engines := self._engines) and (waiting := self._without_plan()):
            bundle = waiting.bundle
            try:
                async with engines.building:  # not in the thread: all models share a few of them
                    plans = await asyncio.to_thread(engines.build, bundle)
                async with self._swapping:
                    if self._is_used(waiting):
                        runtimes = await asyncio.to_thread(engines.load, plans, bundle)
                        loaded = LoadedModel(bundle, runtimes, SERVING)
                        self._go_on(waiting, ServedModel(loaded, self._settings, self._metrics))
            except Exception as error:  # whatever it is, the service goes on without
                if engines.stopped:
                    break
                self._note(waiting, await asyncio.to_thread(engines.after, bundle, error))
        self._building = None

    def _note(self, model: ServedModel, tensorrt: TensorRtState) -> None:
        """What TensorRT is at for a version that is loaded."""
        model.tensorrt = tensorrt
        if model is self._current:
            self._tell(tensorrt)
        elif self._is_used(model):
            facts = {"model": self.name, "version": model.bundle.version}
            told = {"state": tensorrt.state, "reason": tensorrt.reason}
            logger.log(_level(tensorrt), "TensorRT for the candidate", extra={**facts, **told})

    def _is_used(self, model: ServedModel) -> bool:
        trial = self.candidates.trial
        return model is self._current or (trial is not None and model is trial.model)

    def _go_on(self, old: ServedModel, new: ServedModel) -> None:
        """The same version by another engine, as what serves or as what is tried."""
        if old is self._current:
            self._take_over(new)
        else:
            self.candidates.move(new)

    def _queue_clips(self) -> int:
        return self._current.batcher.waiting if self._current else 0

    def _engines_healthy(self) -> int:
        return sum(self._current.batcher.healthy) if self._current else 0

    def _queue_age_s(self) -> float:
        return self._current.batcher.queue_age_s() if self._current else 0.0


def _warn_of_large_requests(bundle: Bundle, settings: Settings) -> None:
    """Logs a warning if the memory for clips is smaller than the largest request."""
    config, most = bundle.config, settings.max_clips_per_request
    largest = most * math.prod((config.num_frames, config.image_size, config.image_size, 3))
    if largest > settings.max_tensor_bytes:
        logger.warning(
            "requests with TIMESFORMER_MAX_CLIPS_PER_REQUEST clips get 413, because they are "
            "larger than TIMESFORMER_MAX_TENSOR_BYTES",
            extra={"model": bundle.name, "clips": most, "bytes": largest},
        )


def _level(tensorrt: TensorRtState) -> int:
    """How loudly it is told what TensorRT is at."""
    if tensorrt.state == "failed":
        return logging.ERROR
    return logging.WARNING if tensorrt.state == "missing" else logging.INFO
