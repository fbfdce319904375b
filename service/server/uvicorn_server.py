"""How uvicorn is run."""

from __future__ import annotations

import contextlib
import math
import socket
from collections.abc import Callable, Iterator
from typing import Any, Literal

import uvicorn
from starlette.types import ASGIApp
from uvicorn import Config

from service.server.http_protocol import with_head_timeout
from service.settings import Settings


def configuration(
    app: ASGIApp, settings: Settings, lifespan: Literal["on", "off"], **more: Any
) -> Config:
    """How uvicorn is run; `more` of its options win over ours."""
    ours = {
        "host": settings.host,
        "port": settings.port,
        "lifespan": lifespan,
        "http": with_head_timeout(settings.head_timeout_s),
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "timeout_graceful_shutdown": math.ceil(settings.shutdown_grace_s),
    }
    return Config(app, **{**ours, **more})


class Server(uvicorn.Server):
    """Calls `on_start` once it listens, and leaves signals to others."""

    def __init__(self, config: Config, on_start: Callable[[], None] = lambda: None) -> None:
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
            self._on_start()

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        shown = "localhost" if host in {"0.0.0.0", "127.0.0.1", "::"} else host  # noqa: S104 - compared, not bound
        return f"http://{shown}:{port}"
