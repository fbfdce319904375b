"""The script for GPU machines runs from end to end on a CPU, and claims nothing that it cannot."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.gpu import Step, steps
from tests.benchmarks.gpu_networks import COMPILED_ORIGINALS, GRAPHS
from tests.benchmarks.gpu_report import Report, ReportError, judge, tables

REPOSITORY = Path(__file__).parents[2]
ON_A_CPU = (
    *("--device", "cpu", "--variant", "demo", "--dtype", "bf16", "--backend", "eager"),
    *("--training-batch", "1", "--rounds", "1", "--turn-seconds", "0"),
)
# All that is ours to install but torch, which brings some more itself.
NOT_PYTORCH = (
    *("av", "click", "fastapi", "httpx", "huggingface_hub", "onnx", "onnxruntime", "onnxscript"),
    *("orjson", "prometheus_client", "pydantic", "pydantic_settings", "rich", "safetensors"),
)
BARE = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({NOT_PYTORCH}))
runpy.run_module("tests.benchmarks.gpu", run_name="__main__", alter_sys=True)
"""


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The script, where nothing but PyTorch can be imported."""
    places = ("--work", folder / "work", "--json", folder / "gpu.json")
    return subprocess.run(
        [sys.executable, "-c", BARE, *map(str, (*ON_A_CPU, *places, *arguments))],
        capture_output=True, text=True, check=False, cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What it printed and wrote, when it was done in two runs."""
    folder = tmp_path_factory.mktemp("gpu")
    first = run(folder, "--batches", 2, "--sections", "parity,eager")
    assert first.returncode == 0, first.stderr
    second = run(folder, "--batches", "2,1")
    assert second.returncode == 0, second.stderr
    assert "parity, batch 4 ..." in first.stdout
    assert "parity, batch 4 ..." not in second.stdout, "it goes on, and does not begin again"
    return second.stdout, json.loads((folder / "gpu.json").read_text())


def test_it_measures_all_that_a_cpu_can_and_names_the_rest(ran: tuple[str, dict[str, Any]]) -> None:
    printed, report = ran
    assert [row["entrant"] for row in report["parity"]] == ["float32", "fp16", "bf16"]
    assert {(row["batch"], row["entrant"]) for row in report["inference"]} == {
        (batch, f"{network}, {how}")
        for batch in (1, 2)
        for network, how in (
            ("original", "eager"),
            ("rewritten", "eager"),
            ("original", "torch.compile"),
            ("original with fused attention", "torch.compile"),
            ("rewritten", "torch.compile"),
        )
    }
    assert {row["entrant"] for row in report["training"]} == {
        f"{network}, {how}"
        for network in ("ours", "original")
        for how in ("eager", "torch.compile")
    }
    for row in (*report["parity"], *report["inference"]):
        assert row["passed"], row
        assert 0.99 < row["cosine"] <= 1
    for row in report["inference"]:
        assert row["milliseconds"] > 0
        assert len(row["share_of_large"]) == len(row["share_of_own_products"]) == 3
    reasons = report["left_out"]
    assert reasons["engines, batch 1"]["ONNX Runtime and TensorRT"] == "are measured on a GPU"
    assert reasons["eager, batch 2"] == {"rewritten, CUDA graph": "CUDA graphs want a GPU"}
    states = [goal["state"] for goal in report["goals"]]
    assert states == ["met", "not measured", "not measured", "not measured"]
    for goal in report["goals"]:
        assert goal["goal"] in printed
    steps_of = {1: ("eager", "compile", "engines", "training", "training-compile")}
    steps_of |= {2: ("eager", "compile", "engines"), 4: ("parity",)}
    done = {f"{section}, batch {n}" for n, sections in steps_of.items() for section in sections}
    assert (report["done"].keys(), report["began"]) == (done, [])


def test_in_no_time_it_begins_nothing_and_says_what_is_left(tmp_path: Path) -> None:
    answer = run(tmp_path, "--batches", 1, "--minutes", 0)
    assert answer.returncode == 0, answer.stderr
    assert not (tmp_path / "gpu.json").exists()
    left = re.findall(r"not begun +(.*): the same command goes on with it", answer.stdout)
    assert left == [
        *("parity, batch 4", "eager, batch 1", "compile, batch 1", "engines, batch 1"),
        *("training, batch 1", "training-compile, batch 1"),
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU")
def test_on_a_gpu_the_answers_of_all_that_runs_are_right(tmp_path: Path) -> None:
    places = ("--work", tmp_path / "work", "--json", tmp_path / "gpu.json")
    sizes = ("--variant", "demo", "--batches", 2, "--training-batch", 2, "--rounds", 2)
    command = [sys.executable, "-m", "tests.benchmarks.gpu", *map(str, (*places, *sizes))]
    subprocess.run(command, check=True, cwd=REPOSITORY)
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["entrant"] for row in report["inference"]} >= {*GRAPHS, *COMPILED_ORIGINALS}
    assert [row["entrant"] for row in report["inference"] if not row["passed"]] == []
    assert len(report["training"]) == 4


MACHINE = {
    **dict.fromkeys(("device", "driver", "torch", "cuda", "commit", "backend"), "some"),
    "kind": "cuda",
    "variant": "base",
    "dtype": "fp16",
}


class TestTheReport:
    def test_it_is_whole_after_every_step_and_names_the_one_that_was_cut_off(
        self, tmp_path: Path
    ) -> None:
        path = tmp_path / "deep" / "gpu.json"
        report = Report(path, MACHINE)
        report.begin("eager, batch 32")
        report.end("eager, batch 32", "inference", [row("rewritten, eager")], {"x": "no"}, 3)
        report.begin("compile, batch 32")  # and the machine is taken away
        again = Report(path, MACHINE)
        assert again.done == {"eager, batch 32": 3}
        assert again.began == ["compile, batch 32"]
        assert again.content["inference"] == [row("rewritten, eager")]
        assert list(path.parent.iterdir()) == [path]

    def test_what_was_cut_off_comes_last(self, tmp_path: Path) -> None:
        options = parsed(tmp_path, "--batches", "32,1")
        report = Report(None, MACHINE)
        before = steps(options, report)
        assert before[:2] == [Step("parity", 4), Step("eager", 32)]
        assert before[4:6] == [Step("training", 1), Step("training-compile", 1)]
        report.begin(str(before[0]))
        report.end(str(before[0]), "parity", [], {}, 1)
        report.begin(str(before[1]))
        assert steps(options, report) == [*before[2:], before[1]]

    def test_a_step_that_is_named_is_measured_again_and_its_rows_replaced(
        self, tmp_path: Path
    ) -> None:
        report = Report(None, MACHINE)
        for speed in (0.5, 0.6):
            report.begin("eager, batch 32")
            assert report.done == {}
            report.end("eager, batch 32", "inference", [row("rewritten, eager", speed)], {}, 1)
        assert report.content["inference"] == [row("rewritten, eager", 0.6)]
        options = parsed(tmp_path, "--batches", "32", "--sections", "eager")
        assert steps(options, report) == [Step("eager", 32)]

    @pytest.mark.parametrize("key", ["device", "commit", "dtype"])
    def test_one_of_another_machine_or_commit_is_refused(self, tmp_path: Path, key: str) -> None:
        path = tmp_path / "gpu.json"
        report = Report(path, MACHINE)
        report.begin("parity, batch 4")
        with pytest.raises(ReportError, match=f"is of {key} some|is of {key} fp16"):
            Report(path, {**MACHINE, key: "other"})

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"machine": {}}'])
    def test_another_file_is_refused(self, tmp_path: Path, content: str) -> None:
        path = tmp_path / "gpu.json"
        path.write_text(content)
        with pytest.raises(ReportError, match="no report of this script"):
            Report(path, MACHINE)
        assert path.read_text() == content


def parsed(folder: Path, *arguments: str) -> Any:
    from tests.benchmarks import gpu

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gpu", *ON_A_CPU, "--work", str(folder), *arguments])
        return gpu.parse()


def row(
    entrant: str, speed: float = 0.5, *, passed: bool = True, batch: int = 32
) -> dict[str, Any]:
    return {
        "entrant": entrant,
        "batch": batch,
        "milliseconds": 1.0,
        "clips_per_second": 1.0,
        "limit": 3e14,
        "share_of_large": [speed - 0.01, speed, speed + 0.01],
        "share_of_own_products": None,
        "off_by": 0.001,
        "cosine": 0.9999 if passed else 0.5,
        "error": 0.01 if passed else 1.0,
        "passed": passed,
    }


class TestGoals:
    def judged(self, *rows: dict[str, Any], **machine: str) -> list[tuple[str, str]]:
        content = Report(None, {**MACHINE, **machine}).content
        content["inference"] = list(rows)
        assert all(isinstance(line, str) for line in tables(content))
        return [(goal.state, goal.detail) for goal in judge(content)[1:]]

    def test_the_best_right_row_is_taken_and_compared_with_the_best_original(self) -> None:
        found = self.judged(
            row("rewritten, TensorRT", 0.7),
            row("rewritten, torch.compile and CUDA graph", 0.6),
            row("rewritten, ONNX Runtime CUDA", 0.4),
            row("original, torch.compile", 0.3),
            row("original with fused attention, torch.compile", 0.35),
        )
        assert found == [
            ("met", "70.0%, rewritten, TensorRT"),
            ("met", "2.00: rewritten, TensorRT over original with fused attention, torch.compile"),
            (
                "met",
                "1.50: rewritten, torch.compile and CUDA graph over rewritten, ONNX Runtime CUDA",
            ),
        ]

    def test_wrong_answers_meet_no_goal(self) -> None:
        found = self.judged(
            row("rewritten, TensorRT", 0.7, passed=False),
            row("rewritten, CUDA graph", 0.5),
            row("rewritten, ONNX Runtime CUDA", 0.1, passed=False),
            row("original, torch.compile", 0.4),
        )
        assert found == [
            ("not met", "50.0%, rewritten, CUDA graph"),
            ("not met", "1.25: rewritten, CUDA graph over original, torch.compile"),
            (
                "not measured",
                "answers are wrong: rewritten, TensorRT; rewritten, ONNX Runtime CUDA",
            ),
        ]

    @pytest.mark.parametrize(
        ("batch", "machine"),
        [(64, {}), (32, {"kind": "cpu"}), (32, {"variant": "small"}), (32, {"dtype": "bf16"})],
        ids=str,
    )
    def test_other_batches_networks_and_machines_are_not_those_of_the_goals(
        self, batch: int, machine: dict[str, str]
    ) -> None:
        rows = (
            row("rewritten, CUDA graph", 0.7, batch=batch),
            row("original, torch.compile", 0.1, batch=batch),
        )
        assert {state for state, _ in self.judged(*rows, **machine)} == {"not measured"}
