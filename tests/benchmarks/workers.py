"""What several workers cost and gain: `timesformer serve` with 1, 2 and so on, in turn.

    python -m tests.benchmarks.workers [--workers 1 2] [--concurrency 16] [--seconds 5] [--rounds 3]

Videos are decoded for real; clips come ready over `/v2`. CPU time is that of the event loops'
threads: what one process of Python can do ends where that of a second is one second. It says
something on a machine that others use too; requests a second do not. The load generator runs on the
same cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np

from export.bundle import BundleStore
from model.demo import STORE
from tests.benchmarks.serving import load, percentile, video_request
from tests.e2e.conftest import run_service
from tests.e2e.test_serving import children_of

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Figures(NamedTuple):
    per_second: float
    p50_ms: float
    p99_ms: float
    engines_ms: float
    """CPU time a request, of the event loop beside the engines."""
    workers_ms: float
    """Of those of all workers together; 0 if there is one, which is the other's."""


def main() -> None:
    """Prints a line for each kind of request and number of workers: medians of the rounds."""
    options = parse()
    print("kind    workers  req/s  p50 ms  p99 ms  loop beside engines, ms  workers' loops, ms")
    for kind, request in (("clips", clip_request()), ("videos", video_request())):
        rounds: dict[int, list[Figures]] = {count: [] for count in options.workers}
        for _ in range(options.rounds):
            for count in options.workers:
                rounds[count].append(measure(count, request, options.concurrency, options.seconds))
        for count, figures in rounds.items():
            middle = Figures(*map(statistics.median, zip(*figures, strict=True)))
            print(
                f"{kind:7} {count:7}  {middle.per_second:5.0f}  {middle.p50_ms:6.1f}  "
                f"{middle.p99_ms:6.1f}  {middle.engines_ms:23.2f}  {middle.workers_ms:18.2f}"
            )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def measure(workers: int, request: bytes, concurrency: int, seconds: float) -> Figures:
    flags = ("--workers", str(workers), "--log-level", "warning", "--max-batch-clips", "16")
    with run_service(*flags) as service:
        port = service.client.base_url.port
        assert port is not None
        asyncio.run(load(port, concurrency, 1.0, request))
        engines = service.process.pid
        several = {child for child in children_of(engines) if children_of(child)}
        before = cpu_s(engines), sum(map(cpu_s, several))
        latencies = asyncio.run(load(port, concurrency, seconds, request))
        used = cpu_s(engines) - before[0], sum(map(cpu_s, several)) - before[1]
        return Figures(
            len(latencies) / seconds,
            percentile(latencies, 0.5) * 1e3,
            percentile(latencies, 0.99) * 1e3,
            used[0] / len(latencies) * 1e3,
            used[1] / len(latencies) * 1e3,
        )


def cpu_s(pid: int) -> float:
    """What the first thread of a process has used so far."""
    fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def clip_request() -> bytes:
    """One random clip for the demo model, as it goes over the wire."""
    config = BundleStore(STORE).open("demo").config
    shape = [1, config.num_frames, config.image_size, config.image_size, 3]
    frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    tensor = {"name": "frames", "datatype": "UINT8", "shape": shape}
    head = json.dumps(
        {
            "inputs": [{**tensor, "parameters": {"binary_data_size": frames.nbytes}}],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    return (
        b"POST /v2/models/demo/infer HTTP/1.1\r\nHost: localhost\r\n"
        b"Inference-Header-Content-Length: %d\r\nContent-Length: %d\r\n\r\n"
        % (len(head), len(head) + frames.nbytes)
    ) + b"".join((head, frames.tobytes()))


if __name__ == "__main__":
    main()
