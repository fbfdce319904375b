"""The side with the engines: answers the workers that ask for the network, or for a key's limits.

A worker has a connection for each request that is at it, and closes one to give its request up:
what is held for the request is let go, and what waits is dropped. So nothing of a worker that was
killed stays behind.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import numpy as np

from service import tracing
from service.auth import ApiKey, Keyring
from service.errors import InternalError, ServiceError
from service.logging import request_id
from service.network import GaveWayError, Held, LocalNetwork, Wanted
from service.wire import Message, Wire

logger = logging.getLogger(__name__)


class Sessions:
    """Listens on a Unix socket for as long as it is open."""

    def __init__(self, network: LocalNetwork, keyring: Keyring | None) -> None:
        self._network = network
        self._keyring = keyring
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.AbstractServer | None = None

    async def open(self, path: Path) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(
            lambda: Wire(self._begin), str(path), backlog=1024
        )

    async def close(self) -> None:
        """Ends all of them."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self, wire: Wire) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(wire))
        wire.on_lost = task.cancel
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, wire: Wire) -> None:
        try:
            while True:
                await self._answer(wire, await wire.receive())
        except ConnectionError:
            pass
        finally:
            wire.abort()

    async def _answer(self, wire: Wire, message: Message) -> None:
        head = message.head
        request_id.set(head["request_id"])
        tracing.current.set(tracing.TraceIds(*head["trace"]) if head["trace"] else None)
        try:
            await self._do(wire, head)
        except GaveWayError:
            wire.send({"gave_way": True})
        except ServiceError as error:
            wire.send({"error": _described(error)})
        except ConnectionError:
            raise
        except Exception:
            logger.exception("a worker's request broke")
            broken = InternalError("Something broke on our side; the log has more.")
            wire.send({"error": _described(broken)})

    async def _do(self, wire: Wire, head: dict[str, Any]) -> None:
        ask = head["ask"]
        if ask == "key":
            await self._count(wire, head)
        elif ask == "room":
            await self._network.check_room(head["model"], head["clips"], head["priority"])
            wire.send({})
        elif ask == "find":
            bundle = await self._network.find(Wanted(*head["wanted"]), head["priority"])
            wire.send({"path": str(bundle.path)})
        elif ask == "for_video":
            wanted = Wanted(*head["wanted"])
            await _hold(wire, self._network.for_video(wanted, head["clips"], head["priority"]))
        else:
            await _hold(wire, self._network.for_clips(Wanted(*head["wanted"])))

    async def _count(self, wire: Wire, head: dict[str, Any]) -> None:
        """Counts a request of a key until the worker says that it is over."""
        if self._keyring is None:
            raise RuntimeError("a worker has keys, and the service has none")
        with self._keyring.use(ApiKey.model_validate(head["key"])):
            wire.send({})
            await wire.receive()


async def _hold(wire: Wire, holding: AbstractAsyncContextManager[Held]) -> None:
    """Holds a version until the worker has had its answer."""
    async with holding as held:
        wire.send({"path": str(held.bundle.path)})
        head, body = await wire.receive()
        config = held.bundle.config
        shape = (config.num_frames, config.image_size, config.image_size, 3)
        if tuple(head["shape"][1:]) != shape:
            raise ValueError(f"clips of {shape} were to come, not of {head['shape'][1:]}")
        clips = np.frombuffer(body, np.uint8).reshape(head["shape"])
        version, answer = await held.answer(clips, head["priority"], head["deadline"])
    wire.send(
        {
            "version": version,
            "queue_s": answer.queue_s,
            "inference_s": answer.inference_s,
            "logits": answer.logits.shape,
            "embedding": answer.embedding.shape,
        },
        answer.logits,
        answer.embedding,
    )


def _described(error: ServiceError) -> dict[str, Any]:
    return {
        "status": error.status,
        "code": error.code,
        "detail": error.detail,
        "headers": error.headers,
    }
