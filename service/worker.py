"""One of several workers: a process that takes requests in, decodes videos and answers. It asks the
process that started it for the network, and forwards it what it does not do itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from pathlib import Path
from typing import NamedTuple

import uvloop
from fastapi import FastAPI
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from service import sandbox
from service.app import create_intake_app, taking_in
from service.auth import KeyFileError
from service.forwarding import Forwarder
from service.listening import Server, configuration
from service.logging import configure
from service.merging import snapshot
from service.remote import Link, RemoteNetwork, SharedKeyring
from service.settings import Settings, SettingsError
from service.wire import Wire


class Post(NamedTuple):
    """What a worker is given."""

    parent: int
    settings: Settings
    """With its share."""
    listeners: list[socket.socket]
    asking: Path
    """Where `Sessions` listen."""
    forwarding: Path
    """Where the rest of the service is."""


def main(post: Post, control: socket.socket) -> None:
    """Runs until it is told to stop, or the process that started it is gone.

    Args:
        control: connected to that process, which says what to do, and is told how it stands.
    """
    sandbox.end_with(post.parent)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the other process hears them for all
    configure(post.settings.log_level, post.settings.log_format)
    uvloop.run(_work(post, control))


async def _work(post: Post, control: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    _, wire = await loop.create_unix_connection(Wire, sock=control)
    link = Link(post.asking)
    keys = post.settings.api_keys_file
    try:
        app = create_intake_app(post.settings, SharedKeyring(keys, link) if keys else None)
        both = _Split(app, Forwarder(post.forwarding, lambda: bool(app.state.stopping)))
        async with taking_in(app, RemoteNetwork(link)):
            config = configuration(both, post.settings, lifespan="off")
            server = Server(config, lambda: wire.send({"ready": True}))
            obeying = loop.create_task(_obey(wire, app, server))
            await server.serve(post.listeners)
            obeying.cancel()
    except (SettingsError, KeyFileError) as error:
        wire.send({"failed": str(error)})
    link.close()
    await wire.close()


async def _obey(wire: Wire, app: FastAPI, server: Server) -> None:
    with contextlib.suppress(ConnectionError):
        while True:
            order = (await wire.receive()).head["order"]
            if order == "metrics":
                samples = [tuple(sample) for sample in snapshot(app.state.metrics.registry)]
                wire.send({"samples": samples})
            elif order == "stopping":
                app.state.stopping = True
            else:
                server.should_exit = True
    os._exit(1)  # nobody is there to answer for


class _Split:
    """Sends requests to the app if it has their route, and else on."""

    def __init__(self, app: FastAPI, forwarder: Forwarder) -> None:
        self._app = app
        self._forwarder = forwarder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        own = any(route.matches(scope)[0] == Match.FULL for route in self._app.routes)
        await (self._app if own else self._forwarder)(scope, receive, send)
