"""The parity gate on the machine at hand: every artefact of a bundle, and every TensorRT plan that
fits, against the float32 network on the same clips.

The export has passed it where it was made. Another CPU, a GPU or another version of an engine may
answer otherwise, and only running it there can show that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.bundle import GRAPHS, ONNX_FLOAT32, Bundle, BundleError, Parity
from export.runtime.interface import Device, Outputs, Runtime, RuntimeUnavailableError
from export.runtime.onnxruntime import OnnxRuntime
from export.runtime.plans import Plan, engines_folder, plans_in
from export.runtime.tensorrt import TensorRt
from export.verify import LARGEST_BATCH, LIMITS, compare, run_in_batches

logger = logging.getLogger(__name__)

CPU_ONLY = frozenset({"int8"})
"""Precisions whose graphs no GPU takes."""
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


class LeftOut(NamedTuple):
    """What was not run, and why."""

    artefact: str
    reason: str


class Verdict(NamedTuple):
    reference: str
    """What the artefacts were compared with."""
    clips: int
    checked: tuple[Checked, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def passed(self) -> bool:
        return all(each.passed for each in self.checked)


class _Candidate(NamedTuple):
    artefact: str
    precision: str
    open: Callable[[], Runtime]


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
    left_out: list[LeftOut] = []
    cuda = device != "cpu" and _cuda_runs(bundle, device == "cuda", threads)
    candidates = [
        *_graphs(bundle, cuda, threads, left_out),
        *_plans(bundle, device, gpu, engines, left_out),
    ]
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
    if reference.startswith(ONNX_FLOAT32) and not cuda:
        candidates = [each for each in candidates if each.artefact != ONNX_FLOAT32]
        left_out.append(LeftOut(ONNX_FLOAT32, "is itself what the others are compared with"))
    checked = []
    for each in candidates:
        report(f"running {each.artefact}")
        checked.append(_check(each, answers, clips))
    return Verdict(reference, len(clips), tuple(checked), tuple(left_out))


def open_graph(bundle: Bundle, precision: str, *, cuda: bool, threads: int = 0) -> Runtime:
    """A graph in an engine that computes what the graph says.

    FP16 on a CPU is computed in float32 and rounded as GPUs round; see `export.emulation`.

    Raises:
        RuntimeUnavailableError: it cannot be loaded here.
        ModuleNotFoundError: FP16 on a CPU needs `onnx`.
    """
    path = bundle.file(GRAPHS[precision])
    if precision != "fp16" or cuda:
        return OnnxRuntime(path, cuda=cuda, threads=threads, precision=precision)
    import onnx

    from export.emulation import emulate

    runtime = OnnxRuntime(emulate(onnx.load(path)), cuda=False, threads=threads, precision="fp16")
    runtime.provider += ", FP16 rounding emulated"
    return runtime


def _cuda_runs(bundle: Bundle, needed: bool, threads: int) -> bool:
    try:
        OnnxRuntime(bundle.file(ONNX_FLOAT32), cuda=True, threads=threads).close()
    except RuntimeUnavailableError as error:
        if needed:
            raise
        logger.info("graphs run on the CPU: %s", error)
        return False
    return True


def _graphs(
    bundle: Bundle, cuda: bool, threads: int, left_out: list[LeftOut]
) -> Iterator[_Candidate]:
    for precision, file in GRAPHS.items():
        if file not in bundle.manifest.files:
            continue
        on_gpu = cuda and precision not in CPU_ONLY

        def load(precision: str = precision, on_gpu: bool = on_gpu) -> Runtime:
            return open_graph(bundle, precision, cuda=on_gpu, threads=threads)

        if precision == "fp16" and not on_gpu and not _importable("onnx"):
            reason = "on a CPU it takes the package onnx to round as GPUs do: install `export`"
            left_out.append(LeftOut(file, reason))
        else:
            yield _Candidate(file, precision, load)


def _plans(
    bundle: Bundle, device: Device, gpu: int, engines: Path | None, left_out: list[LeftOut]
) -> Iterator[_Candidate]:
    """Plans in the bundle's folder of this GPU, this TensorRT and these graphs."""
    found = list(plans_in(engines_folder(bundle, engines)))
    if not found:
        return
    if device == "cpu":
        left_out += [LeftOut(plan.path.name, "runs on GPUs only") for plan in found]
        return
    try:
        here = TensorRt(gpu, engines)
    except RuntimeUnavailableError as error:
        if device == "cuda":
            raise
        left_out += [LeftOut(plan.path.name, str(error)) for plan in found]
        return
    graphs = {entry.sha256 for entry in bundle.manifest.files.values()}
    for plan in found:
        key = plan.facts.key
        present = (*here.cuda.gpu, str(here.module.__version__))
        if plan.facts.graph_sha256 not in graphs:
            left_out.append(LeftOut(plan.path.name, "was built from another export"))
        elif (key.gpu, key.compute_capability, key.tensorrt) != present:
            reason = f"is for {key.gpu} with TensorRT {key.tensorrt}; here is {' '.join(present)}"
            left_out.append(LeftOut(plan.path.name, reason))
        else:

            def load(plan: Plan = plan) -> Runtime:
                return here.load(plan, LARGEST_BATCH)

            yield _Candidate(plan.path.name, key.precision, load)


def _reference(bundle: Bundle, clips: NDArray[np.uint8], threads: int) -> tuple[str, Outputs]:
    """What the artefacts are compared with, in words, and its answers."""
    try:
        from export.reference import load_network, run_reference
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


def _check(candidate: _Candidate, answers: Outputs, clips: NDArray[np.uint8]) -> Checked:
    try:
        runtime = candidate.open()
    except RuntimeUnavailableError as error:
        return Checked(candidate.artefact, candidate.precision, "", "", "", None, str(error))
    where = (runtime.engine, runtime.provider, runtime.device)
    parity, problem = None, None
    try:
        given = run_in_batches(runtime, clips)
        parity = compare(answers, given, LIMITS[candidate.precision])
    except Exception as error:  # engines' exceptions share no base but Exception
        problem = f"fails on clips: {error}"
    finally:
        runtime.close()
    return Checked(candidate.artefact, candidate.precision, *where, parity, problem)


def _importable(package: str) -> bool:
    try:
        __import__(package)
    except ImportError:
        return False
    return True
