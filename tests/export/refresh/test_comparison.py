"""What a rule says of two models' answers to the same videos."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from export.refresh.comparison import Comparison, Decision, Rule, compare, decide
from model.data.lists import Sample, VideoList
from model.evaluation.metrics import Failure, Predictions
from model.training.errors import DataError

LABELS = ("run", "walk", "jump")
VIDEOS = VideoList(
    tuple(Sample(f"{index}.mp4", label, "") for index, label in enumerate([0, 0, 1, 1, 2, 2])),
    LABELS,
)
RIGHT = (0, 0, 1, 1, 2, 2)


def answers(
    named: tuple[int, ...],
    labels: tuple[str, ...] = LABELS,
    sure: float = 3.0,
    failed: tuple[int, ...] = (),
) -> Predictions:
    """A model that gives each video the class in `named`."""
    read = [index for index in range(len(VIDEOS.samples)) if index not in failed]
    logits = np.zeros((len(read), 1, len(labels)), np.float32)
    logits[np.arange(len(read)), 0, [named[index] for index in read]] = sure
    samples = tuple(VIDEOS.samples[index] for index in read)
    failures = tuple(Failure(VIDEOS.samples[index].path, "undecodable", "") for index in failed)
    targets = np.array([sample.label for sample in samples])
    return Predictions(logits, targets, samples, labels, failures)


def decided(new: Predictions, active: Predictions, **rule: Any) -> Decision:
    return decide(compare(new, active), Rule(**rule))


def test_better_is_more_than_as_good() -> None:
    same = answers(RIGHT), answers(RIGHT)
    assert decided(*same) == (
        False,
        "top-1 went from 1.0000 to 1.0000, a gain of +0.0000 where more than 0 is asked for: "
        "0.0000 short",
    )
    assert decided(*same, kind="not-worse").accepted
    assert decided(answers(RIGHT), answers((0, 0, 1, 1, 2, 0))).accepted


def test_the_gain_must_reach_its_bound() -> None:
    pair = answers(RIGHT), answers((0, 0, 1, 1, 2, 0))
    assert decided(*pair, min_gain=0.1).accepted
    accepted, reason = decided(*pair, min_gain=0.2)
    assert not accepted
    assert reason.endswith("a gain of +0.1667 where more than 0.2 is asked for: 0.0333 short")


def test_log_loss_is_better_when_it_falls() -> None:
    surer = answers(RIGHT, sure=5.0), answers(RIGHT)
    assert decided(*surer, metric="log_loss").accepted
    assert not decided(*surer[::-1], metric="log_loss").accepted


def test_a_class_that_the_active_model_lacks_counts_as_wrong_for_it() -> None:
    compared = compare(answers(RIGHT), answers((0, 0, 1, 1, 0, 0), LABELS[:2]))
    assert isinstance(compared, Comparison)
    assert compared.known is not None
    assert compared.everything.active.top1 == pytest.approx(2 / 3)
    assert (compared.known.active.top1, compared.known.active.videos) == (1.0, 4)
    assert decide(compared, Rule()).accepted
    _, reason = decide(compared, Rule(metric="log_loss"))
    assert "log loss on the old classes" in reason


def test_the_classes_may_stand_in_another_order() -> None:
    turned = answers((2, 2, 1, 1, 0, 0), LABELS[::-1])
    assert compare(answers(RIGHT), turned).everything.active.top1 == 1.0


def test_a_gain_on_new_classes_does_not_pay_for_a_loss_on_old_ones() -> None:
    new, active = answers((0, 2, 1, 1, 2, 2)), answers((0, 0, 1, 1, 0, 0), LABELS[:2])
    accepted, reason = decided(new, active)
    assert not accepted
    assert reason == (
        "accuracy on the old classes fell from 1.0000 to 0.7500 where 0.01 at most may be lost: "
        "0.2400 too far"
    )
    assert decided(new, active, max_old_drop=0.25).accepted


def test_no_class_may_fall_too_far_where_that_is_asked_for() -> None:
    new, active = answers((0, 0, 1, 2, 2, 2)), answers((0, 1, 1, 1, 1, 1))
    assert decided(new, active).accepted
    _, reason = decided(new, active, max_class_drop=0.2)
    assert reason == (
        "accuracy on 'walk' fell from 1.0000 to 0.5000 where 0.2 at most may be lost: "
        "0.3000 too far"
    )


def test_a_hold_out_of_new_classes_only_proves_nothing() -> None:
    old = tuple(range(4))
    new = answers(RIGHT, failed=old)
    accepted, reason = decided(new, answers((0,) * 6, LABELS[:2], failed=old))
    assert not accepted
    assert "no video of a class that the active model knows" in reason


def test_videos_that_one_of_them_could_not_decode_are_left_out() -> None:
    compared = compare(answers(RIGHT, failed=(0,)), answers(RIGHT, failed=(3,)))
    assert compared.everything.new.videos == compared.everything.active.videos == 4
    with pytest.raises(DataError, match="no video of the hold-out"):
        compare(answers(RIGHT, failed=(0, 1, 2)), answers(RIGHT, failed=(3, 4, 5)))
