"""A bundle's engines measured: speed by turns, share of the machine's limit, start and memory, and
how far the answers of each are off, so that nothing is fast and wrong unseen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.artefacts import Artefact, LeftOut, find_artefacts
from export.bench import (
    Entrant,
    Quartiles,
    Timing,
    Turns,
    share_of_limit,
    speed_up,
    take_turns,
    timing,
)
from export.bundle import Bundle, BundleError
from export.clips import verification_clips
from export.machine import machine_facts, versions
from export.manifest import ONNX_FLOAT32, Parity
from export.runtime.cores import usable_cores
from export.runtime.interface import Device, Outputs
from export.runtime.onnxruntime import OnnxRuntime
from export.startup import Startup, StartupError
from export.startup import measure as measure_startup
from export.verify import compare
from model.demo import SAMPLE_CLIP

_PACKAGES = (
    *("numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "cuda-bindings"),
    *("torch", "transformers", "openvino"),
)
_LIMIT = "matrix products alone, "


class Row(NamedTuple):
    """One engine at one batch size."""

    engine: str
    batch: int
    timing: Timing
    of_limit: Quartiles | None
    limit_multiply_adds_per_second: float | None
    """Of the matrix products alone, in the same engine and rounds."""
    speed_up: Quartiles
    speed_up_by_cpu: Quartiles
    off_by: float
    """Largest difference of a logit, relative to the largest logit; of float32 on the CPU."""
    cosine: float


@dataclass(frozen=True)
class Measured:
    bundle: Bundle
    machine: dict[str, Any]
    versions: dict[str, str]
    threads: int
    rounds: int
    yardstick: str
    """What speed-ups are over."""
    rows: tuple[Row, ...]
    startups: dict[str, Startup]
    left_out: tuple[LeftOut, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.bundle.name,
            "version": self.bundle.version,
            "machine": self.machine,
            "versions": self.versions,
            "threads": self.threads,
            "rounds": self.rounds,
            "speed_up_over": self.yardstick,
            "engines": [
                {
                    **row._asdict(),
                    "timing": row.timing._asdict(),
                    "of_limit": row.of_limit._asdict() if row.of_limit else None,
                    "speed_up": row.speed_up._asdict(),
                    "speed_up_by_cpu": row.speed_up_by_cpu._asdict(),
                }
                for row in self.rows
            ],
            "startups": {name: each._asdict() for name, each in self.startups.items()},
            "left_out": [each._asdict() for each in self.left_out],
        }


def measure_bundle(
    bundle: Bundle,
    folder: Path,
    *,
    precisions: Collection[str] = ("float32",),
    batches: Sequence[int] = (1,),
    rounds: int = 7,
    against: bool = False,
    device: Device = "auto",
    gpu: int = 0,
    engines: Sequence[Path] = (),
    threads: int = 0,
    report: Callable[[str], None] = lambda step: None,
) -> Measured:
    """Measures a bundle's artefacts, and what they are to be held against.

    Args:
        folder: for files on the way.
        precisions: of the artefacts; `all` takes every one.
        against: also other programs with the same weights; see `export.yardsticks`.
        report: is told each step as it begins.

    Raises:
        BundleError: nothing of these precisions can run here.
        RuntimeUnavailableError: the device that was asked for cannot be used.
    """
    machine, threads = machine_facts(), threads or usable_cores()
    found = find_artefacts(
        bundle,
        device=device,
        gpu=gpu,
        engines=engines or (None,),
        largest=batches[-1],
        threads=threads,
    )
    left_out = list(found.left_out)
    chosen = [each for each in found.artefacts if {"all", each.precision} & set(precisions)]
    if not chosen:
        reasons = "".join(f"; {each.artefact}: {each.reason}" for each in left_out)
        raise BundleError(f"nothing of {bundle.path} in that precision can run here{reasons}")
    startups = {}
    for each in chosen:
        report(f"starting {each.name} in a process of its own")
        try:
            startups[each.name] = measure_startup(
                bundle.path, each, gpu=gpu, threads=threads, largest=batches[-1], engines=engines
            )
        except StartupError as error:
            left_out.append(LeftOut(f"start of {each.name}", str(error)))
    clips = verification_clips(bundle.config, [SAMPLE_CLIP])
    with contextlib.ExitStack() as held:
        entrants: list[Entrant] = []
        limits: dict[str, Entrant] = {}
        for each in chosen:
            report(f"loading {each.name}")
            entrant, limit = _entrants(bundle, each, threads, held, left_out)
            entrants.append(entrant)
            if limit:
                limits[entrant.name] = limit
        if against:
            from export.yardsticks import NAIVE, open_yardsticks

            for other in open_yardsticks(
                bundle, folder, cuda=found.cuda, threads=threads, report=report
            ):
                if isinstance(other, LeftOut):
                    left_out.append(other)
                else:
                    entrants.append(other)
            entrants.sort(key=lambda each: each.name != NAIVE)
        turns = take_turns([*entrants, *limits.values()], clips, batches, rounds, report=report)
        answers = _float32(bundle, clips, threads)
        rows = tuple(
            _row(each, batch, turns, entrants[0], limits.get(each.name), answers, clips)
            for batch in batches
            for each in entrants
        )
    return Measured(
        bundle,
        machine,
        versions(_PACKAGES),
        threads,
        rounds,
        entrants[0].name,
        rows,
        startups,
        tuple(left_out),
    )


def _entrants(
    bundle: Bundle,
    artefact: Artefact,
    threads: int,
    held: contextlib.ExitStack,
    left_out: list[LeftOut],
) -> tuple[Entrant, Entrant | None]:
    """An artefact, and the limit of the engine that runs its graph."""
    runtime = artefact.open()
    held.callback(runtime.close)
    counted = bundle.manifest.graph_cost
    work = counted.multiply_adds if counted else None
    name = f"{artefact.name}, {runtime.provider}"
    entrant = Entrant(name, runtime.run, work)
    try:
        from export.limit import products_alone

        limit = products_alone(artefact.graph)
        engine = OnnxRuntime(limit.graph, cuda=runtime.device == "cuda", threads=threads)
    except Exception as error:  # no onnx, no shapes, an engine's own
        left_out.append(LeftOut(f"limit of {name}", str(error)))
        return entrant, None
    held.callback(engine.close)

    def run(frames: NDArray[np.uint8]) -> None:
        engine.run(np.zeros(len(frames), np.uint8))

    return entrant, Entrant(_LIMIT + name, run, limit.multiply_adds)


def _float32(bundle: Bundle, clips: NDArray[np.uint8], threads: int) -> Outputs:
    runtime = OnnxRuntime(bundle.file(ONNX_FLOAT32), cuda=False, threads=threads)
    try:
        return runtime.run(clips)
    finally:
        runtime.close()


def _parity(entrant: Entrant, batch: int, answers: Outputs, clips: NDArray[np.uint8]) -> Parity:
    """How far its answers are off in batches of this size: others may have other kernels."""
    batches = np.arange(-(-len(clips) // batch) * batch).reshape(-1, batch) % len(clips)
    parts = []
    for rows in batches:
        given = entrant.run(clips[rows])
        if given is None:
            raise ValueError(f"{entrant.name} answers nothing")
        parts.append(given)
    wanted = Outputs(*(part[batches.ravel()] for part in answers))
    return compare(wanted, Outputs(*map(np.concatenate, zip(*parts, strict=True))))


def _row(
    entrant: Entrant,
    batch: int,
    turns: Turns,
    yardstick: Entrant,
    limit: Entrant | None,
    answers: Outputs,
    clips: NDArray[np.uint8],
) -> Row:
    mine, theirs = turns[entrant.name, batch], turns[yardstick.name, batch]
    share, limit_rate = None, None
    if limit and limit.multiply_adds and entrant.multiply_adds:
        alone = turns[limit.name, batch]
        share = share_of_limit(mine, alone, entrant.multiply_adds, limit.multiply_adds)
        limit_rate = timing(alone, batch, limit.multiply_adds).multiply_adds_per_second
    parity = _parity(entrant, batch, answers, clips)
    return Row(
        entrant.name,
        batch,
        timing(mine, batch, entrant.multiply_adds),
        share,
        limit_rate,
        speed_up(mine, theirs),
        speed_up(mine, theirs, cpu=True),
        parity.max_difference / float(np.abs(answers.logits).max()),
        parity.centred_cosine or 0.0,
    )
