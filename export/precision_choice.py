"""Which precision `auto` takes: the fastest that has passed the gate.

On the CPU that is measured, here and now. What GPUs do is known by the rates that their makers
state for matrix products; which of them has which type is asked where a plan is built.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from export.bundle.manifest import GRAPHS, Choice
from export.runtime.onnxruntime import OnnxRuntime
from export.runtime.plans import GPU_GRAPHS

_CPU_KINDS = ("float32", "int8")
_ROUNDS = 5
_BY_RATE = (
    "by the stated rates of matrix products, not measured: FP8 and INT8 twice that of FP16, FP16 "
    "that of float32 many times"
)


def choose(
    folder: Path, files: Collection[str], clip: NDArray[np.uint8]
) -> dict[Literal["cpu", "gpu"], Choice]:
    """Orders the graphs of a folder by speed, for CPUs and for GPUs.

    Args:
        files: names of the graphs that have passed the gate.
        clip: uint8 (1, time, height, width, 3).
    """
    on_cpu = [kind for kind in _CPU_KINDS if GRAPHS[kind] in files]
    times = _milliseconds({kind: folder / GRAPHS[kind] for kind in on_cpu}, clip)
    order = tuple(sorted(on_cpu, key=lambda kind: times[kind]))
    told = ", ".join(f"{kind} {times[kind]:.3g} ms" for kind in order)
    return {
        "cpu": Choice(
            order=order,
            reason=f"measured by the export, a clip at a time, taking turns: {told}",
            milliseconds=times,
        ),
        "gpu": Choice(
            order=tuple(kind for kind, file in GPU_GRAPHS.items() if file in files),
            reason=_BY_RATE,
        ),
    }


def _milliseconds(graphs: dict[str, Path], clip: NDArray[np.uint8]) -> dict[str, float]:
    """Of a clip, the median of rounds; they take turns, so that all see the same machine."""
    runtimes = {kind: OnnxRuntime(path, cuda=False) for kind, path in graphs.items()}
    taken: dict[str, list[float]] = {kind: [] for kind in runtimes}
    try:
        for turn in range(_ROUNDS + 1):
            for kind, runtime in runtimes.items():
                started = time.perf_counter()
                runtime.run(clip)
                if turn:  # the first one warms up
                    taken[kind].append(time.perf_counter() - started)
    finally:
        for runtime in runtimes.values():
            runtime.close()
    return {kind: round(1000 * median(seconds), 3) for kind, seconds in taken.items()}
