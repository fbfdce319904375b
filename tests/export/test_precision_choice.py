"""Which precision is noted as the fastest."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from export.bundle.manifest import ONNX_FLOAT32, ONNX_FP16, ONNX_INT8, ONNX_INT8_QDQ
from export.precision_choice import choose

CLIP = np.zeros((1, 4, 16, 16, 3), np.uint8)


class Slow:
    """Stands for ONNX Runtime; INT8 takes as long as the test says, of a clock that it moves."""

    clock = 0.0
    int8 = 0.0
    closed: list[str] = []  # noqa: RUF012

    def __init__(self, path: Path, cuda: bool) -> None:
        assert not cuda
        self.name = path.name

    def run(self, frames: NDArray[np.uint8]) -> None:
        Slow.clock += self.int8 if self.name == ONNX_INT8 else 0.02

    def close(self) -> None:
        self.closed.append(self.name)


@pytest.mark.parametrize(("seconds", "order"), [(0.0, ("int8", "float32")),
                                                (0.2, ("float32", "int8"))])  # fmt: skip
def test_the_cpus_order_is_measured(
    seconds: float, order: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("export.precision_choice.OnnxRuntime", Slow)
    clock = SimpleNamespace(perf_counter=lambda: Slow.clock)
    monkeypatch.setattr("export.precision_choice.time", clock)
    monkeypatch.setattr(Slow, "int8", seconds)
    monkeypatch.setattr(Slow, "closed", [])
    choice = choose(tmp_path, [ONNX_FLOAT32, ONNX_INT8], CLIP)["cpu"]
    assert choice.order == order
    assert choice.milliseconds == {
        "float32": pytest.approx(20),
        "int8": pytest.approx(1000 * seconds),
    }
    assert "taking turns: " + order[0] in choice.reason
    assert Slow.closed == [ONNX_FLOAT32, ONNX_INT8]


def test_a_gpus_order_is_by_stated_rates_of_what_has_passed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("export.precision_choice.OnnxRuntime", Slow)
    files = [ONNX_FLOAT32, ONNX_FP16, ONNX_INT8_QDQ]
    choice = choose(tmp_path, files, CLIP)["gpu"]
    assert choice.order == ("int8", "fp16", "float32")
    assert "not measured" in choice.reason
    assert choice.milliseconds is None
