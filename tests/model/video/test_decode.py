"""From files to clips: the right frames, facts that are true, and typed errors for the rest."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from model.config import Preprocessing
from model.video import (
    Clips,
    VideoError,
    load_clips,
    probe,
)
from model.video.index import PacketIndex
from model.video.opening import OpenVideo
from model.video.selective import Keep, decode_at

from .numbered_video import SIDE, draw, number_in, numbers_of_all, write_video

SEEN = Preprocessing(num_frames=4, image_size=SIDE, frame_stride=15)  # half a second apart
B_FRAMES = {"bf": "3", "g": "25", "sc_threshold": "0"}
OnlySequential = Callable[[], None]


def numbers_in(clips: Clips) -> list[list[int]]:
    return [[number_in(frame) for frame in clip] for clip in clips.frames]


@pytest.fixture
def decoded_by(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each selective decoding so far was good enough."""
    outcomes: list[bool] = []

    def recorded(
        video: OpenVideo, index: PacketIndex, wanted: NDArray[np.int64], keep: Keep
    ) -> bool:
        outcomes.append(decode_at(video, index, wanted, keep))
        return outcomes[-1]

    monkeypatch.setattr("model.video.decode.decode_at", recorded)
    return outcomes


# Name of the file, codec and options. The selective way must do for each of them.
SOUND = {
    "b-frames.mp4": ("libx264", B_FRAMES),
    "pyramid.mkv": ("libx264", {**B_FRAMES, "x264-params": "b-pyramid=normal:bframes=7"}),
    "open-gop.mp4": ("libx264", {**B_FRAMES, "x264-params": "open-gop=1:keyint=25:bframes=3"}),
    "intra-refresh.mp4": ("libx264", {"x264-params": "intra-refresh=1:keyint=25"}),
    "one-key.mp4": ("libx264", {"g": "1000", "bf": "2"}),
    "all-keys.mp4": ("libx264", {"g": "1"}),
    "hevc.mp4": ("libx265", {"x265-params": "keyint=25:open-gop=1:bframes=3:log-level=none"}),
    "b-frames.ts": ("libx264", B_FRAMES),
    "b-frames.flv": ("libx264", B_FRAMES),
    "mpeg4.mp4": ("mpeg4", {"g": "12", "bf": "2"}),
    "mpeg2.mpg": ("mpeg2video", {"g": "12", "bf": "2"}),
    "vp8-hidden.webm": ("libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "40"}),
    "vp9.webm": ("libvpx-vp9", {"g": "40", "cpu-used": "8", "lag-in-frames": "16"}),
    "av1.mp4": ("libsvtav1", {"preset": "12", "g": "40", "svtav1-params": "lp=1"}),
    "mjpeg.avi": ("mjpeg", {}),
    "fragmented.mp4": ("libx264", B_FRAMES),
}


@pytest.mark.parametrize("name", SOUND)
def test_every_kind_of_sound_file_gives_the_right_frames_without_reading_them_all(
    name: str, tmp_path: Path, decoded_by: list[bool], only_sequential: OnlySequential
) -> None:
    codec, options = SOUND[name]
    fragmented = {"movflags": "frag_keyframe+empty_moov"} if "fragmented" in name else None
    path = write_video(
        tmp_path / name, 120, codec=codec, options=options, container_options=fragmented
    )
    clips = load_clips(path, SEEN, views=3, crops=3)
    assert decoded_by == [True] or name in ("intra-refresh.mp4", "mpeg2.mpg")
    assert clips.sampling == "dense"
    assert numbers_in(clips)[::3] == [[0, 15, 30, 45], [37, 52, 67, 82], [74, 89, 104, 119]]
    assert clips.facts.frames == 120
    assert not clips.truncated
    only_sequential()
    reference = load_clips(path, SEEN, views=3, crops=3)
    assert np.array_equal(clips.frames, reference.frames)
    assert clips.facts == reference.facts


def test_avi_with_b_frames_is_read_from_end_to_end(tmp_path: Path, decoded_by: list[bool]) -> None:
    path = write_video(tmp_path / "clip.avi", 100, codec="mpeg4", options={"bf": "2", "g": "12"})
    assert numbers_of_all(path)[0] == list(range(100))
    assert decoded_by == []


def test_frames_keep_their_decoded_order_where_their_times_are_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decoded(_: OpenVideo) -> Iterator[av.VideoFrame | None]:
        for number, pts in enumerate([1, 2, 4, 3, 7, 5]):
            frame = av.VideoFrame.from_ndarray(draw(number), "rgb24")
            frame.pts = pts
            yield frame
        yield None

    monkeypatch.setattr("model.video.sequential.decode_sequentially", decoded)
    path = write_video(tmp_path / "clip.avi", 100, codec="mpeg4", options={"bf": "2"})
    numbers, timeline = numbers_of_all(path)
    assert numbers == [0, 1, 2, 3, 4, 5]
    assert np.allclose(timeline.times * 30, [0, 1, 2, 3, 4, 6])


def test_clips_are_ordered_by_view_then_crop(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", 120)
    clips = load_clips(path, SEEN, views=2, crops=3)
    assert clips.frames.shape == (6, 4, SIDE, SIDE, 3)
    assert clips.frames.dtype == np.uint8
    assert clips.frames.flags.c_contiguous
    assert numbers_in(clips) == [[0, 15, 30, 45]] * 3 + [[74, 89, 104, 119]] * 3
    assert clips.times.shape == (2, 4)
    assert np.allclose(clips.times[0], [0, 0.5, 1, 1.5])


def test_short_videos_repeat_frames(tmp_path: Path) -> None:
    clips = load_clips(write_video(tmp_path / "clip.mp4", 2), SEEN)
    assert clips.sampling == "uniform"
    assert numbers_in(clips) == [[0, 0, 1, 1]]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_frame_rate_is_sampled_by_time(tmp_path: Path, suffix: str) -> None:
    pts = [33 * n for n in range(30)] + [990 + 200 * n for n in range(30)]
    path = write_video(tmp_path / f"clip{suffix}", 60, pts=pts, time_base=Fraction(1, 1000))
    numbers, timeline = numbers_of_all(path)
    assert numbers == list(range(60))
    assert np.allclose(timeline.times, np.array(pts) / 1000, atol=1e-3)
    clips = load_clips(path, SEEN, views=2)
    assert numbers_in(clips) == [[0, 15, 30, 32], [51, 54, 56, 59]]
    assert clips.facts.duration_s == pytest.approx(6.79 + 0.033, abs=0.01)


def test_frames_before_zero_count_from_the_first(tmp_path: Path) -> None:
    pts = list(range(-10, 50))
    path = write_video(
        tmp_path / "clip.mkv", 60, pts=pts, container_options={"avoid_negative_ts": "disabled"}
    )
    numbers, timeline = numbers_of_all(path)
    assert numbers == list(range(60))
    assert timeline.times[0] == 0


def test_frames_that_an_edit_list_cuts_away_are_not_sampled(
    tmp_path: Path, decoded_by: list[bool]
) -> None:
    options = {"avoid_negative_ts": "disabled", "movflags": "use_metadata_tags"}
    path = write_video(
        tmp_path / "clip.mp4",
        60,
        pts=list(range(-10, 50)),
        options=B_FRAMES,
        container_options=options,
    )
    clips = load_clips(path, SEEN, views=2)
    assert decoded_by == [True]
    assert clips.facts.frames == 50
    assert numbers_in(clips) == [[10, 25, 40, 55], [14, 29, 44, 59]]


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_metadata_is_applied(tmp_path: Path, degrees: int) -> None:
    path = write_video(
        tmp_path / "clip.mov",
        30,
        change=lambda stream: stream.set_display_rotation(-degrees),
    )
    clips = load_clips(path, SEEN, crops=3)
    turned_back = np.rot90(clips.frames[0], degrees // 90, axes=(1, 2))
    assert clips.facts.rotation == degrees
    assert number_in(turned_back[-1]) == number_in(turned_back[0]) + 23 == 26


def test_pixels_are_stretched_as_stored_and_then_turned(tmp_path: Path) -> None:
    def stretch(stream: av.VideoStream) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)

    def stretch_and_turn(stream: av.VideoStream) -> None:
        stretch(stream)
        stream.set_display_rotation(-90)

    lying = load_clips(write_video(tmp_path / "lying.mov", 30, change=stretch), SEEN, crops=3)
    upright = load_clips(
        write_video(tmp_path / "upright.mov", 30, change=stretch_and_turn), SEEN, crops=3
    )
    assert (upright.facts.width, upright.facts.height) == (SIDE, 2 * SIDE)
    turned = np.rot90(lying.frames, -1, axes=(2, 3))
    assert np.abs(upright.frames.astype(int) - turned).mean() < 1


def test_pixels_that_are_not_square_are_made_so(tmp_path: Path) -> None:
    def twice_as_wide(stream: av.VideoStream) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)

    path = write_video(tmp_path / "clip.mp4", 30, change=twice_as_wide)
    clips = load_clips(path, SEEN, crops=3)
    assert (clips.facts.width, clips.facts.height) == (2 * SIDE, SIDE)
    first, _, last = clips.frames[:, -1].mean(axis=(1, 3))
    assert number_in(np.concatenate([first, last])[None, :, None]) == 26


def test_facts_come_from_what_is_there(tmp_path: Path) -> None:
    facts = probe(write_video(tmp_path / "clip.mkv", 50, rate=25))
    assert dataclasses.asdict(facts) == {
        "width": SIDE, "height": SIDE, "rotation": 0, "frame_rate": pytest.approx(25),
        "frames": 50, "duration_s": pytest.approx(2.0), "codec": "h264",
        "container": "matroska,webm",
    }  # fmt: skip
    assert load_clips(tmp_path / "clip.mkv", SEEN).facts == facts


def test_threads_change_nothing(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", 120, options=B_FRAMES)
    one, two = load_clips(path, SEEN, views=3), load_clips(path, SEEN, views=3, threads=2)
    assert np.array_equal(one.frames, two.frames)


def test_a_file_cut_short_gives_what_is_there_and_says_so(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mkv", 250)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    clips = load_clips(path, SEEN)
    assert clips.truncated
    assert clips.facts.frames < 160


def test_damage_in_the_middle_is_read_from_end_to_end(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", 120, options={"g": "120"})
    data = bytearray(path.read_bytes())
    middle = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 3
    data[middle : middle + 400] = bytes(400)
    path.write_bytes(data)
    assert load_clips(path, SEEN, views=3).truncated


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts", "clip.avi", "clip.webm"])
def test_damaged_copies_raise_nothing_but_typed_errors(name: str, tmp_path: Path) -> None:
    codec = {".avi": "mpeg4", ".webm": "libvpx"}.get(Path(name).suffix, "libx264")
    whole = write_video(tmp_path / name, 30, codec=codec, options={"g": "10"}).read_bytes()
    generator = random.Random(7)
    path = tmp_path / f"damaged-{name}"
    for _ in range(40):
        data = bytearray(whole[: generator.randrange(1, len(whole))])
        if generator.random() < 0.7:
            data = bytearray(whole)
        for _ in range(generator.choice((0, 1, 10, 100))):
            data[generator.randrange(len(data))] = generator.randrange(256)
        path.write_bytes(data)
        try:
            clips = load_clips(path, SEEN, views=2)
        except VideoError:
            continue
        assert clips.frames.shape == (2, 4, SIDE, SIDE, 3)


def test_damage_is_never_mistaken_for_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = write_video(tmp_path / "clip.mp4", 120, options={"g": "40", "bf": "2"})
    sound, whole = load_clips(clip, SEEN, views=2), clip.read_bytes()
    generator = random.Random(3)
    path = tmp_path / "damaged.mp4"
    for _ in range(60):
        data = bytearray(whole)
        start = generator.randrange(whole.index(b"mdat") + 1500, whole.index(b"moov") - 200)
        for _ in range(generator.choice((1, 3, 20))):
            data[start + generator.randrange(200)] = generator.randrange(256)
        path.write_bytes(data)
        clips = load_clips(path, SEEN, views=2)
        with monkeypatch.context() as patch:
            patch.setattr("model.video.decode.decode_at", lambda *_: False)
            reference = load_clips(path, SEEN, views=2)
        if clips.facts.frames == reference.facts.frames:
            # What is left out may be the damage itself: then this is better than the reference.
            better = numbers_in(clips) == numbers_in(sound)
            assert better or np.array_equal(clips.frames, reference.frames)
