"""Runs the app under uvicorn: says when it is ready and what to try, and stops it in good order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import uvloop
from fastapi import FastAPI

from model.demo import SAMPLE_CLIP
from service.observability.logs import configure
from service.observability.metrics import Metrics
from service.server.app import create_admin_app, create_app, running
from service.server.uvicorn_server import Server, configuration
from service.settings import Settings

logger = logging.getLogger(__name__)
_IMPORTED = time.monotonic()


def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT, and then until what runs has been answered.

    Raises:
        BundleError, RuntimeUnavailableError: there is nothing to serve, or nothing to run it.
        SettingsError: the spool cannot be written, or the required sandbox not be had.
    """
    imports_s = process_age_s()
    configure(settings.log_level, settings.log_format)
    uvloop.run(_serve(settings, imports_s))


async def _serve(settings: Settings, imports_s: float) -> None:
    app = create_app(settings)
    app.state.metrics.start_seconds.labels("imports").set(imports_s)
    # Not in the app's lifespan, where an error of ours would end as a framework's traceback.
    # Signals are heard until all is closed: the second one also ends a stop that hangs.
    with contextlib.ExitStack() as signals:
        await _run(app, settings, signals)
    if app.state.hangs:
        # Python would wait for the engine's thread.
        logger.error("ended though an engine hangs")
        os._exit(1)


async def _run(app: FastAPI, settings: Settings, signals: contextlib.ExitStack) -> None:
    async with running(app):
        others = [_admin_server(app, settings)] if settings.admin_port is not None else []
        config = configuration(app, settings, lifespan="off")
        server = Server(config, lambda: _welcome(app.state.metrics, server.url))
        servers = [*others, server]
        signals.enter_context(_until_stopped(app, settings, servers))
        await asyncio.gather(*(each.serve() for each in servers))


def _admin_server(app: FastAPI, settings: Settings) -> Server:
    config = configuration(
        create_admin_app(app), settings, lifespan="off", port=settings.admin_port
    )
    server = Server(
        config, lambda: print(f"\nadministration and metrics at {server.url}", flush=True)
    )
    return server


def _stop_listening(servers: list[Server]) -> None:
    for server in servers:
        server.should_exit = True


@contextlib.contextmanager
def _until_stopped(app: FastAPI, settings: Settings, servers: list[Server]) -> Iterator[None]:
    """Stops the service on a signal.

    SIGTERM: first not ready, so that balancers send no more, and after the delay no new requests.
    Ctrl-C: at once no new requests. A second signal: the end, whatever runs.
    """
    loop = asyncio.get_running_loop()

    def stop(number: signal.Signals) -> None:
        if app.state.stopping:
            logger.warning("ended by a second signal; what ran is lost")
            os._exit(128 + number)
        app.state.stopping = True
        wait_s = settings.shutdown_delay_s if number == signal.SIGTERM else 0.0
        logger.info("stopping", extra={"signal": number.name, "no_new_requests_in_s": wait_s})
        loop.call_later(wait_s, _stop_listening, servers)

    stops = (signal.SIGTERM, signal.SIGINT)
    for number in stops:
        loop.add_signal_handler(number, stop, number)
    try:
        yield
    finally:
        for number in stops:
            loop.remove_signal_handler(number)


def _welcome(metrics: Metrics, url: str) -> None:
    total_s = process_age_s()
    metrics.start_seconds.labels("total").set(total_s)
    stages = metrics.start_stages()
    logger.info("started", extra={stage: round(value, 2) for stage, value in stages.items()})
    clip = shlex.quote(str(SAMPLE_CLIP))
    print(
        f"\nready at {url} after {total_s:.1f} s\n\n"
        f"  curl -F file=@{clip} {url}/v1/classify\n"
        f"  or drop a video onto {url}/ ; the API is at {url}/docs\n",
        flush=True,
    )


def process_age_s() -> float:
    """Seconds since this process was started; where Linux does not tell, since it loaded us."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError):
        return time.monotonic() - _IMPORTED
