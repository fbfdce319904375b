"""TensorRT: plans executed by TensorRT's own runtime, without torch."""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType
from typing import Any

from export.runtime.cuda import Cuda
from export.runtime.interface import RuntimeUnavailableError
from export.runtime.plans import Gpu

logger = logging.getLogger(__name__)

_KEPT = 20


def load_tensorrt(name: str = "tensorrt") -> ModuleType:
    """The TensorRT module.

    Raises:
        RuntimeUnavailableError: it is not installed, or its libraries are not.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        raise RuntimeUnavailableError(
            f"TensorRT cannot be imported ({error}): install the `gpu` extra on a GPU node"
        ) from error


def this_machine(index: int = 0) -> tuple[Gpu, str]:
    """The GPU and the version of TensorRT, which plans depend on.

    Raises:
        RuntimeUnavailableError: there is no usable GPU, or no TensorRT.
    """
    return Cuda(index).gpu, str(load_tensorrt().__version__)


@functools.cache  # TensorRT keeps to the first one that a process gives it
def log_of(trt: ModuleType) -> Any:
    """The process's `trt.ILogger`, which passes records on to `logging` and remembers what went
    wrong: TensorRT says it nowhere else.

    Its `warnings` and `errors` are the different ones since `forget()`, in their order, `why()` is
    the errors as one sentence, and `half_norms` says whether a LayerNorm in FP16 was found.
    """
    levels = {
        trt.ILogger.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.ERROR: logging.ERROR,
        trt.ILogger.WARNING: logging.WARNING,
    }

    class Log(trt.ILogger):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.forget()

        def forget(self) -> None:
            self.warnings: list[str] = []
            self.errors: list[str] = []
            self.half_norms = False

        def log(self, severity: Any, msg: str) -> None:
            level = levels.get(severity, logging.DEBUG)
            text = " ".join(msg.split())
            logger.log(level, text)
            if level < logging.WARNING:
                return
            if "layernorm" in text.lower() and "fp16" in text.lower():
                self.half_norms = True
            kept = self.errors if level == logging.ERROR else self.warnings
            if text not in kept and len(kept) < _KEPT:
                kept.append(text)

        def why(self) -> str:
            return "; ".join(self.errors) or "TensorRT gave no reason"

    return Log()
