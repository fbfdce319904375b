"""Runs the app under uvicorn: says when it is ready and what to try, and stops it in good order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import shlex
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import uvicorn
import uvloop
from fastapi import FastAPI
from uvicorn import Config

from model.demo import SAMPLE_CLIP
from service.app import create_admin_app, create_app, running
from service.logging import configure
from service.metrics import Metrics
from service.protocol import with_head_timeout
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
        servers = [
            _Server(configuration(app, settings, lifespan="off"), _welcome(app.state.metrics))
        ]
        if settings.admin_port is not None:
            config = configuration(create_admin_app(app), settings, lifespan="off")
            config.port = settings.admin_port
            servers.insert(0, _Server(config, _admin_welcome))
        signals.enter_context(_until_stopped(app, servers, settings.shutdown_delay_s))
        await asyncio.gather(*(server.serve() for server in servers))


def configuration(app: FastAPI, settings: Settings, lifespan: Literal["on", "off"]) -> Config:
    """How uvicorn is run."""
    return Config(
        app,
        host=settings.host,
        port=settings.port,
        lifespan=lifespan,
        http=with_head_timeout(settings.head_timeout_s),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(settings.shutdown_grace_s),
    )


class _Server(uvicorn.Server):
    """Calls `on_start` with its address once it listens, and leaves signals to others."""

    def __init__(self, config: Config, on_start: Callable[[str], None]) -> None:
        super().__init__(config)
        self._on_start = on_start

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own raises the signal again when it is done, which would end the process with
        # the engine and the decoders still open, and with another status than 0.
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and not self.should_exit:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            shown = "localhost" if host in {"0.0.0.0", "127.0.0.1", "::"} else host  # noqa: S104
            self._on_start(f"http://{shown}:{port}")


@contextlib.contextmanager
def _until_stopped(app: FastAPI, servers: list[_Server], delay_s: float) -> Iterator[None]:
    """Stops the servers on a signal.

    SIGTERM: first not ready, so that balancers send no more, and after the delay no new requests.
    Ctrl-C: at once no new requests. A second signal: the end, whatever runs.
    """
    loop = asyncio.get_running_loop()

    def stop_listening() -> None:
        for server in servers:
            server.should_exit = True

    def stop(number: signal.Signals) -> None:
        if app.state.stopping:
            logger.warning("ended by a second signal; what ran is lost")
            os._exit(128 + number)
        app.state.stopping = True
        app.state.metrics.ready.set(0)
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


def _welcome(metrics: Metrics) -> Callable[[str], None]:
    def print_it(url: str) -> None:
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

    return print_it


def _admin_welcome(url: str) -> None:
    print(f"\nadministration and metrics at {url}", flush=True)


def process_age_s() -> float:
    """Seconds since this process was started; where Linux does not tell, since it loaded us."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError):
        return time.monotonic() - _IMPORTED
