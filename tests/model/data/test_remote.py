"""Lists and videos by URL: read as local ones, tried again, and named with what is wrong."""

from __future__ import annotations

import collections
import functools
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")

from model.config import Preprocessing
from model.data import remote
from model.data.check import check
from model.data.lists import Sample, VideoList, read_videos, write_list
from model.data.remote import joined, local_video, without_secrets
from model.evaluation.metrics import Protocol, predict
from model.training.errors import DataError, MissingVideo, UnreachableVideo
from service.cli.main import cli

SEES = Preprocessing(num_frames=2, image_size=16, frame_stride=4)


class Site(SimpleHTTPRequestHandler):
    """Serves a folder; a path that begins with `/busyN/` is refused N times before."""

    asked: ClassVar[collections.Counter[str]] = collections.Counter()

    def do_GET(self) -> None:
        self.asked[self.path] += 1
        first, _, rest = self.path.lstrip("/").partition("/")
        if first == "forbidden":
            self.send_error(403)
        elif first.startswith("busy"):
            if self.asked[self.path] <= int(first.removeprefix("busy")):
                self.send_error(503)
            else:
                self.path = f"/{rest}"
                super().do_GET()
        else:
            super().do_GET()

    def do_HEAD(self) -> None:
        first, _, rest = self.path.lstrip("/").partition("/")
        self.path = f"/{rest}" if first.startswith(("busy", "forbidden")) else self.path
        super().do_HEAD()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_PAUSES_S", (0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def site(colours: Path) -> Iterator[str]:
    handler = functools.partial(Site, directory=str(colours))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def table(colours: Path) -> Iterator[str]:
    """The name of a list that the site has."""
    lines = [f"{name}/{index}.mp4,{name}" for name in ("red", "blue") for index in range(4)]
    (colours / "list.csv").write_text("\n".join(lines))
    yield "list.csv"
    (colours / "list.csv").unlink()


def test_a_list_by_url_has_its_videos_beside_it(site: str, table: str, colours: Path) -> None:
    videos = read_videos(f"{site}/{table}")
    assert videos.samples[0] == Sample(f"{site}/red/0.mp4", 1, "red/0.mp4")
    elsewhere = read_videos(colours / table, root=f"{site}/")
    assert elsewhere.samples == videos.samples


def test_a_folder_by_url_is_the_folder(colours: Path) -> None:
    local, found = read_videos(colours), read_videos(f"file://{colours}/")
    assert found.labels == local.labels
    assert [(s.path, *s[1:]) for s in found.samples] == [
        (f"file://{s.path}", *s[1:]) for s in local.samples
    ]


@pytest.mark.parametrize("processes", [0, 1])
def test_remote_videos_are_checked_and_evaluated_as_local_ones(
    site: str, table: str, colours: Path, processes: int
) -> None:
    local, found = read_videos(colours / table), read_videos(f"{site}/{table}")
    wrong = VideoList((*found.samples, Sample(f"{site}/red/9.mp4", 0, "x")), found.labels)
    report = check(wrong, SEES, processes=processes)
    assert report.clean == found
    assert [(each.kind, each.detail) for each in report.problems] == [
        ("unreadable", "It cannot be fetched: there is no such file.")
    ]
    classify = lambda frames: frames.mean((1, 2, 3)).astype(np.float32)  # noqa: E731
    one = Protocol(1, 1)
    ours = predict(wrong, SEES, classify, one, processes=processes)
    np.testing.assert_array_equal(ours.logits, predict(local, SEES, classify, one).logits)
    assert [failure.code for failure in ours.failures] == ["missing_video"]


def test_training_replaces_a_video_that_is_not_there(site: str) -> None:
    from model.training.data.loader import Draw, TrainingClips, View

    samples = tuple(Sample(f"{site}/red/{name}.mp4", 0, name) for name in ("0", "9"))
    clips = TrainingClips(VideoList(samples, ("red",)), SEES, View(), seed=0)
    frames, _, replaced = clips[Draw(place=0, video=1)]
    assert frames.shape == (2, 16, 16, 3)
    assert {(each.path, each.code) for each in replaced} == {(samples[1].path, "missing_video")}


def test_a_cache_is_not_filled_with_an_outage(site: str, colours: Path, tmp_path: Path) -> None:
    from model.training.data.clip_cache import Draws, open_cache
    from model.training.data.loader import View

    def draws(*urls: str) -> Draws:
        samples = tuple(Sample(url, 0, url) for url in urls)
        return Draws(VideoList(samples, ("red",)), SEES, View(cached=2), 0)

    missing = f"{site}/red/9.mp4"
    cache = open_cache(tmp_path, draws(f"{site}/red/0.mp4", missing))
    assert np.asarray(cache.clip(0, 1)).shape == (2, 16, 16, 3)
    assert cache.clip(1, 0) == (missing, "missing_video", cache.clip(1, 1)[2])
    with pytest.raises(DataError, match=r"503 Service Unavailable.* fills the cache on"):
        open_cache(tmp_path, draws(f"{site}/busy9/red/1.mp4"))
    assert len(list(tmp_path.glob("*.partial"))) == 1


def test_what_may_pass_is_tried_again_and_what_stays_is_not(site: str, colours: Path) -> None:
    Site.asked.clear()
    with local_video(f"{site}/busy2/red/0.mp4") as path:
        assert Path(path).read_bytes() == (colours / "red" / "0.mp4").read_bytes()
    assert not Path(path).exists()
    with (
        pytest.raises(UnreachableVideo, match="in 4 attempts: 503 Service Unavailable"),
        local_video(f"{site}/busy9/red/0.mp4"),
    ):
        pass
    with (
        pytest.raises(MissingVideo, match="403 Forbidden"),
        local_video(f"{site}/forbidden/red/0.mp4"),
    ):
        pass
    assert list(Site.asked.values()) == [3, 4, 1]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/list.csv", "cannot fetch s3://bucket/list.csv: .*Install s3fs"),
        ("nowhere://list.csv", "cannot fetch nowhere://list.csv: Protocol not known"),
        ("http://127.0.0.1:9/list.csv", "cannot fetch http://127.0.0.1:9/list.csv: .*onnect"),
    ],
)
def test_a_list_that_cannot_be_fetched_names_its_url_and_what_to_install(
    url: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_videos(url)


def test_videos_that_nothing_can_fetch_are_refused_with_the_list(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("1.mp4,a\ns3://bucket/2.mp4,a\n")
    with pytest.raises(DataError, match=r"s3://bucket/2\.mp4: .*Install s3fs"):
        read_videos(tmp_path / "list.csv")


def test_a_video_without_its_package_ends_the_work_and_is_not_replaced() -> None:
    with (
        pytest.raises(DataError, match=r"cannot fetch s3://bucket/2\.mp4: .*Install s3fs"),
        local_video("s3://bucket/2.mp4"),
    ):
        pass


def test_paths_in_lists(tmp_path: Path) -> None:
    assert joined("s3://b/f/", "a/1.mp4") == "s3://b/f/a/1.mp4"
    assert joined("s3://b/f", "gs://c/1.mp4") == "gs://c/1.mp4"
    assert joined("s3://b/f", "/data/1.mp4") == "/data/1.mp4"
    assert joined("/data", "1.mp4") == "/data/1.mp4"
    videos = VideoList((Sample("https://site/a.mp4", 0, "x"),), ("a",))
    write_list(videos, tmp_path / "list.csv")
    assert read_videos(tmp_path / "list.csv") == videos


def test_the_command_takes_urls_and_names_paths_that_do_not_exist(
    site: str, table: str, tmp_path: Path
) -> None:
    arguments = ["data", "check", f"{site}/{table}", "--variant", "demo", "--workers", "0",
                 "--clean", str(tmp_path / "clean.csv"), "--json"]  # fmt: skip
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["usable"] == 8
    assert read_videos(tmp_path / "clean.csv").samples[0].path == f"{site}/red/0.mp4"
    absent = CliRunner().invoke(cli, ["data", "check", str(tmp_path / "absent.csv")])
    assert absent.exit_code == 2
    assert "does not exist" in absent.stderr


def test_serving_and_local_lists_import_no_fsspec(colours: Path) -> None:
    code = (
        "import sys, service.server.app, service.cli.main;"
        "from model.data.lists import read_videos;"
        f"read_videos({str(colours)!r}); raise SystemExit('fsspec' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_written_of_a_url_has_no_signature_and_no_password() -> None:
    for text, expected in (
        ("https://x.org/a b.mp4?X-Sig=abc&t=1", "https://x.org/a b.mp4"),
        ("s3://key:secret@bucket/a.mp4", "s3://bucket/a.mp4"),
        ("403 for https://x.org/a?k=1, gone; see https://x.org/b?k=2", None),
        ("what is this? a file.mp4", "what is this? a file.mp4"),
        ("/videos/why?.mp4", "/videos/why?.mp4"),
    ):
        cut = without_secrets(text)
        assert "k=" not in cut
        assert expected is None or cut == expected
    fields = {"path": 'https://x.org/a?"k=1', "detail": "It is gone? Yes.", "code": "a://b?c"}
    assert json.loads(without_secrets(json.dumps(fields))) == {
        "path": "https://x.org/a", "detail": "It is gone? Yes.", "code": "a://b"
    }  # fmt: skip
