"""Work for a client ends when the client disconnects: one cancel scope for all who wait.

Knows nothing of HTTP but the message that ASGI sends then.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from anyio import CancelScope

from service.errors import ClientDisconnectedError


@contextlib.contextmanager
def until_disconnect(
    receive: Callable[[], Awaitable[Any]], deadline: float = math.inf
) -> Iterator[CancelScope]:
    """Runs the block, and cancels the block when the client disconnects or at the deadline.

    The body must have been read, so that the next message can only be the disconnect. The scope
    cancels each wait of the block from then on, also of its cleanup: cleanup that waits must be
    shielded, or stand outside of the block.

    Args:
        receive: of ASGI.
        deadline: by the clock of the event loop.

    Raises:
        ClientDisconnectedError: the client disconnected.
        TimeoutError: the deadline has passed.
    """
    leaving = asyncio.ensure_future(receive())

    def cancel(_: object) -> None:
        if not leaving.cancelled():
            scope.cancel()

    try:
        with CancelScope(deadline=deadline) as scope:
            leaving.add_done_callback(cancel)
            yield scope
        if scope.cancelled_caught:
            if leaving.done():
                raise ClientDisconnectedError("The client went away.")
            raise TimeoutError
    finally:
        leaving.cancel()
