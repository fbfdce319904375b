"""Metrics are what their definitions say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from model.config import Preprocessing
from model.data.lists import Sample, VideoList, read_videos
from model.evaluation.metrics import (
    Predictions,
    Protocol,
    agreement,
    calibration_error,
    measure,
    predict,
    predict_each,
)
from model.training.errors import DataError

SEES = Preprocessing(num_frames=2, image_size=16, frame_stride=4)


def predictions(scores: object, targets: list[int]) -> Predictions:
    """Of logits (videos, clips, classes) with these softmax scores."""
    logits = np.log(np.asarray(scores, np.float32))
    labels = tuple(f"class {index}" for index in range(logits.shape[-1]))
    samples = tuple(Sample("x", target, "x") for target in targets)
    return Predictions(logits, np.array(targets), samples, labels, ())


def test_a_video_s_score_is_the_mean_over_its_clips() -> None:
    """Of the softmax: one sure clip outweighs two that are hardly sure of another class."""
    video = [[0.98, 0.01, 0.01], [0.3, 0.4, 0.3], [0.3, 0.4, 0.3]]
    metrics = measure(predictions([video], [0]))
    assert metrics.top1 == 1
    assert metrics.log_loss == pytest.approx(-np.log((0.98 + 0.3 + 0.3) / 3))


def test_accuracies_over_videos_and_over_classes() -> None:
    sure = np.eye(7) * 0.86 + 0.02
    # Class 0 three times, right twice; class 6 once, wrong; in its order of ties it comes last.
    metrics = measure(predictions(sure[[0, 0, 3, 3]][:, None], [0, 0, 0, 6]))
    assert metrics.top1 == 0.5
    assert metrics.top5 == 0.75
    assert metrics.mean_class_accuracy == pytest.approx((2 / 3 + 0) / 2, abs=1e-6)
    assert metrics.per_class == {
        "class 0": {"videos": 3, "accuracy": pytest.approx(2 / 3, abs=1e-6)},
        "class 6": {"videos": 1, "accuracy": 0.0},
    }


def test_a_model_that_says_nothing_is_not_right_everywhere() -> None:
    metrics = measure(predictions(np.full((10, 1, 10), 0.1), list(range(10))))
    assert (metrics.top1, metrics.top5) == (0.1, 0.5)


def test_calibration_error_by_hand() -> None:
    confidence = np.array([0.95, 0.97, 0.55, 0.56, 1.0])
    right = np.array([True, False, True, True, True])
    # Bins of a fifteenth: [0.933, 1] holds three, mean 0.9733, right 2/3; [0.533, 0.6] two.
    expected = 3 / 5 * (0.97333 - 2 / 3) + 2 / 5 * (1 - 0.555)
    assert calibration_error(confidence, right) == pytest.approx(expected, abs=1e-4)


def redness(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    red, _, blue = frames.mean((1, 2, 3)).T
    return np.stack([blue, red], 1).astype(np.float32)


@pytest.mark.parametrize("processes", [0, 1])
def test_every_video_is_scored_in_order_and_broken_ones_are_named(
    colours: Path, tmp_path: Path, processes: int
) -> None:
    (tmp_path / "broken.mp4").write_text("no video")
    good = read_videos(colours)
    samples = (good.samples[0], Sample(str(tmp_path / "broken.mp4"), 1, "x"), *good.samples[1:])
    counted: list[int] = []
    found = predict(
        VideoList(samples, good.labels),
        SEES,
        redness,
        Protocol(views=2, crops=3),
        processes=processes,
        done=counted.append,
    )
    assert found.logits.shape == (8, 6, 2)
    assert found.samples == good.samples
    assert [failure.code for failure in found.failures] == ["undecodable_video"]
    assert counted == list(range(1, 10))
    metrics = measure(found)
    assert (metrics.videos, metrics.top1) == (8, 1.0)


def test_several_models_are_asked_in_one_pass(colours: Path) -> None:
    """Each gets what it alone would get; their agreement is that of their labels."""
    videos = read_videos(colours)
    seen: list[int] = []

    def always_blue(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        seen.append(len(frames))
        return np.tile(np.array([1, 0], np.float32), (len(frames), 1))

    alone = predict(videos, SEES, redness)
    both = predict_each(videos, SEES, [redness, always_blue])
    np.testing.assert_array_equal(both[0].logits, alone.logits)
    assert [measure(each).top1 for each in both] == [1.0, 0.5]
    assert sum(seen) == 8 * 3
    assert agreement(both[0], both[1]) == 0.5
    assert agreement(both[0], alone) == 1.0


def test_a_set_that_cannot_be_decoded_is_an_error(tmp_path: Path) -> None:
    absent = VideoList((Sample(str(tmp_path / "absent.mp4"), 0, "x"),), ("a", "b"))
    with pytest.raises(DataError, match="none of the 1 videos"):
        predict(absent, SEES, redness)
