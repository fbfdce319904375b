"""`create_app(settings)`: the FastAPI application and its lifespan."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from importlib.metadata import version

from fastapi import FastAPI

from model.video import Limits
from service import errors
from service.batcher import Batcher
from service.decoding import DecoderPool, WorkerLimits
from service.metrics import Metrics
from service.middleware import RequestContext
from service.models import ServedModel, load_model
from service.routes import classify, health, models, page
from service.settings import Settings
from service.state import State
from service.uploads import remove_leftovers

logger = logging.getLogger(__name__)


def create_app(settings: Settings) -> FastAPI:
    """The application; the model is loaded when it starts, not when it is made."""
    app = FastAPI(
        title="TimeSformer",
        summary="Video in, action labels out.",
        version=version("timesformer-service"),
        lifespan=running,
    )
    app.state.settings, app.state.metrics, app.state.service = settings, Metrics(), None
    errors.install(app, app.state.metrics)
    app.add_middleware(RequestContext, metrics=app.state.metrics)
    for group in (classify, models, health, page):
        app.include_router(group.router)
    return app


@contextlib.asynccontextmanager
async def running(app: FastAPI) -> AsyncIterator[None]:
    """Loads the model, starts decoders and batcher; stops them at the end of the block.

    Raises:
        BundleError, RuntimeUnavailableError: the model cannot be served.
    """
    settings: Settings = app.state.settings
    metrics: Metrics = app.state.metrics
    if leftovers := remove_leftovers(settings.spool_dir):
        logger.warning("removed uploads of an earlier run", extra={"files": leftovers})
    decoders = _decoders(settings, metrics)
    try:
        model, _ = await asyncio.gather(asyncio.to_thread(load_model, settings), decoders.start())
        batcher = _batcher(settings, metrics, model)
        batcher.start()
        _set_model_info(metrics, model)
        app.state.service = State(settings, metrics, model, decoders, batcher)
        metrics.ready.set(1)
        try:
            yield
        finally:
            metrics.ready.set(0)
            app.state.service = None
            await batcher.close()
            model.runtime.close()
    finally:
        decoders.close()


def _decoders(settings: Settings, metrics: Metrics) -> DecoderPool:
    limits = WorkerLimits(
        memory_bytes=settings.decode_memory_bytes,
        timeout_s=settings.decode_timeout_s,
        video=Limits(
            max_pixels=settings.max_video_pixels, max_duration_s=settings.max_video_duration_s
        ),
    )
    return DecoderPool(
        settings.decode_workers,
        limits,
        on_restart=lambda reason: metrics.decoder_restarts.labels(reason).inc(),
    )


def _batcher(settings: Settings, metrics: Metrics, model: ServedModel) -> Batcher:
    return Batcher(
        model.runtime.run,
        max_batch=settings.max_batch_clips,
        max_queue=settings.max_queue_clips,
        settle_s=settings.batch_settle_ms / 1e3,
        on_batch=metrics.batch_clips.observe,
        on_queue=metrics.queue_clips.set,
    )


def _set_model_info(metrics: Metrics, model: ServedModel) -> None:
    bundle, runtime = model
    metrics.model_info.labels(
        bundle.name, bundle.version, runtime.engine, runtime.provider, runtime.device
    ).set(1)
