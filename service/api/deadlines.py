"""How urgent a request is: its priority and its deadline, from its headers, its key and its body.

A key's priority is what its requests have and the most that they may ask for. Without keys every
request may ask for any; what that is worth is in `service/inference/scheduler.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple

from fastapi import Request

from service.errors import BadRequestError, DeadlineExceededError, ForbiddenError
from service.inference.scheduler import PRIORITIES, Priority

PRIORITY_HEADER = "X-Request-Priority"
TIMEOUT_HEADER = "X-Request-Timeout"
_SECONDS = re.compile(r"[0-9]{1,6}(\.[0-9]{1,9})?")
HEADERS: list[dict[str, Any]] = [
    {
        "name": PRIORITY_HEADER,
        "in": "header",
        "required": False,
        "description": "Whose turn it is when requests wait for the engine; by default that of the "
        "API key, and `normal` without one. A key's requests may ask for less, not for more.",
        "schema": {"type": "string", "enum": list(PRIORITIES)},
    },
    {
        "name": TIMEOUT_HEADER,
        "in": "header",
        "required": False,
        "description": "Seconds after which the answer is of no use, counted from the request's "
        "head. What is not done by then is dropped and answered 504 `deadline_exceeded`; what "
        "certainly would not be done is refused at once with 503 `deadline_unreachable`.",
        "schema": {"type": "number", "exclusiveMinimum": 0},
    },
]
"""For OpenAPI."""


class Urgency(NamedTuple):
    """Of one request."""

    priority: Priority
    highest: Priority
    """What it may ask for."""
    arrived: float
    deadline: float | None
    """Both by the clock of the event loop."""

    def asking(self, priority: Priority | None, timeout_s: float) -> Urgency:
        """With what the body asks for on top; None and 0: nothing.

        Raises:
            ForbiddenError: more than the key may have.
        """
        asked = self
        if priority is not None:
            asked = asked._replace(priority=_allowed(priority, self.highest))
        if timeout_s:
            deadline = self.arrived + timeout_s
            asked = asked._replace(
                deadline=deadline if self.deadline is None else min(deadline, self.deadline)
            )
        return asked


def urgency_of(request: Request) -> Urgency:
    """What the request's headers and its key say; to be asked before the body is read.

    Raises:
        BadRequestError: a header has a value that makes no sense.
        ForbiddenError: a priority above the key's.
    """
    arrived = asyncio.get_running_loop().time()
    own: Priority | None = getattr(request.state, "priority", None)
    headers = request.headers
    wanted, seconds = headers.get(PRIORITY_HEADER), headers.get(TIMEOUT_HEADER)
    priority, highest = own or "normal", own or PRIORITIES[0]
    if wanted is not None:
        known = next((name for name in PRIORITIES if name == wanted), None)
        if known is None:
            raise BadRequestError(f"{PRIORITY_HEADER} is one of {', '.join(PRIORITIES)}.")
        priority = _allowed(known, highest)
    if seconds is None:
        return Urgency(priority, highest, arrived, None)
    if not _SECONDS.fullmatch(seconds) or not float(seconds):
        raise BadRequestError(f"{TIMEOUT_HEADER} is a number of seconds, such as 2.5, above 0.")
    return Urgency(priority, highest, arrived, arrived + float(seconds))


def within(deadline: float | None) -> AbstractAsyncContextManager[None]:
    """Ends the block when the request's own time is over.

    Raises:
        DeadlineExceededError: it is.
    """
    # Most requests have none, and a generator for each would cost a microsecond.
    return contextlib.nullcontext() if deadline is None else _until(deadline)


@contextlib.asynccontextmanager
async def _until(deadline: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout_at(deadline) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise DeadlineExceededError("There was no answer in the time that was given.") from None


def _allowed(priority: Priority, highest: Priority) -> Priority:
    if PRIORITIES.index(priority) < PRIORITIES.index(highest):
        raise ForbiddenError(f"Requests of this key may have the priority `{highest}` at most.")
    return priority
