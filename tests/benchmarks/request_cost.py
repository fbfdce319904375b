"""What a v2 request of one ready clip takes of the event loop: CPU time of its thread, with HTTP's
parsing, without sockets and the engine.

    python -m tests.benchmarks.request_cost

CPU time of one thread hardly sees who else is busy; the least of many rounds is what to compare.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import statistics
import time
from typing import Any

import numpy as np
import orjson
import uvloop
from uvicorn.server import ServerState

from service.server.app import create_app, running
from service.server.serve import configuration
from service.settings import Settings

CLIP = np.zeros((1, 8, 64, 64, 3), np.uint8)  # the demo model's


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=10, help="of each client in a round")
    parser.add_argument("--rounds", type=int, default=30)
    logging.disable(logging.INFO)
    milliseconds = uvloop.run(measure(parser.parse_args()))
    print(f"least {min(milliseconds):.3f} ms, median {statistics.median(milliseconds):.3f} ms")


async def measure(options: argparse.Namespace) -> list[float]:
    settings = Settings(device="cpu", decode_workers=1, max_batch_clips=options.clients)
    app = create_app(settings)
    found = []
    async with running(app):
        config = configuration(app, settings, lifespan="off")
        config.load()
        clients = [Client(config) for _ in range(options.clients)]
        for _ in range(options.rounds):
            started = time.thread_time()
            await asyncio.gather(*(client.ask(options.requests) for client in clients))
            used = time.thread_time() - started
            found.append(used / options.clients / options.requests * 1e3)
    return found


class Client(asyncio.Transport):
    """A connection without a socket, and who is at its other end."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self._server = config.http_protocol_class(
            config=config, server_state=ServerState(), app_state={}
        )
        self._server.connection_made(self)
        self._received = b""

    async def ask(self, times: int) -> None:
        for _ in range(times):
            self._answered = asyncio.get_running_loop().create_future()
            self._server.data_received(REQUEST)
            await self._answered

    def write(self, data: Any) -> None:
        self._received += data
        head, _, body = self._received.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if length and len(body) >= int(length):
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(self._received.decode())
            self._received = b""
            self._answered.set_result(None)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        """All is there already."""

    def resume_reading(self) -> None:
        """All is there already."""

    def close(self) -> None:
        """Nothing to close."""


def request() -> bytes:
    tensor = {"name": "frames", "datatype": "UINT8", "shape": CLIP.shape}
    item = {**tensor, "parameters": {"binary_data_size": CLIP.nbytes}}
    outputs = [{"name": "logits", "parameters": {"binary_data": True}}]
    text = orjson.dumps({"inputs": [item], "outputs": outputs})
    head = (
        f"POST /v2/models/demo/infer HTTP/1.1\r\nHost: localhost\r\n"
        f"Inference-Header-Content-Length: {len(text)}\r\n"
        f"Content-Length: {len(text) + CLIP.nbytes}\r\n\r\n"
    )
    return head.encode() + text + CLIP.tobytes()


REQUEST = request()

if __name__ == "__main__":
    main()
