"""The clips to calibrate on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from export.calibration.clips import calibration_clips, held_out_clips
from model.training.errors import DataError
from model.video import UndecodableVideo
from tests.export.conftest import write_video
from tests.model.conftest import tiny_config


def test_are_rendered_where_none_are_given() -> None:
    clips = calibration_clips(tiny_config(), None)
    assert clips.shape == (12, 4, 32, 32, 3)
    assert clips.dtype == np.uint8
    assert all(clip.std() > 10 for clip in clips)
    np.testing.assert_array_equal(clips, calibration_clips(tiny_config(), None))


def test_are_one_of_each_video_of_a_folder_labelled_or_not(tmp_path: Path) -> None:
    write_video(tmp_path / "red.mp4", "red")
    (tmp_path / "deeper").mkdir()
    write_video(tmp_path / "deeper" / "blue.mp4", "blue")
    (tmp_path / "notes.txt").write_text("no video")
    clips = calibration_clips(tiny_config(), tmp_path)
    assert clips.mean(axis=(1, 2, 3)).argmax(axis=1).tolist() == [2, 0]


def test_are_those_of_a_list(tmp_path: Path) -> None:
    write_video(tmp_path / "green.mp4", "green")
    (tmp_path / "list.csv").write_text("path,label\ngreen.mp4,growing\n")
    clips = calibration_clips(tiny_config(), tmp_path / "list.csv")
    assert clips.mean(axis=(1, 2, 3)).argmax(axis=1).tolist() == [1]


def test_are_spread_over_a_large_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.calibration.clips._CALIBRATION_VIDEOS", 3)
    for index, colour in enumerate(["red", "blue", "green", "red", "blue"]):
        write_video(tmp_path / f"{index}.mp4", colour)
    clips = calibration_clips(tiny_config(), tmp_path)
    assert clips.mean(axis=(1, 2, 3)).argmax(axis=1).tolist() == [2, 0, 2]


def test_what_the_gate_alone_sees_is_rendered_anew() -> None:
    measured, held_out = calibration_clips(tiny_config(), None), held_out_clips(tiny_config(), None)
    assert held_out.shape == (4, 4, 32, 32, 3)
    assert held_out.dtype == np.uint8
    for clip in held_out:
        assert all((clip != other).any() for other in measured)


def test_one_video_in_five_is_for_the_gate_alone(tmp_path: Path) -> None:
    colours = ["red", "blue", "green", "red", "blue"]
    for index, colour in enumerate(colours[:4]):
        write_video(tmp_path / f"{index}.mp4", colour)
    assert len(calibration_clips(tiny_config(), tmp_path)) == 4
    assert held_out_clips(tiny_config(), tmp_path).shape == (0, 4, 32, 32, 3)
    write_video(tmp_path / "4.mp4", colours[4])
    measured, held_out = (
        part(tmp_path).mean(axis=(1, 2, 3)).argmax(axis=1).tolist()
        for part in (
            lambda folder: calibration_clips(tiny_config(), folder),
            lambda folder: held_out_clips(tiny_config(), folder),
        )
    )
    channel = {"red": 0, "green": 1, "blue": 2}
    assert sorted(measured + held_out) == sorted(channel[colour] for colour in colours)
    assert len(held_out) == 1


def test_a_folder_without_videos_and_a_broken_video_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no video in "):
        calibration_clips(tiny_config(), tmp_path)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(UndecodableVideo, match=r"cannot calibrate on .*broken\.mp4"):
        calibration_clips(tiny_config(), tmp_path)
