"""A running service: the real app on a real socket, in a thread of this process."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
import uvicorn

from service.server.app import create_app
from service.server.uvicorn_server import configuration
from service.settings import load_settings
from tests.videos import encode

Serve = Callable[..., AbstractContextManager[httpx.Client]]


@contextlib.contextmanager
def _serve(**overrides: object) -> Iterator[httpx.Client]:
    defaults = {"device": "cpu", "decode_workers": 2, "max_batch_clips": 8, "port": 0}
    own = load_settings(**{**defaults, "shutdown_grace_s": 5, **overrides})
    server = uvicorn.Server(configuration(create_app(own), own, lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        assert server.started, "the service did not start"
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


def send(
    client: httpx.Client,
    path: str,
    content: bytes = b"",
    length: int | None = None,
    method: str = "POST",
    **headers: str,
) -> socket.socket:
    """Sends a request, of `length` or whole, and leaves its connection to the caller."""
    connection = socket.create_connection((client.base_url.host, client.base_url.port), 60)
    size = len(content) if length is None else length
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Content-Length: {size}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + content)
    return connection


def tensor(frames: np.ndarray, **parameters: int) -> dict[str, Any]:
    """An inference request of `/v2` with these clips, as keywords of httpx."""
    item = {"name": "frames", "datatype": "UINT8", "shape": frames.shape}
    item["parameters"] = {"binary_data_size": frames.nbytes}
    head = orjson.dumps({"inputs": [item], "parameters": parameters})
    headers = {"Inference-Header-Content-Length": str(len(head))}
    return {"content": head + frames.tobytes(), "headers": headers}


@pytest.fixture(scope="session")
def serve() -> Serve:
    """Starts a service with the given settings; its client is the context's value."""
    return _serve


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """One service with default settings, shared by the tests that do not change it."""
    with _serve(spool_dir=tmp_path_factory.mktemp("spool")) as client:
        yield client


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds of a bright square that moves right, 96 x 64, 30 fps, H.264."""
    pictures = np.full((60, 64, 96, 3), 40, np.uint8)
    for index, picture in enumerate(pictures):
        picture[20:44, index : index + 24] = 220
    return encode(tmp_path_factory.mktemp("videos") / "square.mp4", pictures)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The event loop of tests that are coroutine functions and marked with `anyio`."""
    return "asyncio"
