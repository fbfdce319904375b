"""What the export gains on a CPU: ONNX Runtime on the original network's graph and on ours, in
float32 and in INT8.

    python -m tests.benchmarks.cpu_inference [--variant base] [--rounds 7] [--threads 0] [--without]

Batch 1, random weights, whose answers are compared too. The graphs take turns and each round gives
a ratio to the naive graph in the same round, since the machine may be shared: believe the median of
the ratios, not the seconds. Processor time is given beside wall time: with `--threads 1`, where no
thread spins, it hardly sees the neighbours. `--without` measures one graph more for each rewrite,
all of them but that one.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from export.onnx import export_onnx
from export.precision import quantize
from export.reference import run_reference
from export.rewrite import REWRITES, InferenceTimeSformer, multiply_adds, rewrite
from export.runtime.interface import Outputs
from export.runtime.onnxruntime import OnnxRuntime
from export.verify import compare
from model.config import VARIANTS, ModelConfig
from model.cost import cost
from model.timesformer import TimeSformer

NAIVE = "naive"


class Seconds(NamedTuple):
    """What one run took: by the clock, and of all processors together."""

    wall: float
    cpu: float


def main() -> None:
    """Prints a line per graph: ratio to the naive graph, and how far its answers are off."""
    options = parse()
    config = VARIANTS[options.variant]
    model = random_model(config)
    clip = np.random.default_rng(0).integers(
        0, 256, (1, config.num_frames, config.image_size, config.image_size, 3), dtype=np.uint8
    )
    reference = run_reference(model, clip)
    with tempfile.TemporaryDirectory() as folder:
        engines = load(model, Path(folder), options.threads, options.without)
    seconds = measure(engines, clip, options.rounds)
    before, after = cost(config).multiply_adds, multiply_adds(rewrite(model))
    print(f"{options.variant}: {before / 1e9:.2f} G multiply-adds, rewritten {after / 1e9:.2f} G")
    print(
        "graph                       wall s   speed-up   (quartiles)  by cpu time  off by   cosine"
    )
    for name, times in seconds.items():
        wall, cpu = (ratios(seconds[NAIVE], times, clock) for clock in ("wall", "cpu"))
        answers = engines[name].run(clip)
        print(
            f"{name:26s} {statistics.median(t.wall for t in times):7.3f}   {wall[1]:8.3f}   "
            f"({wall[0]:.2f}, {wall[2]:.2f})  {cpu[1]:11.3f}  "
            f"{error(reference, answers):.1e}  {compare(reference, answers).centred_cosine:.6f}"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=sorted(VARIANTS), default="base")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--without", action="store_true")
    return parser.parse_args()


def random_model(config: ModelConfig) -> TimeSformer:
    """No weight is zero; the scale is that of trained weights, so that attention is not uniform."""
    generator = torch.Generator().manual_seed(0)
    model = TimeSformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)
    return model


def load(model: TimeSformer, folder: Path, threads: int, without: bool) -> dict[str, OnnxRuntime]:
    """The graphs to compare, loaded; their files are not needed any more."""
    graphs: dict[str, TimeSformer | InferenceTimeSformer] = {
        NAIVE: model,
        "rewritten": rewrite(model),
    }
    for left_out in REWRITES if without else ():
        rest = [rewriting for rewriting in REWRITES if rewriting is not left_out]
        graphs[f"  not {left_out.__name__}"] = rewrite(model, rest)
    path, rounded = folder / "model.onnx", folder / "model.int8.onnx"
    engines = {}
    for name, network in graphs.items():
        export_onnx(network, path)
        engines[name] = OnnxRuntime(path, cuda=False, threads=threads)
        if name == "rewritten":
            quantize(path, rounded)
            engines["rewritten, int8"] = OnnxRuntime(rounded, cuda=False, threads=threads)
    return engines


def measure(
    engines: dict[str, OnnxRuntime], clip: NDArray[np.uint8], rounds: int
) -> dict[str, list[Seconds]]:
    """Times the clip on each engine in turn, round by round, after one round to warm up."""
    seconds: dict[str, list[Seconds]] = {name: [] for name in engines}
    for round_number in range(rounds + 1):
        for name, engine in engines.items():
            wall, cpu = time.perf_counter(), time.process_time()
            engine.run(clip)
            if round_number:
                seconds[name].append(Seconds(time.perf_counter() - wall, time.process_time() - cpu))
    return seconds


def ratios(naive: list[Seconds], times: list[Seconds], clock: str) -> list[float]:
    """How many times faster than the naive graph, as quartiles over the rounds."""
    return statistics.quantiles(
        (getattr(n, clock) / getattr(t, clock) for n, t in zip(naive, times, strict=True)),
        method="inclusive",
    )


def error(reference: Outputs, outputs: Outputs) -> float:
    """Largest difference of two logits, relative to the largest logit."""
    difference = np.abs(reference.logits - outputs.logits).max()
    return float(difference / np.abs(reference.logits).max())


if __name__ == "__main__":
    main()
