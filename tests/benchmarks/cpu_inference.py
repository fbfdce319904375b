"""What each exact rewrite gains on a CPU: ONNX Runtime on the plain export of the network as it is
published, on our graph, on our graph without each of its rewrites in turn, and in INT8.

    python -m tests.benchmarks.cpu_inference [--variant base] [--rounds 7] [--threads 0] [--without]

Batch 1, random weights. The graphs take turns, and ratios are of one round each, since the machine
may be shared. Processor time is given beside wall time: with `--threads 1`, where no thread spins,
it hardly sees the neighbours. `--without` measures a graph more for each rewrite, all of them but
that one. A bundle's engines are measured by `timesformer bench`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from export.benchmark.timing import Entrant, speed_up, take_turns, timing
from export.graph.int8_cpu import quantize
from export.graph.onnx_export import export_onnx
from export.graph.rewrite import REWRITES, InferenceTimeSformer, multiply_adds, rewrite
from export.runtime.onnxruntime import OnnxRuntime
from export.verification.parity import compare
from export.verification.torch_reference import run_reference
from model.config import VARIANTS
from model.network.cost import cost
from model.network.timesformer import TimeSformer
from tests.benchmarks.networks import random_model
from tests.benchmarks.published import AsPublished

NAIVE = "naive export, ONNX Runtime"
OURS_DROPPED = "the same, last MLP dropped"
REWRITTEN = "rewritten"


def main() -> None:
    """Prints a line per graph: ratio to the plain export, and how far its answers are off."""
    options = parse()
    config = VARIANTS[options.variant]
    model = random_model(config)
    clip = np.random.default_rng(0).integers(
        0, 256, (1, config.num_frames, config.image_size, config.image_size, 3), dtype=np.uint8
    )
    reference = run_reference(model, clip)
    with tempfile.TemporaryDirectory() as folder:
        engines = load(model, Path(folder), options.threads, options.without)
    entrants = [Entrant(name, engine.run, None) for name, engine in engines.items()]
    turns = take_turns(entrants, clip, [1], options.rounds, turn_seconds=0)
    before, after = cost(config).multiply_adds, multiply_adds(rewrite(model))
    print(f"{options.variant}: {before / 1e9:.2f} G multiply-adds, rewritten {after / 1e9:.2f} G")
    print(f"{'graph':30s}   p50 s  speed-up  (quartiles)  by cpu time  off by   cosine")
    for name, engine in engines.items():
        mine, naive = turns[name, 1], turns[NAIVE, 1]
        wall, cpu = speed_up(mine, naive), speed_up(mine, naive, cpu=True)
        parity = compare(reference, engine.run(clip))
        off_by = parity.max_difference / np.abs(reference.logits).max()
        print(
            f"{name:30s} {timing(mine, 1, None).p50_ms / 1000:7.3f}  {wall.median:8.3f}  "
            f"({wall.low:.2f}, {wall.high:.2f})  {cpu.median:11.3f}  "
            f"{off_by:.1e}  {parity.centred_cosine:.6f}"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=sorted(VARIANTS), default="base")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--without", action="store_true")
    return parser.parse_args()


def load(model: TimeSformer, folder: Path, threads: int, without: bool) -> dict[str, OnnxRuntime]:
    """The graphs to compare, loaded; their files are not needed any more."""
    graphs: dict[str, TimeSformer | InferenceTimeSformer] = {
        NAIVE: AsPublished.of(model),
        OURS_DROPPED: model,
        REWRITTEN: rewrite(model),
    }
    for left_out in REWRITES if without else ():
        rest = [rewriting for rewriting in REWRITES if rewriting is not left_out]
        graphs[f"  not {left_out.__name__}"] = rewrite(model, rest)
    path, rounded = folder / "model.onnx", folder / "model.int8.onnx"
    engines = {}
    for name, network in graphs.items():
        export_onnx(network, path)
        engines[name] = OnnxRuntime(path, cuda=False, threads=threads)
        if name == REWRITTEN:
            quantize(path, rounded)
            engines["rewritten, int8"] = OnnxRuntime(rounded, cuda=False, threads=threads)
    return engines


if __name__ == "__main__":
    main()
