"""The temperature that makes a model's scores mean what they say (Guo et al., 2017). No torch.

Logits are divided by it before the softmax: above 1 a model that is too sure of itself becomes
less sure, below 1 a timid one becomes surer. The order of the scores of a clip stays.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np

from model.evaluation.metrics import Predictions, measure
from model.scores import mean_scores

_RANGE = (0.05, 20.0)  # of temperatures that are searched


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A temperature, and what one does to videos that it was not fitted on.

    Attributes:
        temperature: fitted on all videos; 1 if the trial did not lower the log loss.
        trial_temperature: fitted on one half of the groups, judged on the other.
        fitted_on, judged_on: videos in the halves.
        before, after: `log_loss` and `calibration_error` of the judged half, without and with the
            trial's temperature.
    """

    temperature: float
    trial_temperature: float
    fitted_on: int
    judged_on: int
    before: dict[str, float]
    after: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def calibrate(predictions: Predictions) -> Calibration | None:
    """Fits a temperature, and proves it on videos that the trial did not see.

    Predictions are to be of validation videos: not of those that the model was trained on.

    Returns:
        None if all videos are of one group: then there is nothing to judge on.
    """
    fitted, judged = _halves(predictions)
    if not len(fitted.targets) or not len(judged.targets):
        return None
    trial = fit_temperature(fitted)
    before, after = _quality(judged, 1.0), _quality(judged, trial)
    helps = after["log_loss"] < before["log_loss"]
    return Calibration(
        fit_temperature(predictions) if helps else 1.0,
        trial,
        len(fitted.targets),
        len(judged.targets),
        before,
        after,
    )


def fit_temperature(predictions: Predictions) -> float:
    """The temperature with the least log loss, within 0.05 to 20, to four places.

    The right class's target is not 1 but (n + 1) / (n + 2) for n videos (Platt, 1999): of a model
    that is right on all of a few videos, the least plain log loss would make it infinitely sure.
    """
    targets = predictions.targets
    doubt = 1 / (len(targets) + 2)

    def loss(logarithm: float) -> float:
        scores = mean_scores(predictions.logits, float(np.exp(logarithm)))
        right = np.clip(scores[np.arange(len(targets)), targets], 1e-300, 1 - 1e-12)
        return float(-((1 - doubt) * np.log(right) + doubt * np.log1p(-right)).mean())

    # The mean over clips may have more than one minimum: a grid first, then a search around it.
    lowest, highest = np.log(_RANGE)
    grid = np.linspace(lowest, highest, 25)
    at = int(np.argmin([loss(point) for point in grid]))
    low, high = float(grid[max(at - 1, 0)]), float(grid[min(at + 1, len(grid) - 1)])
    golden = (np.sqrt(5) - 1) / 2
    for _ in range(30):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return round(float(np.exp((low + high) / 2)), 4)


def _halves(predictions: Predictions) -> tuple[Predictions, Predictions]:
    """Every second group, in an order that only their names decide."""
    groups = [sample.group for sample in predictions.samples]
    order = sorted(set(groups), key=lambda group: hashlib.sha256(group.encode()).digest())
    first = set(order[::2])
    inside = np.array([group in first for group in groups])
    return predictions.of(inside), predictions.of(~inside)


def _quality(predictions: Predictions, temperature: float) -> dict[str, float]:
    metrics = measure(predictions, temperature).to_dict()
    return {name: metrics[name] for name in ("log_loss", "calibration_error")}
