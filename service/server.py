"""Runs the app under uvicorn, and says when it is ready and what to try."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import signal
import socket
from collections.abc import Iterator
from typing import Literal

import uvicorn
import uvloop
from fastapi import FastAPI
from uvicorn import Config

from model.demo import SAMPLE_CLIP
from service import logging
from service.app import create_app, running
from service.protocol import with_head_timeout
from service.settings import Settings


def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT, and then until what runs has been answered.

    Raises:
        BundleError, RuntimeUnavailableError: there is nothing to serve, or nothing to run it.
    """
    logging.configure(settings.log_level, settings.log_format)
    uvloop.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    app = create_app(settings)
    # Not in the app's lifespan, where an error of ours would end as a framework's traceback.
    async with running(app):
        await _Server(configuration(app, settings, lifespan="off")).serve()


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
        timeout_graceful_shutdown=int(settings.shutdown_grace_s),
    )


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own raises the signal again when it is done, which would end the process with
        # the engine and the decoders still open, and with another status than 0.
        loop = asyncio.get_running_loop()
        stops = (signal.SIGTERM, signal.SIGINT)
        for stop in stops:
            loop.add_signal_handler(stop, self.handle_exit, stop, None)
        try:
            yield
        finally:
            for stop in stops:
                loop.remove_signal_handler(stop)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and not self.should_exit:
            print(self._welcome(), flush=True)

    def _welcome(self) -> str:
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        url = f"http://{'localhost' if host in {'0.0.0.0', '127.0.0.1', '::'} else host}:{port}"  # noqa: S104
        clip = shlex.quote(str(SAMPLE_CLIP))
        return (
            f"\nready at {url}\n\n"
            f"  curl -F file=@{clip} {url}/v1/classify\n"
            f"  or drop a video onto {url}/ ; the API is at {url}/docs\n"
        )
