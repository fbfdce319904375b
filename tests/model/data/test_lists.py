"""Lists of labelled videos: every kind is read, wrong lines are named, splits are honest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.data.lists import (
    Columns,
    Sample,
    VideoList,
    read_class_names,
    read_videos,
    write_list,
)
from model.labels import LabelError
from model.training.errors import DataError


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def pairs(videos: VideoList) -> list[tuple[str, str]]:
    return [(Path(sample.path).name, videos.labels[sample.label]) for sample in videos.samples]


def test_a_folder_per_class(tmp_path: Path) -> None:
    for name in ("b/2.mp4", "b/deep/3.MKV", "a/1.webm", "a/notes.txt", "a/._1.mp4", ".git/x.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    videos = read_videos(tmp_path)
    assert videos.labels == ("a", "b")
    assert pairs(videos) == [("1.webm", "a"), ("2.mp4", "b"), ("3.MKV", "b")]
    assert [sample.group for sample in videos.samples] == ["a/1.webm", "b/2.mp4", "b/deep/3.MKV"]


@pytest.mark.parametrize(
    ("text", "files"),
    [
        ("one.mp4 0\nmy two.mp4 2\n\n", ["one.mp4", "my two.mp4"]),
        ('one.mp4,0\n"my, two.mp4", 2\n', ["one.mp4", "my, two.mp4"]),
        ("/data/one.mp4\t0\ntwo.mp4\t2", ["one.mp4", "two.mp4"]),
    ],
)
def test_kinetics_lists(tmp_path: Path, text: str, files: list[str]) -> None:
    videos = read_videos(written(tmp_path / "train.csv", text))
    assert pairs(videos) == [(files[0], "class 0"), (files[1], "class 2")]
    assert len(videos.labels) == 3
    assert Path(videos.samples[1].path).parent == tmp_path


def test_labels_may_be_names_or_indices_of_given_names(tmp_path: Path) -> None:
    source = written(tmp_path / "list.csv", "1.mp4 run\n2.mp4 0\n")
    videos = read_videos(source, labels=["walk", "run"], root="/elsewhere")
    assert videos.samples == (
        Sample("/elsewhere/1.mp4", 1, "1.mp4"),
        Sample("/elsewhere/2.mp4", 0, "2.mp4"),
    )


def test_a_table_with_named_columns(tmp_path: Path) -> None:
    text = 'id,clip,action,person\n1,x.mp4,"jump, high",ann\n2,y.mp4,sit,\n'
    source = written(tmp_path / "table.csv", text)
    videos = read_videos(source, columns=Columns("clip", "action", "person"))
    assert videos.labels == ("jump, high", "sit")
    assert [sample.group for sample in videos.samples] == ["ann", "y.mp4"]


def parquet(file: Path, **columns: list[object]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), file)
    return file


def test_a_parquet_table(tmp_path: Path) -> None:
    source = parquet(
        tmp_path / "t.parquet",
        path=["x.mp4", "deep/y.mp4"],
        label=["sit", "jump, high"],
        group=["ann", None],
        more=[1, 2],
    )
    videos = read_videos(source)
    assert videos.labels == ("jump, high", "sit")
    assert videos.samples == (
        Sample(str(tmp_path / "x.mp4"), 1, "ann"),
        Sample(str(tmp_path / "deep/y.mp4"), 0, "deep/y.mp4"),
    )
    source = parquet(tmp_path / "n.parquet", clip=["x.mp4", "y.mp4"], action=[2, 0], who=[7, 8])
    videos = read_videos(source, columns=Columns("clip", "action", "who"))
    assert [(sample.label, sample.group) for sample in videos.samples] == [(2, "7"), (0, "8")]
    with pytest.raises(DataError, match=r"no column 'label'; it has clip, action, who\."):
        read_videos(source, columns=Columns(path="clip"))


def test_what_is_wrong_in_a_parquet_table_is_said(tmp_path: Path) -> None:
    source = parquet(tmp_path / "t.parquet", path=["x.mp4", "y.mp4"], label=["a", None])
    with pytest.raises(DataError, match=r"t\.parquet: row 2 has no path or no label"):
        read_videos(source)
    source.write_bytes(b"PAR1 no table")
    with pytest.raises(DataError, match="it is no Parquet table"):
        read_videos(source)


def test_something_something(tmp_path: Path) -> None:
    (tmp_path / "7.mp4").touch()
    entries = [
        {"id": "5", "label": "pushing a cup", "template": "Pushing [something]"},
        {"id": "7", "template": "Dropping [something]"},
    ]
    source = written(tmp_path / "train.json", json.dumps(entries))
    names = written(tmp_path / "l.json", '{"Pushing something": "0", "Dropping something": "1"}')
    videos = read_videos(source, labels=read_class_names(names))
    assert pairs(videos) == [("5.webm", "Pushing something"), ("7.mp4", "Dropping something")]
    assert [sample.label for sample in videos.samples] == [0, 1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "one.mp4 0\ntwo.mp4\n", "line 2 is 'two.mp4'; it must be `path label`"),
        ("a.csv", "one.mp4,0\ntwo.mp4,1,3\n", "line 2"),
        ("a.csv", "", "there are no videos"),
        ("a.csv", "path,label\none.mp4,\n", "line 2 has no path or no label"),
        ("a.json", "{", "it is no JSON"),
        ("a.json", "{}", "must be a JSON list"),
        ("a.json", '[{"id": "1"}]', "entry 1 has neither"),
    ],
)
def test_what_is_wrong_in_a_list_is_said(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    source = written(tmp_path / name, text)
    with pytest.raises(DataError) as caught:
        read_videos(source)
    assert message in str(caught.value)
    assert str(source) in str(caught.value)


def test_labels_that_are_not_among_the_given_ones(tmp_path: Path) -> None:
    source = written(tmp_path / "a.csv", "one.mp4 run\n")
    with pytest.raises(DataError, match="'run' is none of the 1 labels"):
        read_videos(source, labels=["walk"])
    source = written(tmp_path / "a.csv", "one.mp4 1\n")
    with pytest.raises(DataError, match="'1' is none of the 1 labels"):
        read_videos(source, labels=["walk"])
    with pytest.raises(DataError, match="cannot read"):
        read_videos(tmp_path / "absent.csv")
    with pytest.raises(DataError, match="one per class"):
        read_videos(tmp_path)


def test_label_files_of_other_kinds_are_left_to_the_reader_of_labels(tmp_path: Path) -> None:
    assert read_class_names(written(tmp_path / "l.txt", "b\na\n")) == ("b", "a")
    assert read_class_names(written(tmp_path / "l.json", '{"0": "b", "1": "a"}')) == ("b", "a")
    with pytest.raises(LabelError):
        read_class_names(written(tmp_path / "l.json", '{"0": "1", "1": "0"}'))


def many(groups: int, videos: int = 3) -> VideoList:
    samples = (
        Sample(f"{g}-{v}.mp4", 0, f"person {g}") for g in range(groups) for v in range(videos)
    )
    return VideoList(tuple(samples), ("a",))


def test_a_group_is_on_one_side_of_a_split_only() -> None:
    whole = many(200)
    train, held_out = whole.split(0.25)
    assert not {s.group for s in train.samples} & {s.group for s in held_out.samples}
    assert sorted(train.samples + held_out.samples) == sorted(whole.samples)
    assert 0.15 < len(held_out.samples) / len(whole.samples) < 0.35


def test_a_split_is_the_same_again_and_when_the_set_has_grown() -> None:
    held_out = many(50).split(0.2)[1].samples
    assert held_out == many(50).split(0.2)[1].samples
    assert set(held_out) <= set(many(80).split(0.2)[1].samples)
    assert held_out != many(50).split(0.2, seed=1)[1].samples


def test_a_split_with_an_empty_side_is_refused() -> None:
    with pytest.raises(DataError, match="1 groups empty"):
        many(1).split(0.5)


def test_a_written_list_is_read_back(tmp_path: Path) -> None:
    samples = (Sample("/v/one, two.mp4", 1, "ann"), Sample("/v/ü.mp4", 0, "b"))
    videos = VideoList(samples, ("jump, high", "sit"))
    path = tmp_path / "new" / "clean.csv"
    write_list(videos, path)
    assert read_videos(path) == videos
    assert read_videos(path).fingerprint() == videos.fingerprint()
    assert many(2).fingerprint() != many(3).fingerprint()
    with pytest.raises(DataError, match="cannot write"):
        write_list(videos, path / "below a file.csv")
