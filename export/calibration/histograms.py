"""How a network's numbers are spread on calibration clips, and the range that 8 bits cover of them.

Numbers are counted in bins that each are 1/64 of a power of two, so that one pass is enough: where
the largest lies need not be known before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, TensorProto, helper, numpy_helper

from export.calibration.recorder import Shapes, record
from export.runtime.interface import Outputs

Float32 = NDArray[np.float32]
Method = Literal["max", "percentile", "mse"]

METHODS: tuple[Method, ...] = ("max", "percentile", "mse")
# A number in ten thousand may be cut off; of one clip's tokens that is a channel in one of a few.
_PERCENTILE = 0.9999
# Rows of each tensor that are counted, of one clip: the largest number is measured on all of them.
_ROWS = 512
_SAMPLED = 32
_SHIFT = 17  # of float32's bits: sign and exponent and six bits of the mantissa are left
_BINS = 1 << (31 - _SHIFT)


@dataclass(frozen=True)
class Format:
    """A type of eight bits."""

    name: Literal["int8", "fp8"]
    element: int
    """In ONNX."""
    largest: float
    round: Callable[[Float32], NDArray[np.generic]]
    """Numbers divided by their scale to this type; what is beyond `largest` becomes that."""
    by_channel: bool
    """Whether weights have a scale for each output channel, or one for all."""

    def scale(self, largest: float | Float32) -> NDArray[np.float16]:
        """What numbers of up to `largest` are divided by, as the FP16 that the graph holds.

        Rounded up, so that the largest is not cut off; never 0.
        """
        exact = np.asarray(largest, np.float32) / np.float32(self.largest)
        near = exact.astype(np.float16)
        up = np.where(near < exact, np.nextafter(near, np.float16(np.inf)), near)
        return np.where(up > 0, up, np.float16(1)).astype(np.float16)

    def weight_scale(self, weight: Float32) -> NDArray[np.float16]:
        """Of a matrix of weights (inputs, outputs): (outputs,) or ()."""
        largest = np.abs(weight)
        return self.scale(largest.max(axis=0) if self.by_channel else largest.max())

    def rounded(self, values: Float32, scale: NDArray[np.floating]) -> Float32:
        """The numbers that are left of `values`."""
        wide = scale.astype(np.float32)
        return np.asarray(self.round(values / wide).astype(np.float32) * wide, np.float32)


FORMATS = {
    "int8-qdq": Format(
        "int8",
        TensorProto.INT8,
        127,
        lambda values: np.clip(np.rint(values), -127, 127).astype(np.int8),
        by_channel=True,
    ),
    # TensorRT multiplies in FP8 where both factors have one scale; weights with a scale for each
    # channel it is known to widen first, and to multiply in FP16. An exponent makes up for it.
    "fp8": Format(
        "fp8",
        TensorProto.FLOAT8E4M3FN,
        448,
        lambda values: np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn),
        by_channel=False,
    ),
}
"""By kind of graph."""


@dataclass(frozen=True)
class Spread:
    """The numbers of one tensor."""

    counts: NDArray[np.int64]
    """Of absolute values, by bin."""
    rows: Float32
    """Some of its rows, (rows, channels)."""

    def largest(self, method: Method, form: Format) -> float:
        """The end of the range that is to be covered; what lies beyond is cut off."""
        if not self.counts[1:].any():
            return 0.0
        end = float(_UPPER[np.flatnonzero(self.counts)[-1]])
        if method == "max":
            return end
        if method == "percentile":
            share = np.cumsum(self.counts) / self.counts.sum()
            return float(_UPPER[np.searchsorted(share, _PERCENTILE)])
        return min(
            (end * 2 ** (-step / 8) for step in range(49)),
            key=lambda candidate: self._error(candidate, form),
        )

    def _error(self, largest: float, form: Format) -> float:
        """Sum of the squares of what rounding takes or adds."""
        there = np.flatnonzero(self.counts)
        off = form.rounded(_CENTRES[there], form.scale(largest)) - _CENTRES[there]
        return float((self.counts[there] * off.astype(np.float64) ** 2).sum())


_EDGES = (np.arange(_BINS, dtype=np.uint32) << _SHIFT).view(np.float32)
_CENTRES = ((np.arange(_BINS, dtype=np.uint32) << _SHIFT) + (1 << (_SHIFT - 1))).view(np.float32)
_UPPER = np.append(_EDGES[1:], np.float32(np.inf))


@dataclass(frozen=True)
class Calibration:
    """What a float32 graph computes on some clips."""

    clips: NDArray[np.uint8]
    counted: int
    """How many of them, from the first, the spreads are of."""
    spreads: Mapping[str, Spread]
    """Of each tensor that was asked for."""
    answers: Outputs
    """To all clips."""


class SpreadRecorder:
    """Counts the numbers of some tensors of a graph.

    Args:
        names: tensors whose last axis are channels.
        counted: how many clips, from the first, are counted; None for all.
    """

    def __init__(self, names: Iterable[str], counted: int | None = None) -> None:
        self._names = tuple(dict.fromkeys(names))
        self._most = counted
        self._counted = 0
        self._counts = {name: np.zeros(_BINS, np.int64) for name in self._names}
        self._rows: dict[str, list[Float32]] = {name: [] for name in self._names}

    def attach(self, graph: GraphProto, shapes: Shapes) -> None:
        random = np.random.default_rng(0)
        for index, name in enumerate(self._names):
            *before, channels = shapes[name]
            total = int(np.prod(before))
            chosen = random.permutation(total)[:_ROWS]
            constants = {"flat": np.array([-1, channels]), "rows": chosen}
            for what, value in constants.items():
                tensor = numpy_helper.from_array(value.astype(np.int64), f"{what}_{index}")
                graph.initializer.append(tensor)
            flat, every, some = f"flat_{index}", f"all_{index}", f"some_{index}"
            graph.node.append(helper.make_node("Reshape", [name, flat], [every]))
            graph.node.append(helper.make_node("Gather", [every, f"rows_{index}"], [some]))
            shape = [len(chosen), channels]
            graph.output.append(helper.make_tensor_value_info(some, TensorProto.FLOAT, shape))

    def take(self, clip: int, values: Sequence[NDArray[Any]]) -> None:
        if self._most is not None and clip >= self._most:
            return
        self._counted += 1
        for name, rows in zip(self._names, values, strict=True):
            self._counts[name] += count(rows)
            self._rows[name].append(rows[:_SAMPLED].copy())

    def calibration(self, clips: NDArray[np.uint8], answers: Outputs) -> Calibration:
        """What was found, with the clips that were recorded and the graph's answers to them."""
        spreads = {
            name: Spread(self._counts[name], np.concatenate(self._rows[name]))
            for name in self._names
        }
        return Calibration(clips, self._counted, spreads, answers)


def record_spreads(path: Path, names: Iterable[str], clips: NDArray[np.uint8]) -> Calibration:
    """Counts the numbers of some tensors of a float32 graph.

    Args:
        path: as `export_onnx` wrote it.
        names: tensors whose last axis are channels.
        clips: uint8 (clips, time, height, width, 3); they go through one at a time.
    """
    recorder = SpreadRecorder(names)
    return recorder.calibration(clips, record(path, clips, recorder))


def count(values: Float32) -> NDArray[np.int64]:
    """How many numbers lie in each bin, whatever their sign."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).ravel()
    return np.bincount((bits & 0x7FFFFFFF) >> _SHIFT, minlength=_BINS)[:_BINS]
