"""One interface over the engines that execute a bundle; one file per engine.

`load_runtimes(bundle, device)` is the only door: it decides which engine runs, and never decides
in silence. The engine that was chosen is on the object and in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

from export.bundle.bundle import Bundle
from export.bundle.manifest import ONNX_FLOAT32, ONNX_FP16, ONNX_INT8
from export.runtime.interface import (
    Device,
    Outputs,
    Precision,
    Runtime,
    RuntimeUnavailableError,
    device_name,
)

__all__ = [
    "Device",
    "Outputs",
    "Precision",
    "Runtime",
    "RuntimeUnavailableError",
    "device_name",
    "load_on_gpus",
    "load_runtime",
    "load_runtimes",
]

logger = logging.getLogger(__name__)


def load_runtime(
    bundle: Bundle, device: Device = "auto", threads: int = 0, precision: Precision = "float32"
) -> Runtime:
    """`load_runtimes` with the first GPU."""
    (runtime,) = load_runtimes(bundle, device, threads, precision)
    return runtime


def load_runtimes(
    bundle: Bundle,
    device: Device = "auto",
    threads: int = 0,
    precision: Precision = "float32",
    gpus: Sequence[int] = (0,),
) -> tuple[Runtime, ...]:
    """Loads a bundle into the best engine for `device`, TensorRT aside: one on each GPU, or one.

    Args:
        device: `cuda` or `cpu`; `auto` takes the GPUs if they can be used, else warns and takes the
            CPU. ONNX Runtime computes INT8 on CPUs, so with it `auto` is the CPU.
        threads: CPU threads inside one operator; 0 for one per core.
        precision: `int8` takes the bundle's INT8 graph for CPUs; `auto`, where no GPU is used, the
            one that the export measured to be faster, or INT8 if there is one and it did not.
        gpus: which of the visible ones.

    Raises:
        RuntimeUnavailableError: `device` cannot run this bundle here, or not in this precision; or
            some of the GPUs can be used and others not.
        BundleError: the bundle lacks the file.
    """
    # Now, not above: a machine that only exports or shows help need not have every engine.
    from export.runtime.onnxruntime import OnnxRuntime

    def on_cpu(file: str, precision: str) -> tuple[Runtime]:
        path = bundle.file(file)
        return (OnnxRuntime(path, cuda=False, threads=threads, precision=precision),)

    if precision in ("fp16", "fp8") or (precision == "int8" and device == "cuda"):
        raise RuntimeUnavailableError(
            f"{precision} cannot be served: on a GPU int8 and fp8 need TensorRT, a CPU has float32 "
            "and int8 only; set the precision to auto, or make the GPU and TensorRT usable"
        )
    if precision == "int8":
        return on_cpu(ONNX_INT8, "int8")
    if device != "cpu" and (
        found := load_on_gpus(bundle, threads, gpus, "float32", must=device == "cuda")
    ):
        return found
    if precision == "auto" and _int8_is_faster(bundle):
        return on_cpu(ONNX_INT8, "int8")
    return on_cpu(ONNX_FLOAT32, "float32")


def load_on_gpus(
    bundle: Bundle,
    threads: int,
    gpus: Sequence[int],
    precision: Literal["fp16", "float32"],
    *,
    must: bool,
) -> tuple[Runtime, ...]:
    """Loads a graph of the bundle in ONNX Runtime on each of the GPUs.

    Args:
        must: False returns no engine where none of the GPUs can be used, with a warning in the log.

    Raises:
        RuntimeUnavailableError: one of the GPUs cannot be used.
        BundleError: the bundle lacks the file.
    """
    from export.runtime.onnxruntime import OnnxRuntime

    path = bundle.file(ONNX_FP16 if precision == "fp16" else ONNX_FLOAT32)
    loaded: list[Runtime] = []
    failed: dict[int, RuntimeUnavailableError] = {}
    for gpu in gpus:
        try:
            loaded.append(
                OnnxRuntime(path, cuda=True, gpu=gpu, threads=threads, precision=precision)
            )
        except RuntimeUnavailableError as error:
            failed[gpu] = error
    if not failed:
        return tuple(loaded)
    for runtime in loaded:
        runtime.close()
    gpu, reason = next(iter(failed.items()))
    if loaded:
        raise RuntimeUnavailableError(f"GPU {gpu} cannot be used, and others can: {reason}")
    if must:
        raise reason
    logger.warning("no GPU is used: %s", reason)
    return ()


def _int8_is_faster(bundle: Bundle) -> bool:
    """By the export's measurement; without one INT8 is taken to be, as it was wherever measured."""
    found = bundle.manifest.fastest.get("cpu")
    if found is not None:
        return found.order[0] == "int8"
    return ONNX_INT8 in bundle.manifest.files
