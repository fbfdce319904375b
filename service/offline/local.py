"""`timesformer classify` and `timeline`: videos of this machine, without a server."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from model.video import (
    Limits,
    Opened,
    VideoError,
    Window,
    load_clips,
    make_cut,
    stream_windows,
)
from service.inference.parameters import ClassifyParameters, TimelineParameters
from service.inference.postprocess import classification
from service.inference.results import (
    Classification,
    TimelineEvent,
    TimelineSegment,
    TimelineSummary,
)
from service.inference.timeline import MOST_WINDOWS, Timeline
from service.observability.progress import Bar, bar, print_table
from service.registry.loading import LoadedModel, find_bundle, load_model
from service.settings import Settings


class UnreadableFile(VideoError):  # noqa: N818 - named as the others of its kind
    """Not there, a folder, or not ours to read."""

    code = "unreadable_file"


def classify_files(
    files: Sequence[Path], settings: Settings, parameters: ClassifyParameters, as_json: bool
) -> int:
    """Prints an answer for each file as it is done; returns how many files failed.

    Raises:
        BundleError: the bundle cannot be used.
        RuntimeUnavailableError: the device cannot run it.
    """
    model = _load(settings)
    limits = Limits(
        max_pixels=settings.max_video_pixels, max_duration_s=settings.max_video_duration_s
    )
    failed = 0
    # On a terminal the answers are progress enough.
    with bar(len(files) > 1 and not sys.stdout.isatty(), lines=False) as progress:
        for done, file in enumerate(files):
            progress.show(f"classifying {done + 1} of {len(files)}", done, len(files))
            try:
                answer = _classify(file, model, parameters, limits)
            except VideoError as error:
                failed += 1
                _print_problem(progress, file, error, as_json)
                continue
            _print_answer(file, answer, as_json)
    model.close()
    return failed


def timeline_of_file(
    file: Path, settings: Settings, parameters: TimelineParameters, as_json: bool
) -> None:
    """Prints the segments of a long video as they are known, or with `as_json` all events.

    Raises:
        VideoError: the file gives no windows, or no more; what was seen has been printed.
        WindowError: the parameters do not fit the model.
        BundleError, RuntimeUnavailableError: as `classify_files`.
    """
    model = _load(settings)
    seen = model.bundle.config.preprocessing
    cut = make_cut(seen, parameters.window, parameters.stride, parameters.crops, MOST_WINDOWS)
    timeline = Timeline(model.bundle, cut, parameters)
    limits = Limits(
        max_pixels=settings.max_video_pixels, max_duration_s=settings.max_long_video_duration_s
    )
    console = Console()

    def show(piece: Opened | Window) -> None:
        if isinstance(piece, Opened):
            _print_event(timeline.start(piece), console, as_json)
            return
        rows = [model.runtime.run(clip[None]).logits[0] for clip in piece.frames]
        for event in timeline.window(piece, np.stack(rows)):
            _print_event(event, console, as_json)

    try:
        check_readable(file)
        ended = stream_windows(file, seen, cut, show, limits=limits)
        for event in timeline.end(ended):
            _print_event(event, console, as_json)
    finally:
        model.close()


def _load(settings: Settings) -> LoadedModel:
    """The model on one GPU: clips go through the network one at a time here."""
    first = (settings.gpus or (0,))[0]
    alone = settings.model_copy(update={"max_batch_clips": 1, "gpu": str(first)})
    return load_model(find_bundle(settings), alone)


def _print_event(event: TimelineEvent, console: Console, as_json: bool) -> None:
    if as_json:
        _print_json(event.model_dump(mode="json", exclude_none=True))
    elif isinstance(event, TimelineSegment):
        times = f"{_clock(event.start_s)} to {_clock(event.end_s)}"
        console.print(f"{times}  {event.score:.3f}  {event.label}", highlight=False, markup=False)
    elif isinstance(event, TimelineSummary):
        text = f"{event.windows} windows, {event.segments} segments in {event.total_s:.1f} s"
        console.print(text, highlight=False, style="dim")
        if event.video.truncated:
            click.echo("the file is truncated or damaged; the rest was used")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes) // 60}:{int(minutes) % 60:02}:{rest:04.1f}"


def _print_problem(progress: Bar, file: Path, error: VideoError, as_json: bool) -> None:
    if as_json:
        _print_json({"file": str(file), "error": {"code": error.code, "detail": str(error)}})
    else:
        progress.print(Text(f"{click.format_filename(file)}: {error}", style="red"))


def _print_answer(file: Path, answer: Classification, as_json: bool) -> None:
    if as_json:
        _print_json({"file": str(file), **answer.model_dump(mode="json")})
    else:
        print_table(click.format_filename(file), _table(answer))
        if answer.video.truncated:
            click.echo("the file is truncated or damaged; the rest was used")


def _print_json(line: dict[str, object]) -> None:
    click.echo(json.dumps(line))  # echo flushes: a reader sees each answer when it is done


def _classify(
    file: Path, model: LoadedModel, parameters: ClassifyParameters, limits: Limits
) -> Classification:
    check_readable(file)
    clips = load_clips(
        file,
        model.bundle.config.preprocessing,
        views=parameters.views,
        crops=parameters.crops,
        limits=limits,
    )
    # One clip at a time: a batch gains nothing here and a hundred views would fill the memory.
    rows = [model.runtime.run(clips.frames[i : i + 1]).logits[0] for i in range(len(clips.frames))]
    return classification(model.bundle, clips, np.stack(rows), parameters)


def check_readable(file: Path) -> None:
    """Raises `UnreadableFile` in the system's words, which decoders do not have."""
    try:
        file.open("rb").close()
    except OSError as error:
        raise UnreadableFile(f"{error.strerror}.") from error


def _table(answer: Classification) -> Table:
    table = Table()
    table.add_column("label")
    table.add_column("score", justify="right")
    for prediction in answer.predictions:  # as text: "Pushing [something]" is no markup
        table.add_row(Text(prediction.label), f"{prediction.score:.3f}")
    return table
