"""Runs the app under uvicorn, and says when it is ready and what to try."""

from __future__ import annotations

import shlex
import socket
import sys

import uvicorn

from model.demo import SAMPLE_CLIP
from service import logging
from service.app import create_app
from service.models import find_bundle
from service.settings import Settings


def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT; exits with 1 if it could not start.

    Raises:
        BundleError: there is no bundle to serve; found out before anything starts.
    """
    logging.configure(settings.log_level, settings.log_format)
    bundle = find_bundle(settings)
    server = _Server(
        uvicorn.Config(
            create_app(settings),
            host=settings.host,
            port=settings.port,
            loop="uvloop",
            http="httptools",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(settings.shutdown_grace_s),
        ),
        f"{bundle.name} version {bundle.version}",
    )
    server.run()
    if not server.started:
        sys.exit(1)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, model: str) -> None:
        super().__init__(config)
        self._model = model

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and not self.should_exit:
            print(self._welcome(), flush=True)

    def _welcome(self) -> str:
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        url = f"http://{'localhost' if host in {'0.0.0.0', '127.0.0.1', '::'} else host}:{port}"  # noqa: S104
        clip = shlex.quote(str(SAMPLE_CLIP))
        return (
            f"\n{self._model} is ready at {url}\n\n"
            f"  curl -F file=@{clip} {url}/v1/classify\n"
            f"  API and schemas: {url}/docs\n"
        )
