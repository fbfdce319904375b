"""GPUs in `/metrics`, as a driver made up for the test tells of them."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from service.observability.metrics import Metrics


class NvmlError(Exception):
    pass


def driver(**functions: Any) -> SimpleNamespace:
    def memory(device: int) -> SimpleNamespace:
        return SimpleNamespace(used=1_000 * (device + 1), total=80_000)

    made_up = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetUtilizationRates": lambda device: SimpleNamespace(gpu=40 + device),
        "NVMLError": NvmlError,
    }
    return SimpleNamespace(**{**made_up, **functions})


def test_each_gpu_has_its_use_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", driver())
    registry = Metrics().registry

    def value(name: str, gpu: str) -> float | None:
        return registry.get_sample_value(f"timesformer_gpu_{name}", {"gpu": gpu})

    assert (value("utilization_ratio", "0"), value("utilization_ratio", "1")) == (0.4, 0.41)
    assert (value("memory_used_bytes", "1"), value("memory_bytes", "1")) == (2_000, 80_000)


def test_a_gpu_that_does_not_answer_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(index: int) -> int:
        if index == 0:
            raise NvmlError("GPU is lost")
        return index

    monkeypatch.setitem(sys.modules, "pynvml", driver(nvmlDeviceGetHandleByIndex=lost))
    text = Metrics().render().decode()
    assert 'timesformer_gpu_memory_bytes{gpu="1"}' in text
    assert 'gpu="0"' not in text


def test_without_a_driver_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> None:
        raise NvmlError("no driver")

    monkeypatch.setitem(sys.modules, "pynvml", driver(nvmlInit=no_driver))
    assert "timesformer_gpu_memory_bytes{" not in Metrics().render().decode()


def test_without_the_package_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "timesformer_gpu_memory_bytes{" not in Metrics().render().decode()
