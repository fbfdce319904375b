"""What a GPU makes of `base`: parity in 16 bits, inference, share of the chip's limit, training.

    python -m tests.benchmarks.gpu --json gpu.json

On a machine with nothing but PyTorch: ONNX Runtime and TensorRT take part where they are installed,
and what did not is named with its reason. Entrants take turns, round by round; ratios are of one
round each. At the end every goal is met, not met, or not measured. Without a GPU
`--device cpu --variant demo` runs all of it that a CPU can, in seconds, to see that it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name the field uses
from torch.utils._python_dispatch import TorchDispatchMode

from export.published import AsPublished, write_plainly
from export.rewrite import InferenceTimeSformer, multiply_adds, rewrite
from model.config import VARIANTS, ModelConfig
from model.cost import cost
from model.timesformer import TimeSformer
from tests.benchmarks.half import halve
from tests.benchmarks.networks import random_model

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Least centred cosine of the worst clip's logits; FP16's is the limit of the export's gate.
COSINES = {"fp16": 0.9995, "bf16": 0.99}
LARGE = 8192
TURN_SECONDS = 0.2
GOAL_BATCH, GOAL_SHARE, GOAL_SPEED_UP = 32, 0.55, 1.5

ORIGINAL = "original, eager"
ORIGINAL_COMPILED = "original, torch.compile"
FUSED_COMPILED = "original with fused attention, torch.compile"
REWRITTEN = "rewritten, eager"
REWRITTEN_GRAPH = "rewritten, CUDA graph"
REWRITTEN_COMPILED = "rewritten, torch.compile"
REWRITTEN_COMPILED_GRAPH = "rewritten, torch.compile and CUDA graph"
ONNX_RUNTIME, TENSORRT = "rewritten, ONNX Runtime CUDA", "rewritten, TensorRT"

Run = Callable[[], Any]


class Goal(NamedTuple):
    goal: str
    state: str
    """`met`, `not met` or `not measured`."""
    detail: str


class Bench:
    """What is measured on, and what was left out."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.dtype = DTYPES[options.dtype]
        self.config: ModelConfig = VARIANTS[options.variant]
        self.left_out: dict[str, str] = {}

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @functools.cached_property
    def work(self) -> int:
        """Multiply-adds of the rewritten network for a clip: what cannot be saved."""
        return multiply_adds(rewrite(TimeSformer(self.config)))

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def frames(self, batch: int) -> Tensor:
        config = self.config
        shape = (batch, config.num_frames, config.image_size, config.image_size, 3)
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(self.device)

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """What fails inside is left out with its reason; the rest goes on."""
        try:
            yield
        except Exception as error:  # of compilers, drivers and engines
            lines = str(error).strip().splitlines() or [""]
            self.left_out[what] = f"{type(error).__name__}: {lines[0][:200]}"
            print(f"left out: {what}: {self.left_out[what]}", file=sys.stderr)

    def seconds(self, runs: dict[str, Run]) -> dict[str, list[float]]:
        """Seconds a call, a figure a round; all have run once before."""
        found: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.options.rounds):
            for name, run in runs.items():
                self.wait()
                start, calls = time.perf_counter(), 0
                while not calls or time.perf_counter() - start < self.options.turn_seconds:
                    run()
                    calls += 1
                    self.wait()
                found[name].append((time.perf_counter() - start) / calls)
        return found


def main() -> None:
    bench = Bench(parse())
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    report: dict[str, Any] = {"machine": machine(bench)}
    for key, value in report["machine"].items():
        print(f"{key}: {value}")
    model = random_model(bench.config)
    report["parity"] = parity(bench, model)
    report["limits"] = limits(bench, model)
    report["inference"] = inference(bench, model, report["limits"])
    report["training"] = training(bench, model, report["limits"])
    report["left_out"] = bench.left_out
    goals = judge(bench, report)
    report["goals"] = [goal._asdict() for goal in goals]
    print("\ngoals")
    for goal in goals:
        print(f"  {goal.state:12s} {goal.goal}: {goal.detail}")
    for name, reason in bench.left_out.items():
        print(f"  left out     {name}: {reason}")
    if bench.options.json:
        bench.options.json.write_text(json.dumps(report, indent=2) + "\n")


def parse() -> argparse.Namespace:
    def sizes(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--variant", choices=sorted(VARIANTS), default="base")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp16", help="of inference")
    parser.add_argument("--batches", type=sizes, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--training-batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turn-seconds", type=float, default=TURN_SECONDS)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", type=Path, help="file for all of it")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU; --device cpu --variant demo shows that the script runs")
    return options


def machine(bench: Bench) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if bench.cuda else platform.processor() or "cpu",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "clocks": _output("nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm", "--format=csv"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": _output("git", "rev-parse", "HEAD"),
        "variant": bench.options.variant,
        "dtype": bench.options.dtype,
    }
    for package in ("onnx", "onnxruntime", "tensorrt"):
        with contextlib.suppress(ImportError):
            facts[package] = getattr(__import__(package), "__version__", "unknown")
    return facts


def _output(*command: str) -> str | None:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip().replace("\n", "; ")


# ---- parity -----------------------------------------------------------------------------------


def parity(bench: Bench, model: TimeSformer) -> list[dict[str, Any]]:
    """The rewritten network in 16 bits against the original in float32, on the device."""
    frames, rows = bench.frames(4), []
    print("\nparity of the rewritten network, 4 random clips")
    with torch.inference_mode():
        exact = AsPublished.of(model).to(bench.device)(frames)[0].double()
    for name, dtype in (("float32", None), *DTYPES.items()):
        with bench.attempt(f"parity in {name}"), torch.inference_mode():
            network = rewritten(bench, model, dtype)
            given = network(frames)[0].double()
            one, other = (each - each.mean(dim=1, keepdim=True) for each in (exact, given))
            cosine = F.cosine_similarity(one, other).min().item()
            off_by = ((exact - given).abs().max() / exact.abs().max()).item()
            passed = off_by <= 1e-4 if dtype is None else cosine >= COSINES[name]
            rows.append({"precision": name, "off_by": off_by, "cosine": cosine, "passed": passed})
            verdict = "passed" if passed else "FAILED"
            print(f"  {name:8s} off by {off_by:.1e}, cosine {cosine:.6f}, {verdict}")
    return rows


def rewritten(bench: Bench, model: TimeSformer, dtype: torch.dtype | None) -> InferenceTimeSformer:
    network = rewrite(model)
    return (halve(network, dtype) if dtype else network).to(bench.device).eval()


# ---- the limit --------------------------------------------------------------------------------


def limits(bench: Bench, model: TimeSformer) -> dict[str, Any]:
    """Multiply-adds a second of matrix products: large ones, and those of the network."""
    found: dict[str, Any] = {}
    print("\nlimit of matrix products, T multiply-adds a second")
    for name, dtype in DTYPES.items():
        with bench.attempt(f"limit in {name}"):
            found[name] = {"large": _large(bench, dtype)}
            for batch in bench.options.batches:
                found[name][f"own shapes, batch {batch}"] = _own(bench, model, dtype, batch)
        for what, rate in found.get(name, {}).items():
            print(f"  {name} {what:22s} {rate / 1e12:8.3f}")
    return found


def _large(bench: Bench, dtype: torch.dtype) -> float:
    side = LARGE if bench.cuda else 128
    factors = [torch.randn(side, side, device=bench.device).to(dtype) for _ in range(2)]
    torch.mm(*factors)
    times = bench.seconds({"large": lambda: torch.mm(*factors)})["large"]
    return side**3 / statistics.median(times)


def _own(bench: Bench, model: TimeSformer, dtype: torch.dtype, batch: int) -> float:
    """Each product of the rewritten network by itself, as often as it is there."""
    total_seconds, total_work = 0.0, 0.0
    for (left, right), count in product_shapes(rewrite(model), batch).items():
        one, other = (torch.randn(s, device=bench.device).to(dtype) for s in (left, right))
        multiply = torch.bmm if len(left) == 3 else torch.mm

        def run(multiply: Any = multiply, one: Tensor = one, other: Tensor = other) -> Tensor:
            return multiply(one, other)  # type: ignore[no-any-return]

        run()
        seconds = statistics.median(bench.seconds({"product": run})["product"])
        total_seconds += count * seconds
        total_work += count * one.numel() * right[-1]
    return total_work / total_seconds


class _Recorder(TorchDispatchMode):
    """Notes the shapes of what is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        skip = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1}.get(func)
        if skip is not None:
            self.shapes[tuple(args[skip].shape), tuple(args[skip + 1].shape)] += 1
        return func(*args, **(kwargs or {}))


def product_shapes(
    network: InferenceTimeSformer, batch: int
) -> Counter[tuple[tuple[int, ...], tuple[int, ...]]]:
    """How often two matrices, or batches of them, of given shapes are multiplied."""
    config = network.config
    shape = (batch, config.num_frames, config.image_size, config.image_size, 3)
    with torch.no_grad(), _Recorder() as recorder:
        network.to("meta")(torch.zeros(shape, dtype=torch.uint8, device="meta"))
    return recorder.shapes


# ---- inference --------------------------------------------------------------------------------


def inference(bench: Bench, model: TimeSformer, limit: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each entrant and batch size; the frames are on the device already."""
    rows: list[dict[str, Any]] = []
    print(
        f"\ninference, {bench.options.dtype}: ms a batch, clips/s, share of the limit of large "
        f"products and of its own shapes, speed-up over {ORIGINAL_COMPILED!r} (quartiles)"
    )
    with tempfile.TemporaryDirectory() as folder:
        others = _other_engines(bench, model, Path(folder))
        for batch in bench.options.batches:
            runs: dict[str, Run] = {}
            with bench.attempt(f"batch {batch}"), torch.inference_mode():
                runs = _entrants(bench, model, batch, others)
                times = bench.seconds(runs)
                rows += _inference_rows(bench, batch, times, limit)
            del runs
            if bench.cuda:
                torch.cuda.empty_cache()
    return rows


def _entrants(
    bench: Bench, model: TimeSformer, batch: int, others: dict[str, Any]
) -> dict[str, Run]:
    frames, runs = bench.frames(batch), {}

    def enter(name: str, network: Callable[[Tensor], Any], *, graph: bool = False) -> None:
        with bench.attempt(f"{name}, batch {batch}"):
            network(frames)
            runs[name] = _captured(network, frames) if graph else lambda: network(frames)

    published = AsPublished.of(model).to(bench.device, bench.dtype)
    plain = write_plainly(AsPublished.of(model)).to(bench.device, bench.dtype)
    ours = rewritten(bench, model, bench.dtype)
    enter(ORIGINAL, plain)
    enter(REWRITTEN, ours)
    if bench.cuda:
        enter(REWRITTEN_GRAPH, ours, graph=True)
    if bench.options.no_compile:
        bench.left_out["torch.compile"] = "--no-compile"
    else:
        torch.compiler.reset()
        enter(ORIGINAL_COMPILED, torch.compile(plain, dynamic=False))
        enter(FUSED_COMPILED, torch.compile(published, dynamic=False))
        compiled = torch.compile(ours, dynamic=False)
        enter(REWRITTEN_COMPILED, compiled)
        if bench.cuda:
            enter(REWRITTEN_COMPILED_GRAPH, compiled, graph=True)
    for name, engine in others.items():
        with bench.attempt(f"{name}, batch {batch}"):
            runs[name] = engine(frames)
            runs[name]()
    return runs


def _captured(network: Callable[[Tensor], Any], frames: Tensor) -> Run:
    """The network's work on these frames, recorded once and launched whole."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            network(frames)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = network(frames)

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def _other_engines(bench: Bench, model: TimeSformer, folder: Path) -> dict[str, Any]:
    """ONNX Runtime and TensorRT on the FP16 graph, where they are installed."""
    engines: dict[str, Any] = {}
    names = (ONNX_RUNTIME, TENSORRT)
    if not bench.cuda or bench.options.dtype != "fp16":
        reason = "the graph is FP16" if bench.cuda else "are measured on a GPU"
        bench.left_out.update(dict.fromkeys(names, reason))
        return engines
    graph = None
    with bench.attempt(" and ".join(names)):
        from tests.benchmarks import gpu_engines

        graph = gpu_engines.write_graph(model, folder)
    if graph is not None:
        with bench.attempt(ONNX_RUNTIME):
            engines[ONNX_RUNTIME] = gpu_engines.onnx_runtime(graph)
        with bench.attempt(TENSORRT):
            engines[TENSORRT] = gpu_engines.tensorrt(graph, max(bench.options.batches))
    return engines


def _inference_rows(
    bench: Bench, batch: int, times: dict[str, list[float]], limit: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    known = limit.get(bench.options.dtype, {})
    for name, seconds in times.items():
        # An original computes more than the rewritten one; useful work is what both must do.
        work = bench.work * batch / statistics.median(seconds)
        own = known.get(f"own shapes, batch {batch}")
        row = {
            "entrant": name,
            "batch": batch,
            "milliseconds": statistics.median(seconds) * 1000,
            "clips_per_second": batch / statistics.median(seconds),
            "multiply_adds_per_second": work,
            "share_of_large": work / known["large"] if known else None,
            "share_of_own_shapes": work / own if own else None,
            "speed_up": _ratios(times.get(ORIGINAL_COMPILED), seconds),
        }
        both = (row["share_of_large"], row["share_of_own_shapes"])
        shares = [f"{share:.0%}" if share else "-" for share in both]  # type: ignore[str-format]
        ratio = row["speed_up"]
        print(
            f"  {batch:3d} {name:46s} {row['milliseconds']:9.3f} {row['clips_per_second']:9.1f} "
            f"{shares[0]:>5s} {shares[1]:>5s} "
            + (f"{ratio[1]:6.3f} ({ratio[0]:.2f}, {ratio[2]:.2f})" if ratio else "-")  # type: ignore[index]
        )
        yield row


def _ratios(slow: list[float] | None, fast: list[float]) -> list[float] | None:
    if slow is None:
        return None
    ratios = [one / other for one, other in zip(slow, fast, strict=True)]
    return statistics.quantiles(ratios, method="inclusive") if len(ratios) > 1 else ratios * 3


# ---- training ---------------------------------------------------------------------------------


def training(bench: Bench, model: TimeSformer, limit: dict[str, Any]) -> list[dict[str, Any]]:
    """Steps of SGD in bfloat16: ours and the original written plainly, each also compiled."""
    batch = bench.options.training_batch
    print(f"\ntraining, bf16, batch {batch}: ms a step, clips/s, model FLOPs utilisation, memory")
    networks: dict[str, Callable[[], nn.Module]] = {
        "ours": lambda: _trainable(bench, TimeSformer(bench.config), model),
        "original": lambda: write_plainly(_trainable(bench, AsPublished(bench.config), model)),  # type: ignore[arg-type]
    }
    rows = []
    for compiled in (False,) if bench.options.no_compile else (False, True):
        runs: dict[str, Run] = {}
        memory: dict[str, int | None] = {}
        for name, make in networks.items():
            title = f"{name}, torch.compile" if compiled else f"{name}, eager"
            with bench.attempt(f"training: {title}"):
                run = _step(bench, make(), batch, compiled)
                memory[title] = _peak_memory(bench, run)
                runs[title] = run
        with bench.attempt("training"):
            times = bench.seconds(runs)
            rows += _training_rows(bench, batch, times, memory, limit)
    return rows


def _trainable(bench: Bench, network: TimeSformer, model: TimeSformer) -> TimeSformer:
    network.load_state_dict(model.state_dict())
    return network.to(bench.device).train()


def _step(bench: Bench, network: nn.Module, batch: int, compiled: bool) -> Run:
    optimiser = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)
    forward = torch.compile(network, dynamic=False) if compiled else network
    frames = bench.frames(batch)
    targets = torch.arange(batch, device=bench.device) % bench.config.num_classes

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(bench.device.type, torch.bfloat16):
            logits, _ = forward(frames)
        F.cross_entropy(logits.float(), targets).backward()
        optimiser.step()

    return step


def _peak_memory(bench: Bench, run: Run) -> int | None:
    """Of the first two steps; None on a CPU."""
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    run(), run()
    return torch.cuda.max_memory_allocated() if bench.cuda else None


def _training_rows(
    bench: Bench,
    batch: int,
    times: dict[str, list[float]],
    memory: dict[str, int | None],
    limit: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    # Forward once and backward twice, of the network as it is trained.
    work = 3 * cost(bench.config).multiply_adds * batch
    large = limit.get("bf16", {}).get("large")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        used = work / median / large if large else None
        held = memory[name]
        yield {
            "entrant": name,
            "batch": batch,
            "milliseconds": median * 1000,
            "clips_per_second": batch / median,
            "utilisation": used,
            "peak_bytes": held,
        }
        print(
            f"  {name:26s} {median * 1000:9.2f} {batch / median:9.2f} "
            f"{f'{used:.0%}' if used else '-':>5s} {f'{held / 2**30:.1f} GiB' if held else '-'}"
        )


# ---- goals ------------------------------------------------------------------------------------


def judge(bench: Bench, report: dict[str, Any]) -> list[Goal]:
    """Each goal: met, not met or not measured; only `base` on a GPU can meet those of speed."""
    rows = {row["entrant"]: row for row in report["inference"] if row["batch"] == GOAL_BATCH}
    right = bench.cuda and bench.options.variant == "base" and bench.options.dtype == "fp16"
    ours = [row for name, row in rows.items() if name.startswith("rewritten")]
    best = max(ours, key=lambda row: row["clips_per_second"], default=None)
    goals = [_parity_goal(report["parity"])]
    title = f"FP16 base at batch {GOAL_BATCH} above {GOAL_SHARE:.0%} of the limit of large products"
    if right and best and best["share_of_large"]:
        share = best["share_of_large"]
        goals.append(_goal(title, share > GOAL_SHARE, f"{share:.1%}, {best['entrant']}"))
    else:
        goals.append(Goal(title, "not measured", "wants base in FP16 on a GPU at that batch"))
    title = f"at least {GOAL_SPEED_UP} times torch.compile of the original, batch {GOAL_BATCH}"
    compiled = [rows[name] for name in (ORIGINAL_COMPILED, FUSED_COMPILED) if name in rows]
    if right and best and compiled:
        fastest = max(compiled, key=lambda row: row["clips_per_second"])
        ratio = best["clips_per_second"] / fastest["clips_per_second"]
        detail = f"{ratio:.2f}: {best['entrant']} over {fastest['entrant']}"
        goals.append(_goal(title, ratio >= GOAL_SPEED_UP, detail))
    else:
        goals.append(Goal(title, "not measured", "wants both in FP16 on a GPU at that batch"))
    title = f"PyTorch with CUDA graphs beats ONNX Runtime at batch {GOAL_BATCH}"
    graphs = [rows[n] for n in (REWRITTEN_GRAPH, REWRITTEN_COMPILED_GRAPH) if n in rows]
    if right and graphs and ONNX_RUNTIME in rows:
        fastest = max(graphs, key=lambda row: row["clips_per_second"])
        ratio = fastest["clips_per_second"] / rows[ONNX_RUNTIME]["clips_per_second"]
        goals.append(_goal(title, ratio > 1, f"{ratio:.2f}: {fastest['entrant']}"))
    else:
        goals.append(Goal(title, "not measured", "wants both on a GPU"))
    return goals


def _parity_goal(rows: list[dict[str, Any]]) -> Goal:
    title = "answers of the rewritten network in 16 bits are those of the original in float32"
    if len(rows) < 1 + len(DTYPES):
        return Goal(title, "not measured", "a precision did not run")
    wrong = [row["precision"] for row in rows if not row["passed"]]
    return _goal(title, not wrong, f"off in {', '.join(wrong)}" if wrong else "within the limits")


def _goal(title: str, met: bool, detail: str) -> Goal:
    return Goal(title, "met" if met else "not met", detail)


if __name__ == "__main__":
    main()
