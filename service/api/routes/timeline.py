"""`POST /v1/timeline`: a long video in, labels over time out, while it is decoded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from model.video import Limits
from service.api.deadlines import HEADERS, urgency_of, within
from service.api.dependencies import Running, State
from service.api.event_stream import MEDIA_TYPES, EventStream, choose_format
from service.api.schemas.openapi import inlined_schema
from service.api.schemas.predictions import TimelineRequest
from service.api.video_requests import PROBLEM_RESPONSES, answer_in_time, merge_fields, video_body
from service.decoding.messages import StreamRequest
from service.errors import QueueFullError
from service.inference.parameters import TimelineParameters
from service.inference.results import (
    TimelineError,
    TimelineEvent,
    TimelineSegment,
    TimelineStart,
    TimelineSummary,
    TimelineWindow,
)
from service.inference.scheduler import Priority
from service.inference.timeline import Timeline, checked_cut, events_of
from service.ingest.upload_rate import Pace
from service.ingest.uploads import Upload, receive
from service.observability.logs import request_id
from service.registry.instance import ServedModel

router = APIRouter(prefix="/v1", tags=["timeline"])
_RETRY_AFTER_S = 30
_EVENT: dict[str, Any] = {
    "schema": {
        "description": "One event; the body is a sequence of them.",
        "oneOf": [
            inlined_schema(kind)
            for kind in (
                TimelineStart,
                TimelineWindow,
                TimelineSegment,
                TimelineSummary,
                TimelineError,
            )
        ],
    }
}


@router.post(
    "/timeline",
    response_class=Response,
    responses={
        200: {
            "description": "Events, sent as they are known.",
            "content": dict.fromkeys(MEDIA_TYPES.values(), _EVENT),
        },
        **PROBLEM_RESPONSES,
    },
    openapi_extra={"requestBody": video_body(TimelineRequest), "parameters": HEADERS},
    summary="Name the actions in a long video, over time",
)
async def timeline(
    request: Request, state: Running, query: Annotated[TimelineRequest, Query()]
) -> Response:
    """Cuts the video into overlapping windows, runs them through the network while decoding goes
    on, and sends each one's labels and the segments that they make as they are known.
    """
    settings, metrics = state.settings, state.metrics
    urgency = urgency_of(request)
    state.models.find(query.model)  # now, so that a name that is wrong costs nobody an upload
    _refuse_if_full(state)
    stack = AsyncExitStack()
    try:
        metrics.timelines_running.inc()
        stack.callback(metrics.timelines_running.dec)
        async with within(urgency.deadline):
            upload = await stack.enter_async_context(
                receive(
                    request,
                    state.spool,
                    settings.max_long_upload_bytes,
                    Pace.of_long(settings),
                    state.sources,
                )
            )
        parameters = merge_fields(query, upload.fields)
        form = choose_format(request, parameters.format)
        _refuse_if_full(state)
        deadline = asyncio.get_running_loop().time() + settings.timeline_timeout_s
        model = stack.enter_context(state.models.find(parameters.model).current.in_use())
        begin = _begin(stack, state, model, upload, parameters, urgency.priority)
        async with within(urgency.deadline):
            events = await answer_in_time(request, settings.timeline_timeout_s, begin)
    except BaseException:
        await stack.aclose()
        raise
    return EventStream(
        events,
        stack,
        form,
        deadline=deadline,
        own_deadline=urgency.deadline,
        stall_s=settings.request_timeout_s,
        on_error=lambda code: metrics.rejected.labels(code).inc(),
    )


def _refuse_if_full(state: State) -> None:
    if state.streams.waiting >= state.settings.timeline_workers:
        raise QueueFullError(_RETRY_AFTER_S)


async def _begin(
    stack: AsyncExitStack,
    state: State,
    model: ServedModel,
    upload: Upload,
    parameters: TimelineParameters,
    priority: Priority,
) -> AsyncIterator[TimelineEvent]:
    """Decodes up to the first event, so that a video which gives none is refused with a status."""
    settings = state.settings
    cut = checked_cut(model, parameters)
    limits = Limits(
        max_pixels=settings.max_video_pixels, max_duration_s=settings.max_long_video_duration_s
    )
    job = StreamRequest(upload.path, model.bundle.config.preprocessing, cut, limits)
    pieces = await stack.enter_async_context(state.streams.stream(job))
    made = Timeline(model.bundle, cut, parameters, request_id.get())
    events = events_of(pieces, model, made, model.ahead, priority)
    stack.push_async_callback(events.aclose)
    first = await anext(events)
    return _counted(state, first, events)


async def _counted(
    state: State, first: TimelineEvent, events: AsyncGenerator[TimelineEvent, None]
) -> AsyncIterator[TimelineEvent]:
    yield first
    async for event in events:
        if isinstance(event, TimelineWindow):
            state.metrics.timeline_windows.inc()
        elif isinstance(event, TimelineSegment):
            state.metrics.timeline_segments.inc()
        yield event
