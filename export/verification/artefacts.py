"""What of a bundle can run on the machine at hand: its graphs, and the TensorRT plans that fit.

The gate runs all of them; the benchmark measures them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from export.bundle.bundle import Bundle
from export.bundle.manifest import GPU_KINDS, GRAPHS, ONNX_FLOAT32
from export.runtime.interface import Device, Runtime, RuntimeUnavailableError
from export.runtime.onnxruntime import OnnxRuntime
from export.runtime.plans import Plan, engines_folder, plans_in
from export.runtime.tensorrt import TensorRt

logger = logging.getLogger(__name__)

CPU_ONLY = frozenset({"int8", "int8-qdq", "fp8"})
"""Graphs that ONNX Runtime does not take to a GPU: of 8 bits, which there are TensorRT's."""


class Artefact(NamedTuple):
    """A graph or plan that can run here."""

    name: str
    """The file's."""
    precision: str
    device: str
    """`cpu` or `cuda`."""
    graph: Path
    """The ONNX file that it is or was built from."""
    open: Callable[[], Runtime]
    """May raise `RuntimeUnavailableError`."""


class LeftOut(NamedTuple):
    """What was not run, and why."""

    artefact: str
    reason: str


class Found(NamedTuple):
    artefacts: tuple[Artefact, ...]
    left_out: tuple[LeftOut, ...]
    cuda: bool
    """Whether the graphs that GPUs take run on one."""


def find_artefacts(
    bundle: Bundle,
    *,
    device: Device = "auto",
    gpu: int = 0,
    engines: Sequence[Path | None] = (None,),
    largest: int | None = None,
    threads: int = 0,
    emulate: bool = False,
    cuda: bool | None = None,
) -> Found:
    """All of a bundle that can run here.

    Args:
        device: `cuda` runs what GPUs take there, and it is an error if it cannot; `auto` does so
            where there is a usable GPU; `cpu` leaves plans out.
        engines: folders where plans lie; None is the bundle's own.
        largest: most clips in a batch of a plan; None for as many as it was built for.
        threads: on the CPU; 0 for one per usable core.
        cuda: whether ONNX Runtime has a usable GPU; None tries it, which takes seconds.
        emulate: graphs for GPUs run on CPUs too, slowly, rounded as there; else they are left out.

    Raises:
        RuntimeUnavailableError: the device that was asked for cannot be used.
    """
    if cuda is None:
        cuda = device != "cpu" and _cuda_runs(bundle, device == "cuda", threads)
    artefacts: list[Artefact] = []
    left_out: list[LeftOut] = []
    for each in (
        *_graphs(bundle, cuda, threads, emulate),
        *(part for folder in engines for part in _plans(bundle, device, gpu, folder, largest)),
    ):
        if isinstance(each, Artefact):
            artefacts.append(each)
        else:
            left_out.append(each)
    return Found(tuple(artefacts), tuple(left_out), cuda)


def open_graph(bundle: Bundle, precision: str, *, cuda: bool, threads: int = 0) -> Runtime:
    """A graph in an engine that computes what the graph says.

    On a CPU, graphs for GPUs are computed in float32 and rounded as GPUs round; see
    `export.verification.gpu_emulation`. On a GPU, ONNX Runtime runs the FP16 graph; INT8 and FP8
    are TensorRT's.

    Raises:
        RuntimeUnavailableError: it cannot be loaded here.
        ModuleNotFoundError: rounding on a CPU needs `onnx`.
    """
    path = bundle.file(GRAPHS[precision])
    cuda = cuda and precision not in CPU_ONLY
    if precision not in GPU_KINDS or cuda:
        return OnnxRuntime(path, cuda=cuda, threads=threads, precision=precision)
    import onnx

    from export.verification.gpu_emulation import emulate

    model = emulate(onnx.load(path))
    runtime = OnnxRuntime(model, cuda=False, threads=threads, precision=precision)
    runtime.provider += ", rounding emulated"
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
    bundle: Bundle, cuda: bool, threads: int, emulate: bool
) -> Iterator[Artefact | LeftOut]:
    for precision, file in GRAPHS.items():
        if file not in bundle.manifest.files:
            continue
        on_gpu = cuda and precision not in CPU_ONLY
        if precision in GPU_KINDS and not on_gpu:
            if not emulate:
                yield LeftOut(file, "is for GPUs")
                continue
            if not _importable("onnx"):
                reason = "on a CPU it takes the package onnx to round as GPUs do: install `export`"
                yield LeftOut(file, reason)
                continue
        load = functools.partial(open_graph, bundle, precision, cuda=on_gpu, threads=threads)
        yield Artefact(file, precision, "cuda" if on_gpu else "cpu", bundle.file(file), load)


def _plans(
    bundle: Bundle, device: Device, gpu: int, engines: Path | None, largest: int | None
) -> Iterator[Artefact | LeftOut]:
    """Plans of this GPU, this TensorRT and these graphs."""
    found = list(plans_in(engines_folder(bundle, engines)))
    if not found:
        return
    if device == "cpu":
        yield from (LeftOut(_title(plan, engines), "runs on GPUs only") for plan in found)
        return
    try:
        here = TensorRt(gpu, engines)
    except RuntimeUnavailableError as error:
        if device == "cuda":
            raise
        yield from (LeftOut(_title(plan, engines), str(error)) for plan in found)
        return
    present = (*here.cuda.gpu, str(here.module.__version__))
    graphs = {entry.sha256: name for name, entry in bundle.manifest.files.items()}
    for plan in found:
        key, title = plan.facts.key, _title(plan, engines)
        if plan.facts.graph_sha256 not in graphs:
            yield LeftOut(title, "was built from another export")
        elif (key.gpu, key.compute_capability, key.tensorrt) != present:
            reason = f"is for {key.gpu} with TensorRT {key.tensorrt}; here is {' '.join(present)}"
            yield LeftOut(title, reason)
        else:
            graph = bundle.file(graphs[plan.facts.graph_sha256])
            load = functools.partial(here.load, plan, largest or key.batches[-1])
            yield Artefact(title, key.precision, "cuda", graph, load)


def _title(plan: Plan, engines: Path | None) -> str:
    """The file's name; of another folder, its path, since plans of two folders share names."""
    name = str(plan.path) if engines else plan.path.name
    return f"{name}, refittable" if plan.facts.refittable else name


def _importable(package: str) -> bool:
    try:
        __import__(package)
    except ImportError:
        return False
    return True
