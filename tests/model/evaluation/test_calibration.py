"""The temperature mends the calibration, and what is claimed of it is measured on other videos."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from model.data.lists import Sample
from model.evaluation.calibration import calibrate, fit_temperature
from model.evaluation.metrics import Predictions, measure


def drawn(boast: float, videos: int = 6000, groups: int | None = None) -> Predictions:
    """Of a model whose logits are `boast` times what its accuracy warrants."""
    rng = np.random.default_rng(0)
    true = rng.normal(0, 1.5, (videos, 1, 5))
    powers = np.exp(true[:, 0])
    targets = np.array([rng.choice(5, p=row / row.sum()) for row in powers])
    samples = tuple(
        Sample(f"{index}.mp4", int(target), f"take {index % (groups or videos)}")
        for index, target in enumerate(targets)
    )
    return Predictions((true * boast).astype(np.float32), targets, samples, tuple("abcde"), ())


def test_the_temperature_of_an_overconfident_model_is_found() -> None:
    assert fit_temperature(drawn(1)) == pytest.approx(1.0, abs=0.06)
    boastful = drawn(3)
    temperature = fit_temperature(boastful)
    assert temperature == pytest.approx(3.0, abs=0.18)
    before, after = measure(boastful), measure(boastful, temperature)
    assert before.calibration_error > 0.1
    assert after.calibration_error < 0.03
    assert after.top1 == before.top1


def test_a_few_videos_that_are_all_right_do_not_make_it_infinitely_sure() -> None:
    logits = np.tile(np.array([[[4.0, 0.0, 0.0]]], np.float32), (8, 1, 1))
    samples = tuple(Sample(f"{index}.mp4", 0, str(index)) for index in range(8))
    sure = Predictions(logits, np.zeros(8, np.int64), samples, tuple("abc"), ())
    score = 1 - measure(sure, fit_temperature(sure)).calibration_error
    assert score == pytest.approx(9 / 10, abs=1e-3)  # Platt's target for eight of eight


def test_the_claim_is_of_videos_that_the_trial_did_not_see() -> None:
    found = calibrate(drawn(3, groups=60))
    assert found is not None
    assert (found.fitted_on, found.judged_on) == (3000, 3000)
    assert found.trial_temperature == pytest.approx(3.0, abs=0.3)
    assert found.trial_temperature != found.temperature
    assert found.before["calibration_error"] > 0.1
    assert found.after["calibration_error"] < 0.04


def test_a_group_is_on_one_side() -> None:
    """What is right of one group only, with scores that mislead of the other."""
    one, other = drawn(3, 2000), drawn(1, 2000)
    both = dataclasses.replace(
        one,
        logits=np.concatenate([one.logits, other.logits]),
        targets=np.concatenate([one.targets, other.targets]),
        samples=(Sample("x", 0, "first"),) * 2000 + (Sample("y", 0, "second"),) * 2000,
    )
    found = calibrate(both)
    assert found is not None
    assert found.trial_temperature in (fit_temperature(one), fit_temperature(other))


def test_a_temperature_that_does_not_help_other_videos_is_not_taken() -> None:
    one, other = drawn(0.4, 400), drawn(3, 400)
    swapped = dataclasses.replace(
        one,
        logits=np.concatenate([one.logits, other.logits]),
        targets=np.concatenate([one.targets, other.targets]),
        samples=(Sample("x", 0, "first"),) * 400 + (Sample("y", 0, "second"),) * 400,
    )
    found = calibrate(swapped)
    assert found is not None
    assert found.after["log_loss"] > found.before["log_loss"]
    assert found.temperature == 1.0


def test_of_one_group_there_is_nothing_to_judge_on() -> None:
    assert calibrate(drawn(2, 20, groups=1)) is None
