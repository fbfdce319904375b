"""How good a model is on labelled videos: accuracy and calibration.

The model is any function from clips to logits: a network, or a bundle's engine. No torch.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.config import Preprocessing
from model.data.lists import Sample, VideoList
from model.data.process_pool import in_processes
from model.data.remote import local_video
from model.scores import mean_scores
from model.training.errors import DataError
from model.video import Crops, VideoError, load_clips

Classify = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""uint8 clips (batch, time, size, size, 3) to logits (batch, classes)."""

_BINS = 15  # of confidence; Guo et al., 2017
_BATCH_CLIPS = 16


class Protocol(NamedTuple):
    """Which clips of a video are scored. The paper's: one in time, three in space."""

    views: int = 1
    crops: Crops = 3


class Failure(NamedTuple):
    """A video that gave no clips, and why."""

    path: str
    code: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a model says of every video that can be decoded.

    `logits` float32 (videos, clips, classes), `targets` int64 (videos,), `samples` the videos.
    """

    logits: NDArray[np.float32]
    targets: NDArray[np.int64]
    samples: tuple[Sample, ...]
    labels: tuple[str, ...]
    failures: tuple[Failure, ...]

    def of(self, which: Sequence[bool] | NDArray[np.bool_]) -> Predictions:
        """Returns the predictions of the videos that `which` (videos,) chooses."""
        chosen = np.asarray(which, bool)
        return dataclasses.replace(
            self,
            logits=self.logits[chosen],
            targets=self.targets[chosen],
            samples=tuple(itertools.compress(self.samples, chosen)),
        )


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Shares are from 0 to 1. The score of a video is the mean of the softmax over its clips.

    Attributes:
        mean_class_accuracy: over the classes that occur.
        calibration_error: expected calibration error: mean distance of confidence and accuracy over
            15 bins of confidence, weighted by the videos in them (Guo et al., 2017).
        log_loss: mean negative logarithm of the right class's score.
        per_class: videos and accuracy of each class that occurs.
    """

    videos: int
    top1: float
    top5: float
    mean_class_accuracy: float
    calibration_error: float
    log_loss: float
    per_class: dict[str, dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: shares rounded to 6 places."""
        fields = dataclasses.asdict(self)
        return {key: round(v, 6) if isinstance(v, float) else v for key, v in fields.items()}


def predict(
    videos: VideoList,
    preprocessing: Preprocessing,
    classify: Classify,
    protocol: Protocol = Protocol(),  # noqa: B008 (immutable)
    *,
    processes: int = 0,
    done: Callable[[int], object] = lambda count: None,
) -> Predictions:
    """Runs a model on every video. What cannot be decoded is left out and named.

    Args:
        processes: that decode; 0 decodes here.
        done: told how many videos have been read.

    Raises:
        DataError: no video can be decoded.
    """
    part = predict_part(videos, preprocessing, classify, protocol, processes=processes, done=done)
    return joined_predictions([part])


def joined_predictions(parts: Sequence[Predictions]) -> Predictions:
    """Those of one list of videos, from those of its parts in order.

    Raises:
        DataError: no video could be decoded.
    """
    failures = tuple(failure for part in parts for failure in part.failures)
    if not any(part.samples for part in parts):
        raise DataError(
            f"none of the {len(failures)} videos can be decoded; "
            f"the first, {failures[0].path}: {failures[0].detail}"
        )
    return Predictions(
        np.concatenate([part.logits for part in parts]),
        np.concatenate([part.targets for part in parts]),
        tuple(sample for part in parts for sample in part.samples),
        parts[0].labels,
        failures,
    )


def predict_part(
    videos: VideoList,
    preprocessing: Preprocessing,
    classify: Classify,
    protocol: Protocol = Protocol(),  # noqa: B008 (immutable)
    *,
    processes: int = 0,
    done: Callable[[int], object] = lambda count: None,
) -> Predictions:
    """As `predict`, of some of the videos of a list: it may be that none can be decoded."""
    load = functools.partial(_load, preprocessing=preprocessing, protocol=protocol)
    answers = in_processes(load, videos.samples, processes, crashed=_crashed)
    logits: list[NDArray[np.float32]] = []
    scored: list[Sample] = []
    failures: list[Failure] = []
    waiting: list[NDArray[np.uint8]] = []
    at_once = max(_BATCH_CLIPS // (protocol.views * protocol.crops), 1)
    for count, (sample, answer) in enumerate(zip(videos.samples, answers, strict=True), start=1):
        if isinstance(answer, Failure):
            failures.append(answer)
        else:
            scored.append(sample)
            waiting.append(answer)
        if len(waiting) == at_once:
            logits += _classify(classify, waiting)
            waiting.clear()
        done(count)
    if waiting:
        logits += _classify(classify, waiting)
    shape = (len(scored), protocol.views * protocol.crops, len(videos.labels))
    return Predictions(
        np.stack(logits) if logits else np.empty(shape, np.float32),
        np.array([sample.label for sample in scored], np.int64),
        tuple(scored),
        videos.labels,
        tuple(failures),
    )


def predict_each(
    videos: VideoList,
    preprocessing: Preprocessing,
    classifiers: Sequence[Classify],
    protocol: Protocol = Protocol(),  # noqa: B008 (immutable)
    *,
    processes: int = 0,
    done: Callable[[int], object] = lambda count: None,
) -> list[Predictions]:
    """As `predict`, of several models of the same classes; the videos are decoded once."""

    def together(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.concatenate([classify(frames) for classify in classifiers], axis=1)

    found = predict(videos, preprocessing, together, protocol, processes=processes, done=done)
    parts = np.split(found.logits, len(classifiers), axis=2)
    return [dataclasses.replace(found, logits=part) for part in parts]


def _load(
    sample: Sample, preprocessing: Preprocessing, protocol: Protocol
) -> NDArray[np.uint8] | Failure:
    try:
        with local_video(sample.path) as path:
            clips = load_clips(path, preprocessing, views=protocol.views, crops=protocol.crops)
    except VideoError as error:
        return Failure(sample.path, error.code, str(error))
    return clips.frames


def _crashed(sample: Sample) -> NDArray[np.uint8] | Failure:
    return Failure(sample.path, "decoder_crashed", "It crashes the decoder.")


def _classify(classify: Classify, videos: list[NDArray[np.uint8]]) -> Iterator[NDArray[np.float32]]:
    """Logits (clips, classes) of each of some videos, which go through the model together."""
    yield from np.split(classify(np.concatenate(videos)), len(videos))


# ---- measures ---------------------------------------------------------------------------------


def measure(predictions: Predictions, temperature: float = 1.0) -> Metrics:
    """The metrics of predictions whose logits are divided by `temperature` first."""
    scores = mean_scores(predictions.logits, temperature)
    targets = predictions.targets
    best = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    right = best[:, 0] == targets
    per_class = {
        predictions.labels[index]: {
            "videos": int((targets == index).sum()),
            "accuracy": round(float(right[targets == index].mean()), 6),
        }
        for index in np.unique(targets)
    }
    return Metrics(
        videos=len(targets),
        top1=float(right.mean()),
        top5=float((best == targets[:, None]).any(1).mean()),
        mean_class_accuracy=float(np.mean([each["accuracy"] for each in per_class.values()])),
        calibration_error=calibration_error(scores.max(1), right),
        log_loss=_log_loss(scores, targets),
        per_class=per_class,
    )


def agreement(one: Predictions, other: Predictions) -> float:
    """The share of the videos that two models give the same label."""
    best, others = (mean_scores(each.logits).argmax(1) for each in (one, other))
    return float((best == others).mean())


class Bin(NamedTuple):
    """The videos of which a model is between `low` and `high` sure: how sure, and how often right,
    it is on average."""

    low: float
    high: float
    videos: int
    confidence: float
    accuracy: float


def confidence_bins(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> list[Bin]:
    """Predictions (n,) made with `confidence` from 0 to 1, in equal bins, but the empty ones."""
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    return [
        Bin(
            number / _BINS,
            (number + 1) / _BINS,
            int((bins == number).sum()),
            float(confidence[bins == number].mean()),
            float(right[bins == number].mean()),
        )
        for number in np.unique(bins).tolist()
    ]


def calibration_error(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """Expected calibration error of predictions (n,) made with `confidence` from 0 to 1."""
    bins = confidence_bins(confidence, right)
    error = sum(each.videos * abs(each.confidence - each.accuracy) for each in bins)
    return error / len(confidence)


def _log_loss(scores: NDArray[np.float64], targets: NDArray[np.int64]) -> float:
    chosen = scores[np.arange(len(targets)), targets]
    return float(-np.log(np.maximum(chosen, 1e-300)).mean())
