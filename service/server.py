"""Runs the app under uvicorn: says when it is ready and what to try, and stops it in good order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import uvloop
from fastapi import FastAPI

from model.demo import SAMPLE_CLIP
from service.app import create_admin_app, create_app, running
from service.listening import Server, configuration
from service.logging import configure
from service.metrics import Metrics
from service.settings import Settings
from service.state import State
from service.workers import Workers

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
    app = create_app(settings.of_engines())
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
    several = settings.workers > 1
    async with running(app, behind_workers=several):
        others = [_admin_server(app, settings)] if settings.admin_port is not None else []
        if several:
            await _run_workers(app, settings, signals, others)
            return
        config = configuration(app, settings, lifespan="off")
        server = Server(config, lambda: _welcome(app.state.metrics, server.url))
        servers = [*others, server]
        signals.enter_context(
            _until_stopped(app, settings.shutdown_delay_s, lambda: _stop_listening(servers))
        )
        await asyncio.gather(*(each.serve() for each in servers))


async def _run_workers(
    app: FastAPI, settings: Settings, signals: contextlib.ExitStack, others: list[Server]
) -> None:
    """The workers have the port; what they forward comes over a socket of this process's own."""
    state: State = app.state.service
    app.state.workers = workers = Workers(
        settings, state.metrics, state.network, app.state.keyring, state.spool
    )
    stop = asyncio.Event()
    config = configuration(
        app, settings, lifespan="off", uds=str(workers.forwarding), date_header=False
    )
    servers = [*others, Server(config)]
    serving = [asyncio.create_task(each.serve()) for each in servers]
    try:
        url = await workers.start()
        signals.enter_context(
            _until_stopped(app, settings.shutdown_delay_s, stop.set, workers.tell_stopping)
        )
        _welcome(state.metrics, url)
        await stop.wait()
        await workers.stop()
    finally:
        await workers.close()
        _stop_listening(servers)
        await asyncio.gather(*serving)


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
def _until_stopped(
    app: FastAPI,
    delay_s: float,
    stop_listening: Callable[[], object],
    on_signal: Callable[[], object] = lambda: None,
) -> Iterator[None]:
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
        on_signal()
        wait_s = delay_s if number == signal.SIGTERM else 0.0
        logger.info("stopping", extra={"signal": number.name, "no_new_requests_in_s": wait_s})
        loop.call_later(wait_s, stop_listening)

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
