"""How busy and how full the GPUs are, for `/metrics`, asked of NVIDIA's driver when it is scraped.

Needs the package `nvidia-ml-py`, which the extra `gpu` brings. Without it, or without a driver,
there are no such metrics.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

# Name, what it says, and what of NVML's answers it is.
_GAUGES = {
    "timesformer_gpu_utilization_ratio": "Share of the last moment in which the GPU computed.",
    "timesformer_gpu_memory_used_bytes": "Memory of the GPU in use, by any process.",
    "timesformer_gpu_memory_bytes": "Memory of the GPU.",
}


class GpuCollector(Collector):
    """The GPUs that the driver shows; none where there is no driver."""

    def __init__(self) -> None:
        self._nvml = _start_nvml()

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """One sample a GPU and gauge; a GPU that does not answer is left out."""
        gauges = {
            name: GaugeMetricFamily(name, text, labels=["gpu"]) for name, text in _GAUGES.items()
        }
        for index in range(self._nvml.nvmlDeviceGetCount() if self._nvml else 0):
            try:
                values = self._ask(index)
            except self._nvml.NVMLError:
                continue
            for gauge, value in zip(gauges.values(), values, strict=True):
                gauge.add_metric([str(index)], value)
        return gauges.values()

    def _ask(self, index: int) -> tuple[float, float, float]:
        device = self._nvml.nvmlDeviceGetHandleByIndex(index)
        memory = self._nvml.nvmlDeviceGetMemoryInfo(device)
        busy = self._nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100
        return busy, float(memory.used), float(memory.total)


def _start_nvml() -> Any:
    try:
        import pynvml
    except ModuleNotFoundError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver
        return None
    return pynvml
