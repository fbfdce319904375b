"""A long video's timeline: its windows through the network while it is decoded, and its segments.

In go pieces of a video, out come events: `start`, `window` and `segment` as they are known, and at
the end `summary`. Memory does not grow with the length of the video.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from fastapi.exceptions import RequestValidationError
from numpy.typing import NDArray

from export.bundle.bundle import Bundle
from model.scores import mean_scores
from model.video import Cut, Ended, Opened, Window, WindowError, make_cut
from service.decoding.messages import StreamMessage
from service.errors import QueueFullError
from service.inference.batcher import Batcher
from service.inference.parameters import TimelineParameters
from service.inference.postprocess import best_scores, video_facts
from service.inference.results import (
    LabelTime,
    ModelName,
    TimelineEvent,
    TimelineSegment,
    TimelineStart,
    TimelineSummary,
    TimelineWindow,
)
from service.inference.scheduler import Answer, Priority
from service.inference.segments import Rule, Segment, Segmenter

# A long video waits for room in the queue instead of being refused in its middle.
_RETRY_S = 0.1
MOST_WINDOWS = 20_000
"""Limit on the windows of one video."""


class TimelineModel(Protocol):
    """The part of a model's instance that timelines need."""

    @property
    def bundle(self) -> Bundle: ...

    @property
    def batcher(self) -> Batcher: ...


class _Total(NamedTuple):
    seconds: float = 0.0
    segments: int = 0


class Timeline:
    """Makes events of what is seen, in its order."""

    def __init__(
        self,
        bundle: Bundle,
        cut: Cut,
        parameters: TimelineParameters,
        request_id: str | None = None,
    ) -> None:
        self._bundle = bundle
        self._cut = cut
        self._parameters = parameters
        self._request_id = request_id
        self._started = time.perf_counter()
        rule = Rule(
            parameters.smoothing,
            parameters.open_score,
            parameters.close_score,
            parameters.min_segment,
        )
        self._segmenter = Segmenter(len(bundle.manifest.labels), rule)
        self._totals: dict[int, _Total] = {}

    def start(self, opened: Opened) -> TimelineStart:
        return TimelineStart(
            model=ModelName(name=self._bundle.name, version=self._bundle.version),
            video=video_facts(opened.facts, truncated=False),
            window_s=round(self._cut.window_s, 4),
            stride_s=round(self._cut.stride_s, 4),
            windows=opened.windows,
            request_id=self._request_id,
        )

    def window(self, window: Window, logits: NDArray[np.float32]) -> list[TimelineEvent]:
        """Of the next window, whose crops have these logits (crops, classes)."""
        manifest = self._bundle.manifest
        scores = mean_scores(logits, manifest.temperature)
        ended = self._segmenter.add(window.start_s, window.end_s, scores)
        event = TimelineWindow(
            number=window.number,
            start_s=round(window.start_s, 4),
            end_s=round(window.end_s, 4),
            predictions=best_scores(
                manifest.labels, scores, self._parameters.top_k, self._parameters.threshold
            ),
        )
        return [event, *map(self._segment, ended)]

    def end(self, ended: Ended) -> list[TimelineEvent]:
        last = [self._segment(segment) for segment in self._segmenter.finish()]
        labels = tuple(
            LabelTime(
                label=self._bundle.manifest.labels[index],
                class_index=index,
                seconds=round(total.seconds, 4),
                segments=total.segments,
            )
            for index, total in sorted(self._totals.items(), key=lambda item: -item[1].seconds)
        )
        summary = TimelineSummary(
            windows=ended.windows,
            segments=sum(label.segments for label in labels),
            labels=labels,
            video=video_facts(ended.facts, ended.truncated),
            total_s=round(time.perf_counter() - self._started, 4),
        )
        return [*last, summary]

    def _segment(self, segment: Segment) -> TimelineSegment:
        seconds, count = self._totals.get(segment.class_index, _Total())
        self._totals[segment.class_index] = _Total(
            seconds + segment.end_s - segment.start_s, count + 1
        )
        return TimelineSegment(
            start_s=round(segment.start_s, 4),
            end_s=round(segment.end_s, 4),
            label=self._bundle.manifest.labels[segment.class_index],
            class_index=segment.class_index,
            score=round(segment.score, 6),
            windows=segment.windows,
        )


async def events_of(
    pieces: AsyncIterator[StreamMessage],
    model: TimelineModel,
    timeline: Timeline,
    ahead: int,
    priority: Priority,
) -> AsyncGenerator[TimelineEvent, None]:
    """Runs windows through the network as they are decoded.

    Args:
        ahead: most windows that are on their way at once; no more are taken from the decoder,
            which then stops until there is room.

    Raises:
        ServiceError: as `DecoderPool.stream` and `Batcher.submit`; what was seen before the trouble
            has been given by then.
    """
    running: deque[tuple[Window, asyncio.Future[NDArray[np.float32]]]] = deque()
    reading: asyncio.Future[StreamMessage] | None = asyncio.ensure_future(anext(pieces))
    try:
        while reading or running:
            waiting: list[asyncio.Future[Any]] = [task for _, task in list(running)[:1]]
            if reading and len(running) < ahead and not (running and _failed(reading)):
                waiting.append(reading)
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if running and running[0][1].done():
                window, logits = running.popleft()
                for event in timeline.window(window, logits.result()):
                    yield event
            elif reading and reading in waiting and reading.done():
                piece, reading = reading.result(), None
                if isinstance(piece, Ended):
                    ended = piece
                    continue
                reading = asyncio.ensure_future(anext(pieces))
                if isinstance(piece, Opened):
                    yield timeline.start(piece)
                else:
                    running.append(
                        (piece, asyncio.ensure_future(_submit(model, piece.frames, priority)))
                    )
    finally:
        for future in (reading, *(task for _, task in running)):
            if future is not None:
                _let_go(future)
    for event in timeline.end(ended):
        yield event


def _failed(future: asyncio.Future[Any]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is not None


def _let_go(future: asyncio.Future[Any]) -> None:
    """Nobody waits for it any more, nor for its error."""
    future.cancel()
    future.add_done_callback(_failed)


async def _submit(
    model: TimelineModel, frames: NDArray[np.uint8], priority: Priority
) -> NDArray[np.float32]:
    return (await submit_patiently(model, frames, priority)).logits


async def submit_patiently(
    model: TimelineModel, frames: NDArray[np.uint8], priority: Priority
) -> Answer:
    """`Batcher.submit` for work that waits for room in the queue instead of being refused."""
    while True:
        try:
            return await model.batcher.submit(frames, priority)
        except QueueFullError:
            await asyncio.sleep(_RETRY_S)


def checked_cut(model: TimelineModel, parameters: TimelineParameters) -> Cut:
    """How these parameters cut videos for this model.

    Raises:
        RequestValidationError: they do not fit it.
    """
    try:
        return make_cut(
            model.bundle.config.preprocessing,
            parameters.window,
            parameters.stride,
            parameters.crops,
            MOST_WINDOWS,
        )
    except WindowError as error:
        problem = {"loc": ("query", error.field), "msg": error.message, "type": "window"}
        raise RequestValidationError([problem]) from None
