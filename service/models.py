"""Which bundle serves: loads it, warms it up, and keeps what requests need of it."""

from __future__ import annotations

import logging
import time
from typing import NamedTuple

import numpy as np

from export.bundle import Bundle, BundleError, BundleStore
from export.runtime import Runtime, load_runtime
from model.demo import STORE as DEMO_STORE
from service.settings import Settings

logger = logging.getLogger(__name__)


class ServedModel(NamedTuple):
    """A bundle and the engine that runs it."""

    bundle: Bundle
    runtime: Runtime


def find_bundle(settings: Settings) -> Bundle:
    """The bundle that the settings name.

    Raises:
        BundleError: it is not there or cannot be read; the message says what to do.
    """
    store = BundleStore(settings.store or DEMO_STORE)
    return store.open(settings.model or _only_name(store))


def load_model(settings: Settings) -> ServedModel:
    """Finds, checks, loads and warms the model up; takes seconds, so not for the event loop.

    Raises:
        BundleError: the bundle cannot be used.
        RuntimeUnavailableError: the device cannot run it.
    """
    started = time.perf_counter()
    bundle = find_bundle(settings)
    bundle.verify()
    runtime = load_runtime(bundle, settings.device, settings.engine_threads)
    config = bundle.config
    shape = (config.num_frames, config.image_size, config.image_size, 3)
    for clips in {1, settings.max_batch_clips}:  # the engine's memory grows now, not under load
        runtime.run(np.zeros((clips, *shape), np.uint8))
    logger.info(
        "model loaded",
        extra={
            "model": bundle.name,
            "version": bundle.version,
            "engine": runtime.engine,
            "provider": runtime.provider,
            "device": runtime.device,
            "seconds": round(time.perf_counter() - started, 2),
        },
    )
    return ServedModel(bundle, runtime)


def _only_name(store: BundleStore) -> str:
    names = store.names()
    if len(names) != 1:
        found = f"holds {', '.join(names)}: set TIMESFORMER_MODEL to one" if names else "is empty"
        raise BundleError(f"the bundle store {store.root} {found}")
    return names[0]
