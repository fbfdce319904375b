"""The script for GPU machines runs from end to end on a CPU, and reports only checked answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name the field uses
from torch.utils.flop_counter import FlopCounterMode

from export.graph.rewrite import multiply_adds, rewrite
from export.verification.parity import LIMITS
from model.config import ATTENTION_TYPES
from tests.benchmarks import gpu, gpu_networks
from tests.benchmarks.gpu import Report, Step, goals, measure, table
from tests.benchmarks.gpu_limits import LARGE, MEMORY, PRODUCTS, products_of, replay_of
from tests.benchmarks.gpu_networks import DTYPES, Bench, Entrant, check
from tests.benchmarks.half import halve
from tests.model.conftest import random_model, tiny_config

REPOSITORY = Path(__file__).parents[2]
# The packages that a machine with nothing but PyTorch lacks.
NOT_PYTORCH = (
    *("av", "click", "fastapi", "httpx", "huggingface_hub", "onnx", "onnxruntime", "onnxscript"),
    *("orjson", "prometheus_client", "pydantic", "pydantic_settings", "rich", "safetensors"),
)
BARE = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({NOT_PYTORCH}))
runpy.run_module("tests.benchmarks.gpu", run_name="__main__", alter_sys=True)
"""
QUICK = ("--variant", "demo", "--batches", "2", "--rounds", "1", "--turn-seconds", "0")
GPU = {"kind": "cuda", "variant": "base"}


def script(path: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Runs the script where only PyTorch can be imported; returns the report and the table."""
    command = [sys.executable, "-c", BARE, *QUICK, *arguments, "--json", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def entrants(graph: str = "") -> set[str]:
    return {
        "original, eager",
        f"rewritten, eager{graph}",
        "original, torch.compile",
        f"original with fused attention, torch.compile{graph}",
        f"rewritten, torch.compile{graph}",
    }


def test_script_on_a_cpu_reports_every_entrant_and_its_shares(tmp_path: Path) -> None:
    on_a_cpu = ("--device", "cpu", "--backend", "eager", "--dtypes", "bf16")
    report, printed = script(tmp_path / "gpu.json", *on_a_cpu)
    assert report["left_out"] == {}
    assert {row["entrant"] for row in report["rows"]} == entrants()
    for row in report["rows"]:
        assert row["cosine"] > 0.99
        assert row["clips_per_second"] > 0
        assert row["shares"].keys() == {LARGE, PRODUCTS, MEMORY}
        assert all(share > 0 for share in row["shares"].values())
        assert row["entrant"] in printed
    assert set(report["goals"].values()) == {"not measured"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU")
def test_script_on_a_gpu_reports_every_entrant(tmp_path: Path) -> None:
    report, _ = script(tmp_path / "gpu.json", "--minutes", "30")
    assert report["left_out"] == {}
    for dtype in DTYPES:
        rows = [row for row in report["rows"] if row["dtype"] == dtype]
        assert {row["entrant"] for row in rows} == entrants(", CUDA graph")


class TestSteps:
    STEPS = (Step(32, "fp16", "eager"), Step(32, "bf16", "eager"), Step(1, "fp16", "eager"))

    def test_run_with_a_failing_step_reports_it_and_goes_on(self, tmp_path: Path) -> None:
        path = tmp_path / "gpu.json"
        report = Report(path, GPU)
        before = []

        def measure(step: Step) -> None:
            before.append(json.loads(path.read_text()) if path.exists() else None)
            if step == self.STEPS[1]:
                raise RuntimeError("CUDA out of memory\nand more")
            report.rows.append(row(step=step))

        gpu.run(self.STEPS, measure, report, deadline=float("inf"))
        assert before[0] is None
        assert [each["batch"] for each in before[1]["rows"]] == [32]
        failed = {"eager, bf16, batch 32": "RuntimeError: CUDA out of memory"}
        assert before[2]["left_out"] == failed
        content = json.loads(path.read_text())
        assert [each["batch"] for each in content["rows"]] == [32, 1]
        assert content["left_out"] == failed
        assert any("CUDA out of memory" in line for line in table(report))

    def test_run_after_the_deadline_reports_that_no_time_was_left(self) -> None:
        report = Report(None, GPU)
        gpu.run(self.STEPS, lambda step: pytest.fail(f"{step} started"), report, deadline=0)
        assert report.left_out == {str(step): "no time was left" for step in self.STEPS}


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench("cpu", "demo", backend="eager")


class TestAnswers:
    @pytest.mark.parametrize("dtype", ["fp16", "bf16"])
    def test_check_of_other_answers_raises(self, bench: Bench, dtype: str) -> None:
        exact = logits, embedding = bench.exact(bench.frames(3))
        assert check(exact, exact, dtype)["cosine"] == pytest.approx(1)
        infinite = embedding.clone()
        infinite[1, 0] = float("inf")
        others = {
            "cosine": (logits.roll(1, 0), embedding.roll(1, 0)),
            "error": (logits * 1.3, embedding * 1.3),
            "finite": (logits, infinite),
            "instead of": (logits[:1], embedding[:1]),
        }
        for reason, other in others.items():
            with pytest.raises(ValueError, match=reason):
                check(exact, other, dtype)

    def test_limits_are_those_of_the_export(self) -> None:
        limits = LIMITS["fp16"]
        assert gpu_networks.COSINES["fp16"] == limits.cosine
        assert gpu_networks.ERRORS["fp16"] == limits.error

    def test_measure_refuses_wrong_answers_and_times_the_other_entrants(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = gpu_networks.entrants

        def made_up(*arguments: Any) -> dict[str, Callable[[], Entrant]]:
            right = real(*arguments)["rewritten, eager"]
            logits, embedding = right().answers()
            wrong = right()._replace(answers=lambda: (-logits, embedding))
            return {"wrong": lambda: wrong, "broken": lambda: 1 / 0, "right": right}

        monkeypatch.setattr(gpu, "entrants", made_up)
        report = Report(None, GPU)
        measure(bench, Step(2, "fp16", "eager"), report, 1, 0)
        assert [each["entrant"] for each in report.rows] == ["right"]
        reasons = {name.rpartition(" ")[2]: reason for name, reason in report.left_out.items()}
        assert reasons.pop("broken") == "ZeroDivisionError: division by zero"
        assert reasons.pop("wrong").startswith("ValueError: answers are wrong: cosine -")

    def test_measure_refuses_a_cuda_graph_that_writes_nothing(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cuda = MagicMock()  # records nothing, so that a replay computes nothing
        for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
        monkeypatch.setattr(Bench, "cuda", True)
        monkeypatch.setattr(gpu, "limits", lambda *_: {})
        report = Report(None, GPU)
        measure(bench, Step(2, "bf16", "eager"), report, 1, 0)
        assert [each["entrant"] for each in report.rows] == ["original, eager"]
        assert [name.partition(": ")[2] for name in report.left_out] == [
            "rewritten, eager, CUDA graph"
        ]
        cuda.graph.assert_called_once_with(cuda.CUDAGraph.return_value)


class TestLimits:
    @pytest.mark.parametrize("scheme", ATTENTION_TYPES)
    def test_products_are_all_of_the_networks_work(self, scheme: str) -> None:
        network = rewrite(random_model(tiny_config(scheme)))
        counted = multiply_adds(network)
        products = products_of(halve(network, torch.bfloat16), 3)
        with FlopCounterMode(display=False) as counter:
            replay_of(products, torch.device("meta"))()
        assert counter.get_total_flops() == 2 * 3 * counted

    @pytest.mark.parametrize("scheme", ATTENTION_TYPES)
    @pytest.mark.parametrize("half", [False, True], ids=["float32", "bf16"])
    def test_linears_see_all_tokens_in_one_product(self, scheme: str, *, half: bool) -> None:
        """PyTorch computes a small product for each group of tokens that are not contiguous."""
        network: nn.Module = rewrite(random_model(tiny_config(scheme)))
        products = products_of(halve(network, torch.bfloat16) if half else network, 2)
        for function, (tokens, *_) in products:
            if function is F.linear and len(tokens.shape) > 2 and tokens.shape[-2] > 1:
                assert tokens.random(torch.device("cpu")).is_contiguous(), tokens


def row(
    entrant: str = "rewritten, eager, CUDA graph",
    share: float = 0.5,
    step: Step = Step(32, "fp16", "eager"),  # noqa: B008 - an immutable tuple
) -> dict[str, Any]:
    shares = {LARGE: share, PRODUCTS: share, MEMORY: share}
    figures = {"milliseconds": 1.0, "clips_per_second": 1.0, "cosine": 1.0, "error": 0.0}
    return {**step._asdict(), "entrant": entrant, "shares": shares, **figures}


class TestGoals:
    COMPILED = Step(32, "fp16", "torch.compile")

    def states(self, *rows: dict[str, Any], **machine: str) -> list[str]:
        report = Report(None, {**GPU, **machine})
        report.rows = [*rows]
        return [*goals(report).values()]

    def test_goals_compare_the_best_of_ours_with_the_best_compiled_original(self) -> None:
        rows = (
            row(share=0.5),
            row("rewritten, torch.compile, CUDA graph", 0.6, self.COMPILED),
            row("original, torch.compile", 0.2, self.COMPILED),
            row("original with fused attention, torch.compile", 0.5, self.COMPILED),
            row("original, eager", 0.9),
        )
        assert self.states(*rows) == ["met, 0.600", "not met, 1.200"]
        assert self.states(*rows, kind="cpu") == ["not measured"] * 2
        assert self.states(*rows, variant="demo") == ["not measured"] * 2

    def test_goals_ignore_other_batches_and_dtypes(self) -> None:
        others = (Step(1, "fp16", "eager"), Step(32, "bf16", "eager"))
        assert self.states(*(row(share=0.9, step=step) for step in others)) == ["not measured"] * 2
