"""Messages between the processes of one service over a Unix socket: a head, which is a JSON object,
and a body of bytes, such as clips.

    4 bytes, length of the head | 8 bytes, length of the body | head | body

Each side trusts the other as a part of itself: what clients sent has been checked by then.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

_PREFIX = struct.Struct("<IQ")


class Message(NamedTuple):
    head: dict[str, Any]
    body: bytearray


class Wire(asyncio.BufferedProtocol):
    """One end of a connection. Bodies are read to where they stay.

    Args:
        on_open: called with it once it is connected.
        on_lost: called when the connection has ended.
    """

    def __init__(
        self,
        on_open: Callable[[Wire], object] | None = None,
        on_lost: Callable[[], object] | None = None,
    ) -> None:
        self.on_open, self.on_lost = on_open, on_lost
        self.lost = False
        self._transport: asyncio.Transport | None = None
        self._arrived: deque[Message] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._lengths: tuple[int, int] | None = None
        self._head: dict[str, Any] | None = None
        self._buffer = bytearray(_PREFIX.size)
        self._missing = memoryview(self._buffer)

    def send(self, head: dict[str, Any], *bodies: NDArray[Any]) -> None:
        """Sends a message; the arrays must not change before it is answered.

        Raises:
            ConnectionError: the other side is gone.
        """
        if self._transport is None or self.lost:
            raise ConnectionResetError("the other side is gone")
        text = orjson.dumps(head)
        size = sum(body.nbytes for body in bodies)
        self._transport.write(_PREFIX.pack(len(text), size) + text)
        for body in bodies:
            if body.nbytes:
                self._transport.write(np.ascontiguousarray(body).reshape(-1).view(np.uint8).data)

    async def receive(self) -> Message:
        """The next message; for one caller at a time.

        Raises:
            ConnectionError: there is none, as the other side is gone.
        """
        while not self._arrived:
            if self.lost:
                raise ConnectionResetError("the other side is gone")
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._arrived.popleft()

    def abort(self) -> None:
        """Ends the connection at once, whatever has not been sent."""
        if self._transport is not None:
            self._transport.abort()

    async def close(self) -> None:
        """Ends the connection once all has been sent."""
        if self._transport is not None and not self.lost:
            ended = asyncio.Event()
            self.on_lost = ended.set
            self._transport.close()
            await ended.wait()

    # ---- the protocol's side --------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # the base names a wider type
        self._transport = transport
        if self.on_open is not None:
            self.on_open(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._wake()
        if self.on_lost is not None:
            self.on_lost()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._missing

    def buffer_updated(self, nbytes: int) -> None:
        self._missing = self._missing[nbytes:]
        while not self._missing:  # an empty body is complete as soon as it begins
            self._complete()

    def _expect(self, size: int) -> None:
        self._buffer = bytearray(size)
        self._missing = memoryview(self._buffer)

    def _complete(self) -> None:
        """The prefix, the head or the body is there."""
        if self._lengths is None:
            self._lengths = _PREFIX.unpack(self._buffer)
            self._expect(self._lengths[0])
        elif self._head is None:
            self._head = orjson.loads(self._buffer)
            self._expect(self._lengths[1])
        else:
            self._arrived.append(Message(self._head, self._buffer))
            self._lengths = self._head = None
            self._expect(_PREFIX.size)
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
