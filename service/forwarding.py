"""An ASGI app that passes requests on to another process over a Unix socket, as they are, and its
answers back as they come.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httptools
from starlette.types import Message, Receive, Scope, Send

from service.api.problems import problem_for
from service.errors import NotReadyError
from service.middleware import answer_last

# Of one connection, not of a request: RFC 9110 section 7.6.1; what is expected has been answered.
_OF_A_HOP = frozenset(
    (
        b"connection",
        b"expect",
        b"keep-alive",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
_MOST_WAITING = 1024 * 1024
"""Bytes of an answer that are read ahead of the client."""


class Forwarder:
    """Needs a server with HTTP/1.1 at `path`.

    Args:
        is_stopping: whether clients are to send their next requests elsewhere.
    """

    def __init__(self, path: Path, is_stopping: Callable[[], bool]) -> None:
        self._path = path
        self._is_stopping = is_stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        answer = _Answer(has_body=scope["method"] != "HEAD")
        try:
            await loop.create_unix_connection(lambda: answer, str(self._path))
        except OSError:
            await self._refuse(scope, receive, send)
            return
        passing = loop.create_task(_pass_on(scope, receive, answer))
        started = False
        try:
            while (event := await answer.next()) is not None:
                if event["type"] == "http.response.start":
                    started = True
                    if self._is_stopping():
                        event["headers"].append((b"connection", b"close"))
                await send(event)
            if not started and not answer.given_up:
                await self._refuse(scope, receive, send)
        except asyncio.CancelledError:
            if self._is_stopping() and not started:
                await answer_last(scope, receive, send)
            raise
        finally:
            passing.cancel()
            await asyncio.gather(passing, return_exceptions=True)
            answer.transport.abort()

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = NotReadyError("The process with the engines is gone.")
        await problem_for(scope["path"], error)(scope, receive, send)


async def _pass_on(scope: Scope, receive: Receive, answer: _Answer) -> None:
    """Sends the request on, then waits for the client's leaving."""
    names = {name for name, _ in scope["headers"]}
    chunked = b"transfer-encoding" in names
    has_body = chunked or b"content-length" in names
    with contextlib.suppress(ConnectionError):  # the other side answers without reading to the end
        await answer.write(_head(scope, chunked))
        more = has_body
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                answer.give_up()
                return
            body = message.get("body", b"")
            if body and more:
                await answer.write(b"%x\r\n%b\r\n" % (len(body), body) if chunked else body)
            if more and not message.get("more_body", False):
                more = False
                if chunked:
                    await answer.write(b"0\r\n\r\n")


def _head(scope: Scope, chunked: bool) -> bytes:
    query = b"?" + scope["query_string"] if scope["query_string"] else b""
    lines = [b"%b %b%b HTTP/1.1" % (scope["method"].encode(), scope["raw_path"], query)]
    left_out = _OF_A_HOP | {b"content-length"} if chunked else _OF_A_HOP
    lines += [b"%b: %b" % item for item in scope["headers"] if item[0] not in left_out]
    if chunked:
        lines.append(b"transfer-encoding: chunked")
    return b"\r\n".join(lines) + b"\r\n\r\n"


class _Answer(asyncio.Protocol):
    """The other side's answer, as ASGI events."""

    transport: asyncio.Transport

    def __init__(self, *, has_body: bool) -> None:
        self.given_up = False
        self._has_body = has_body
        self._parser = httptools.HttpResponseParser(self)
        self._headers: list[tuple[bytes, bytes]] = []
        self._events: deque[Message] = deque()
        self._waiting = 0
        self._over = False
        self._news = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()

    async def next(self) -> Message | None:
        """The next event; None after the last, or if the other side is gone."""
        while not self._events:
            if self._over:
                return None
            self._news.clear()
            await self._news.wait()
        event = self._events.popleft()
        self._waiting -= len(event.get("body", b""))
        if not self._over and self._waiting <= _MOST_WAITING:
            self.transport.resume_reading()
        return event

    async def write(self, data: bytes) -> None:
        """Raises:
        ConnectionError: the other side reads no more.
        """
        if self.transport.is_closing():
            raise ConnectionResetError("the other side is gone")
        self.transport.write(data)
        await self._writable.wait()

    def give_up(self) -> None:
        """Nobody wants the answer any more."""
        self.given_up = True
        self.transport.abort()

    # ---- the protocol's side --------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._writable.set()
        self._end()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)
        if self._waiting > _MOST_WAITING and not self._over:
            self.transport.pause_reading()

    # ---- the parser's side ----------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() not in _OF_A_HOP:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        self._tell({"type": "http.response.start", "status": status, "headers": self._headers})
        if not self._has_body:
            self.on_message_complete()

    def on_body(self, body: bytes) -> None:
        if not self._over:
            self._waiting += len(body)
            self._tell({"type": "http.response.body", "body": body, "more_body": True})

    def on_message_complete(self) -> None:
        if not self._over:
            self._tell({"type": "http.response.body", "body": b""})
            self._end()

    def _tell(self, event: Message) -> None:
        self._events.append(event)
        self._news.set()

    def _end(self) -> None:
        self._over = True
        self._news.set()
