"""What a GPU makes of `base`: parity in 16 bits, inference, share of the chip's limit, training.

    python -m tests.benchmarks.gpu --json gpu.json

On a machine with nothing but PyTorch: ONNX Runtime and TensorRT take part where they are installed,
and what did not is named with its reason. Entrants take turns, round by round, beside one large
product; the answers of each are held to the original's in float32. The file is whole after every
step, and the same command goes on with it: where a command may take ten minutes, `--minutes 8`,
again and again until nothing is left. At the end every goal is met, not met, or not measured.
Without a GPU `--device cpu --variant demo` runs all of it that a CPU can, to see that it runs.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from model.config import VARIANTS
from model.cost import cost
from tests.benchmarks import gpu_networks, gpu_products, gpu_training
from tests.benchmarks.gpu_bench import DTYPES, Bench, Entrant, agreement, share
from tests.benchmarks.gpu_report import GOAL_BATCH, Report, ReportError, Row, tables

REPOSITORY = Path(__file__).parents[2]
PARITY_BATCH = 4
PACKAGES = ("onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "triton")
ENGINES = "ONNX Runtime and TensorRT"

INFERENCE = ("eager", "compile", "engines")
TRAINING = ("training", "training-compile")
SECTIONS = ("parity", *INFERENCE, *TRAINING)
KINDS = {
    "parity": "parity",
    **dict.fromkeys(INFERENCE, "inference"),
    **dict.fromkeys(TRAINING, "training"),
}
"""Where in the report a section's rows go."""


class Step(NamedTuple):
    """A part that is measured and written down at once."""

    section: str
    batch: int

    def __str__(self) -> str:
        return f"{self.section}, batch {self.batch}"


def main() -> None:
    options = parse()
    started = time.monotonic()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    # What was compiled for a step that was cut off is there when it begins again.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(options.work / "compiled"))
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        report = Report(options.json, machine(options))
    except ReportError as error:
        sys.exit(str(error))
    for key, value in report.content["machine"].items():
        print(f"{key}: {value}")
    left = steps(options, report)
    script = functools.cache(lambda: Script(Bench(options)))
    while left and time.monotonic() - started < options.minutes * 60:
        script().take(left.pop(0), report)
    for line in tables(report.content):
        print(line)
    for step in left:
        print(f"  not begun    {step}: the same command goes on with it")


def parse() -> argparse.Namespace:
    def count(text: str) -> int:
        if (number := int(text)) < 1:
            raise argparse.ArgumentTypeError(f"{number} is less than 1")
        return number

    def counts(text: str) -> list[int]:
        return [count(part) for part in text.split(",")]

    def sections(text: str) -> list[str]:
        named = text.split(",")
        if unknown := set(named) - set(SECTIONS):
            raise argparse.ArgumentTypeError(f"no {', '.join(unknown)} in {', '.join(SECTIONS)}")
        return named

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--variant", choices=sorted(VARIANTS), default="base")
    add("--dtype", choices=sorted(DTYPES), default="fp16", help="of inference")
    add("--batches", type=counts, default=[GOAL_BATCH, 1, 8, 64, 2, 4, 16], help="in this order")
    add("--training-batch", type=count, default=16)
    add("--rounds", type=count, default=5)
    add("--turn-seconds", type=float, default=0.2)
    add("--sections", type=sections, help=f"of {','.join(SECTIONS)}: only these, also once more")
    add("--minutes", type=float, default=float("inf"), help="no step begins after so many")
    add("--backend", default="inductor", help="of torch.compile")
    add("--json", type=Path, help="file for all of it; gone on with if it is there")
    add("--work", type=Path, default=REPOSITORY / "build" / "gpu", help="graphs, plans, kernels")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU; --device cpu --variant demo shows that the script runs")
    return options


def machine(options: argparse.Namespace) -> dict[str, Any]:
    cuda = options.device == "cuda"
    facts: dict[str, Any] = {
        "kind": options.device,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "clocks": _output("nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm", "--format=csv"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": _output("git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"),
        "variant": options.variant,
        "dtype": options.dtype,
        "backend": options.backend,
    }
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    return facts


def _output(*command: str) -> str | None:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip().replace("\n", "; ")


def steps(options: argparse.Namespace, report: Report) -> list[Step]:
    """What is to be done: the first batch and training before the other batches, and last what was
    begun before and ended in the middle, which may do so again."""
    first, *others = [[Step(section, batch) for section in INFERENCE] for batch in options.batches]
    training = [Step(section, options.training_batch) for section in TRAINING]
    parts = [[Step("parity", PARITY_BATCH)], first, training, *others]
    wanted = [step for part in parts for step in part]
    if options.sections is None:
        wanted = [step for step in wanted if str(step) not in report.done]
    else:
        wanted = [step for step in wanted if step.section in options.sections]
    return sorted(wanted, key=lambda step: str(step) in report.began)


class Script:
    """The steps, on one bench."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._engines: Any = None

    def take(self, step: Step, report: Report) -> None:
        """Measures one step and writes it down; what fails of it is left out with its reason."""
        print(f"{step} ...", flush=True)
        report.begin(str(step))
        start = time.monotonic()
        rows: list[Row] = []
        self.bench.left_out = {}
        with self.bench.attempt("all of it"):
            if step.section == "parity":
                rows = self.parity(step.batch)
            elif step.section in INFERENCE:
                rows = self.inference(step.section, step.batch)
            else:
                rows = self.training(step.section, step.batch)
        self.bench.wait()  # a device that is lost ends it here, before anything is taken for done
        self.bench.tidy()
        seconds = time.monotonic() - start
        report.end(str(step), KINDS[step.section], rows, self.bench.left_out, seconds)
        print(f"{step}: {len(rows)} rows in {seconds:.0f} s", flush=True)

    def parity(self, batch: int) -> list[Row]:
        """The rewritten network in PyTorch against the original in float32, on the device."""
        frames, rows = self.bench.frames(batch), []
        exact = self.bench.exact(frames)
        for precision, dtype in (("float32", None), *DTYPES.items()):
            with self.bench.attempt(precision), torch.inference_mode():
                given = self.bench.rewritten(dtype)(frames)
                found = agreement(exact, given, precision)
                rows.append({"entrant": precision, "batch": batch, **found._asdict()})
        return rows

    def inference(self, section: str, batch: int) -> list[Row]:
        """A row for each entrant of a section."""
        bench = self.bench
        with torch.inference_mode():
            frames = bench.frames(batch)
            entrants = self._entrants(section, frames)
            answers = self._compared(entrants, frames)
            entrants = {name: entrants[name] for name in answers}
            if not entrants:
                return []
            entrants[gpu_products.LARGE] = gpu_products.large(bench, bench.dtype)
            with bench.attempt(gpu_products.OWN):
                network = bench.rewritten(bench.dtype)
                entrants[gpu_products.OWN] = gpu_products.own(bench, network, batch)
            times = bench.take_turns(entrants)
        large, own = times[gpu_products.LARGE], times.get(gpu_products.OWN)
        whole = gpu_products.large_side(bench) ** 3
        work = bench.multiply_adds * batch / whole
        return [
            {
                **_timing(name, batch, times[name]),
                "limit": whole / statistics.median(large),
                "share_of_large": share(times[name], large, work),
                "share_of_own_products": share(times[name], own) if own else None,
                **found,
            }
            for name, found in answers.items()
        ]

    def _entrants(self, section: str, frames: torch.Tensor) -> dict[str, Entrant]:
        if section == "eager":
            return gpu_networks.eager(self.bench, frames)
        if section == "compile":
            return gpu_networks.compiled(self.bench, frames)
        options = self.bench.options
        if not self.bench.cuda or options.dtype != "fp16":
            self.bench.left_out[ENGINES] = (
                "the graph is FP16" if self.bench.cuda else "are measured on a GPU"
            )
            return {}
        found: dict[str, Entrant] = {}
        with self.bench.attempt(ENGINES):
            if self._engines is None:
                from tests.benchmarks.gpu_engines import Engines  # wants onnx and onnxruntime

                self._engines = Engines(self.bench, max(options.batches))
            found = self._engines.entrants(frames)
        return found

    def _compared(
        self, entrants: dict[str, Entrant], frames: torch.Tensor
    ) -> dict[str, dict[str, Any]]:
        """How each one's answers to the whole batch are beside the exact ones."""
        exact, found = self.bench.exact(frames), {}
        for name, entrant in entrants.items():
            with self.bench.attempt(name):
                if entrant.answers is None:
                    raise ValueError("it answers nothing")
                given = entrant.answers()
                self.bench.wait()
                found[name] = agreement(exact, given, self.bench.options.dtype)._asdict()
        return found

    def training(self, section: str, batch: int) -> list[Row]:
        """Steps of SGD in bfloat16: ours and the original written plainly."""
        bench = self.bench
        compiled = section == "training-compile"
        entrants, memory = gpu_training.steps(bench, batch, compiled=compiled)
        entrants[gpu_products.LARGE] = gpu_products.large(bench, torch.bfloat16)
        times = bench.take_turns(entrants)
        large = times.pop(gpu_products.LARGE)
        whole = gpu_products.large_side(bench) ** 3
        # Forward once and backward twice, of the network as it is trained.
        work = 3 * cost(bench.config).multiply_adds * batch / whole
        return [
            {
                **_timing(name, batch, times[name]),
                "limit": whole / statistics.median(large),
                "utilisation": share(times[name], large, work),
                "peak_bytes": memory.get(name),
            }
            for name in times
        ]


def _timing(name: str, batch: int, seconds: list[float]) -> Row:
    median = statistics.median(seconds)
    return {
        "entrant": name,
        "batch": batch,
        "milliseconds": median * 1000,
        "clips_per_second": batch / median,
    }


if __name__ == "__main__":
    main()
