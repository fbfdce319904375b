"""What a job does, by its kind: a video in the jobs' folder in, the JSON of its result out, as it
comes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from model.video import Limits
from service.decoding.messages import DecodeRequest, StreamRequest
from service.decoding.pool import DecoderPool
from service.inference.parameters import ClassifyParameters, JobTimelineParameters, ViewParameters
from service.inference.postprocess import classification, embedding_of
from service.inference.results import (
    TimelineSegment,
    TimelineStart,
    TimelineSummary,
    TimelineWindow,
)
from service.inference.timeline import Timeline, checked_cut, events_of, submit_patiently
from service.jobs.results import Draft
from service.registry.instance import ServedModel
from service.registry.models import Models
from service.settings import Settings

Kind = Literal["classify", "timeline", "embed"]
PARAMETERS: dict[str, type[ViewParameters] | type[JobTimelineParameters]] = {
    "classify": ClassifyParameters,
    "timeline": JobTimelineParameters,
    "embed": ViewParameters,
}
Parameters = ViewParameters | JobTimelineParameters


_HEAD = b'{"start":%b,"windows":['


class Progress(NamedTuple):
    windows: int
    of: int


class Means(NamedTuple):
    """What jobs are done with."""

    settings: Settings
    models: Models
    decoders: DecoderPool


def parse(kind: str, given: Mapping[str, Any], most_clips: int) -> Parameters:
    """The parameters of a kind of job.

    Raises:
        RequestValidationError: one is unknown or wrong.
    """
    try:
        parameters = PARAMETERS[kind].model_validate(given)
    except ValidationError as error:
        raise RequestValidationError(
            [{**item, "loc": ("body", *item["loc"])} for item in error.errors()]
        ) from None
    if isinstance(parameters, ViewParameters) and parameters.views * parameters.crops > most_clips:
        message = f"views x crops may be {most_clips} at most"
        raise RequestValidationError(
            [{"loc": ("body", "views"), "msg": message, "type": "too_many_clips"}]
        )
    return parameters


async def do(
    parameters: Parameters,
    video: Path,
    means: Means,
    result: Draft,
    on_progress: Callable[[Progress], None],
) -> None:
    """Does the job; its clips stand back behind those of requests.

    Args:
        result: is written to.

    Raises:
        ServiceError: the video or the service does not allow it.
        RequestValidationError: the parameters do not fit the model that serves now.
    """
    with means.models.find(parameters.model).current.in_use() as model:
        if isinstance(parameters, JobTimelineParameters):
            await _timeline(parameters, video, means, model, result, on_progress)
        else:
            await result.write(await _look(parameters, video, means, model))


async def _look(parameters: ViewParameters, video: Path, means: Means, model: ServedModel) -> bytes:
    seen = model.bundle.config.preprocessing
    clips = await means.decoders.decode(
        DecodeRequest(video, seen, parameters.views, parameters.crops)
    )
    answer = await submit_patiently(model, clips.frames, "low")
    found: BaseModel
    if isinstance(parameters, ClassifyParameters):
        found = classification(model.bundle, clips, answer.logits, parameters)
    else:
        found = embedding_of(model.bundle, clips, answer.embedding, parameters)
    return found.model_dump_json().encode()


async def _timeline(
    parameters: JobTimelineParameters,
    video: Path,
    means: Means,
    model: ServedModel,
    result: Draft,
    on_progress: Callable[[Progress], None],
) -> None:
    settings = means.settings
    cut = checked_cut(model, parameters)
    limits = Limits(
        max_pixels=settings.max_video_pixels, max_duration_s=settings.max_long_video_duration_s
    )
    job = StreamRequest(video, model.bundle.config.preprocessing, cut, limits)
    timeline = Timeline(model.bundle, cut, parameters)
    start = summary = b"null"
    windows = expected = 0
    with result.beside() as segments:
        async with (
            means.decoders.stream(job) as pieces,
            aclosing(events_of(pieces, model, timeline, model.ahead, "low")) as events,
        ):
            async for event in events:
                text = event.model_dump_json(exclude={"event", "request_id"}).encode()
                if isinstance(event, TimelineStart):
                    start, expected = text, event.windows
                elif isinstance(event, TimelineWindow):
                    await result.write((b"," if windows else _HEAD % start) + text)
                    windows += 1
                    on_progress(Progress(windows, expected))
                elif isinstance(event, TimelineSegment):
                    await segments.write((b"," if segments.file.size else b"") + text)
                elif isinstance(event, TimelineSummary):
                    summary = text
        await segments.end()
        await result.write((b"" if windows else _HEAD % start) + b'],"segments":[')
        await result.append(segments)
        await result.write(b'],"summary":%b}' % summary)
