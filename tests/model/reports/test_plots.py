"""Pictures are drawn where their numbers are, whatever the numbers."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from model.evaluation.metrics import Bin, calibration_error, confidence_bins
from model.reports.plots import (
    confusion_matrix,
    line_chart,
    nice_ticks,
    reliability_diagram,
    stretches,
)


def drawn(svg: str) -> ElementTree.Element:
    assert "nan" not in svg.lower()
    assert "inf" not in svg.lower()
    return ElementTree.fromstring(svg)  # noqa: S314 (our own)


def texts(svg: str) -> list[str]:
    return ["".join(text.itertext()) for text in drawn(svg).iter("text")]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.93, 0.94), (-3, 1e6), (2.5, 2.5), (0, 0), (1e-9, 3e-9), (5, 7)]
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high - 1e-12
    assert 2 <= len(ticks) <= 8
    distance = ticks[1] - ticks[0]
    assert float(f"{distance:.1g}") == pytest.approx(distance)


def test_a_long_line_keeps_its_mean_and_its_extremes() -> None:
    values = [(step, float(step % 10 == 3) * 50) for step in range(1, 100_001)]
    points = stretches(values)
    assert len(points) <= 300
    assert np.mean([point.mean for point in points]) == pytest.approx(5, rel=0.01)
    assert {(point.low, point.high) for point in points} == {(0.0, 50.0)}


def test_higher_values_are_drawn_higher() -> None:
    svg = line_chart([(10, 0.2), (20, 0.9)], dots=True)
    low, high = (float(dot.get("cy", "")) for dot in drawn(svg).iter("circle"))
    assert low > high
    assert {"0.2", "10", "20"} <= set(texts(svg))


def test_a_line_of_one_value_is_a_dot_and_of_none_a_word() -> None:
    assert len(list(drawn(line_chart([(1, 3.0)])).iter("circle"))) == 1
    assert "nothing to draw" in line_chart([])


def test_what_is_no_number_is_left_out_of_a_line() -> None:
    svg = line_chart([(1, math.nan), (2, 1.0), (3, math.inf), (4, 2.0)], dots=True)
    assert len(list(drawn(svg).iter("circle"))) == 2


def test_a_matrix_says_what_was_taken_for_what() -> None:
    svg = confusion_matrix(np.array([[3, 1, 0], [0, 0, 0], [0, 0, 2]]), ["a", "b", "c" * 60])
    titles = [title.text for title in drawn(svg).iter("title")]
    assert "a taken for b: 1" in titles
    assert "c" * 60 in titles  # the label itself is cut
    assert sorted(re.findall(r'class="(right|wrong)"', svg)) == ["right", "right", "wrong"]


def test_a_matrix_of_one_class() -> None:
    assert "3" in texts(confusion_matrix(np.array([[3]]), ["only"]))


def test_bins_hold_every_video_once_and_give_the_calibration_error() -> None:
    confidence = np.array([0.0, 0.1, 0.62, 0.63, 1.0])
    right = np.array([False, False, True, False, True])
    bins = confidence_bins(confidence, right)
    assert sum(each.videos for each in bins) == 5
    assert all(each.low <= each.confidence <= each.high for each in bins)
    pair = next(each for each in bins if each.videos == 2)
    assert pair.accuracy == 0.5
    assert calibration_error(confidence, right) == pytest.approx((0.1 + 2 * 0.125) / 5)


def test_bars_stand_at_their_accuracy() -> None:
    svg = reliability_diagram([Bin(0.4, 0.5, 4, 0.45, 0.25), Bin(0.9, 1.0, 12, 0.97, 1.0)])
    bars = [rect for rect in drawn(svg).iter("rect") if rect.get("class") == "bar"]
    heights = [float(bar.get("height", "")) for bar in bars]
    assert heights[0] == pytest.approx(heights[1] / 4)
    assert "4 videos of 40% to 50%: 25.0% right, 45.0% sure" in svg
