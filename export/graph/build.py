"""The graphs of a bundle: written from the float32 one, each for the precisions that are asked for.

INT8 is two graphs, for ONNX Runtime on CPUs and for TensorRT. Needs onnx, no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from export.bundle.bundle import Bundle
from export.bundle.manifest import (
    GPU_KINDS,
    GRAPHS,
    ONNX_FLOAT32,
    ONNX_FP16,
    CalibrationReport,
    ProductReport,
)
from export.calibration.histograms import FORMATS, SpreadRecorder
from export.calibration.recorder import record
from export.graph.fp16 import export_fp16
from export.graph.int8_cpu import quantize
from export.graph.matmuls import MagnitudeRecorder
from export.graph.onnx_export import ExportError
from export.graph.qdq import export_qdq, linears

Precision = Literal["float32", "fp16", "int8", "fp8", "auto"]

Report = Callable[[str], None]
_KINDS: dict[Precision, tuple[str, ...]] = {
    "float32": ("float32",),
    "fp16": ("fp16",),
    "int8": ("int8", "int8-qdq"),
    "fp8": ("fp8",),
    "auto": tuple(GRAPHS),
}


def kinds_of(precisions: Collection[Precision]) -> tuple[str, ...]:
    """The kinds of graphs, in the order of `GRAPHS`, that precisions stand for; always float32."""
    wanted = {"float32", *(kind for each in precisions for kind in _KINDS[each])}
    return tuple(kind for kind in GRAPHS if kind in wanted)


def precisions_of(bundle: Bundle) -> frozenset[Precision]:
    """What a bundle was exported to, besides float32."""
    if bundle.manifest.fastest:
        return frozenset({"auto"})
    held = {kind for kind, file in GRAPHS.items() if file in bundle.manifest.files}
    named = {precision for precision, kinds in _KINDS.items() if not held.isdisjoint(kinds)}
    return frozenset(named - {"float32", "auto"})


@dataclass(frozen=True)
class Clips:
    """What ranges are measured on."""

    ranges: NDArray[np.uint8]
    """Clips like those to be served, whose numbers 8 bits are to tell apart."""
    gate: NDArray[np.uint8]
    """More that the graphs will be held to, besides those that are held out: on them nothing may
    overflow either, and no product is left in 8 bits that puts their answers off."""
    source: str
    """Of `ranges`."""

    @property
    def all(self) -> NDArray[np.uint8]:
        return np.concatenate([self.ranges, self.gate])


@dataclass
class Artefacts:
    """What was written into a folder, by file name."""

    products: dict[str, tuple[ProductReport, ...]] = field(default_factory=dict)
    methods: dict[str, str] = field(default_factory=dict)
    agreement: dict[str, dict[str, float]] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    calibrated: bool = False

    def calibration(self, clips: Clips | None) -> CalibrationReport | None:
        if clips is None or not self.calibrated:
            return None
        return CalibrationReport(
            source=clips.source,
            clips=len(clips.ranges),
            methods=self.methods,
            agreement=self.agreement,
        )


def write_graphs(
    folder: Path,
    kinds: Collection[str],
    clips: Clips | None,
    optional: Collection[str],
    report: Report,
) -> Artefacts:
    """Writes the graphs of these kinds beside the float32 one.

    Args:
        clips: needed where one of the kinds is for GPUs.
        optional: kinds that may fail; the reason is kept.

    Raises:
        ExportError: a graph that is not optional cannot be written.
    """
    written = Artefacts()
    source = folder / ONNX_FLOAT32
    if "int8" in kinds:
        report("rounding to INT8")
        _try("int8", optional, written, lambda: quantize(source, folder / GRAPHS["int8"]))
    if GPU_KINDS.isdisjoint(kinds):
        return written
    if clips is None:
        raise ValueError("graphs for GPUs need clips to calibrate on")
    written.calibrated = True
    eight = [kind for kind in FORMATS if kind in kinds]
    candidates = linears(source) if eight else ()
    magnitudes = MagnitudeRecorder()
    spreads = SpreadRecorder((each.activation for each in candidates), len(clips.ranges))
    report(f"measuring ranges on {len(clips.all)} clips")
    answers = record(source, clips.all, magnitudes, spreads)
    report("rounding to FP16")
    halves = folder / ONNX_FP16
    products = export_fp16(source, halves, magnitudes.magnitudes)
    counted = spreads.calibration(clips.all, answers)
    for kind in eight:

        def write(kind: str = kind) -> None:
            file = GRAPHS[kind]
            found = export_qdq(
                halves, folder / file, FORMATS[kind], candidates, products, counted, report
            )
            written.products[file] = found.products
            written.methods[file] = found.method
            written.agreement[file] = {str(name): is_ for name, is_ in found.agreement.items()}

        _try(kind, optional, written, write)
    if "fp16" in kinds:
        written.products[ONNX_FP16] = products
    else:
        halves.unlink()
    return written


def _try(
    kind: str, optional: Collection[str], written: Artefacts, write: Callable[[], None]
) -> None:
    try:
        write()
    except ExportError as error:
        if kind not in optional:
            raise
        written.rejected[GRAPHS[kind]] = str(error)
