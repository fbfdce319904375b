"""What an engine takes until its first answer: a process of its own that opens one artefact.

    python -m tests.benchmarks.startup BUNDLE ARTEFACT cpu|cuda GPU THREADS LARGEST [ENGINES ...]

`measure` runs it and gives what it found.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from export.artefacts import Artefact, find_artefacts
from export.bundle import Bundle
from export.runtime.cuda import Cuda
from export.runtime.interface import RuntimeUnavailableError

_SECONDS = 600


class Startup(NamedTuple):
    """Times from the start of the process; memory beyond what it had before the engine."""

    load_seconds: float
    """That the engine took to load the artefact."""
    first_answer_seconds: float
    """That the first clip took."""
    start_seconds: float
    """From nothing to the first answer, imports and all."""
    resident_bytes: int
    """After the first answer."""
    peak_bytes: int
    device_bytes: int | None
    """Taken of the GPU's memory, by all processes; None on a CPU."""


class StartupError(RuntimeError):
    """The engine could not be started in a process of its own; the message says why."""


def measure(
    bundle: Path,
    artefact: Artefact,
    *,
    gpu: int = 0,
    threads: int = 0,
    largest: int,
    engines: Sequence[Path] = (),
) -> Startup:
    """Starts a process for one artefact and waits for its first answer.

    Args:
        largest: most clips in a batch; plans are made ready for each size up to it.

    Raises:
        StartupError: it did not come.
    """
    values = (bundle, artefact.name, artefact.device, gpu, threads, largest, *engines)
    begin = time.perf_counter()
    try:
        answer = subprocess.run(
            [sys.executable, "-m", __name__, *map(str, values)],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise StartupError(f"no answer in {_SECONDS} s") from None
    seconds = time.perf_counter() - begin
    if answer.returncode:
        lines = answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"]
        raise StartupError(lines[-1])
    return Startup(**{**json.loads(answer.stdout), "start_seconds": seconds})


def main() -> None:
    bundle_path, artefact, device, gpu, threads, largest, *engines = sys.argv[1:]
    bundle = Bundle(Path(bundle_path))
    found = find_artefacts(
        bundle,
        device="cuda" if device == "cuda" else "cpu",
        cuda=device == "cuda",
        gpu=int(gpu),
        engines=[Path(folder) for folder in engines] or [None],
        largest=int(largest),
        threads=int(threads),
    )
    (wanted,) = (each for each in found.artefacts if each.name == artefact)
    preprocessing = bundle.config.preprocessing
    size = preprocessing.image_size
    clip = np.zeros((1, preprocessing.num_frames, size, size, 3), np.uint8)
    before, _ = resident_bytes()
    free = _free_device_bytes(int(gpu)) if device == "cuda" else None
    begin = time.perf_counter()
    runtime = wanted.open()
    loaded = time.perf_counter()
    runtime.run(clip)
    answered = time.perf_counter()
    resident, peak = resident_bytes()
    left = _free_device_bytes(int(gpu)) if free is not None else None
    facts = {
        "load_seconds": loaded - begin,
        "first_answer_seconds": answered - loaded,
        "resident_bytes": resident - before,
        "peak_bytes": peak - before,
        "device_bytes": free - left if free is not None and left is not None else None,
    }
    print(json.dumps(facts))


def resident_bytes(status: Path = Path("/proc/self/status")) -> tuple[int, int]:
    """Returns the memory that this process has now, and the most that it ever had."""
    sizes = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    now, most = (int(sizes[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, most


def _free_device_bytes(gpu: int) -> int | None:
    """None without cuda-bindings, which the TensorRT runtime brings."""
    try:
        return Cuda(gpu).free_bytes()
    except RuntimeUnavailableError:
        return None


if __name__ == "__main__":
    main()
