"""Which frames make a clip, by presentation times alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import Preprocessing
from model.video.sampling import Timeline, dense_times, frames_at, sample, uniform_times

DENSE = Preprocessing(num_frames=8, frame_stride=32)


def steady(frames: int, rate: float) -> Timeline:
    return Timeline(np.arange(frames) / rate)


@pytest.mark.parametrize(
    ("rate", "step"), [(30, 32), (60, 64), (15, 16), (120, 128)], ids=lambda v: str(v)
)
def test_dense_frames_are_as_far_apart_in_seconds_at_any_frame_rate(rate: int, step: int) -> None:
    chosen, sampling = sample(steady(20 * rate, rate), DENSE)
    assert sampling == "dense"
    assert np.diff(chosen[0]).tolist() == [step] * 7


def test_one_dense_view_lies_in_the_middle() -> None:
    timeline = steady(601, 30)  # the last frame appears at 20 s
    chosen, _ = sample(timeline, DENSE)
    assert abs((600 - chosen[0, -1]) - chosen[0, 0]) <= 1


def test_many_dense_views_reach_from_the_first_frame_to_the_last() -> None:
    chosen, _ = sample(steady(601, 30), DENSE, views=5)
    assert chosen.shape == (5, 8)
    assert chosen[0, 0] == 0
    assert chosen[-1, -1] == 600
    assert np.ptp(np.diff(chosen[:, 0])) <= 1


def test_the_middle_of_three_views_is_the_only_view_of_one() -> None:
    timeline = steady(601, 30)
    assert np.array_equal(sample(timeline, DENSE, 3)[0][1], sample(timeline, DENSE, 1)[0][0])


def test_variable_frame_rate_does_not_shift_what_is_sampled() -> None:
    fast_then_slow = np.concatenate([np.arange(0, 10, 1 / 60), np.arange(10, 20, 1 / 10)])
    chosen, _ = sample(Timeline(fast_then_slow), DENSE)
    wanted = dense_times(fast_then_slow[-1], 8, 32 / 30)[0]
    late = wanted - fast_then_slow[chosen[0]]
    assert late.min() > -1.1e-3
    assert np.all(late[wanted < 10] < 1 / 60 + 1e-3)
    assert np.all(late[wanted > 10] < 1 / 10 + 1e-3)


def test_times_rounded_to_milliseconds_choose_the_same_frames() -> None:
    exact = steady(601, 30)
    rounded = Timeline(np.round(exact.times, 3))
    assert np.array_equal(sample(exact, DENSE, 10)[0], sample(rounded, DENSE, 10)[0])


def test_the_frame_on_screen_is_the_last_that_has_appeared() -> None:
    timeline = Timeline(np.array([0.0, 1.0, 1.5, 4.0]))
    wanted = np.array([-1.0, 0.0, 0.9, 1.0, 1.4, 3.9, 4.0, 99.0])
    assert frames_at(timeline, wanted).tolist() == [0, 0, 0, 1, 1, 2, 3, 3]


def test_uniform_takes_the_middle_of_each_segment() -> None:
    chosen, sampling = sample(steady(80, 25), Preprocessing(sampling="uniform"))
    assert sampling == "uniform"
    assert chosen.tolist() == [[5, 15, 25, 35, 45, 55, 65, 75]]


def test_uniform_takes_every_frame_once_if_there_are_just_enough() -> None:
    chosen, _ = sample(steady(8, 25), Preprocessing(sampling="uniform"))
    assert chosen.tolist() == [list(range(8))]


def test_uniform_views_are_shifted_inside_their_segments() -> None:
    times = uniform_times(8.0, 4, views=2)
    assert times.tolist() == [[0.5, 2.5, 4.5, 6.5], [1.5, 3.5, 5.5, 7.5]]


@pytest.mark.parametrize("frames", [2, 3, 4])
def test_few_frames_repeat(frames: int) -> None:
    chosen, sampling = sample(steady(frames, 30), DENSE)
    assert sampling == "uniform"
    assert set(chosen[0].tolist()) == set(range(frames))


def test_dense_turns_uniform_just_below_its_span() -> None:
    span_in_frames = 7 * 32  # from the first wanted frame to the last
    assert sample(steady(span_in_frames + 1, 30), DENSE)[1] == "dense"
    assert sample(steady(span_in_frames - 1, 30), DENSE)[1] == "uniform"


def test_a_dense_clip_that_just_fits_uses_both_ends() -> None:
    chosen, _ = sample(steady(7 * 32 + 1, 30), DENSE)
    assert chosen[0].tolist() == [32 * n for n in range(8)]


def test_duration_counts_the_last_frame_and_not_a_pause() -> None:
    with_pause = Timeline(np.array([0.0, 0.1, 0.2, 0.3, 5.3]))
    assert with_pause.duration == pytest.approx(5.4)
    assert steady(10, 10).duration == pytest.approx(1.0)
    assert steady(10, 10).frame_rate == pytest.approx(10)
    assert steady(1, 10).frame_rate is None
    assert steady(1, 10).duration == 0


@given(
    gaps=st.lists(st.floats(1e-4, 10), min_size=1, max_size=60),
    frames=st.integers(1, 20),
    stride=st.integers(1, 64),
    views=st.integers(1, 7),
    dense=st.booleans(),
)
def test_any_timeline_gives_frames_that_exist_in_order(
    gaps: list[float], frames: int, stride: int, views: int, dense: bool
) -> None:
    timeline = Timeline(np.concatenate([[0.0], np.cumsum(gaps)]))
    preprocessing = Preprocessing(
        num_frames=frames, frame_stride=stride, sampling="dense" if dense else "uniform"
    )
    chosen, _ = sample(timeline, preprocessing, views)
    assert chosen.shape == (views, frames)
    assert chosen.dtype == np.int64
    assert 0 <= chosen.min() <= chosen.max() < len(timeline.times)
    assert np.all(np.diff(chosen, axis=1) >= 0)
    assert np.all(np.diff(chosen, axis=0) >= 0)
