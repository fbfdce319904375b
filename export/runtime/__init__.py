"""One interface over the engines that execute a bundle; one file per engine.

`load_runtime(bundle, device)` is the only door: it decides which engine runs, and never decides
in silence. The engine that was chosen is on the object and in the log.
"""

from __future__ import annotations

import logging

from export.bundle import ONNX_FLOAT32, Bundle
from export.runtime.interface import Device, Outputs, Runtime, RuntimeUnavailableError

__all__ = ["Device", "Outputs", "Runtime", "RuntimeUnavailableError", "load_runtime"]

logger = logging.getLogger(__name__)


def load_runtime(bundle: Bundle, device: Device = "auto", threads: int = 0) -> Runtime:
    """Loads a bundle into the best engine for `device`.

    Args:
        device: `cuda` or `cpu`; `auto` takes the GPU if it can be used, else warns and takes the
            CPU.
        threads: CPU threads inside one operator; 0 for one per core.

    Raises:
        RuntimeUnavailableError: `device` cannot run this bundle here.
        BundleError: the bundle lacks the file.
    """
    # Now, not above: a machine that only exports or shows help need not have every engine.
    from export.runtime.onnxruntime import OnnxRuntime

    path = bundle.file(ONNX_FLOAT32)
    if device != "cpu":
        try:
            return OnnxRuntime(path, cuda=True, threads=threads)
        except RuntimeUnavailableError as error:
            if device == "cuda":
                raise
            logger.warning("no GPU is used: %s", error)
    return OnnxRuntime(path, cuda=False, threads=threads)
