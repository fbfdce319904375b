"""Training from decoded clips on disk is training that decodes the same views, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model.config import Preprocessing
from model.data.lists import Sample, VideoList, read_videos
from model.network.timesformer import TimeSformer
from model.training.config import Job, Machine
from model.training.data import clip_cache as caching
from model.training.data.clip_cache import Draws, open_cache
from model.training.data.loader import Replaced, View, view_clip
from model.training.errors import DataError, RecipeError
from model.training.event_log import read_log
from model.training.loop import LOG, train
from model.training.recipe import PRESETS
from model.training.trainer import WEIGHTS
from tests.model.conftest import tiny_config, write_video

SEES = Preprocessing(num_frames=2, image_size=16, frame_stride=4)
REPOSITORY = Path(__file__).parents[4]


def changing(level: int) -> Callable[[int], np.ndarray]:
    """Pictures that differ from place to place and from frame to frame."""
    slope = np.linspace(0, 100, 48 * 32).reshape(32, 48, 1)
    return lambda number: (slope + level + 2 * number).repeat(3, 2).astype(np.uint8)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> VideoList:
    """Eight that decode, no view of them like another, and a file that is none."""
    folder = tmp_path_factory.mktemp("changing")
    for number in range(8):
        (folder / "ab"[number % 2]).mkdir(exist_ok=True)
        write_video(folder / "ab"[number % 2] / f"{number}.mp4", paint=changing(8 * number))
    (folder / "b" / "broken.mp4").write_text("no video")
    return read_videos(folder)


def draws(videos: VideoList, **view: Any) -> Draws:
    return Draws(videos, SEES, View(**{"cached": 2, **view}), seed=5)


def everything(folder: Path) -> bytes:
    (clips,) = folder.glob("*/clips.u8")
    return clips.read_bytes()


@pytest.mark.parametrize("processes", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_it_holds_the_views_as_they_decode(
    videos: VideoList, tmp_path: Path, processes: int
) -> None:
    wanted, told = draws(videos), list[tuple[int, int]]()
    cache = open_cache(
        tmp_path, wanted, processes=processes, done=lambda *count: told.append(count)
    )
    assert told == [(count, 9) for count in range(1, 10)]
    for number, sample in enumerate(videos.samples):
        for view in range(2):
            decoded = view_clip(sample, SEES, wanted.view, wanted.seed, number, view)
            kept = cache.clip(number, view)
            if isinstance(decoded, Replaced):
                assert kept == decoded
            else:
                np.testing.assert_array_equal(kept, decoded)
    assert isinstance(cache.clip(8, 1), Replaced)
    assert not np.array_equal(cache.clip(0, 0), cache.clip(0, 1))


class Ended(NamedTuple):
    """The files of a run that say what was learned, and from what."""

    weights: dict[str, bytes]
    losses: list[float]
    replaced: list[tuple[int, str, str]]


def ended(videos: VideoList, out: Path, machine: Machine, **changes: Any) -> Ended:
    recipe = PRESETS["modern"].replace(
        {"epochs": 3, "batch_size": 3, "ema": 0, "learning_rate": 0.01, "cached": 2, **changes}
    )
    torch.manual_seed(1)
    config = tiny_config(num_classes=2, num_frames=2, image_size=16, frame_stride=4)
    train(TimeSformer(config), Job(recipe, videos, None, out), machine)
    log = read_log(out / LOG)
    return Ended(
        {name: value.numpy().tobytes() for name, value in load_file(out / WEIGHTS).items()},
        [line["loss"] for line in log if line["event"] == "step"],
        [(e["step"], e["path"], e["code"]) for e in log if e["event"] == "replaced"],
    )


@pytest.mark.parametrize("balanced", [False, True])
def test_training_from_the_cache_is_training_that_decodes(
    videos: VideoList, tmp_path: Path, balanced: bool
) -> None:
    decoding = ended(videos, tmp_path / "decoding", Machine(), balanced=balanced)
    machine = Machine(cache=tmp_path / "cache")
    assert ended(videos, tmp_path / "first", machine, balanced=balanced) == decoding
    assert ended(videos, tmp_path / "second", machine, balanced=balanced) == decoding
    if not balanced:
        assert len(decoding.replaced) >= 3
        assert ended(videos, tmp_path / "other", Machine(), cached=3) != decoding


def test_a_full_cache_needs_no_decoding(
    videos: VideoList, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_cache(tmp_path, draws(videos))

    def decoded(*arguments: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(caching, "view_clip", decoded)
    open_cache(tmp_path, draws(videos))
    with pytest.raises(AssertionError):
        open_cache(tmp_path, draws(videos)._replace(seed=6))


def test_what_decides_the_pixels_has_a_cache_of_its_own(videos: VideoList, tmp_path: Path) -> None:
    copy = tmp_path / "0.mp4"
    shutil.copy(videos.samples[0].path, copy)
    one = VideoList((Sample(str(copy), 0, "x"),), ("a",))
    wanted = draws(one)
    others = [
        draws(one, scale=(1.0, 1.0)),
        draws(one, cached=1),
        wanted._replace(seed=6),
        wanted._replace(preprocessing=Preprocessing(2, 16, frame_stride=5)),
        wanted._replace(videos=VideoList(one.samples, ("b",))),
    ]
    for count, other in enumerate([wanted, *others], start=1):
        open_cache(tmp_path / "cache", other)
        assert len(list((tmp_path / "cache").glob("*/clips.u8"))) == count
    write_video(copy, frames=30)
    open_cache(tmp_path / "cache", wanted)
    assert len(list((tmp_path / "cache").glob("*/clips.u8"))) == count + 1


FILL = """
import os, signal, sys
from pathlib import Path
from model.config import Preprocessing
from model.training.data.clip_cache import Draws, open_cache
from model.training.data.loader import View
from model.data.lists import read_videos

def kill(count, videos):
    if count == 3:
        os.kill(os.getpid(), signal.SIGKILL)

draws = Draws(read_videos(sys.argv[1]), Preprocessing(2, 16, frame_stride=4), View(cached=2), 5)
open_cache(Path(sys.argv[2]), draws, done=kill)
"""


def test_a_fill_that_was_killed_goes_on_and_damage_is_decoded_again(
    videos: VideoList, tmp_path: Path
) -> None:
    wanted = draws(videos)
    open_cache(tmp_path / "whole", wanted)
    killed = subprocess.run(
        [
            sys.executable,
            "-c",
            FILL,
            str(Path(videos.samples[0].path).parents[1]),
            str(tmp_path / "killed"),
        ],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    (partial,) = (tmp_path / "killed").glob("*.partial")
    with (partial / "journal.jsonl").open("a") as journal:
        journal.write('{"video": 4, "cr')  # a line that was cut off
    with (partial / "clips.u8").open("rb+") as clips:
        clips.write(b"as after a power cut")  # of the first video
    told = list[int]()
    open_cache(tmp_path / "killed", wanted, done=lambda count, videos: told.append(count))
    assert told == [3, 4, 5, 6, 7, 8, 9]  # two of the three were intact
    assert everything(tmp_path / "killed") == everything(tmp_path / "whole")
    assert not partial.exists()


def test_a_cache_that_does_not_fit_is_refused_before_it_is_filled(
    videos: VideoList, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"takes \d+\.\d GB and .* GB left: make room"):
        open_cache(tmp_path, draws(videos, cached=10**12))


def test_a_damaged_cache_and_one_that_cannot_be_written_are_named(
    videos: VideoList, tmp_path: Path
) -> None:
    open_cache(tmp_path, draws(videos))
    (clips,) = tmp_path.glob("*/clips.u8")
    with clips.open("ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match="is damaged, delete it"):
        open_cache(tmp_path, draws(videos))
    with pytest.raises(DataError, match="cannot write the cache"):
        open_cache(clips / "below a file", draws(videos))


def test_a_cache_without_a_number_of_views_is_refused(videos: VideoList, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--cached-views"):
        ended(videos, tmp_path / "run", Machine(cache=tmp_path / "cache"), cached=0)
    with pytest.raises(RecipeError, match="cached is -1"):
        View(cached=-1)


def test_the_cache_says_what_it_is(videos: VideoList, tmp_path: Path) -> None:
    open_cache(tmp_path, draws(videos))
    (about,) = tmp_path.glob("*/cache.json")
    facts = json.loads(about.read_text())
    assert facts["view"]["cached"] == 2
    assert [failure[0] for failure in facts["failed"]] == [8, 8]
    assert facts["failed"][0][2][0].endswith("broken.mp4")
