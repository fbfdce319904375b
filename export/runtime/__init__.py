"""One interface over the engines that execute a bundle; one file per engine.

`load_runtime(bundle, device)` is the only door: it decides which engine runs, and never decides
in silence. The engine that was chosen is on the object and in the log.
"""

from __future__ import annotations

import logging

from export.bundle import ONNX_FLOAT32, ONNX_INT8, Bundle
from export.runtime.interface import (
    Device,
    Outputs,
    Precision,
    Runtime,
    RuntimeUnavailableError,
)

__all__ = ["Device", "Outputs", "Precision", "Runtime", "RuntimeUnavailableError", "load_runtime"]

logger = logging.getLogger(__name__)


def load_runtime(
    bundle: Bundle, device: Device = "auto", threads: int = 0, precision: Precision = "float32"
) -> Runtime:
    """Loads a bundle into the best engine for `device`, TensorRT aside.

    Args:
        device: `cuda` or `cpu`; `auto` takes the GPU if it can be used, else warns and takes the
            CPU. ONNX Runtime computes INT8 on CPUs, so with it `auto` is the CPU.
        threads: CPU threads inside one operator; 0 for one per core.
        precision: `int8` takes the bundle's INT8 graph for CPUs; `auto`, where no GPU is used, the
            one that the export measured to be faster, or INT8 if there is one and it did not.

    Raises:
        RuntimeUnavailableError: `device` cannot run this bundle here, or not in this precision.
        BundleError: the bundle lacks the file.
    """
    # Now, not above: a machine that only exports or shows help need not have every engine.
    from export.runtime.onnxruntime import OnnxRuntime

    if precision in ("fp16", "fp8") or (precision == "int8" and device == "cuda"):
        raise RuntimeUnavailableError(
            f"{precision} on a GPU is TensorRT's, and on a CPU there is no more than float32 and "
            "int8: set the precision to auto, or make TensorRT usable"
        )
    if precision == "int8":
        return OnnxRuntime(bundle.file(ONNX_INT8), cuda=False, threads=threads, precision="int8")
    if device != "cpu":
        try:
            return OnnxRuntime(bundle.file(ONNX_FLOAT32), cuda=True, threads=threads)
        except RuntimeUnavailableError as error:
            if device == "cuda":
                raise
            logger.warning("no GPU is used: %s", error)
    if precision == "auto" and _int8_is_faster(bundle):
        return OnnxRuntime(bundle.file(ONNX_INT8), cuda=False, threads=threads, precision="int8")
    return OnnxRuntime(bundle.file(ONNX_FLOAT32), cuda=False, threads=threads)


def _int8_is_faster(bundle: Bundle) -> bool:
    """By the export's measurement; without one INT8 is taken to be, as it was wherever measured."""
    found = bundle.manifest.fastest.get("cpu")
    if found is not None:
        return found.order[0] == "int8"
    return ONNX_INT8 in bundle.manifest.files
