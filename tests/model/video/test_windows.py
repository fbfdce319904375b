"""Windows of long videos: the right frames, one window at a time, whatever the file is like."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from model.config import Preprocessing
from model.video import (
    Cut,
    Ended,
    Opened,
    TooFewFrames,
    VideoTooLarge,
    Window,
    WindowError,
    load_clips,
    make_cut,
    stream_windows,
)
from model.video.sampling import Timeline
from model.video.windows import plan_windows

from .numbered_video import SIDE, number_in, write_video

SEEN = Preprocessing(num_frames=4, image_size=SIDE, frame_stride=15)  # half a second apart


def windows_of(path: Path, cut: Cut) -> tuple[Opened, list[Window], Ended]:
    pieces: list[Opened | Window] = []
    ended = stream_windows(path, SEEN, cut, pieces.append)
    opened, *windows = pieces
    assert isinstance(opened, Opened)
    return opened, [piece for piece in windows if isinstance(piece, Window)], ended


def numbers_in(window: Window) -> list[int]:
    return [number_in(frame) for frame in window.frames[0]]


def test_the_model_s_own_span_is_the_default_and_half_of_it_the_stride() -> None:
    assert make_cut(SEEN) == Cut(window_s=2.0, stride_s=1.0)
    assert make_cut(SEEN, window_s=4.0) == Cut(window_s=4.0, stride_s=2.0)


@pytest.mark.parametrize("stride", [0.0, 0.2, 2.1])
def test_a_stride_that_leaves_gaps_or_overlaps_too_much_is_refused(stride: float) -> None:
    with pytest.raises(WindowError, match="stride"):
        make_cut(SEEN, stride_s=stride)


def test_a_model_that_looks_at_whole_videos_needs_a_window() -> None:
    uniform = Preprocessing(num_frames=4, sampling="uniform")
    with pytest.raises(WindowError, match="window"):
        make_cut(uniform)
    assert make_cut(uniform, window_s=3.0).window_s == 3.0


def test_windows_cover_the_video_from_its_first_to_its_last_moment() -> None:
    timeline = Timeline(np.arange(0, 70) / 10)  # 7 s
    plan = plan_windows(timeline, SEEN, make_cut(SEEN, stride_s=1.5))
    assert plan.starts.tolist() == pytest.approx([0.0, 1.5, 3.0, 4.5, 5.0])
    assert plan.ends.tolist() == pytest.approx([2.0, 3.5, 5.0, 6.5, 7.0])
    assert plan.indices[1].tolist() == [15, 20, 25, 30]


def test_a_window_of_uniform_sampling_takes_the_middles_of_its_segments() -> None:
    uniform = Preprocessing(num_frames=4, sampling="uniform")
    plan = plan_windows(
        Timeline(np.arange(0, 100) / 10), uniform, make_cut(uniform, window_s=4.0, stride_s=4.0)
    )
    assert plan.indices[0].tolist() == [5, 15, 25, 35]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.avi"])
def test_each_window_shows_the_frames_of_its_moments(name: str, tmp_path: Path) -> None:
    """B-frames included; in AVI, whose times cannot be trusted, too."""
    path = write_video(tmp_path / name, 200, options={"bf": "3", "g": "25"})
    opened, windows, ended = windows_of(path, make_cut(SEEN))
    assert opened.windows == ended.windows == len(windows) == 6
    assert [numbers_in(window) for window in windows[:5]] == [
        [30 * start + 15 * step for step in range(4)] for start in range(5)
    ]
    assert [window.start_s for window in windows[:5]] == [0, 1, 2, 3, 4]
    assert windows[-1].end_s == pytest.approx(200 / 30, abs=2e-3)
    assert opened.facts == ended.facts
    assert ended.facts.frames == 200
    assert not ended.truncated


def test_the_clip_of_one_window_is_the_one_that_classify_would_see(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 60)
    _, (window,), _ = windows_of(path, make_cut(SEEN, crops=3))
    clips = load_clips(path, SEEN, crops=3)
    assert np.array_equal(window.frames, clips.frames)
    assert window.times == tuple(clips.times[0])


def test_frames_of_variable_rate_are_taken_by_their_time(tmp_path: Path) -> None:
    """Ten frames a second, then thirty."""
    pts = [*range(0, 3000, 100), *range(3000, 6000, 33)]
    path = write_video(tmp_path / "a.mkv", len(pts), pts=pts, time_base=Fraction(1, 1000))
    _, windows, _ = windows_of(path, make_cut(SEEN, stride_s=2.0))
    assert numbers_in(windows[0]) == [0, 5, 10, 15]
    assert numbers_in(windows[1]) == [20, 25, 30, 45]


def test_a_file_that_was_cut_off_gives_what_is_there(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "a.mkv", 250, options={"g": "30"})
    content = whole.read_bytes()
    part = tmp_path / "part.mkv"
    part.write_bytes(content[: len(content) // 2])
    _, windows, ended = windows_of(part, make_cut(SEEN))
    assert ended.truncated
    assert 1 < len(windows) < 8
    for number, window in enumerate(windows[:-1]):
        assert numbers_in(window)[0] == 30 * number


def test_damage_in_the_middle_costs_nothing_that_decodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was given before trouble shows is not given again, and the rest follows."""
    path = write_video(tmp_path / "a.mp4", 200, options={"g": "25"})
    _, sound, _ = windows_of(path, make_cut(SEEN))

    def stumble(*arguments: object) -> bool:
        from model.video.selective import decode_at

        video, index, wanted, keep, tick = arguments
        assert isinstance(wanted, np.ndarray)
        decode_at(video, index, wanted[: len(wanted) // 2], keep, tick)  # type: ignore[arg-type]
        return False

    monkeypatch.setattr("model.video.windows.decode_at", stumble)
    opened, windows, ended = windows_of(path, make_cut(SEEN))
    assert [window.number for window in windows] == list(range(6))
    for one, other in zip(windows, sound, strict=True):
        assert np.array_equal(one.frames, other.frames)
    assert opened.windows == ended.windows


def test_a_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TooFewFrames):
        windows_of(write_video(tmp_path / "a.mp4", 1), make_cut(SEEN))


def test_more_windows_than_allowed_are_refused_before_any_is_given(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 200)
    given: list[object] = []
    with pytest.raises(VideoTooLarge, match="stride"):
        stream_windows(path, SEEN, make_cut(SEEN, max_windows=4), given.append)
    assert given == []


def test_what_the_receiver_raises_ends_the_decoding(tmp_path: Path) -> None:
    """Unchanged, also what would be the file's fault if decoding had raised it."""

    def emit(piece: object) -> None:
        if isinstance(piece, Window):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        stream_windows(write_video(tmp_path / "a.mp4", 200), SEEN, make_cut(SEEN), emit)


def test_it_tells_of_every_frame_that_it_decodes(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 90, options={"bf": "0"})
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        ticks += 1

    stream_windows(path, SEEN, make_cut(SEEN), lambda piece: None, tick=tick)
    assert 50 < ticks <= 90
