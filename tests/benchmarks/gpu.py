"""Measures TimeSformer's inference on a GPU, with nothing but PyTorch.

    python -m tests.benchmarks.gpu --json gpu.json

The original network and ours take turns, round by round, with the limits of the GPU. A network is
reported and not timed if its answers differ from those of the original in float32. The report is
written after every step, and names the steps that failed. No step starts after `--minutes`.
`--device cpu --variant demo` shows that the script runs. `timesformer bench` measures engines.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from model.config import VARIANTS
from tests.benchmarks.gpu_limits import LARGE, MEMORY, PRODUCTS, limits
from tests.benchmarks.gpu_networks import DTYPES, Bench, Entrant, check, entrants

REPOSITORY = Path(__file__).parents[2]
GOAL_BATCH, GOAL_SHARE, GOAL_SPEED_UP = 32, 0.55, 1.5
_MAX_CALLS = 10_000

Row = dict[str, Any]


class Step(NamedTuple):
    """Measured together, and in the report at once."""

    batch: int
    dtype: str
    how: str

    def __str__(self) -> str:
        return f"{self.how}, {self.dtype}, batch {self.batch}"


class Report:
    """Everything that was measured so far.

    Args:
        path: of the JSON file; None keeps the report in memory.
    """

    def __init__(self, path: Path | None, machine: dict[str, Any]) -> None:
        self._path = path
        self.machine, self.rows = machine, list[Row]()
        self.rates: dict[str, dict[str, float]] = {}
        """For each step, the multiply-adds or bytes a second of each limit."""
        self.left_out: dict[str, str] = {}

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Reports an error of the block as the reason why `name` is left out."""
        try:
            yield
        except Exception as error:  # compilers and drivers raise any class
            lines = str(error).strip().splitlines() or [""]
            self.left_out[name] = f"{type(error).__name__}: {lines[0][:200]}"
            print(f"left out: {name}: {self.left_out[name]}", file=sys.stderr)

    def write(self) -> None:
        if self._path is None:
            return
        content = {key: value for key, value in vars(self).items() if not key.startswith("_")}
        new = self._path.with_name(f".{self._path.name}.new")
        new.write_text(json.dumps({**content, "goals": goals(self)}, indent=2) + "\n")
        new.replace(self._path)


def main() -> None:
    deadline, options = time.monotonic(), parse()
    deadline += options.minutes * 60
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    bench = Bench(options.device, options.variant, options.backend)
    report = Report(options.json, machine(options))
    steps = [
        Step(batch, dtype, how)
        for batch in options.batches
        for dtype in options.dtypes
        for how in ("eager", "torch.compile")
    ]

    def measure_step(step: Step) -> None:
        measure(bench, step, report, options.rounds, options.turn_seconds)

    run(steps, measure_step, report, deadline)
    print("\n".join(table(report)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--variant", choices=sorted(VARIANTS), default="base")
    add("--batches", nargs="+", type=int, default=[GOAL_BATCH, 1, 8], help="in this order")
    add("--dtypes", nargs="+", choices=[*DTYPES], default=[*DTYPES])
    add("--rounds", type=int, default=5)
    add("--turn-seconds", type=float, default=0.1)
    add("--minutes", type=float, default=5, help="no step starts later")
    add("--backend", default="inductor", help="of torch.compile")
    add("--json", type=Path, help="file for the report")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU; --device cpu --variant demo shows that the script runs")
    return options


def machine(options: argparse.Namespace) -> dict[str, Any]:
    cuda = options.device == "cuda"
    return {
        "kind": options.device,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": _output("git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"),
        "variant": options.variant,
    }


def _output(*command: str) -> str | None:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def run(
    steps: Iterable[Step], measure: Callable[[Step], None], report: Report, deadline: float
) -> None:
    """Measures the steps that can start before the deadline of `time.monotonic`."""
    for step in steps:
        start = time.monotonic()
        if start >= deadline:
            report.left_out[str(step)] = "no time was left"
        else:
            print(f"{step} ...", flush=True)
            with report.attempt(str(step)):
                measure(step)
            print(f"{step}: {time.monotonic() - start:.0f} s", flush=True)
        report.write()


@torch.inference_mode()
def measure(bench: Bench, step: Step, report: Report, rounds: int, turn_s: float) -> None:
    """Adds a row for each entrant whose answers pass the check."""
    gc.collect()
    if bench.cuda:
        torch.cuda.empty_cache()
    torch.compiler.reset()  # so that each batch size is compiled, and not refused as one too many
    frames = bench.frames(step.batch)
    exact = bench.exact(frames)
    runs: dict[str, Callable[[], object]] = {}
    checks: dict[str, dict[str, float]] = {}
    for name, make in entrants(bench, step.how, DTYPES[step.dtype], frames).items():
        with report.attempt(f"{step}: {name}"):
            entrant: Entrant = make()
            answers = entrant.answers()
            bench.wait()
            checks[name] = check(exact, answers, step.dtype)
            runs[name] = entrant.run
    found = limits(bench, DTYPES[step.dtype], frames)
    times = take_turns(
        runs | {name: limit.run for name, limit in found.items()}, bench.wait, rounds, turn_s
    )
    report.rates[str(step)] = {
        name: limit.amount / statistics.median(times[name]) for name, limit in found.items()
    }
    for name, result in checks.items():
        median = statistics.median(times[name])
        shares = {
            limit_name: share(times[name], times[limit_name], limit.needed / limit.amount)
            for limit_name, limit in found.items()
        }
        report.rows.append(
            {
                **step._asdict(),
                "entrant": name,
                "milliseconds": median * 1000,
                "clips_per_second": step.batch / median,
                "shares": shares,
                **result,
            }
        )


def take_turns(
    runs: dict[str, Callable[[], object]], wait: Callable[[], None], rounds: int, turn_s: float
) -> dict[str, list[float]]:
    """Times the runs in turns, and returns for each run the seconds of one call in each round.

    The calls of a turn are started one after another, and only the last is waited for, so that the
    device is timed and not the start of its work.
    """

    def seconds(run: Callable[[], object], calls: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        wait()
        return (time.perf_counter() - start) / calls

    calls = {}
    for name, run in runs.items():
        seconds(run, 1)
        calls[name] = min(_MAX_CALLS, max(1, math.ceil(turn_s / seconds(run, 1))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, calls[name]))
    return times


def share(times: list[float], limit_times: list[float], work: float) -> float:
    """Returns the median over the rounds of how much of a limit's rate was reached."""
    return statistics.median(
        work * limit / own for own, limit in zip(times, limit_times, strict=True)
    )


def table(report: Report) -> Iterator[str]:
    """Returns the report's lines for a reader."""
    yield ", ".join(f"{key} {value}" for key, value in report.machine.items())
    for step, rates in report.rates.items():
        yield (
            f"{step}: T multiply-adds/s: {rates[LARGE] / 1e12:.3f} {LARGE}, "
            f"{rates[PRODUCTS] / 1e12:.3f} {PRODUCTS}; GB/s: {rates[MEMORY] / 1e9:.1f} {MEMORY}"
        )
    yield (
        f"{'batch':>5s} {'dtype':5s} {'entrant':60s} {'ms':>9s} {'clips/s':>9s} "
        f"{'share: ' + LARGE:>21s} {PRODUCTS:>18s} {MEMORY:>6s} {'cosine':>8s} {'error':>7s}"
    )
    for row in report.rows:
        shares = row["shares"]
        yield (
            f"{row['batch']:5d} {row['dtype']:5s} {row['entrant']:60s} {row['milliseconds']:9.3f} "
            f"{row['clips_per_second']:9.1f} {shares[LARGE]:21.1%} {shares[PRODUCTS]:18.1%} "
            f"{shares[MEMORY]:6.1%} {row['cosine']:8.6f} {row['error']:7.1e}"
        )
    for goal, state in goals(report).items():
        yield f"goal: {goal}: {state}"
    for name, reason in report.left_out.items():
        yield f"left out: {name}: {reason}"


def goals(report: Report) -> dict[str, str]:
    """Returns each goal's state. The goals are for `base` in FP16 on a GPU.

    Networks are compared by their shares of the large product's rate, because the clocks of the GPU
    may differ between steps.
    """
    machine = report.machine
    rows = [row for row in report.rows if (row["batch"], row["dtype"]) == (GOAL_BATCH, "fp16")]
    if (machine["kind"], machine["variant"]) != ("cuda", "base"):
        rows = []
    ours = [row["shares"][LARGE] for row in rows if row["entrant"].startswith("rewritten")]
    original = [
        row["shares"][LARGE]
        for row in rows
        if row["entrant"].startswith("original") and row["how"] == "torch.compile"
    ]
    reached = max(ours) if ours else None
    speed_up = max(ours) / max(original) if ours and original else None
    return {
        f"at least {GOAL_SHARE:.0%} of the large product's rate": _state(reached, GOAL_SHARE),
        f"at least {GOAL_SPEED_UP} times the compiled original": _state(speed_up, GOAL_SPEED_UP),
    }


def _state(value: float | None, least: float) -> str:
    if value is None:
        return "not measured"
    return f"{'met' if value >= least else 'not met'}, {value:.3f}"


if __name__ == "__main__":
    main()
