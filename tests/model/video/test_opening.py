"""What is let in: limits, playlists, covers, and files that are no video."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from av.container import OutputContainer
from av.stream import Disposition

from model.config import Preprocessing
from model.video import (
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

from .numbered_video import SIDE, write_video

SEEN = Preprocessing(num_frames=4, image_size=SIDE, frame_stride=15)


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
    "sound.wav": (lambda path: path.write_bytes(WAV), NoVideoStream),
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
