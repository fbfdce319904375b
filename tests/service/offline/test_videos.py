"""Which videos `timesformer label` finds in a folder, a list and an object store."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.training.errors import DataError
from service.offline.errors import LabellingError
from service.offline.videos import find_videos


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.mp4", "a.MKV", "deep/er/c.webm", "notes.txt", ".hidden.mp4", ".git/d.mp4"):
        (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "videos" / name).touch()
    return tmp_path / "videos"


def test_a_folder_is_searched_at_any_depth(folder: Path) -> None:
    found = find_videos(str(folder))
    assert list(found) == [str(folder / name) for name in ("a.MKV", "b.mp4", "deep/er/c.webm")]
    assert list(found.values()) == list(found)


def test_an_object_store_s_prefix_is_searched_as_a_folder() -> None:
    store = fsspec.filesystem("memory")
    for name in ("b.mp4", "deep/a.mp4", "readme.md"):
        store.pipe_file(f"/archive/{name}", b"")
    found = find_videos("memory://archive")
    assert list(found.values()) == ["memory:///archive/b.mp4", "memory:///archive/deep/a.mp4"]


def test_lists_name_paths_relative_to_where_they_lie(tmp_path: Path) -> None:
    expected = [str(tmp_path / "a b.mp4"), "/else/where.mp4", "s3://bucket/c.mp4"]
    (tmp_path / "list.txt").write_text("a b.mp4\n\n/else/where.mp4\ns3://bucket/c.mp4\n")
    (tmp_path / "list.csv").write_text(
        "id,file\n1,a b.mp4\n2,/else/where.mp4\n3,\n4,s3://bucket/c.mp4\n"
    )
    table = {"file": ["a b.mp4", "/else/where.mp4", None, "s3://bucket/c.mp4"]}
    pq.write_table(pa.table(table), tmp_path / "list.parquet")
    with pytest.MonkeyPatch.context() as patch:  # the package for s3 is not what is tested
        patch.setattr("service.offline.videos.check_protocols", lambda paths: None)
        for name in ("list.txt", "list.csv", "list.parquet"):
            assert list(find_videos(str(tmp_path / name), "file").values()) == expected
    assert list(find_videos(str(_list(tmp_path, "x.mp4")), root="/archive")) == ["/archive/x.mp4"]


def test_a_list_may_lie_in_an_object_store(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe_file("/lists/all.txt", b"one.mp4\n")
    assert list(find_videos("memory://lists/all.txt")) == ["memory://lists/one.mp4"]


def test_a_video_named_twice_is_labelled_once(tmp_path: Path) -> None:
    assert len(find_videos(str(_list(tmp_path, "a.mp4", "b.mp4", "a.mp4")))) == 2


def test_a_name_that_is_no_utf8_is_escaped_in_the_table_only(tmp_path: Path) -> None:
    raw = os.fsdecode(b"caf\xe9.mp4")
    (tmp_path / raw).touch()
    ((name, path),) = find_videos(str(tmp_path)).items()
    assert name.endswith("caf\\xe9.mp4")
    assert Path(path).exists()


def test_the_table_never_holds_the_signature_of_a_url(tmp_path: Path) -> None:
    url = "https://store.example/a.mp4?signature=secret"
    ((name, path),) = find_videos(str(_list(tmp_path, url))).items()
    assert (name, path) == ("https://store.example/a.mp4", url)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("list.txt", b"\n", "there are no videos in"),
        ("list.csv", b"a.mp4\nb.mp4\n", "has no column 'path'"),
        ("list.csv", b"", "has no column 'path'"),
        ("list.parquet", b"PAR1", "is no Parquet table"),
    ],
)
def test_what_cannot_be_used_says_so(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((LabellingError, DataError), match=says):
        find_videos(str(tmp_path / name))


def test_a_scheme_that_nothing_knows_is_refused_before_the_first_video(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nosuch"):
        find_videos(str(_list(tmp_path, "nosuch://bucket/a.mp4")))


def _list(folder: Path, *lines: str) -> Path:
    path = folder / "lines.txt"
    path.write_text("\n".join(lines))
    return path
