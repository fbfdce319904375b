"""HTTP/1.1 connections with the limits that uvicorn has not, for clients that send slowly or on and
on.

The head of a request has a deadline and a size limit. So have the trailer fields after a chunked
body, because the parser keeps them in memory. After an early refusal the client may send the rest
of its body for a moment. `service/ingest/uploads.py` limits the body of a request that is accepted.

The attributes of uvicorn that this file needs are not public: pyproject.toml bounds uvicorn's
version, and `tests/service/server/test_http_protocol.py` lists them.
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
    b"The request's head, or what follows its body, is larger than 64 KiB.",
)


class DeadlineProtocol(HttpToolsProtocol):
    """HTTP/1.1 as uvicorn speaks it, with a limit to everything that a client may put off."""

    head_timeout_s = 10.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None
        self._in_head = True
        self._in_body = False
        self._in_trailer = False
        self._had_body = False
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # the base names a wider type
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        was_in_trailer, self._had_body = self._in_trailer, False
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_head or (was_in_trailer and self._in_trailer):
            if not self._had_body:  # else it may nearly all have been of a body or of a chunk
                self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(*_HEAD_TOO_LARGE)
        elif self._is_idle:
            # It ended uvicorn's wait for the next request without beginning one: an empty line,
            # or the end of a body that nobody wanted.
            self._await_head()

    def on_message_begin(self) -> None:
        self._await_head()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_body:  # what follows a body is a trailer, which nobody asks for
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._in_head, self._in_body, self._head_bytes = False, True, 0
        super().on_headers_complete()

    def on_chunk_header(self) -> None:
        self._in_trailer = True  # unless bytes of the chunk come: the last one has none

    def on_body(self, body: bytes) -> None:
        self._in_trailer, self._had_body = False, True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = self._in_trailer = False
        self._stop_timer()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        unread = self._in_body and self.cycle.response_complete
        if unread and not self.transport.is_closing():
            self._stop_timer()
            self._timer = self.loop.call_later(_LINGER_S, self.transport.close)

    @property
    def _is_answering(self) -> bool:
        cycle = self.cycle
        return cycle is not None and cycle.response_started and not cycle.response_complete

    @property
    def _is_idle(self) -> bool:
        """Whether there is neither a request nor anything that waits for one."""
        cycle = self.cycle
        answered = cycle is not None and cycle.response_complete and not self._in_body
        return answered and self._timer is self.timeout_keep_alive_task is None

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
        if self._is_answering:  # in the middle of another answer there is no place for this one
            self.transport.close()
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
