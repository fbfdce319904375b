"""The parity gate on the machine at hand: every artefact of a bundle, and every TensorRT plan that
fits, against the float32 network on the same clips.

The export has passed it where it was made. Another CPU, a GPU or another version of an engine may
answer otherwise, and only running it there can show that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.bundle.bundle import Bundle, BundleError
from export.bundle.manifest import ONNX_FLOAT32, Parity
from export.runtime.interface import Device, Outputs, RuntimeUnavailableError
from export.runtime.onnxruntime import OnnxRuntime
from export.verification.artefacts import Artefact, LeftOut, find_artefacts
from export.verification.parity import LIMITS, hold, run_in_batches

_EXPORT_PACKAGES = frozenset({"torch", "safetensors", "huggingface_hub", "onnx"})


class Checked(NamedTuple):
    """An artefact that ran, on what, and how it fared."""

    artefact: str
    precision: str
    engine: str
    provider: str
    device: str
    parity: Parity | None
    """None if it failed on the clips."""
    problem: str | None = None

    @property
    def passed(self) -> bool:
        return self.parity is not None and self.parity.passed


class Verdict(NamedTuple):
    reference: str
    """What the artefacts were compared with."""
    clips: int
    checked: tuple[Checked, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def passed(self) -> bool:
        return all(each.passed for each in self.checked)


def check_bundle(
    bundle: Bundle,
    clips: NDArray[np.uint8],
    *,
    device: Device = "auto",
    precisions: Collection[str] = (),
    gpu: int = 0,
    engines: Path | None = None,
    threads: int = 0,
    report: Callable[[str], None] = lambda step: None,
) -> Verdict:
    """Runs the gate on all of a bundle that can run here.

    Args:
        clips: uint8 (clips, time, height, width, 3), two at least.
        device: `cuda` runs what GPUs take there, and it is an error if it cannot; `auto` does so
            where there is a usable GPU; `cpu` leaves plans out.
        precisions: only these; an error if the bundle has no such artefact.
        gpu, engines: which GPU, and where plans lie if not in the bundle.
        report: is told each step as it begins.

    Raises:
        RuntimeUnavailableError: the device that was asked for cannot be used.
        BundleError: the bundle has no artefact of a precision that was asked for.
        CheckpointError: the bundle's weights are not those of a network.
    """
    found = find_artefacts(
        bundle,
        device=device,
        gpu=gpu,
        engines=[engines],
        threads=threads,
        emulate=True,
    )
    candidates, left_out = list(found.artefacts), list(found.left_out)
    if precisions:
        candidates = [each for each in candidates if each.precision in precisions]
        missing = set(precisions) - {each.precision for each in candidates}
        if missing:
            reasons = "".join(f"; {each.artefact}: {each.reason}" for each in left_out)
            raise BundleError(
                f"nothing of precision {', '.join(sorted(missing))} in bundle {bundle.name} "
                f"version {bundle.version} can run here{reasons}"
            )
    report("computing the float32 answers")
    reference, answers = _reference(bundle, clips, threads)
    if reference.startswith(ONNX_FLOAT32) and not found.cuda:
        candidates = [each for each in candidates if each.name != ONNX_FLOAT32]
        left_out.append(LeftOut(ONNX_FLOAT32, "is itself what the others are compared with"))
    checked = []
    for each in candidates:
        report(f"running {each.name}")
        checked.append(_check(each, answers, clips))
    return Verdict(reference, len(clips), tuple(checked), tuple(left_out))


def _reference(bundle: Bundle, clips: NDArray[np.uint8], threads: int) -> tuple[str, Outputs]:
    """What the artefacts are compared with, in words, and its answers."""
    try:
        from export.verification.torch_reference import load_network, run_reference
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXPORT_PACKAGES:
            raise
        runtime = OnnxRuntime(bundle.file(ONNX_FLOAT32), cuda=False, threads=threads)
        try:
            name = f"{ONNX_FLOAT32} by ONNX Runtime on the CPU, since {package} is not installed"
            return name, run_in_batches(runtime, clips)
        finally:
            runtime.close()
    answers = run_reference(load_network(bundle), clips)
    return f"the network in PyTorch {version('torch')} float32 on the CPU", answers


def _check(candidate: Artefact, answers: Outputs, clips: NDArray[np.uint8]) -> Checked:
    try:
        runtime = candidate.open()
    except RuntimeUnavailableError as error:
        return Checked(candidate.name, candidate.precision, "", "", "", None, str(error))
    where = (runtime.engine, runtime.provider, runtime.device)
    parity, problem = None, None
    try:
        parity = hold(runtime, clips, answers, LIMITS[candidate.precision])
    except Exception as error:  # engines' exceptions share no base but Exception
        problem = f"fails on clips: {error}"
    finally:
        runtime.close()
    return Checked(candidate.name, candidate.precision, *where, parity, problem)
