"""`create_app(settings)`: the FastAPI application and its lifespan."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from importlib.metadata import version
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.telemetry import TelemetryConfig
from starlette.middleware.cors import CORSMiddleware

from service.api import problems
from service.api.auth import KeyFileError, Keyring, allow
from service.api.dependencies import State, is_ready
from service.api.middleware import REQUEST_ID_HEADER, RequestContext
from service.api.routes import admin, health, jobs, pages, predict, timeline
from service.api.routes import models as model_list
from service.api.v2 import routes as inference_protocol
from service.decoding.messages import DecoderLimits
from service.decoding.pool import LOSS_REASONS, DecoderPool
from service.decoding.sandbox import LAYERS
from service.ingest.memory_budget import Memory
from service.ingest.spool import Spool
from service.ingest.url_sources import Sources
from service.jobs.manager import Jobs
from service.jobs.runner import Means
from service.observability.metrics import Metrics
from service.observability.tracing import open_tracer
from service.registry.loading import store_of
from service.registry.local_client import Network
from service.registry.models import Models
from service.registry.store_sync import Mirror
from service.settings import Settings, SettingsError

logger = logging.getLogger(__name__)
# FastAPI's own telemetry is off: `service/observability/` has spans and metrics, and FastAPI would
# look for telemetry in each request.
_NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False}
_MOST_WAITING_VIDEOS = 64  # for a decoder; more are refused
_NICENESS = 10  # of the decoders of jobs, which nobody waits for


def create_app(settings: Settings) -> FastAPI:
    """The application; the model is loaded when it starts, not when it is made.

    Raises:
        SettingsError: the settings name a file of API keys that cannot be used, or ask for spans
            and OpenTelemetry is not installed.
    """
    try:
        keyring = Keyring(settings.api_keys_file) if settings.api_keys_file else None
    except KeyFileError as error:
        raise SettingsError(f"TIMESFORMER_API_KEYS_FILE: {error}") from error
    app = FastAPI(
        title="TimeSformer",
        summary="Video in, action labels out.",
        version=version("timesformer-service"),
        lifespan=running,
        openapi_url="/openapi.json" if settings.pages == "on" else None,
        docs_url=None,  # FastAPI's own loads its script from elsewhere
        redoc_url=None,
        telemetry=_NO_TELEMETRY,
    )
    app.state.settings, app.state.metrics, app.state.service = settings, Metrics(), None
    app.state.stopping = app.state.hangs = False
    app.state.keyring = keyring
    problems.install(app, app.state.metrics)
    app.state.tracer = open_tracer(settings.tracing)
    # Added last is outermost.
    if settings.cors_origins:
        _allow_origins(app, settings.cors_origins)
    app.add_middleware(RequestContext, metrics=app.state.metrics, tracer=app.state.tracer)
    app.router.routes[:0] = inference_protocol.infer_routes
    protocol = inference_protocol.router, inference_protocol.described
    groups = predict, timeline, jobs, model_list
    for router in (*(group.router for group in groups), *protocol):
        app.include_router(router, dependencies=[Depends(allow("infer"))])
    for router in (health.router, inference_protocol.probes):
        app.include_router(router)
    if settings.pages == "on":
        app.include_router(pages.router)
    if settings.admin_port is None:
        _administrate(app)
    return app


def create_admin_app(app: FastAPI) -> FastAPI:
    """Administration and metrics of a running app, to be served apart from it."""
    title = "TimeSformer administration"
    apart = FastAPI(title=title, version=app.version, openapi_url=None, telemetry=_NO_TELEMETRY)
    apart.state = app.state
    problems.install(apart, app.state.metrics)
    apart.add_middleware(RequestContext, metrics=app.state.metrics, tracer=app.state.tracer)
    apart.include_router(health.router)
    _administrate(apart)
    return apart


def _administrate(app: FastAPI) -> None:
    app.include_router(admin.router, dependencies=[Depends(allow("admin"))])
    app.include_router(health.metrics_router)


def _allow_origins(app: FastAPI, origins: str) -> None:
    """Lets pages of these origins call the service; they send no cookies, as it has none."""
    app.add_middleware(
        CORSMiddleware,
        allow_origins=[origin.strip() for origin in origins.split(",")],
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=[REQUEST_ID_HEADER, "Retry-After"],
    )


@contextlib.asynccontextmanager
async def running(app: FastAPI) -> AsyncIterator[None]:
    """Loads the model, starts decoders and batcher; stops them at the end of the block.

    Raises:
        BundleError, RuntimeUnavailableError: the model cannot be served.
        SettingsError: the spool cannot be written, or the required sandbox not be had.
    """
    settings: Settings = app.state.settings
    metrics: Metrics = app.state.metrics
    spool = Spool(settings.spool_dir, settings.max_spool_bytes)
    decoders = _decoders(settings, metrics, spool, settings.decode_workers)
    streams = _decoders(settings, metrics, spool, settings.timeline_workers, lazy=True)
    memory = Memory(settings.max_tensor_bytes)
    mirror = Mirror(settings, metrics)
    sources = Sources(settings, metrics)
    try:
        models = Models(settings, metrics)
        kept_jobs = _jobs(settings, metrics, models, sources)
        await _timed("store", mirror.start(), metrics)
        await asyncio.gather(
            _timed("models", models.start(), metrics),
            _timed("decoders", decoders.start(), metrics),
            streams.start(),
        )
        _watch(metrics, settings, decoders)
        metrics.watch_disk("spool", settings.spool_dir)
        metrics.watch_disk("store", store_of(settings).root)
        metrics.timelines_waiting.set_function(lambda: streams.waiting)
        metrics.spool_bytes.set_function(lambda: spool.used_bytes)
        metrics.tensor_bytes.set_function(lambda: memory.used_bytes)
        if kept_jobs is not None:
            await kept_jobs.start()
        app.state.service = State(
            settings=settings,
            metrics=metrics,
            network=Network(models),
            decoders=decoders,
            spool=spool,
            sources=sources,
            memory=memory,
            models=models,
            streams=streams,
            jobs=kept_jobs,
        )
        metrics.ready.set_function(lambda: is_ready(app.state))
        try:
            yield
        finally:
            app.state.service = None
            if kept_jobs is not None:
                await kept_jobs.close()
            app.state.hangs = not await models.close()
    finally:
        await mirror.close()
        decoders.close()
        streams.close()
        sources.close()
        spool.close()
        await asyncio.to_thread(app.state.tracer.close)


async def _timed(stage: str, start: Coroutine[Any, Any, None], metrics: Metrics) -> None:
    started = time.perf_counter()
    await start
    metrics.start_seconds.labels(stage).set(time.perf_counter() - started)


def _watch(metrics: Metrics, settings: Settings, decoders: DecoderPool) -> None:
    """From here on `/metrics` asks the decoders how they are.

    Raises:
        SettingsError: as `tell_of_sandbox`.
    """
    tell_of_sandbox(settings, metrics, decoders)
    metrics.decoders.set(settings.decode_workers)
    metrics.decoders_busy.set_function(lambda: decoders.busy)
    metrics.decode_waiting.set_function(lambda: decoders.waiting)


def tell_of_sandbox(settings: Settings, metrics: Metrics, decoders: DecoderPool) -> None:
    """Says what holds decoders in.

    Raises:
        SettingsError: less than what is required.
    """
    for layer in LAYERS:
        metrics.decode_sandbox.labels(layer).set(layer in decoders.sandbox)
    missing = decoders.missing_layers(settings)
    if settings.decode_sandbox != "off" and missing:
        logger.warning("decoders run without a part of their sandbox", extra={"missing": missing})


def _jobs(settings: Settings, metrics: Metrics, models: Models, sources: Sources) -> Jobs | None:
    if settings.jobs_dir is None:
        return None
    metrics.add_jobs(settings.jobs_dir)
    folders = (settings.jobs_dir / "videos", settings.jobs_dir / "incoming")
    limits = DecoderLimits.of(settings, folders)
    long = dataclasses.replace(limits.video, max_duration_s=settings.max_long_video_duration_s)
    decoders = DecoderPool(
        settings.job_workers,
        limits._replace(video=long, niceness=_NICENESS),
        on_restart=lambda reason: metrics.decoder_restarts.labels(reason).inc(),
        lazy=True,
    )
    means = Means(settings, models, decoders)
    return Jobs(settings.jobs_dir, means, metrics, sources, jobs.hook_body)


def _decoders(
    settings: Settings, metrics: Metrics, spool: Spool, workers: int, *, lazy: bool = False
) -> DecoderPool:
    for reason in LOSS_REASONS:
        metrics.decoder_restarts.labels(reason)  # at 0, so that the first one is seen as a rise
    return DecoderPool(
        workers,
        DecoderLimits.of(settings, (spool.folder,)),
        on_restart=lambda reason: metrics.decoder_restarts.labels(reason).inc(),
        lazy=lazy,
        max_waiting=_MOST_WAITING_VIDEOS,
    )
