"""A bundle's engines measured beside each other: their speed by turns, and how far the answers of
each are off, so that nothing is fast and wrong unseen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.benchmark.timing import Entrant, Quartiles, Timing, Turns, speed_up, take_turns, timing
from export.bundle.bundle import Bundle, BundleError
from export.bundle.manifest import ONNX_FLOAT32, Parity
from export.calibration.clips import verification_clips
from export.runtime.interface import Device, Outputs, Runtime
from export.runtime.onnxruntime import OnnxRuntime
from export.verification.artefacts import Artefact, Found, LeftOut, find_artefacts
from export.verification.parity import compare
from model.demo import SAMPLE_CLIP


class Row(NamedTuple):
    """One engine at one batch size."""

    engine: str
    batch: int
    timing: Timing
    speed_up: Quartiles
    """Over the first engine, in the same rounds."""
    speed_up_by_cpu: Quartiles
    off_by: float
    """Largest difference of a logit, relative to the largest logit; of float32 on the CPU."""
    cosine: float


class Measured(NamedTuple):
    rows: tuple[Row, ...]
    left_out: tuple[LeftOut, ...]


def measure_bundle(
    bundle: Bundle,
    *,
    precisions: Collection[str] = ("float32",),
    batches: Sequence[int] = (1,),
    rounds: int = 7,
    device: Device = "auto",
    gpu: int = 0,
    engines: Sequence[Path] = (),
    threads: int = 0,
    report: Callable[[str], None] = lambda step: None,
) -> Measured:
    """Times a bundle's artefacts on this machine and compares their answers.

    Args:
        precisions: of the artefacts; `all` measures every artefact.
        report: is told each step as it begins.

    Raises:
        BundleError: nothing of these precisions can run here.
        RuntimeUnavailableError: the device that was asked for cannot be used.
    """
    found = choose_artefacts(
        bundle,
        precisions,
        device=device,
        gpu=gpu,
        engines=engines or (None,),
        largest=batches[-1],
        threads=threads,
    )
    clips = verification_clips(bundle.config, [SAMPLE_CLIP])
    with contextlib.ExitStack() as held:
        entrants = []
        for each in found.artefacts:
            report(f"loading {each.name}")
            entrants.append(open_entrant(bundle, each, held)[0])
        turns = take_turns(entrants, clips, batches, rounds, report=report)
        return Measured(rows_of(bundle, entrants, batches, turns, clips), found.left_out)


def choose_artefacts(
    bundle: Bundle,
    precisions: Collection[str],
    *,
    device: Device,
    gpu: int,
    engines: Sequence[Path | None],
    largest: int,
    threads: int,
) -> Found:
    """Returns the artefacts of these precisions that can run here.

    Raises:
        BundleError: there is none.
        RuntimeUnavailableError: the device that was asked for cannot be used.
    """
    found = find_artefacts(
        bundle, device=device, gpu=gpu, engines=engines, largest=largest, threads=threads
    )
    chosen = tuple(each for each in found.artefacts if {"all", each.precision} & set(precisions))
    if not chosen:
        reasons = "".join(f"; {each.artefact}: {each.reason}" for each in found.left_out)
        raise BundleError(f"nothing of {bundle.path} in that precision can run here{reasons}")
    return found._replace(artefacts=chosen)


def open_entrant(
    bundle: Bundle, artefact: Artefact, held: contextlib.ExitStack
) -> tuple[Entrant, Runtime]:
    """Loads an artefact; `held` closes it."""
    runtime = artefact.open()
    held.callback(runtime.close)
    counted = bundle.manifest.graph_cost
    work = counted.multiply_adds if counted else None
    return Entrant(f"{artefact.name}, {runtime.provider}", runtime.run, work), runtime


def rows_of(
    bundle: Bundle,
    entrants: Sequence[Entrant],
    batches: Sequence[int],
    turns: Turns,
    clips: NDArray[np.uint8],
) -> tuple[Row, ...]:
    """Returns a row for each batch size and entrant; speed-ups are over the first entrant."""
    runtime = OnnxRuntime(bundle.file(ONNX_FLOAT32), cuda=False)
    try:
        answers = runtime.run(clips)
    finally:
        runtime.close()
    rows = []
    for batch in batches:
        theirs = turns[entrants[0].name, batch]
        for each in entrants:
            mine, parity = turns[each.name, batch], _parity(each, batch, answers, clips)
            rows.append(
                Row(
                    each.name,
                    batch,
                    timing(mine, batch, each.multiply_adds),
                    speed_up(mine, theirs),
                    speed_up(mine, theirs, cpu=True),
                    parity.max_difference / float(np.abs(answers.logits).max()),
                    parity.centred_cosine or 0.0,
                )
            )
    return tuple(rows)


def _parity(entrant: Entrant, batch: int, answers: Outputs, clips: NDArray[np.uint8]) -> Parity:
    """Compares answers in batches of this size: other sizes may have other kernels."""
    batches = np.arange(-(-len(clips) // batch) * batch).reshape(-1, batch) % len(clips)
    parts = []
    for rows in batches:
        given = entrant.run(clips[rows])
        if given is None:
            raise ValueError(f"{entrant.name} answers nothing")
        parts.append(given)
    wanted = Outputs(*(part[batches.ravel()] for part in answers))
    return compare(wanted, Outputs(*map(np.concatenate, zip(*parts, strict=True))))
