"""Responses that are sent while they come to be: NDJSON or server-sent events.

What goes wrong once the first byte is out is an event like the others, with its stable code: a
stream that ends without a last event was cut off on its way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Literal

from anyio import CancelScope
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from service.api.deadlines import within
from service.api.middleware import LAST_WORD_S
from service.errors import (
    ClientDisconnectedError,
    InternalError,
    NotReadyError,
    RequestTimeoutError,
    ServiceError,
)
from service.inference.results import TimelineError, TimelineEvent
from service.ingest.disconnect import until_disconnect
from service.observability.logs import request_id

logger = logging.getLogger(__name__)
Format = Literal["ndjson", "sse"]
MEDIA_TYPES: dict[Format, str] = {"ndjson": "application/x-ndjson", "sse": "text/event-stream"}


def choose_format(request: Request, asked: Format | None) -> Format:
    """What is asked for by name, else by `Accept`, else NDJSON."""
    if asked is not None:
        return asked
    return "sse" if MEDIA_TYPES["sse"] in request.headers.get("accept", "") else "ndjson"


def encode(event: TimelineEvent, form: Format) -> bytes:
    """One event as it is sent."""
    text = event.model_dump_json()
    if form == "sse":
        return f"event: {event.event}\ndata: {text}\n\n".encode()
    return f"{text}\n".encode()


class EventStream(Response):
    """Sends events as they come.

    Args:
        stack: closed before the end is sent, or as soon as the client has gone.
        deadline: of the service, by the event loop's clock.
        own_deadline: the one that the request gave itself.
        stall_s: longest time that the client may take to read an event.
        on_error: told the code of what ended the stream.
    """

    def __init__(
        self,
        events: AsyncIterator[TimelineEvent],
        stack: AsyncExitStack,
        form: Format,
        *,
        deadline: float,
        own_deadline: float | None,
        stall_s: float,
        on_error: Callable[[str], object],
    ) -> None:
        super().__init__(media_type=MEDIA_TYPES[form])
        del self.headers["content-length"]
        # No cache and no proxy (nginx has this header) may hold events back.
        self.headers["Cache-Control"] = "no-store"
        self.headers["X-Accel-Buffering"] = "no"
        self._events = events
        self._stack = stack
        self._form = form
        self._deadline = deadline
        self._own_deadline = own_deadline
        self._stall_s = stall_s
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with until_disconnect(receive) as connected:
                await self._send_all(send, connected)
        except ClientDisconnectedError as error:
            self._on_error(error.code)
        finally:
            await self._stack.aclose()

    async def _send_all(self, send: Send, connected: CancelScope) -> None:
        start = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        await send(start)
        try:
            try:
                async with (
                    within(self._own_deadline),
                    asyncio.timeout_at(self._deadline) as limit,
                ):
                    async for event in self._events:
                        await self._send(send, event)
            except TimeoutError:
                if not limit.expired():
                    raise
                raise RequestTimeoutError("The video took longer than one may.") from None
        except ServiceError as error:
            await self._send_error(send, error)
        except TimeoutError:  # the client reads no more; there is nobody to tell
            self._on_error(ClientDisconnectedError.code)
            return
        except asyncio.CancelledError:
            if connected.cancel_called:  # the client has disconnected
                raise
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORD_S):
                    await self._send_error(send, NotReadyError("The service is stopping."))
                    await send({"type": "http.response.body", "body": b""})
            raise
        except Exception:
            logger.exception("a stream of events broke")
            broken = InternalError("Something broke on our side; the log has more.")
            await self._send_error(send, broken)
        # First, so that a client which has read the end finds the decoder free again.
        await self._stack.aclose()
        await send({"type": "http.response.body", "body": b""})

    async def _send(self, send: Send, event: TimelineEvent) -> None:
        body = encode(event, self._form)
        async with asyncio.timeout(self._stall_s):
            await send({"type": "http.response.body", "body": body, "more_body": True})

    async def _send_error(self, send: Send, error: ServiceError) -> None:
        self._on_error(error.code)
        await self._send(send, error_event(error))


def error_event(error: ServiceError) -> TimelineError:
    """The event that says what went wrong."""
    return TimelineError(
        code=error.code, status=error.status, detail=error.detail, request_id=request_id.get()
    )
