"""From files to clips: the right frames, facts that are true, and typed errors for the rest."""

from __future__ import annotations

import dataclasses
import http.server
import random
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.container import OutputContainer
from av.stream import Disposition
from numpy.typing import NDArray

from model.config import Preprocessing
from model.video import (
    Clips,
    EmptyFile,
    Limits,
    NoVideoStream,
    TooFewFrames,
    UndecodableVideo,
    UnsupportedFormat,
    VideoError,
    VideoTooLarge,
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


class Cover:
    """Cover art, in two steps: all streams must be there before the first packet is written."""

    def add(self, container: OutputContainer) -> None:
        stream = container.add_stream("mjpeg", rate=1)
        assert isinstance(stream, av.VideoStream)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuvj420p"
        stream.disposition = Disposition.attached_pic
        self.container, self.stream = container, stream

    def fill(self, _: object = None) -> None:
        frame = av.VideoFrame(16, 16, "yuvj420p")
        frame.pts = 0
        self.container.mux([*self.stream.encode(frame), *self.stream.encode(None)])


def test_cover_art_is_not_the_video(tmp_path: Path) -> None:
    cover = Cover()
    path = write_video(tmp_path / "clip.mp4", 60, before=cover.add, change=cover.fill)
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 2
    assert (probe(path).codec, probe(path).frames) == ("h264", 60)


def test_a_song_with_cover_art_is_no_video(tmp_path: Path) -> None:
    song = write_sound(tmp_path / "song.mp4", Cover())
    with av.open(str(song)) as container:
        assert len(container.streams.video) == 1
    with pytest.raises(NoVideoStream):
        probe(song)


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


def write_sound(path: Path, cover: Cover | None = None) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        if cover is not None:
            cover.add(container)
            cover.fill()
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_rgb(path: Path) -> Path:
    def colours(stream: av.VideoStream) -> None:
        stream.pix_fmt = "rgb24"

    return write_video(path, 10, codec="rawvideo", change=colours)


WAV = (
    b"RIFF\x44\x00\x00\x00WAVEfmt \x10\x00\x00\x00\x01\x00\x01\x00\x40\x1f\x00\x00\x80\x3e\x00\x00"
    b"\x02\x00\x10\x00data\x20\x00\x00\x00" + bytes(32)
)

BROKEN: dict[str, tuple[Callable[[Path], object], type[VideoError]]] = {
    "empty.mp4": (lambda path: path.write_bytes(b""), EmptyFile),
    "text.mp4": (lambda path: path.write_text("not a video at all " * 50), UndecodableVideo),
    "zeros.mp4": (lambda path: path.write_bytes(bytes(5000)), UndecodableVideo),
    "sound.mp4": (write_sound, NoVideoStream),
    "sound.wav": (lambda path: path.write_bytes(WAV), UnsupportedFormat),
    "one-frame.mp4": (lambda path: write_video(path, 1), TooFewFrames),
    "raw.avi": (write_rgb, UnsupportedFormat),
    "missing.mp4": (lambda path: None, UndecodableVideo),
    "folder.mp4": (lambda path: path.mkdir(), UndecodableVideo),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_video_is_a_typed_error_that_names_no_path(name: str, tmp_path: Path) -> None:
    make, expected = BROKEN[name]
    make(tmp_path / name)
    with pytest.raises(expected) as caught:
        load_clips(tmp_path / name, SEEN)
    assert caught.value.code == expected.code
    assert str(tmp_path) not in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    "limits", [Limits(max_pixels=SIDE * SIDE - 1), Limits(max_duration_s=3), Limits(max_frames=100)]
)
def test_videos_beyond_a_limit_are_refused(tmp_path: Path, limits: Limits) -> None:
    path = write_video(tmp_path / "clip.mp4", 120)
    for read in (lambda: load_clips(path, SEEN, limits=limits), lambda: probe(path, limits)):
        with pytest.raises(VideoTooLarge):
            read()


def test_videos_just_within_the_limits_are_read(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", 120)
    load_clips(path, SEEN, limits=Limits(SIDE * SIDE, max_duration_s=4, max_frames=120))


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A web server, and the paths that anyone asked it for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    httpd = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}", asked
    httpd.shutdown()
    thread.join()
    httpd.server_close()


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile '{}'\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period>'
    '<AdaptationSet><Representation id="1"><BaseURL>{}</BaseURL></Representation></AdaptationSet>'
    "</Period></MPD>",
    "sdp": "v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=control:{}\n",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_playlists_reach_no_other_file_and_no_network(
    kind: str, tmp_path: Path, server: tuple[str, list[str]]
) -> None:
    address, asked = server
    secret = write_video(tmp_path / "secret.ts", 60)
    for target in (f"{address}/a.ts", str(secret), secret.name, f"file:{secret}"):
        path = tmp_path / "clip.mp4"
        path.write_text(PLAYLISTS[kind].format(target))
        with pytest.raises((UnsupportedFormat, UndecodableVideo)):
            load_clips(path, SEEN)
    assert asked == []


def test_the_playlist_test_would_see_a_leak(tmp_path: Path) -> None:
    secret = write_video(tmp_path / "secret.ts", 60)
    path = tmp_path / "clip.mp4"
    path.write_text(PLAYLISTS["concat"].format(secret.name))
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).width == SIDE


def test_a_name_that_looks_like_a_protocol_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "concat:a.mp4|b.mp4"
    write_video(tmp_path / "clip.mp4", 60).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert probe(name).frames == 60


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
    whole = write_video(tmp_path / "clip.mp4", 120, options={"g": "40", "bf": "2"}).read_bytes()
    generator = random.Random(3)
    path = tmp_path / "damaged.mp4"
    for _ in range(60):
        data = bytearray(whole)
        start = generator.randrange(len(data) // 10, len(data) * 9 // 10)
        for _ in range(generator.choice((1, 3, 20))):
            data[min(start + generator.randrange(200), len(data) - 1)] = generator.randrange(256)
        path.write_bytes(data)
        clips = load_clips(path, SEEN, views=2)
        with monkeypatch.context() as patch:
            patch.setattr("model.video.decode.decode_at", lambda *_: False)
            reference = load_clips(path, SEEN, views=2)
        if clips.facts.frames == reference.facts.frames:
            assert np.array_equal(clips.frames, reference.frames)


def test_drawn_numbers_are_read_back() -> None:
    assert [number_in(draw(number)) for number in (0, 1, 85, 170, 255)] == [0, 1, 85, 170, 255]
