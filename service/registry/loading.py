"""From a bundle in the store to an engine that is checked, loaded and warm."""

from __future__ import annotations

import logging
import time
from typing import NamedTuple

import numpy as np

from export.bundle.bundle import Bundle, BundleError, BundleStore
from export.bundle.manifest import ONNX_FP16
from export.bundle.remote_store import RemoteStore
from export.runtime import (
    Runtime,
    RuntimeUnavailableError,
    device_name,
    load_on_gpus,
    load_runtimes,
)
from export.runtime.plans import PlanError
from export.verification.engine_check import prove_or_close
from model.demo import STORE as DEMO_STORE
from service.registry.tensorrt_plans import OFF, SERVING, Engines, TensorRtState, find_gpus
from service.settings import ALL_MODELS, Settings

logger = logging.getLogger(__name__)

# On two CPU cores the service kept 0.96 of the engine's best rate on `tiny` with batches of 1,
# 0.92 with 2, 0.85 with 4 (docs/measurements.md).
_MAX_BATCH = {"cpu": 2, "cuda": 16}


class LoadedModel(NamedTuple):
    """A bundle and the engines that run it, one on each GPU, or one on the CPU."""

    bundle: Bundle
    runtimes: tuple[Runtime, ...]
    tensorrt: TensorRtState = OFF

    @property
    def runtime(self) -> Runtime:
        """The first; the others differ from it in their GPU only."""
        return self.runtimes[0]

    def close(self) -> None:
        """Frees the devices' memory; no `run` may be on its way."""
        for runtime in self.runtimes:
            runtime.close()


def find_bundle(settings: Settings) -> Bundle:
    """The bundle that the settings name, the first if they name several; fetched if it is remote.

    Raises:
        BundleError: it is not there or cannot be read; the message says what to do.
    """
    follow_store(settings)
    return store_of(settings).open(served_names(settings)[0])


def served_names(settings: Settings) -> tuple[str, ...]:
    """Names of the models that are to serve, the default first.

    Raises:
        BundleError: the settings name none, and it is not clear which.
    """
    if settings.model_names:
        return settings.model_names
    store = store_of(settings)
    names = store.names()
    if settings.model == ALL_MODELS:
        names = [name for name in names if was_activated(store, name)]
    if not names:
        raise BundleError(f"the bundle store {store.root} is empty")
    if len(names) > 1 and settings.model is None:
        raise BundleError(
            f"the bundle store {store.root} holds {', '.join(names)}: "
            f"set TIMESFORMER_MODEL to one, to several with commas, or to {ALL_MODELS}"
        )
    return tuple(names)


def follow_store(settings: Settings) -> None:
    """Brings the folder of this node up to date with the store at the settings' URL, if they have
    one.

    Raises:
        BundleError: it cannot be reached or used; the folder is as it was.
    """
    if settings.store_url is not None:
        RemoteStore(settings.store_url).follow(store_of(settings), settings.model_names)


def was_activated(store: BundleStore, name: str) -> bool:
    """Whether there is a pointer to a version, be it damaged."""
    try:
        return bool(store.history(name))
    except BundleError:
        return True


def store_of(settings: Settings) -> BundleStore:
    """The store that is served from."""
    return BundleStore(settings.store or DEMO_STORE)


def load_model(
    bundle: Bundle, settings: Settings, engines: Engines | None = None, threads: int = 0
) -> LoadedModel:
    """Checks, loads and warms a bundle up; takes seconds, so not for the event loop.

    Args:
        engines: plans to look among; without it ONNX Runtime runs the bundle.
        threads: CPU threads inside one operator of ONNX Runtime; 0 for one per usable core.

    Raises:
        BundleError: the bundle cannot be used.
        RuntimeUnavailableError: the device cannot run it, or one of several GPUs cannot.
    """
    started = time.perf_counter()
    bundle.verify()
    runtimes, tensorrt = _load_plans(bundle, engines) if engines else (None, OFF)
    if runtimes is None:
        runtimes = _load_graph(bundle, settings, threads, has_tensorrt=engines is not None)
    loaded = LoadedModel(bundle, runtimes, tensorrt)
    runtime = loaded.runtime
    try:
        for each in runtimes:
            _warm_up(bundle, each, max_batch(settings, each))
    except Exception as error:  # engines' exceptions share no base but Exception
        loaded.close()
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
            "devices": [device_name(each) for each in runtimes],
            "precision": runtime.precision,
            "seconds": round(time.perf_counter() - started, 2),
        },
    )
    return loaded


def _load_plans(
    bundle: Bundle, engines: Engines
) -> tuple[tuple[Runtime, ...] | None, TensorRtState]:
    """Returns the bundle's plans, loaded and proven, or None; and TensorRT's status."""
    try:
        plans = engines.find(bundle)
        if plans is None:
            return None, engines.without_plan
        return engines.load(plans, bundle), SERVING
    except (PlanError, RuntimeUnavailableError) as error:
        return None, engines.after(bundle, error)


def _load_graph(
    bundle: Bundle, settings: Settings, threads: int, *, has_tensorrt: bool
) -> tuple[Runtime, ...]:
    """Loads a graph of the bundle in ONNX Runtime: on GPUs the FP16 graph, unless the settings ask
    for float32 or the FP16 graph's answers are wrong there.

    Args:
        has_tensorrt: whether ONNX Runtime replaces a plan, of whatever precision.

    Raises:
        BundleError, RuntimeUnavailableError: as `load_model`.
    """
    device, precision = settings.device, settings.precision
    gpus = () if device == "cpu" else find_gpus(settings)
    is_half = precision in ("auto", "fp16") or (has_tensorrt and precision != "float32")
    if gpus and is_half and ONNX_FP16 in bundle.manifest.files:
        try:
            halves = load_on_gpus(bundle, threads, gpus, "fp16", must=True)
            prove_or_close(halves, bundle)
            return halves
        except (PlanError, RuntimeUnavailableError) as error:
            logger.warning("ONNX Runtime cannot serve FP16", extra={"reason": str(error)})
    if has_tensorrt and precision != "auto":
        precision = "float32"
    return load_runtimes(bundle, device, threads, precision, gpus)


def max_batch(settings: Settings, runtime: Runtime) -> int:
    """Most clips in a batch, on the device that was found."""
    return largest_batch(settings, runtime.device)


def largest_batch(settings: Settings, device: str) -> int:
    """Most clips in a batch on `cpu` or `cuda`."""
    return settings.max_batch_clips or _MAX_BATCH[device]


def _warm_up(bundle: Bundle, runtime: Runtime, largest: int) -> None:
    """Runs the smallest and the largest batch: the engine's memory grows now, not under load."""
    config = bundle.config
    shape = (config.num_frames, config.image_size, config.image_size, 3)
    for clips in {1, largest}:
        outputs = runtime.run(np.zeros((clips, *shape), np.uint8))
        if not np.isfinite(outputs.logits).all():
            raise FloatingPointError("its logits are not finite")
