"""The rule by which windows become segments, on scores that are made up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.inference.segments import Rule, Segment, Segmenter

PLAIN = Rule(smoothing=1, open_score=0.5, close_score=0.3, min_segment_s=0.0)


def segments_of(scores: list[list[float]], rule: Rule = PLAIN) -> list[Segment]:
    """Of windows of 2 s, 1 s apart."""
    segmenter = Segmenter(len(scores[0]), rule)
    found = []
    for start, row in enumerate(scores):
        found += segmenter.add(float(start), start + 2.0, np.array(row))
    return found + segmenter.finish()


def test_a_dip_above_the_closing_score_does_not_end_a_segment() -> None:
    assert len(segments_of([[0.9], [0.35], [0.9]])) == 1
    assert len(segments_of([[0.9], [0.25], [0.9]])) == 2


def test_what_never_reaches_the_opening_score_is_no_segment() -> None:
    assert segments_of([[0.4], [0.49], [0.4]]) == []
    (segment,) = segments_of([[0.4], [0.5], [0.4]])
    assert segment.windows == 3  # the rise before the peak belongs to it
    assert segment.score == pytest.approx(1.3 / 3)


def test_smoothing_takes_a_lone_peak_for_noise_and_bridges_a_lone_gap() -> None:
    smooth = PLAIN._replace(smoothing=3)
    assert segments_of([[0.0], [0.0], [0.9], [0.0], [0.0]], smooth) == []
    (segment,) = segments_of([[0.9], [0.9], [0.0], [0.9], [0.9]], smooth)
    assert segment.windows == 5
    assert segment.score == pytest.approx(0.72)  # its windows' own scores


def test_short_segments_are_dropped() -> None:
    scores = [[0.9], [0.0], [0.0], [0.9], [0.9], [0.9]]
    assert [s.start_s for s in segments_of(scores)] == [0.0, 3.5]
    assert [s.start_s for s in segments_of(scores, PLAIN._replace(min_segment_s=2.0))] == [3.5]


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3).map(lambda row: row), min_size=1),
    st.sampled_from([1, 3, 5, 9]),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_taken_one_by_one_it_is_the_rule_applied_to_all_at_once(
    scores: list[list[float]], smoothing: int, one: float, other: float
) -> None:
    rule = Rule(smoothing, max(one, other), min(one, other), 0.0)
    table = np.array(scores)
    reach = smoothing // 2
    smoothed = np.array(
        [table[max(i - reach, 0) : i + reach + 1].mean(axis=0) for i in range(len(table))]
    )
    expected = []
    for label in range(3):
        run: list[int] = []
        for i in range(len(table) + 1):
            if i < len(table) and smoothed[i, label] >= rule.close_score:
                run.append(i)
                continue
            if run and smoothed[run, label].max() >= rule.open_score:
                start = 0.0 if run[0] == 0 else run[0] + 0.5
                end = run[-1] + (2.0 if run[-1] == len(table) - 1 else 1.5)
                expected.append((label, start, end, len(run), table[run, label].mean()))
            run = []
    found = [
        (s.class_index, s.start_s, s.end_s, s.windows, pytest.approx(s.score))
        for s in segments_of(scores, rule)
    ]
    assert sorted(found, key=lambda s: s[:2]) == expected


def test_its_memory_does_not_grow() -> None:
    segmenter = Segmenter(2, PLAIN._replace(smoothing=5))
    for start in range(1000):
        segmenter.add(float(start), start + 2.0, np.array([0.9, 0.1]))
        assert len(segmenter._recent) <= 6
