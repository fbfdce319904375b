"""Twice as many videos as the service can do, for two minutes: what becomes of those that it takes,
and how fast it turns the others away.

    python -m tests.load.overload [--seconds 120] [--variant tiny]

The arrivals are an open model (k6): they do not wait for answers, as a crowd does not. Capacity is
what a closed loop of clients gets, right before and right after, since a machine that is shared
does not stay the same for minutes. The network has random weights. k6 and the service share the
machine. Exits with 1 if anything but 200 and 503 with Retry-After came back, or a goal was missed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from model.demo import SAMPLE_CLIP
from tests.e2e.conftest import TIMESFORMER, Service, run_service

SCRIPT = Path(__file__).with_name("open_model.js")
PATH = "/v1/classify"
_CLIENTS = 8  # of the closed loop
_IN_FLIGHT = 4  # clips: two batches of two, the default on a CPU


class Phase(NamedTuple):
    """What came back of one phase of load; times in ms."""

    rate: float
    """Videos a second that were taken and answered, over k6's run without its own start."""
    refused: int
    wrong: int
    unsent: int
    accepted_ms: dict[str, float]
    refused_ms: dict[str, float]
    cores: float
    """That k6 itself took of the machine."""


def main() -> None:
    """Runs the phases and prints a table and the verdicts."""
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder), options.variant)
        flags = ["--store", str(store), "--log-level", "warning", "--max-clips-per-request", "4"]
        with run_service(*flags) as service:
            rough = measure_capacity(service, options.closed_seconds)
        # Two seconds' worth: what a client of an interactive service will wait.
        queue = max(_CLIENTS, round(2 * rough))
        with run_service(*flags, "--max-queue-clips", str(queue)) as service:
            measure_capacity(service, 3)  # so that it knows its own rate
            calm = load(service, options, 0.5 * rough, min(30, options.seconds))
            before = measure_capacity(service, options.closed_seconds)
            storm = load(service, options, 2 * rough, options.seconds)
            recovery = seconds_to_recover(service, calm.accepted_ms["p(95)"])
            after = measure_capacity(service, options.closed_seconds)
    capacity = (before + after) / 2
    print(
        f"{options.variant}: capacity {before:.1f} videos/s before, {after:.1f} after; "
        f"queue of {queue} clips"
    )
    print_table([("half of it", calm), ("twice of it", storm)])
    print(f"first answer as fast as before {recovery:.1f} s after the storm")
    judge(calm, storm, capacity, queue)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--closed-seconds", type=int, default=20)
    parser.add_argument("--variant", default="tiny")
    parser.add_argument("--k6", type=Path, default=Path("build/faults/bin/k6"))
    return parser.parse_args()


def make_store(folder: Path, variant: str) -> Path:
    """A store with one bundle of random weights."""
    from model.checkpoints import save_safetensors
    from model.config import VARIANTS
    from model.training.initialisation import fresh_model

    config = VARIANTS[variant]
    weights = folder / "weights.safetensors"
    labels = [f"class {index}" for index in range(config.num_classes)]
    save_safetensors(fresh_model(config, seed=0), weights, config, labels=labels)
    store = folder / "store"
    command = [TIMESFORMER, "export", weights, "--name", variant, "--store", store]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return store


def measure_capacity(service: Service, seconds: float) -> float:
    """Videos a second that a closed loop of clients gets through."""
    clip = SAMPLE_CLIP.read_bytes()
    ends = time.monotonic() + seconds

    def loop(_: int) -> int:
        done = 0
        with httpx.Client(base_url=service.client.base_url, timeout=120) as client:
            while time.monotonic() < ends:
                done += client.post(PATH, files={"file": clip}).status_code == 200
        return done

    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(_CLIENTS) as pool:
        done = sum(pool.map(loop, range(_CLIENTS)))
    return done / (time.monotonic() - began)


def load(service: Service, options: argparse.Namespace, rate: float, seconds: float) -> Phase:
    """Runs k6 at a fixed rate of arrivals."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "summary.json"
        variables = {
            "URL": f"{service.client.base_url}{PATH}".replace("//v1", "/v1"),
            "FILE": str(SAMPLE_CLIP),
            "RATE": f"{rate:.2f}",
            "SECONDS": f"{seconds:.0f}",
            "VUS": str(max(20, round(rate * 20))),
            "OUT": str(out),
        }
        given = [part for item in variables.items() for part in ("-e", "=".join(item))]
        command = [options.k6, "run", "--quiet", "--no-usage-report", *given, SCRIPT]
        began, used = time.monotonic(), _children_seconds()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        cores = (_children_seconds() - used) / (time.monotonic() - began)
        metrics: dict[str, Any] = json.loads(out.read_text())

    def count(name: str) -> int:
        return int(metrics.get(name, {}).get("values", {}).get("count", 0))

    def values(name: str) -> dict[str, float]:
        return dict(metrics.get(name, {}).get("values", {}))

    return Phase(
        values("accepted").get("rate", 0.0),
        count("refused"),
        count("wrong"),
        count("dropped_iterations"),
        values("accepted_ms"),
        values("refused_ms"),
        cores,
    )


def _children_seconds() -> float:
    """Processor time of the child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def seconds_to_recover(service: Service, usual_ms: float) -> float:
    """How long after the load an answer comes as fast as under light load again."""
    clip = SAMPLE_CLIP.read_bytes()
    began = time.monotonic()
    while time.monotonic() - began < 60:
        sent = time.monotonic()
        answer = service.client.post(PATH, files={"file": clip})
        if answer.status_code == 200 and (time.monotonic() - sent) * 1e3 <= usual_ms:
            break
    return time.monotonic() - began


def print_table(phases: Sequence[tuple[str, Phase]]) -> None:
    print(
        "load        | taken/s | taken: p50, p95 ms | refused | refused: p50, p95, p99 ms | wrong"
    )
    for name, phase in phases:
        taken = ", ".join(f"{phase.accepted_ms.get(key, 0):.0f}" for key in ("med", "p(95)"))
        turned = ", ".join(
            f"{phase.refused_ms.get(key, 0):.0f}" for key in ("med", "p(95)", "p(99)")
        )
        print(
            f"{name:11} | {phase.rate:7.2f} | {taken:18} | {phase.refused:7} | {turned:25} "
            f"| {phase.wrong}"
        )
        late = f", and was too slow to send {phase.unsent} more" if phase.unsent else ""
        print(f"            | k6 took {phase.cores:.2f} cores{late}")


def judge(calm: Phase, storm: Phase, capacity: float, queue: int) -> None:
    """Says which goals were met; what is taken may wait for the queue and the batches before it."""
    bound = calm.accepted_ms["p(95)"] + 1e3 * (queue + _IN_FLIGHT) / capacity
    goals = {
        "nothing but 200 and 503 with Retry-After": calm.wrong + storm.wrong == 0,
        "every arrival was sent": storm.unsent == 0,
        "p95 of what is taken: at most the queue's time more": storm.accepted_ms["p(95)"] <= bound,
        "95 % of the others are refused in under 50 ms": storm.refused_ms.get("p(95)", 0) < 50,
        "throughput at least 95 % of capacity": storm.rate >= 0.95 * capacity,
    }
    for goal, met in goals.items():
        print(f"{'met   ' if met else 'MISSED'} {goal}")
    if not all(goals.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
