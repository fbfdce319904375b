"""How slowly a client may send a body: all of it within a time, and any part of it at a least rate,
so that a few idle connections do not hold for long what others are to have.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from service.errors import UploadTimeoutError

if TYPE_CHECKING:
    from service.settings import Settings

_WINDOW_S = 15.0
_LONG_WINDOW_S = 60.0
"""Whoever sends for minutes may lose the network for some seconds."""


class Pace(NamedTuple):
    """What is asked of whoever sends a body."""

    timeout_s: float
    least_rate: float
    """Bytes a second; 0 for any."""
    window_s: float
    """What the least rate is a mean over."""

    @classmethod
    def of(cls, settings: Settings) -> Pace:
        """As the settings have it."""
        return cls(settings.upload_timeout_s, settings.min_upload_rate, _WINDOW_S)

    @classmethod
    def of_long(cls, settings: Settings) -> Pace:
        """The same for a long video."""
        return cls(settings.long_upload_timeout_s, settings.min_upload_rate, _LONG_WINDOW_S)


class Watch:
    """Ends its block, in which a body is received, when that comes too slowly.

    Raises:
        UploadTimeoutError: it does.
    """

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._share = pace.least_rate * pace.window_s
        self._missing = self._share

    async def __aenter__(self) -> Watch:
        self._time = asyncio.get_running_loop().time
        self._end = self._time() + self._pace.timeout_s
        self._window_end = self._time() + self._pace.window_s
        self._limit = asyncio.timeout_at(self._next_end())
        await self._limit.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self._limit.__aexit__(kind, error, trace)
        except TimeoutError:
            raise self._error() from None

    def note(self, count: int) -> None:
        """So many bytes have come."""
        self._missing -= count
        if self._missing <= 0:
            self._missing = self._share
            self._window_end = self._time() + self._pace.window_s
            self._limit.reschedule(self._next_end())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Its block is for what takes time on our side, which the rate leaves out."""
        began = self._time()
        self._limit.reschedule(self._end)
        yield
        self._window_end += self._time() - began
        self._limit.reschedule(self._next_end())

    def complete(self) -> None:
        """All of it has come; what is left of the time is for what has to be done with it."""
        self._share = 0
        self._limit.reschedule(self._end)

    def _next_end(self) -> float:
        return min(self._end, self._window_end) if self._share else self._end

    def _error(self) -> UploadTimeoutError:
        if self._time() >= self._end:
            return UploadTimeoutError(
                f"The upload was not complete after {self._pace.timeout_s:g} s."
            )
        return UploadTimeoutError(
            f"For {self._pace.window_s:g} s the upload came at less than "
            f"{self._pace.least_rate:,.0f} bytes a second, the least that this service waits for."
        )
