"""`timesformer classify`: videos of this machine, without a server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from model.video import Limits, VideoError, load_clips
from service.classification import classification
from service.models import ServedModel, load_model
from service.schemas import Classification, ClassifyParameters
from service.settings import Settings


def classify_files(
    files: Sequence[Path], settings: Settings, parameters: ClassifyParameters, as_json: bool
) -> int:
    """Prints an answer for each file as it is done; returns how many files failed."""
    model = load_model(settings)
    limits = Limits(
        max_pixels=settings.max_video_pixels, max_duration_s=settings.max_video_duration_s
    )
    errors = Console(stderr=True)
    failed = 0
    shown = track(files, "classifying", console=errors, disable=len(files) == 1, transient=True)
    for file in shown:
        try:
            answer = _classify(file, model, parameters, limits)
        except VideoError as error:
            failed += 1
            if as_json:
                problem = {"file": str(file), "error": {"code": error.code, "detail": str(error)}}
                print(json.dumps(problem))
            else:
                errors.print(f"[red]{file}: {error}[/red]", highlight=False)
            continue
        if as_json:
            print(json.dumps({"file": str(file), **answer.model_dump(mode="json")}))
        else:
            Console().print(_table(file, answer))
    model.runtime.close()
    return failed


def _classify(
    file: Path, model: ServedModel, parameters: ClassifyParameters, limits: Limits
) -> Classification:
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


def _table(file: Path, answer: Classification) -> Table:
    table = Table(title=str(file), title_justify="left")
    table.add_column("label")
    table.add_column("score", justify="right")
    for prediction in answer.predictions:
        table.add_row(prediction.label, f"{prediction.score:.3f}")
    if answer.video.truncated:
        table.caption = "the file is truncated or damaged; the rest was used"
    return table
