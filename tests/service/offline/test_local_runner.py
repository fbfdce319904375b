"""`timesformer label` on this machine: every video in the table, whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from export.bundle.bundle import BundleStore
from export.runtime import Outputs
from export.runtime.onnxruntime import OnnxRuntime
from model.data import remote
from service.cli.main import cli
from service.inference.batcher import Batcher
from service.inference.scheduler import Answer
from service.offline.rows import Row

Label = Callable[..., Result]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("TIMESFORMER_"):
            monkeypatch.delenv(name)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "labels.parquet"


@pytest.fixture
def label(store: BundleStore, archive: Path, out: Path) -> Label:
    def run(*words: object, source: object = archive) -> Result:
        common = ["label", source, "--out", out, "--store", store.root, "--device", "cpu"]
        return CliRunner().invoke(cli, [str(word) for word in (*common, *words)])

    return run


def rows(out: Path) -> dict[str, Row]:
    return {Path(row["path"]).name: row for row in pq.read_table(out).to_pylist()}


def test_every_video_gets_its_labels_and_what_is_none_gets_a_reason(
    label: Label, out: Path
) -> None:
    result = label("--views", 2, "--crops", 3, "--top-k", 2, "--workers", 2)
    assert result.exit_code == 3, result.output
    found = rows(out)
    assert len(found) == 15
    for name, row in found.items():
        if row["error_code"] is None:
            assert row["label"] == name.split("-")[0]
            assert row["labels"][0] == row["label"]
            assert row["scores"] == sorted(row["scores"], reverse=True)
            assert len(row["labels"]) == len(row["class_indices"]) == 2
            assert (row["views"], row["crops"], len(row["times_s"])) == (2, 3, 2)
            assert row["duration_s"] == pytest.approx(40 / 30, abs=0.01)
            assert (row["width"], row["height"], row["codec"]) == (48, 32, "mpeg4")
        assert (row["model_name"], row["model_version"]) == ("colours", "1")
    errors = pq.read_table(out.with_name("labels.errors.parquet")).to_pylist()
    assert {Path(row["path"]).name: row["error_code"] for row in errors} == {
        "empty.mp4": "empty_file",
        "words.mp4": "undecodable_video",
        "folder.mp4": "unreadable_file",
    }


def test_the_answer_is_that_of_classify(label: Label, store: BundleStore, out: Path) -> None:
    label("--views", 3)
    row = rows(out)["green-1.mp4"]
    words = ["classify", row["path"], "--store", str(store.root), "--views", "3", "--json"]
    answer = json.loads(CliRunner().invoke(cli, [*words, "--device", "cpu"]).output)
    assert row["labels"] == [item["label"] for item in answer["predictions"]]
    assert row["scores"] == pytest.approx([item["score"] for item in answer["predictions"]])
    assert row["times_s"] == answer["sampling"]["times_s"]


def test_batches_are_filled_across_videos(label: Label, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    submitted = 0
    enough = threading.Event()
    run, submit = OnnxRuntime.run, Batcher.submit

    async def counted(batcher: Batcher, frames: NDArray[np.uint8]) -> Answer:
        nonlocal submitted
        submitted += 1
        if submitted == 5:
            enough.set()
        return await submit(batcher, frames)

    def slow(self: OnnxRuntime, frames: NDArray[np.uint8]) -> Outputs:
        sizes.append(len(frames))
        if submitted:
            assert enough.wait(120)  # the next videos are decoded while the network runs
        return run(self, frames)

    monkeypatch.setattr(Batcher, "submit", counted)
    monkeypatch.setattr(OnnxRuntime, "run", slow)
    monkeypatch.setenv("TIMESFORMER_MAX_BATCH_CLIPS", "4")
    label("--workers", 2)
    warm_up, work = sizes[:2], sizes[2:]
    assert set(warm_up) == {1, 4}
    assert sum(work) == 12
    assert max(work) == 4


def test_it_reports_how_fast_it_was_and_the_cost_also_to_programs(label: Label) -> None:
    result = label("--cost-per-hour", 3.6)
    assert "15 videos, 3 without labels" in result.stdout
    assert "this run: 15 videos in" in result.stdout
    assert "a thousand videos cost" in result.stdout
    assert "15 of 15 videos" in result.stderr  # a line in a log, not a bar
    facts = json.loads(label("--json").stdout)
    assert (facts["videos"], facts["failed"], facts["labelled"]) == (15, 3, 0)


def test_what_is_done_is_not_done_again(
    label: Label, archive: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = tmp_path / "some.txt"
    some.write_text("\n".join(str(archive / f"red-{number}.mp4") for number in range(4)))
    assert label(source=some).exit_code == 0
    asked: list[int] = []
    real = OnnxRuntime.run

    def counted(self: OnnxRuntime, frames: NDArray[np.uint8]) -> Outputs:
        asked.append(len(frames))
        return real(self, frames)

    monkeypatch.setattr(OnnxRuntime, "run", counted)
    result = label()
    assert "15 videos, 4 of them done before" in result.stderr
    assert sum(asked) == 8 + 3  # and the warm-up's two batches
    assert len(rows(out)) == 15
    asked.clear()
    assert label().exit_code == 3  # the failures of the table are still there
    assert asked == []


def test_videos_of_an_object_store_are_fetched_and_removed(
    label: Label, archive: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_PAUSES_S", (0.0,))
    spool = tmp_path / "fetched"
    spool.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(spool))
    for name in ("red-0.mp4", "green-0.mp4", "words.mp4"):
        content = (archive / name).read_bytes()
        fsspec.filesystem("memory").pipe_file(f"/clips/{name}", content)
    assert label(source="memory://clips").exit_code == 3
    assert {name: row["label"] for name, row in rows(out).items()} == {
        "red-0.mp4": "red",
        "green-0.mp4": "green",
        "words.mp4": None,
    }
    assert list(spool.iterdir()) == []


def test_an_engine_that_always_fails_ends_the_run(
    label: Label, archive: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.offline.local_runner._ENGINE_FAILURES", 4)
    calls = 0
    real = OnnxRuntime.run

    def broken(self: OnnxRuntime, frames: NDArray[np.uint8]) -> Outputs:
        nonlocal calls
        calls += 1
        if calls > 2:  # it passes the warm-up
            raise RuntimeError("the device is lost")
        return real(self, frames)

    monkeypatch.setattr(OnnxRuntime, "run", broken)
    result = label()
    assert result.exit_code == 1
    assert "the engine failed on 4 videos, one after the other" in result.output
    assert not out.exists()
    monkeypatch.setattr(OnnxRuntime, "run", real)
    assert label("--retry-errors").exit_code == 3
    assert rows(out)["red-0.mp4"]["label"] == "red"


@pytest.mark.parametrize("package", ["pyarrow", "ray"])
def test_a_missing_package_is_one_sentence(
    label: Label, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = {"pyarrow": "service.offline.table", "ray": "service.offline.ray_runner"}[package]
    monkeypatch.delitem(sys.modules, "service.offline.archive", raising=False)
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    result = label("--engine", "ray")
    assert result.exit_code == 1
    extra = {"pyarrow": "label", "ray": "ray"}[package]
    assert f"{package} is not installed: this needs the extra `{extra}`" in result.output
