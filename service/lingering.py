"""What still runs for a request that has ended early: its key counts it until that is over too, so
that leaving makes no room for more than a key may run at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextvars import ContextVar

_left: ContextVar[list[asyncio.Event] | None] = ContextVar("left", default=None)
_outlasting: set[asyncio.Task[None]] = set()  # the event loop would forget them


def leave_running(over: asyncio.Event) -> None:
    """Of the present request, if there is one: something that goes on until the event is set."""
    left = _left.get()
    if left is not None:
        left.append(over)


@contextlib.asynccontextmanager
async def outlasting(
    counting: contextlib.AbstractContextManager[None],
) -> AsyncIterator[None]:
    """Runs the block within `counting`, which then waits, but not the caller, for what is left."""
    async with contextlib.AsyncExitStack() as counted:
        counted.enter_context(counting)
        left: list[asyncio.Event] = []
        _left.set(left)
        try:
            yield
        finally:
            if left:
                task = asyncio.create_task(_outlast(left, counted.pop_all()))
                _outlasting.add(task)
                task.add_done_callback(_outlasting.discard)


async def _outlast(left: list[asyncio.Event], counted: contextlib.AsyncExitStack) -> None:
    async with counted:
        for over in left:
            await over.wait()
