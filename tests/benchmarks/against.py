"""A bundle's engines beside other programs with the same weights: the original network in PyTorch,
eager and compiled, its plain export in ONNX Runtime, Hugging Face transformers and OpenVINO.

    python -m tests.benchmarks.against BUNDLE [--precision all] [--batches 1,2,4] [--rounds 7]

Prints what `timesformer bench` prints. Speed-ups are over the plain export. The report names each
program that is not installed.
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

from export.bench import Entrant, take_turns
from export.bundle import Bundle
from export.clips import verification_clips
from export.measure import choose_artefacts, open_entrant, rows_of
from export.runtime.cores import usable_cores
from model.demo import SAMPLE_CLIP
from tests.benchmarks.yardsticks import NAIVE, open_yardsticks

# What decides how fast a CPU multiplies.
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "asimd", "i8mm")
_PACKAGES = (
    *("numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "cuda-bindings"),
    *("torch", "transformers", "openvino"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the figures as JSON, or a line for each engine and batch."""
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
    for table in ("engines", "left_out"):
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
    left_out, machine = list(found.left_out), machine_facts()
    clips = verification_clips(bundle.config, [SAMPLE_CLIP])
    with contextlib.ExitStack() as held, tempfile.TemporaryDirectory() as folder:
        entrants = [open_entrant(bundle, each, held)[0] for each in found.artefacts]
        for other in open_yardsticks(bundle, Path(folder), cuda=found.cuda, threads=threads):
            if isinstance(other, Entrant):
                entrants.append(other)
            else:
                left_out.append(other)
        entrants.sort(key=lambda each: each.name != NAIVE)
        turns = take_turns(entrants, clips, batches, options.rounds)
        rows = rows_of(bundle, entrants, batches, turns, clips)
    engines = []
    for row in rows:
        facts = {**row._asdict(), **row.timing._asdict()}
        del facts["timing"]
        engines.append(facts)
    return {
        "machine": machine,
        "versions": versions(),
        "threads": threads,
        "rounds": options.rounds,
        "speed_up_over": entrants[0].name,
        "engines": engines,
        "left_out": [each._asdict() for each in left_out],
    }


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
