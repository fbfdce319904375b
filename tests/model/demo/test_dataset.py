"""The demo set is files that training reads: complete, resumable, the same for the same seed."""

from __future__ import annotations

from pathlib import Path

import av
import pytest

from model.data.lists import read_videos
from model.demo.dataset import write_demo_set
from model.demo.render import LABELS
from model.training.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "set"
    write_demo_set(folder, 13, 2, processes=0)
    return folder


def test_training_reads_the_lists(folder: Path) -> None:
    train = read_videos(folder / "train.csv", labels=LABELS)
    validation = read_videos(folder / "validation.csv", labels=LABELS)
    assert train.counts() == [2, *[1] * 11]
    assert validation.counts() == [1, 1, *[0] * 10]
    assert all(Path(sample.path).is_file() for sample in train.samples + validation.samples)
    assert (folder / "labels.txt").read_text().split("\n")[:-1] == list(LABELS)


def test_files_differ_in_size_codec_and_rate_and_last_longer_than_a_clip(folder: Path) -> None:
    facts = set()
    for path in folder.rglob("*.mp4"):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            facts.add((stream.codec_context.name, stream.width, stream.average_rate))
            assert stream.duration * stream.time_base > 1.0
    codecs, widths, rates = map(set, zip(*facts, strict=True))
    assert len(codecs) >= 2
    assert len(widths) > 5
    assert len(rates) >= 3


def test_the_held_out_videos_are_none_of_those_to_train_on(folder: Path) -> None:
    contents = [path.read_bytes() for path in folder.rglob("*.mp4")]
    assert len(set(contents)) == len(contents) == 15


def test_what_was_rendered_is_kept_and_what_is_missing_is_rendered_the_same(folder: Path) -> None:
    kept, lost = (folder / "videos/train" / f"00000{number}.mp4" for number in (0, 1))
    before = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    seen = []
    write_demo_set(folder, 13, 2, processes=0, done=seen.append)
    assert (kept.stat().st_mtime_ns, lost.read_bytes()) == before
    assert seen == list(range(1, 16))


def test_another_seed_needs_another_folder(folder: Path) -> None:
    with pytest.raises(DataError, match="seed 0: take another folder"):
        write_demo_set(folder, 13, 2, seed=1, processes=0)


def test_a_folder_that_cannot_be_written_is_named() -> None:
    with pytest.raises(DataError, match="cannot write the demo set into /dev/null"):
        write_demo_set(Path("/dev/null/set"), 12, 12, processes=0)
