"""What figures depend on: the processor, its usable cores, how busy they are, and versions."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from export.runtime.cores import usable_cores

# What decides how fast a CPU multiplies.
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "asimd", "i8mm")


def machine_facts() -> dict[str, Any]:
    """For a report; the load is of all processes in the last minute."""
    facts = _cpu_facts(Path("/proc/cpuinfo"))
    cpu, flags = facts.get("model name", platform.machine()), facts.get("flags", "").split()
    return {
        "cpu": cpu,
        "instructions": [flag for flag in _FLAGS if flag in flags],
        "cores": usable_cores(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def resident_bytes(status: Path = Path("/proc/self/status")) -> tuple[int, int]:
    """Memory that this process has now, and the most that it ever had."""
    sizes = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    now, most = (int(sizes[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, most


def _cpu_facts(cpuinfo: Path) -> dict[str, str]:
    """Of the first core."""
    try:
        first = cpuinfo.read_text().partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
