"""How many CPU cores this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


def usable_cores(cpu_max: Path = _CPU_MAX) -> int:
    """Cores by the scheduler's affinity and the container's quota; one at least.

    Libraries count the machine's cores instead. In a container of 2 on a node of 64 that makes 64
    threads which wait for each other.

    Args:
        cpu_max: the quota file of cgroup v2 (kernel documentation, cgroup-v2.rst, "cpu.max").
    """
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = cpu_max.read_text().split()
    except (OSError, ValueError):
        return cores
    if quota == "max":
        return cores
    return max(1, min(cores, math.ceil(int(quota) / int(period))))
