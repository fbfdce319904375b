"""The script for GPU machines runs from end to end on a CPU, and claims nothing that it cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.gpu", *map(str, arguments)],
        capture_output=True, text=True, timeout=280, check=False, cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_it_measures_all_that_a_cpu_can_and_names_the_rest(tmp_path: Path) -> None:
    answer = run(
        *("--device", "cpu", "--variant", "demo", "--dtype", "bf16", "--batches", "1"),
        *("--training-batch", 1, "--rounds", 1, "--turn-seconds", 0, "--no-compile"),
        *("--json", tmp_path / "gpu.json"),
    )
    assert answer.returncode == 0, answer.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["precision"] for row in report["parity"]] == ["float32", "fp16", "bf16"]
    assert all(row["passed"] for row in report["parity"])
    assert {row["entrant"] for row in report["inference"]} == {
        "original, eager",
        "rewritten, eager",
    }
    assert {row["entrant"] for row in report["training"]} == {"ours, eager", "original, eager"}
    assert report["limits"]["bf16"]["large"] > 0
    assert report["left_out"].keys() >= {"torch.compile", "rewritten, TensorRT"}
    states = [goal["state"] for goal in report["goals"]]
    assert states == ["met", "not measured", "not measured", "not measured"]
    for goal in report["goals"]:
        assert goal["goal"] in answer.stdout
