"""What the table holds of a video: its labels and what was looked at, or why there are none."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.bundle.bundle import Bundle
from model.video import Clips
from service.inference.parameters import ClassifyParameters
from service.inference.postprocess import classification

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Rules:
    """What all rows of a table have in common, so that they can be compared with each other."""

    model: str
    version: str
    weights_sha256: str
    precision: str
    views: int
    crops: int
    top_k: int


def labelled(
    name: str,
    clips: Clips,
    logits: NDArray[np.float32],
    bundle: Bundle,
    parameters: ClassifyParameters,
) -> Row:
    """The row of a video whose clips have these logits (clips, classes)."""
    answer = classification(bundle, clips, logits, parameters)
    best = answer.predictions[0]
    return {
        "path": name,
        "label": best.label,
        "score": best.score,
        "labels": [prediction.label for prediction in answer.predictions],
        "class_indices": [prediction.class_index for prediction in answer.predictions],
        "scores": [prediction.score for prediction in answer.predictions],
        **answer.video.model_dump(),
        "sampling": answer.sampling.mode,
        "views": answer.sampling.views,
        "crops": answer.sampling.crops,
        "times_s": [list(view) for view in answer.sampling.times_s],
        "model_name": answer.model.name,
        "model_version": answer.model.version,
    }


def failed(name: str, code: str, detail: str, bundle: Bundle) -> Row:
    """The row of a video that has no labels."""
    return {
        "path": name,
        "model_name": bundle.name,
        "model_version": bundle.version,
        "error_code": code,
        "error_detail": detail,
    }
