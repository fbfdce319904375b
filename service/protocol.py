"""Connections with deadlines: what uvicorn leaves to whoever sends slowly, or without end.

The head of a request must be there in time and may not grow for ever; a body that nobody reads any
more, since the request has been refused, may trickle on for a moment and no longer. How long the
body of a request may take is `uploads.receive`'s concern.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
_LINGER_S = 5.0
"""Long enough for a client to stop sending and read why it was refused."""

_HEAD_TIMEOUT = b"408 Request Timeout", b"The request's head did not arrive in time."
_HEAD_TOO_LARGE = (
    b"431 Request Header Fields Too Large",
    b"The request's head is larger than 64 KiB.",
)


class DeadlineProtocol(HttpToolsProtocol):
    """HTTP/1.1 as uvicorn speaks it, with a limit to everything that a client may put off."""

    head_timeout_s = 10.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None
        self._in_head = True
        self._in_body = False
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # the base names a wider type
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(*_HEAD_TOO_LARGE)

    def on_message_begin(self) -> None:
        self._await_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._in_head, self._in_body = False, True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        cycle = self.cycle
        if self.parser.should_upgrade() or cycle.response_complete or cycle.body:
            super().on_body(body)
            return
        # The first piece is often all there is; uvicorn's way would copy it twice more, and stop
        # and start the reading.
        cycle.body = body  # type: ignore[assignment] # bytes serve as its bytearray does
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        self._in_body = False
        self._stop_timer()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        unread = self._in_body and self.cycle.response_complete
        if unread and not self.transport.is_closing():
            self._stop_timer()
            self._timer = self.loop.call_later(_LINGER_S, self.transport.close)

    def _await_head(self) -> None:
        self._in_head, self._head_bytes = True, 0
        self._stop_timer()
        self._timer = self.loop.call_later(self.head_timeout_s, self._give_up)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        if self._head_bytes:
            self._refuse(*_HEAD_TIMEOUT)
        else:  # a connection that was opened in advance and never used
            self.transport.close()

    def _refuse(self, status: bytes, reason: bytes) -> None:
        """Answers before there is a request that the app could answer, and hangs up."""
        if self.transport.is_closing():
            return
        length = str(len(reason)).encode()
        self.transport.write(
            b"HTTP/1.1 " + status + b"\r\ncontent-type: text/plain; charset=utf-8\r\n"
            b"content-length: " + length + b"\r\nconnection: close\r\n\r\n" + reason
        )
        self.transport.close()


def with_head_timeout(seconds: float) -> type[DeadlineProtocol]:
    """The protocol with another deadline for heads; uvicorn makes its instances itself."""
    return type("DeadlineProtocol", (DeadlineProtocol,), {"head_timeout_s": seconds})
