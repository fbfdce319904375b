"""TimeSformer-B, random weights and real shapes, exported to every precision on the CPU; then each
of its graphs for GPUs parsed and built by TensorRT-RTX.

    make test-slow      or      .venv/bin/python -m tests.slow.check [--variant demo] [--json FILE]

Prints each step with its time, processor time and peak memory; children count too. Fails if a graph
is missing without a reason or cannot be built; not if it is slow, since machines differ.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from export.bundle.bundle import Bundle, BundleStore
from export.bundle.manifest import GRAPHS
from export.runtime.plans import GPU_GRAPHS, PlanKey
from export.runtime.tensorrt import Wanted
from export.tensorrt.builder import BuildJob, build_plan
from model.checkpoints import save_safetensors
from model.config import VARIANTS, ModelConfig
from tests.benchmarks.networks import random_model
from tests.processes import descendants_of, resident_bytes, stat

TIMESFORMER = Path(sys.executable).with_name("timesformer")
NAME = "slow"
RTX = "tensorrt_rtx_bindings"
GOAL_SECONDS, GOAL_BYTES = 600, 12 << 30
_BATCHES = (1, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=sorted(VARIANTS), default="base")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="timesformer-slow-") as folder:
        figures = check(VARIANTS[options.variant], Path(folder))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def check(config: ModelConfig, work: Path) -> dict[str, Any]:
    weights, store = work / "weights.safetensors", work / "store"
    save_safetensors(random_model(config), weights, config)
    load = os.getloadavg()[0]
    print(f"load before: {load:.1f} on {os.cpu_count()} cores", flush=True)
    exported = run_export(weights, store)
    within = exported["seconds"] <= GOAL_SECONDS and exported["peak_bytes"] <= GOAL_BYTES
    print(
        f"export: {exported['seconds']:.0f} s, {exported['cpu_seconds']:.0f} s of processors, "
        f"peak {exported['peak_bytes'] / 2**30:.2f} GiB; goal of 10 minutes and 12 GiB "
        f"{'met' if within else 'not met'}; load after: {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    bundle = BundleStore(store).open(NAME)
    check_bundle(bundle)
    plans = [build(bundle, precision, work) for precision in GPU_GRAPHS if has(bundle, precision)]
    return {"load": load, "export": exported, "plans": plans}


def run_export(weights: Path, store: Path) -> dict[str, Any]:
    """`timesformer export --precision auto`, with each step as it is told."""
    command = [TIMESFORMER, "export", weights, "--name", NAME, "--store", store]
    started = time.monotonic()
    steps: list[tuple[float, float, str]] = []
    with subprocess.Popen(
        [*command, "--precision", "auto"], stderr=subprocess.PIPE, text=True
    ) as child:
        memory = Memory(child.pid)
        for line in child.stderr or ():
            passed, used, step = time.monotonic() - started, _processor(child.pid), line.strip()
            steps.append((round(passed, 1), used, step))
            print(f"  {passed:7.1f} s  {used:7.1f} s of processors  {step}", flush=True)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - started
    if child.returncode:
        sys.exit(f"the export ended with status {child.returncode}")
    if not steps:
        sys.exit("the export told of no progress")
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_bytes": max(memory.stop(), usage.ru_maxrss * 1024),
        "steps": steps,
    }


class Memory(threading.Thread):
    """The most that a process and its descendants hold together, looked at ten times a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid = pid
        self._peak = 0
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._over.wait(0.1):
            held = map(resident_bytes, (self._pid, *descendants_of(self._pid)))
            self._peak = max(self._peak, sum(held))

    def stop(self) -> int:
        self._over.set()
        self.join()
        return self._peak


def _processor(pid: int) -> float:
    """Seconds of processors that a process has used, all its threads together."""
    fields = stat(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def has(bundle: Bundle, precision: str) -> bool:
    return GPU_GRAPHS[precision] in bundle.manifest.files


def check_bundle(bundle: Bundle) -> None:
    """Every kind of graph is there, or the manifest says why not."""
    bundle.verify()
    manifest = bundle.manifest
    for file in GRAPHS.values():
        if file in manifest.verification:
            parity = manifest.verification[file]
            entry = manifest.files[file]
            stays = [each.name for each in manifest.products.get(file, ()) if each.reason]
            print(
                f"{file}: {entry.size / 2**20:.0f} MiB, cosine {parity.centred_cosine:.6f}, "
                f"largest difference {parity.max_difference:.3g}, kept wider: {len(stays)}"
            )
        elif file in manifest.rejected:
            print(f"{file} is left out: {manifest.rejected[file]}")
        else:
            sys.exit(f"{file} is missing, and the manifest does not say why")


def build(bundle: Bundle, precision: str, work: Path) -> dict[str, Any]:
    """Figures of building a plan, in a child as always; no GPU is needed for it."""
    file = GPU_GRAPHS[precision]
    key = PlanKey(
        gpu="none", compute_capability="9.0", tensorrt="rtx", precision=precision, batches=_BATCHES
    )
    wanted = Wanted(key, bundle.file(file), bundle.manifest.files[file].sha256, work / "plans")
    job = BuildJob.of(wanted, module=RTX)
    memory: list[Memory] = []
    plan = build_plan(job, on_start=lambda child: memory.append(Memory(child.pid)))
    peak, facts = memory[0].stop(), plan.facts
    print(
        f"TensorRT-RTX, {file}: {facts.seconds:.0f} s, {facts.plan.size / 2**20:.0f} MiB, "
        f"peak {peak / 2**30:.2f} GiB; {facts.network}",
        flush=True,
    )
    return {
        "precision": precision,
        "seconds": facts.seconds,
        "bytes": facts.plan.size,
        "peak_bytes": peak,
        "network": facts.network,
    }


if __name__ == "__main__":
    main()
