"""A worker's side: the network, and the limits of keys, in the process that has the engines."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.bundle import Bundle, BundleError
from service import tracing
from service.auth import ApiKey, Keyring
from service.errors import ModelUnavailableError, NotReadyError, ServiceError
from service.logging import request_id
from service.network import Answered, GaveWayError, Held, Wanted
from service.turns import Answer, Priority
from service.wire import Message, Wire

# Versions that are remembered. A few serve or are tried at a time.
_MOST_BUNDLES = 32
# Connections that are kept for the next request.
_MOST_IDLE = 64


class Link:
    """Connections to the process with the engines, one for each request that is at it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._idle: list[Wire] = []

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        """A connection for a request; if something is held at the block's end, it is given up.

        Raises:
            NotReadyError: the other process is gone.
        """
        wire = await self._wire()
        session = Session(wire)
        try:
            yield session
        finally:
            if session.is_over and not wire.lost and len(self._idle) < _MOST_IDLE:
                self._idle.append(wire)
            else:
                wire.abort()

    def close(self) -> None:
        for wire in self._idle:
            wire.abort()

    async def _wire(self) -> Wire:
        while self._idle:
            wire = self._idle.pop()
            if not wire.lost:
                return wire
        try:
            loop = asyncio.get_running_loop()
            _, wire = await loop.create_unix_connection(Wire, str(self._path))
        except OSError:
            raise _gone() from None
        return wire


class Session:
    """Questions and answers on one connection."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self.is_over = True
        """Nothing is held for it on the other side, and no answer is on its way."""

    async def ask(self, question: str, *, holds: bool = False, **facts: Any) -> dict[str, Any]:
        """Asks; with `holds` something is held from here on.

        Raises:
            ServiceError: the other side's, or that it is gone.
        """
        trace = tuple(tracing.current.get() or ())
        head = {"ask": question, "request_id": request_id.get(), "trace": trace, **facts}
        return (await self._exchange(head, holds=holds)).head

    async def finish(self, head: dict[str, Any], *bodies: NDArray[Any]) -> Message:
        """Sends what ends it, and gets the last answer.

        Raises:
            ServiceError, GaveWayError: the other side's, or that it is gone.
        """
        return await self._exchange(head, *bodies, holds=False)

    def let_go(self) -> None:
        """Ends what is held; there is no answer to this."""
        if not self._wire.lost:
            self._wire.send({})
            self.is_over = True

    async def _exchange(self, head: dict[str, Any], *bodies: NDArray[Any], holds: bool) -> Message:
        self.is_over = False
        try:
            self._wire.send(head, *bodies)
            message = await self._wire.receive()
        except ConnectionError:
            raise _gone() from None
        error = message.head.get("error")
        self.is_over = not holds or error is not None
        if error is not None:
            raise _error_of(**error)
        if "gave_way" in message.head:
            raise GaveWayError
        return message


class RemoteNetwork:
    """A `Network` whose engines are in another process."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._bundles: OrderedDict[str, Bundle] = OrderedDict()

    async def check_room(self, model: str | None, clips: int, priority: Priority) -> None:
        async with self._link.session() as session:
            await session.ask("room", model=model, clips=clips, priority=priority)

    async def find(self, wanted: Wanted, priority: Priority) -> Bundle:
        async with self._link.session() as session:
            found = await session.ask("find", wanted=tuple(wanted), priority=priority)
        return await self._bundle(found["path"])

    def for_video(
        self, wanted: Wanted, clips: int, priority: Priority
    ) -> AbstractAsyncContextManager[Held]:
        return self._held("for_video", wanted=tuple(wanted), clips=clips, priority=priority)

    def for_clips(self, wanted: Wanted) -> AbstractAsyncContextManager[Held]:
        return self._held("for_clips", wanted=tuple(wanted))

    @contextlib.asynccontextmanager
    async def _held(self, question: str, **facts: Any) -> AsyncIterator[Held]:
        async with self._link.session() as session:
            found = await session.ask(question, holds=True, **facts)
            yield _RemoteHeld(await self._bundle(found["path"]), session)

    async def _bundle(self, path: str) -> Bundle:
        """What stands in a version's folder, which never changes."""
        if path not in self._bundles:
            try:
                self._bundles[path] = await asyncio.to_thread(Bundle, Path(path))
            except BundleError as error:
                raise ModelUnavailableError(str(error)) from error
            if len(self._bundles) > _MOST_BUNDLES:
                self._bundles.popitem(last=False)
        return self._bundles[path]


class _RemoteHeld:
    def __init__(self, bundle: Bundle, session: Session) -> None:
        self.bundle = bundle
        self._session = session

    async def answer(
        self, clips: NDArray[np.uint8], priority: Priority, deadline: float | None
    ) -> Answered:
        # Event loops of one machine have one clock (CLOCK_MONOTONIC), so deadlines need no change.
        facts = {"shape": clips.shape, "priority": priority, "deadline": deadline}
        head, body = await self._session.finish(facts, clips)
        rows = np.frombuffer(body, np.float32)
        logits, embedding = tuple(head["logits"]), tuple(head["embedding"])
        cut = int(np.prod(logits))
        answer = Answer(
            rows[:cut].reshape(logits),
            rows[cut:].reshape(embedding),
            head["queue_s"],
            head["inference_s"],
        )
        return Answered(head["version"], answer)


class SharedKeyring(Keyring):
    """The keys of a file, whose limits are counted for all workers together."""

    def __init__(self, path: Path, link: Link) -> None:
        super().__init__(path)
        self._link = link

    @contextlib.asynccontextmanager
    async def counting(self, key: ApiKey) -> AsyncIterator[None]:
        if key.max_concurrent is None and key.requests_per_minute is None:
            yield
            return
        async with self._link.session() as session:
            await session.ask("key", holds=True, key=key.model_dump())
            try:
                yield
            finally:
                session.let_go()


def _gone() -> NotReadyError:
    return NotReadyError("The process with the engines is gone.")


def _error_of(status: int, code: str, detail: str, headers: dict[str, str]) -> ServiceError:
    error = ServiceError(detail, headers=headers)
    error.status, error.code = status, code
    return error
