"""A bundle's engines beside other programs with the same weights: the original network in PyTorch,
eager and compiled, its plain export in ONNX Runtime, Hugging Face transformers and OpenVINO.

    python -m tests.benchmarks.against BUNDLE [--precision all] [--batches 1,2,4] [--rounds 7]

Prints what `timesformer bench` prints, and besides: the share of the limit, which is what the same
engine takes in the same rounds for the network's matrix products alone; and what a start takes, in
a process of its own. Speed-ups are over the plain export. A program that is not installed is named.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.artefacts import LeftOut
from export.bench import Entrant, Quartiles, Turn, speed_up, take_turns
from export.bundle import Bundle
from export.clips import verification_clips
from export.measure import choose_artefacts, open_entrant, rows_of
from export.runtime.cores import usable_cores
from export.runtime.onnxruntime import OnnxRuntime
from model.demo import SAMPLE_CLIP
from tests.benchmarks.limit import products_alone
from tests.benchmarks.startup import StartupError, measure
from tests.benchmarks.yardsticks import NAIVE, open_yardsticks

# What decides how fast a CPU multiplies.
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "asimd", "i8mm")
_PACKAGES = (
    *("numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "cuda-bindings"),
    *("torch", "transformers", "openvino"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the figures as JSON, or a line for each engine and batch and for each start."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", default="float32", help="or all")
    parser.add_argument("--batches", default="1,2,4")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--gpu", type=int, default=0)
    parser.add_argument("--engines", type=Path, action="append", default=[])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    facts = compare(Bundle(options.bundle), options)
    if options.json:
        print(json.dumps(facts))
        return
    print(facts["machine"], facts["versions"], f"{facts['threads']} threads")
    for table in ("engines", "starts", "left_out"):
        for row in facts[table]:
            print("  ".join(f"{name} {_short(value)}" for name, value in row.items()))


def compare(bundle: Bundle, options: argparse.Namespace) -> dict[str, Any]:
    """Measures a bundle's artefacts and the other programs in turns."""
    threads = options.threads or usable_cores()
    batches = [int(batch) for batch in options.batches.split(",")]
    found = choose_artefacts(
        bundle,
        [options.precision],
        device=options.device,
        gpu=options.gpu,
        engines=options.engines or (None,),
        largest=batches[-1],
        threads=threads,
    )
    left_out, starts, machine = list(found.left_out), [], machine_facts()
    for each in found.artefacts:
        common = {"gpu": options.gpu, "threads": threads, "engines": options.engines}
        try:
            start = measure(bundle.path, each, largest=batches[-1], **common)
            starts.append({"engine": each.name, **start._asdict()})
        except StartupError as error:
            left_out.append(LeftOut(f"start of {each.name}", str(error)))
    clips = verification_clips(bundle.config, [SAMPLE_CLIP])
    with contextlib.ExitStack() as held, tempfile.TemporaryDirectory() as folder:
        entrants: list[Entrant] = []
        limits: dict[str, Entrant] = {}
        for each in found.artefacts:
            entrant, runtime = open_entrant(bundle, each, held)
            entrants.append(entrant)
            try:
                cuda = runtime.device == "cuda"
                limits[entrant.name] = open_limit(each.graph, entrant.name, cuda, threads, held)
            except Exception as error:  # no shapes, an engine's own
                left_out.append(LeftOut(f"limit of {entrant.name}", str(error)))
        for other in open_yardsticks(bundle, Path(folder), cuda=found.cuda, threads=threads):
            (left_out if isinstance(other, LeftOut) else entrants).append(other)  # type: ignore[arg-type]
        entrants.sort(key=lambda each: each.name != NAIVE)
        turns = take_turns([*entrants, *limits.values()], clips, batches, options.rounds)
        rows = rows_of(bundle, entrants, batches, turns, clips)
    work = {each.name: each.multiply_adds for each in entrants}
    engines = []
    for row in rows:
        facts = {**row._asdict(), **row.timing._asdict()}
        del facts["timing"]
        limit, mine = limits.get(row.engine), work[row.engine]
        if limit and limit.multiply_adds and mine:
            both = turns[row.engine, row.batch], turns[limit.name, row.batch]
            facts["of_limit"] = share_of_limit(*both, mine, limit.multiply_adds)
        engines.append(facts)
    return {
        "machine": machine,
        "versions": versions(),
        "threads": threads,
        "rounds": options.rounds,
        "speed_up_over": entrants[0].name,
        "engines": engines,
        "starts": starts,
        "left_out": [each._asdict() for each in left_out],
    }


def open_limit(
    graph: Path, name: str, cuda: bool, threads: int, held: contextlib.ExitStack
) -> Entrant:
    """Loads the matrix products of a graph; `held` closes them."""
    limit = products_alone(graph)
    engine = OnnxRuntime(limit.graph, cuda=cuda, threads=threads)
    held.callback(engine.close)

    def run(frames: NDArray[np.uint8]) -> None:
        engine.run(np.zeros(len(frames), np.uint8))

    return Entrant(f"matrix products alone, {name}", run, limit.multiply_adds)


def share_of_limit(
    of: Sequence[Turn], limit: Sequence[Turn], multiply_adds: int, limit_multiply_adds: int
) -> Quartiles:
    """Multiply-adds a second, as a share of those of the limit in the same rounds."""
    work = multiply_adds / limit_multiply_adds
    return Quartiles(*(value * work for value in speed_up(of, limit)))


def machine_facts() -> dict[str, Any]:
    """Returns what figures depend on; the load is of all processes in the last minute."""
    first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    facts = {key.strip(): value.strip() for key, _, value in pairs}
    flags = facts.get("flags", "").split()
    return {
        "cpu": facts.get("model name", "unknown"),
        "instructions": [flag for flag in _FLAGS if flag in flags],
        "cores": usable_cores(),
        "load": round(os.getloadavg()[0], 1),
    }


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return "/".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
