"""Whose clip is next: the waiting requests of a batcher, in classes of priority.

Within a class requests take turns clip by clip, oldest first, so that a hundred-clip request delays
a one-clip request by about one batch. Between classes turns go by weight: while all of them have
work, of 13 clips 8 are of high, 4 of normal and 1 of low priority. A class that waits is therefore
passed over a bounded number of times (`MOST_BETWEEN`), and one without work leaves its turns to the
others without saving them up (stride scheduling: Waldspurger and Weihl, 1995).
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

Priority = Literal["high", "normal", "low"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)
"""The highest first."""
WEIGHTS: dict[Priority, int] = {"high": 8, "normal": 4, "low": 1}
_STRIDES = {priority: max(WEIGHTS.values()) // weight for priority, weight in WEIGHTS.items()}
MOST_BETWEEN: dict[Priority, int] = {
    own: sum(_STRIDES[own] // _STRIDES[other] + 1 for other in PRIORITIES if other != own)
    for own in PRIORITIES
}
"""Clips of other classes that may go before a class that waits has its turn."""

DROPPED = ("left", "deadline", "displaced")
"""Why waiting clips are not run: nobody wants them, they are late, others got their place."""


class Answer(NamedTuple):
    """What a request gets: one row per clip of its own, in its order."""

    logits: NDArray[np.float32]
    embedding: NDArray[np.float32]
    queue_s: float
    """From arrival to the start of its first batch."""
    inference_s: float
    """From there to the end of its last."""


class Request:
    """Clips that one caller waits for. Times are the event loop's."""

    def __init__(
        self,
        clips: NDArray[np.uint8],
        answer: asyncio.Future[Answer],
        arrived: float,
        priority: Priority = "normal",
        deadline: float | None = None,
    ) -> None:
        self.clips = clips
        self.answer = answer
        self.arrived = arrived
        self.priority = priority
        self.deadline = deadline
        self.timer: asyncio.TimerHandle | None = None
        self.started: float | None = None
        self.taken = 0
        self._missing = len(clips)
        self._rows: tuple[NDArray[np.float32], ...] = ()

    @property
    def waiting(self) -> int:
        """Clips that no batch has yet."""
        return len(self.clips) - self.taken

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for the answer."""
        return not self.answer.done()

    def give(self, clip: int, rows: Sequence[NDArray[np.float32]], now: float) -> None:
        """Takes what the network says of one clip; with the last of them the caller is answered."""
        if len(self.clips) == 1:
            self._rows = tuple(row[np.newaxis] for row in rows)
        else:
            self._rows = self._rows or tuple(
                np.empty((len(self.clips), len(row)), row.dtype) for row in rows
            )
            for all_rows, row in zip(self._rows, rows, strict=True):
                all_rows[clip] = row
        self._missing -= 1
        # The caller may have gone: setting a result on its future would be an error.
        if self._missing == 0 and self.wanted:
            started = self.arrived if self.started is None else self.started
            logits, embedding = self._rows
            self.answer.set_result(Answer(logits, embedding, started - self.arrived, now - started))


class Slot(NamedTuple):
    """One clip of a batch."""

    request: Request
    clip: int


class Turns:
    """The requests with clips that wait. For one thread at a time."""

    def __init__(self) -> None:
        self._requests: dict[Priority, OrderedDict[Request, None]] = {
            priority: OrderedDict() for priority in PRIORITIES
        }
        self._clips = dict.fromkeys(PRIORITIES, 0)
        self._passes = dict.fromkeys(PRIORITIES, 0)
        self._reached = 0
        self.waiting = 0
        """Clips, of all classes."""
        self.coming = dict.fromkeys(PRIORITIES, 0)
        """Clips of each class that are being decoded."""

    def add(self, request: Request) -> None:
        own = request.priority
        if not self._requests[own]:
            # What it did not use while it had no work is gone.
            self._passes[own] = max(self._passes[own], self._reached)
        self._requests[own][request] = None
        self._count(own, request.waiting)

    def drop(self, request: Request) -> bool:
        """Forgets a request; says whether it had clips that waited."""
        if request not in self._requests[request.priority]:
            return False
        del self._requests[request.priority][request]
        self._count(request.priority, -request.waiting)
        return True

    def take(self, most: int, now: float) -> list[Slot]:
        """The next clips, `most` at most. Requests that nobody waits for, or whose deadline has
        passed, are dropped on the way.
        """
        slots: list[Slot] = []
        while len(slots) < most and self.waiting:
            own = min(
                (priority for priority in PRIORITIES if self._requests[priority]),
                key=self._passes.__getitem__,
            )
            request = next(iter(self._requests[own]))
            late = request.deadline is not None and request.deadline <= now
            if late or not request.wanted:
                self.drop(request)
                continue
            if request.started is None:
                request.started = now
            slots.append(Slot(request, request.taken))
            request.taken += 1
            self._count(own, -1)
            if request.waiting:
                self._requests[own].move_to_end(request)
            else:
                del self._requests[own][request]
            self._reached = self._passes[own]
            self._passes[own] += _STRIDES[own]
        return slots

    def ahead_of(self, clips: int, priority: Priority) -> int:
        """About how many clips go before the last of so many new ones, and they themselves."""
        own = clips + sum(min(clips, other.waiting) for other in self._requests[priority])
        turns = own * _STRIDES[priority]
        return own + sum(
            min(self._clips[other], turns // _STRIDES[other])
            for other in PRIORITIES
            if other != priority
        )

    def room_for(self, clips: int, priority: Priority, limit: int) -> list[Request] | None:
        """Whose place new clips may take where only `limit` may wait; None: they have to go.

        A class that has less than its share, by weight, gets it at the cost of those that have more
        than theirs: the lowest first, and of that the newest that have not been started.
        """
        missing = self.waiting + clips - limit
        if missing <= 0:
            return []
        shares = _shares(limit)
        if self._clips[priority] + clips > shares[priority]:
            return None
        displaced: list[Request] = []
        for other in reversed(PRIORITIES):
            over = self._clips[other] - shares[other]
            for request in reversed(self._requests[other]):
                if missing <= 0:
                    return displaced
                if other != priority and not request.taken and request.waiting <= over:
                    displaced.append(request)
                    over -= request.waiting
                    missing -= request.waiting
        return displaced if missing <= 0 else None

    def would_fit(self, clips: int, priority: Priority, limit: int) -> bool:
        """Whether clips that are yet to be decoded will find room, as far as can be told.

        What is being decoded is expected, but of another class no more than its share: the rest
        would be turned away when it comes. While nothing waits none of it counts, for decoding may
        take its time, and an idle engine refuses nobody.
        """
        if not self.waiting:
            return clips <= limit
        own = self.coming[priority] + clips
        shares = _shares(limit)
        others = sum(
            min(self.coming[other], max(0, shares[other] - self._clips[other]))
            for other in PRIORITIES
            if other != priority
        )
        if self.waiting + own + others <= limit:
            return True
        within = self._clips[priority] + own <= shares[priority]
        return within and self.room_for(own, priority, limit) is not None

    def oldest(self) -> float | None:
        """When the request arrived that has waited longest, of those that are still wanted."""
        arrivals = [
            request.arrived
            for requests in self._requests.values()
            for request in requests
            if request.wanted
        ]
        return min(arrivals, default=None)

    def _count(self, priority: Priority, change: int) -> None:
        self._clips[priority] += change
        self.waiting += change


def _shares(limit: int) -> dict[Priority, int]:
    """Clips of so many that each class may have at the cost of others."""
    return {own: limit * weight // sum(WEIGHTS.values()) for own, weight in WEIGHTS.items()}
