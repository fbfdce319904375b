"""A stream of events that ends early: because the client disconnects, or the service stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from service.api.event_stream import EventStream
from service.inference.results import TimelineEvent


class Stream:
    """An `EventStream` whose first event never comes, and what it does."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.sent: list[Any] = []
        self.closed = False
        self.started, self.disconnected = asyncio.Event(), asyncio.Event()
        stack = AsyncExitStack()
        stack.callback(lambda: setattr(self, "closed", True))
        self._response = EventStream(
            self._events(),
            stack,
            "ndjson",
            deadline=asyncio.get_running_loop().time() + 600,
            own_deadline=None,
            stall_s=600,
            on_error=self.errors.append,
        )

    async def _events(self) -> AsyncIterator[TimelineEvent]:
        self.started.set()
        await asyncio.Event().wait()
        yield  # type: ignore[misc] # never

    async def run(self) -> None:
        await self._response({}, self._receive, self._send)

    async def _receive(self) -> Any:
        await self.disconnected.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await asyncio.sleep(0)
        self.sent.append(message)


@pytest.mark.anyio
async def test_event_stream_of_a_client_that_disconnects_is_closed_and_counted_once() -> None:
    stream = Stream()
    running = asyncio.create_task(stream.run())
    await stream.started.wait()
    stream.disconnected.set()
    await running
    assert stream.closed
    assert stream.errors == ["client_disconnected"]
    assert [message["type"] for message in stream.sent] == ["http.response.start"]


@pytest.mark.anyio
async def test_event_stream_that_the_service_cancels_ends_with_an_event() -> None:
    stream = Stream()
    running = asyncio.create_task(stream.run())
    await stream.started.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert stream.closed
    assert stream.errors == ["not_ready"]
    assert b'"code":"not_ready"' in stream.sent[1]["body"]
    assert not stream.sent[-1].get("more_body")
