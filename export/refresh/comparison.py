"""Whether a new model may take the place of the one that serves: both on the same videos, and a
rule that says what is better. Without torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from model.evaluation.metrics import Metrics, Predictions, measure
from model.training.errors import DataError

Metric = Literal["top1", "mean_class_accuracy", "log_loss"]
_NAMES = {
    "top1": "top-1",
    "mean_class_accuracy": "mean class accuracy",
    "log_loss": "log loss",
}
_PLACES = 9  # what is left of a difference of shares after floating point


@dataclasses.dataclass(frozen=True)
class Rule:
    """What the new model must do to be activated.

    Attributes:
        kind: `better` wants a gain of more than `min_gain`, `not-worse` one of at least that.
        metric: whose gain; for `log_loss`, of which less is better, the gain is the fall.
        max_old_drop: how much top-1 on the classes that the active model knows may fall.
        max_class_drop: how much the accuracy of any one of them may fall; None for no limit.
    """

    kind: Literal["better", "not-worse"] = "better"
    metric: Metric = "top1"
    min_gain: float = 0.0
    max_old_drop: float = 0.01
    max_class_drop: float | None = None


class Pair(NamedTuple):
    """The metrics of both models on the same videos."""

    new: Metrics
    active: Metrics


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Both models on all videos, where a class that the active model does not know counts as wrong
    for it; and on those of classes it knows, None if there are none.
    """

    everything: Pair
    known: Pair | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            part: {model: metrics.to_dict() for model, metrics in pair._asdict().items()}
            for part, pair in (("all_classes", self.everything), ("old_classes", self.known))
            if pair is not None
        }


class Decision(NamedTuple):
    """Whether the rule lets the new model serve, and the figures that say so in a sentence."""

    accepted: bool
    reason: str


def compare(
    new: Predictions,
    active: Predictions,
    *,
    temperatures: tuple[float, float] = (1.0, 1.0),
) -> Comparison:
    """Compares what two models say of the same videos, each in its own classes.

    Videos that only one of them could decode are left out. A model of fewer classes gives the
    others no score at all.

    Args:
        new, active: `labels` are the model's classes, `targets` indices into `new.labels`.
        temperatures: that the logits of the new and of the active model are divided by.

    Raises:
        DataError: they have no video in common.
    """
    labels = (*new.labels, *(label for label in active.labels if label not in new.labels))
    known = np.array([label in active.labels for label in labels])
    failed = {failure.path for failure in (*new.failures, *active.failures)}
    ours, theirs = (
        _in_classes(each, labels).of([sample.path not in failed for sample in each.samples])
        for each in (new, active)
    )
    if not len(ours.targets):
        raise DataError("no video of the hold-out can be decoded by both models")
    old = known[ours.targets]

    def pair(which: Sequence[bool]) -> Pair:
        parts = (each.of(which) for each in (ours, theirs))
        return Pair(*map(measure, parts, temperatures))

    return Comparison(pair([True] * len(old)), pair(list(old)) if old.any() else None)


def _in_classes(predictions: Predictions, labels: tuple[str, ...]) -> Predictions:
    """The same with a column for each of `labels`; what the model does not know scores nothing."""
    logits = np.full((*predictions.logits.shape[:2], len(labels)), -np.inf, np.float32)
    logits[..., [labels.index(label) for label in predictions.labels]] = predictions.logits
    return dataclasses.replace(predictions, logits=logits, labels=labels)


def decide(comparison: Comparison, rule: Rule) -> Decision:
    """Applies the rule; a refusal names every figure that missed its bound, and by how much."""
    if comparison.known is None:
        return Decision(
            False,
            "the hold-out has no video of a class that the active model knows: "
            "nothing shows that it did not get worse",
        )
    gained, gain = _gain(comparison, rule)
    missed = [gain] if not gained else []
    missed += _drops(comparison.known, rule)
    return Decision(not missed, "; ".join(missed) or gain)


def _gain(comparison: Comparison, rule: Rule) -> tuple[bool, str]:
    new, active = comparison.everything
    where = ""
    # A class without a score has an infinite log loss, which says nothing about the others.
    if rule.metric == "log_loss" and comparison.known is not None:
        new, active = comparison.known
        where = " on the old classes" if comparison.everything != comparison.known else ""
    before, after = getattr(active, rule.metric), getattr(new, rule.metric)
    gain = round(before - after if rule.metric == "log_loss" else after - before, _PLACES)
    gained = gain > rule.min_gain if rule.kind == "better" else gain >= rule.min_gain
    bound = "more than" if rule.kind == "better" else "at least"
    text = (
        f"{_NAMES[rule.metric]}{where} went from {before:.4f} to {after:.4f}, "
        f"a gain of {gain:+.4f} where {bound} {rule.min_gain:g} is asked for"
    )
    return gained, text if gained else f"{text}: {rule.min_gain - gain:.4f} short"


def _drops(known: Pair, rule: Rule) -> list[str]:
    """A sentence for each accuracy that fell too far."""
    accuracies = [("accuracy on the old classes", known.active.top1, known.new.top1)]
    bounds = [rule.max_old_drop]
    if rule.max_class_drop is not None:
        for label, row in known.active.per_class.items():
            after = known.new.per_class[label]["accuracy"]
            accuracies.append((f"accuracy on {label!r}", row["accuracy"], after))
            bounds.append(rule.max_class_drop)
    return [
        f"{what} fell from {before:.4f} to {after:.4f} where {bound:g} at most may be lost: "
        f"{before - after - bound:.4f} too far"
        for (what, before, after), bound in zip(accuracies, bounds, strict=True)
        if round(before - after, _PLACES) > bound
    ]
