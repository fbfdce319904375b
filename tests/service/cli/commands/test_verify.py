"""`timesformer verify`: what it prints and how it ends, on the demo bundle."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from export.bundle.bundle import sha256_of
from export.bundle.manifest import MANIFEST, ONNX_FLOAT32
from model.demo import SAMPLE_CLIP, STORE
from service.cli.main import cli
from tests.export.verification.test_gate import scale_the_head

CPU = ("--device", "cpu", "--threads", 1)


def timesformer(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, ["verify", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(STORE / "demo" / "1", tmp_path / "demo" / "1"))


def test_the_table_says_what_ran_on_what_and_how_near_it_came() -> None:
    title, columns, row = timesformer("demo", *CPU).stdout.splitlines()
    assert title.startswith("demo version 1 on 4 clips, against the network in PyTorch ")
    assert re.split(r"\s{2,}", columns.strip()) == [
        *("artefact", "ran on", "max diff", "mean diff", "cosine", "error", "top-1", "top-5"),
        *("low margin", "KL", "limit", "passed"),
    ]
    cells = re.split(r"\s{2,}", row.strip())
    assert cells[:2] == [ONNX_FLOAT32, "onnxruntime, CPUExecutionProvider"]
    assert 0 < float(cells[2]) < 1e-4
    assert cells[-1] == "yes"


def test_videos_of_a_folder_are_compared_on_too(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for name in ("a.mp4", "more/b.mp4"):
        shutil.copy(SAMPLE_CLIP, tmp_path / name)
    (tmp_path / "notes.txt").write_text("no video")
    facts = json.loads(timesformer("demo", "--clips", tmp_path, "--json", *CPU).stdout)
    assert facts["clips"] == 3 * 3 + 1
    assert facts["artefacts"][0]["parity"]["clips"] == 10
    assert facts["passed"]


def test_a_folder_without_videos_and_one_with_a_broken_one_are_errors(tmp_path: Path) -> None:
    assert "there is no video in" in timesformer("demo", "--clips", tmp_path, code=1).stderr
    (tmp_path / "broken.mp4").write_bytes(b"broken")
    answer = timesformer("demo", "--clips", tmp_path, code=1)
    assert "cannot verify on" in answer.stderr
    assert "broken.mp4" in answer.stderr


def test_a_changed_file_is_found_before_anything_runs(folder: Path) -> None:
    scale_the_head(folder / ONNX_FLOAT32, -1)
    assert "its hash is off" in timesformer(folder, *CPU, code=1).stderr


def test_wrong_answers_end_with_3_though_hashes_and_manifest_are_in_order(folder: Path) -> None:
    scale_the_head(folder / ONNX_FLOAT32, -1)
    manifest = json.loads((folder / MANIFEST).read_text())
    entry = manifest["files"][ONNX_FLOAT32]
    entry["sha256"] = sha256_of(folder / ONNX_FLOAT32)
    entry["size"] = (folder / ONNX_FLOAT32).stat().st_size
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert timesformer(folder, *CPU, code=3).stdout.split()[-1] == "no"
    facts = json.loads(timesformer(folder, *CPU, "--json", code=3).stdout)
    assert not facts["passed"]
    assert not facts["artefacts"][0]["parity"]["passed"]


def test_what_is_not_there_is_an_error_in_one_line() -> None:
    assert "nobody has no active version" in timesformer("nobody", code=1).stderr
    answer = timesformer("demo", *CPU, "--precision", "int8", code=1)
    assert "nothing of precision int8 in bundle demo version 1 can run here" in answer.stderr
