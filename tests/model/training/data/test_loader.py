"""Clips for training: a resumable order, random views by serving's rules, bad files replaced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from av.video.frame import VideoFrame

from model.config import Preprocessing
from model.data.lists import Sample, VideoList, read_videos
from model.training.data.loader import (
    BatchOrder,
    TrainingClips,
    View,
    _random_crop,
    load_batches,
    training_clip,
    training_frames,
)
from model.training.errors import DataError
from model.video import Timeline, crop_frame, read_frames
from tests.model.conftest import write_video

SEES = Preprocessing(num_frames=4, image_size=16, frame_stride=4)
LABELS = np.array([0, 0, 0, 0, 0, 0, 1])


# ---- order ------------------------------------------------------------------------------------


def order(batches: range, seed: int = 0, balanced: bool = False) -> list[list[tuple[int, int]]]:
    return [list(batch) for batch in BatchOrder(LABELS, 3, seed, batches, balanced)]


def test_every_epoch_has_every_video_once_in_an_order_of_its_own() -> None:
    draws = [draw for batch in order(range(7)) for draw in batch]
    assert [place for place, _ in draws] == list(range(21))
    epochs = [[video for _, video in draws[start : start + 7]] for start in (0, 7, 14)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 3
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_goes_on_from_anywhere() -> None:
    whole = order(range(20))
    for start in (1, 6, 7, 19):
        assert order(range(start, 20)) == whole[start:]
    assert order(range(20), seed=1) != whole


def test_a_balanced_order_has_classes_alike() -> None:
    draws = [draw for batch in order(range(200), balanced=True) for draw in batch]
    share = np.mean([LABELS[video] for _, video in draws])
    assert 0.4 < share < 0.6


# ---- times ------------------------------------------------------------------------------------

TEN_SECONDS = Timeline(np.arange(300) / 30)


def drawn(timeline: Timeline, sees: Preprocessing, jitter: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.array([training_frames(timeline, sees, jitter, rng) for _ in range(300)])


def test_dense_clips_begin_anywhere_and_keep_their_stride() -> None:
    frames = drawn(TEN_SECONDS, SEES)
    assert set(np.diff(frames, axis=1).flat) <= {3, 4, 5}
    assert np.diff(frames, axis=1).mean() == pytest.approx(4, abs=0.05)
    assert frames.min() < 10
    assert frames.max() >= 290


def test_temporal_jitter_changes_the_stride_of_a_clip() -> None:
    spans = np.ptp(drawn(TEN_SECONDS, SEES, jitter=0.5), axis=1)
    assert spans.min() < 8
    assert spans.max() > 16
    longest = drawn(Timeline(np.arange(13) / 30), SEES, jitter=0.5)
    assert longest.max() == 12  # stretched no further than the video lasts


@pytest.mark.parametrize("frames", [8, 80])
def test_uniform_clips_take_a_frame_of_each_segment(frames: int) -> None:
    """Also dense ones, of a video that is too short for them."""
    sees = SEES if frames == 8 else Preprocessing(4, 16, "uniform")
    chosen = drawn(Timeline(np.arange(frames) / 30), sees)
    length = frames // 4
    for number, column in enumerate(chosen.T):
        # A millisecond before a frame counts as that frame, in serving too.
        within = {int(frame) - number * length for frame in column} - {length}
        assert within == set(range(length))


# ---- pictures ---------------------------------------------------------------------------------


def gradient(number: int) -> np.ndarray:
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[..., 0] = np.linspace(0, 235, 48)
    picture[..., 1] = np.linspace(0, 235, 32)[:, None]
    return picture


def test_a_crop_lies_anywhere_and_is_scaled_as_asked(tmp_path: Path) -> None:
    path = str(write_video(tmp_path / "a.mp4", paint=gradient))
    corners, slopes = [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        clip = training_clip(path, SEES, View(scale=(1.0, 2.0)), rng).astype(float)
        assert clip.shape == (4, 16, 16, 3)
        assert np.ptp(clip.mean((1, 2)), axis=0).max() < 3  # the same crop in every frame
        red, green = clip[0, :, :, 0].mean(0), clip[0, :, :, 1].mean(1)
        corners.append((red[0], green[0]))
        slopes.append((red[-1] - red[0]) / (green[-1] - green[0]))
    left, top = np.array(corners).T
    assert left.min() < 15
    assert left.max() > 120
    assert top.min() < 15
    assert top.max() > 90
    assert np.median(slopes) == pytest.approx(235 / 48 / (235 / 32), rel=0.1)  # not distorted


@pytest.mark.parametrize(
    "name", ["h264_rot90_352x288_phone.mp4", "h264_mov_rot180.mov", "h264_carphone_176x144_sar.mp4"]
)
def test_corners_of_the_scaled_picture_are_what_serving_sees(
    shared_videos: Path, name: str
) -> None:
    """Upright and with square pixels; the first and last of the three crops are corners too."""

    def corners(frame: VideoFrame, sar: float) -> np.ndarray:
        return np.stack(
            [_random_crop(frame, sar, 112, 112, place) for place in ((0, 0), (0.999, 0.999))]
        )

    first = lambda timeline: np.zeros(1, np.int64)  # noqa: E731
    ours = read_frames(shared_videos / name, first, corners).pictures[0]
    crops = lambda frame, sar: crop_frame(frame, 112, 3, sar)  # noqa: E731
    theirs = read_frames(shared_videos / name, first, crops).pictures[0]
    assert np.abs(ours[0].astype(int) - theirs[0]).mean() < 0.5
    assert np.abs(ours[1].astype(int) - theirs[2]).mean() < 0.5


# ---- loading ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def videos(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> VideoList:
    broken = tmp_path_factory.mktemp("broken") / "broken.mp4"
    broken.write_text("no video")
    good = read_videos(colours)
    return VideoList((*good.samples, Sample(str(broken), 0, "x")), good.labels)


def batches(videos: VideoList, which: range, workers: int = 0) -> list[tuple[object, ...]]:
    labels = np.array([sample.label for sample in videos.samples])
    clips = TrainingClips(videos, SEES, View(), seed=5)
    loader = load_batches(clips, BatchOrder(labels, 3, 5, which), workers)
    return [(b.frames.numpy().tobytes(), b.labels.tolist(), b.replaced) for b in loader]


def test_batches_are_the_same_in_any_number_of_workers_and_from_anywhere(
    videos: VideoList,
) -> None:
    whole = batches(videos, range(6))
    assert batches(videos, range(2, 6)) == whole[2:]
    assert batches(videos, range(6), workers=1) == whole


def test_an_undecodable_video_is_replaced_counted_and_named(videos: VideoList) -> None:
    replaced = [each for _, _, some in batches(videos, range(9)) for each in some]  # three epochs
    assert len(replaced) >= 3
    assert {Path(path).name for path, _, _ in replaced} == {"broken.mp4"}
    assert {code for _, code, _ in replaced} == {"undecodable_video"}


def test_labels_belong_to_the_clips_that_are_seen(videos: VideoList) -> None:
    labels = np.array([sample.label for sample in videos.samples])
    clips = TrainingClips(videos, SEES, View(), seed=5)
    for batch in load_batches(clips, BatchOrder(labels, 3, 5, range(9)), 0):
        red, _, blue = batch.frames.float().mean((1, 2, 3)).unbind(-1)
        assert [videos.labels[label] for label in batch.labels] == [
            "red" if more else "blue" for more in (red > blue).tolist()
        ]


def test_loading_leaves_the_global_random_state_alone(videos: VideoList) -> None:
    before = torch.get_rng_state()
    batches(videos, range(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_set_without_any_good_video_is_an_error(tmp_path: Path) -> None:
    absent = VideoList((Sample(str(tmp_path / "absent.mp4"), 0, "x"),), ("a",))
    with pytest.raises(DataError, match=r"could not be decoded, the last .*absent\.mp4"):
        batches(absent, range(1))
