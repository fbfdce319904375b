"""How uvicorn is run, and on which sockets."""

from __future__ import annotations

import contextlib
import math
import socket
from collections.abc import Callable, Iterator
from typing import Any, Literal

import uvicorn
from starlette.types import ASGIApp
from uvicorn import Config

from service.protocol import with_head_timeout
from service.settings import Settings, SettingsError


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
        return url_of(self.servers[0].sockets[0])


def url_of(listener: Any) -> str:
    host, port = listener.getsockname()[:2]
    shown = "localhost" if host in {"0.0.0.0", "127.0.0.1", "::"} else host  # noqa: S104 - compared, not bound
    return f"http://{shown}:{port}"


def bind(host: str, port: int, times: int) -> list[list[socket.socket]]:
    """So many sockets for each address of the host, on one port; the kernel spreads connections
    over those that listen.

    Raises:
        SettingsError: the port is taken, or the address is not this machine's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        per_address = [
            _bind_together(family, address, times)
            for family, address in dict.fromkeys((item[0], item[4]) for item in found)
        ]
    except OSError as error:
        raise SettingsError(
            f"TIMESFORMER_PORT: cannot listen on {host}:{port}: {error.strerror}"
        ) from error
    return [list(listeners) for listeners in zip(*per_address, strict=True)]


def _bind_together(family: int, address: Any, times: int) -> list[socket.socket]:
    # First alone: a port that is to be shared would also be shared with another service.
    with _socket(family) as alone:
        alone.bind(address)
        address = alone.getsockname()
    listeners = [_socket(family) for _ in range(times)]
    for listener in listeners:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
    return listeners


def _socket(family: int) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return made
