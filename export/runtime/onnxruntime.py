"""ONNX Runtime, on a GPU (CUDA provider) or on the CPU.

With no usable GPU, ONNX Runtime falls back to the CPU in silence; here that is an error when a
GPU was asked for, and a warning in the log when the choice was left to us.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from export.runtime.cores import usable_cores
from export.runtime.interface import Outputs, RuntimeUnavailableError

logger = logging.getLogger(__name__)

_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
# What the network's time goes into. The CPU may compute shapes for a GPU, but none of these.
_WORK = frozenset(
    {
        *("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "LayerNormalization", "Softmax"),
        *(
            "SkipLayerNormalization",
            "Gelu",
            "BiasGelu",
            "FastGelu",
            "Attention",
            "MultiHeadAttention",
        ),
    }
)


@functools.cache
def _load_cuda_libraries() -> None:
    """What the extra `gpu` installs, where no linker looks for it; else what the system has."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told):  # which is for answers, as JSON for example
        onnxruntime.preload_dlls()
    for line in told.getvalue().splitlines():
        logger.warning("ONNX Runtime: %s", line)


class OnnxRuntime:
    """An ONNX Runtime session. `run` may be called from several threads.

    Args:
        model: the ONNX file, or what is in one.
        cuda: run on a GPU.
        gpu: which of the visible ones.
        precision: what the graph computes in, to be told to whoever asks.
        threads: CPU threads inside one operator; 0 for one per usable core.

    Raises:
        RuntimeUnavailableError: no GPU here, or the file is no model that the engine can load.
    """

    engine = "onnxruntime"
    slots = 1
    batches: tuple[int, ...] = ()

    def __init__(
        self,
        model: Path | bytes,
        *,
        cuda: bool,
        gpu: int = 0,
        threads: int = 0,
        precision: str = "float32",
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or usable_cores()
        options.log_severity_level = 3
        # Its threads sleep while they wait for one another. To spin is worth 5 % of a batch where
        # cores have nothing else to do; where a decoder or a neighbour takes one of them, others
        # would burn theirs meanwhile, and 50 ms after each batch: see docs/measurements.md.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        wanted = _CUDA if cuda else _CPU
        if wanted not in onnxruntime.get_available_providers():
            raise RuntimeUnavailableError(
                f"this ONNX Runtime has no {wanted}: install the `gpu` extra on a GPU node"
            )
        if cuda:
            _load_cuda_libraries()
        # Without the second option float32 is TF32 there, which keeps ten bits.
        provider = (wanted, {"device_id": str(gpu), "use_tf32": "0"}) if cuda else wanted
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=[provider])
        except Exception as error:  # its exceptions share no base but Exception
            name = model if isinstance(model, Path) else "the graph"
            raise RuntimeUnavailableError(f"ONNX Runtime cannot load {name}: {error}") from error
        self.provider: str = self._session.get_providers()[0]
        if self.provider != wanted:
            raise RuntimeUnavailableError(
                f"ONNX Runtime was asked for {wanted} and fell back to {self.provider}; "
                "its log says what is missing"
            )
        if cuda and (strayed := self._work_on(_CPU)):
            raise RuntimeUnavailableError(
                f"ONNX Runtime would compute {', '.join(sorted(strayed))} on the CPU though the "
                "GPU was asked for"
            )
        self.device = "cuda" if cuda else "cpu"
        self.gpu = gpu if cuda else None
        self.precision = precision

    def _work_on(self, provider: str) -> set[str]:
        """Operators of `_WORK` that go to a provider; none are known before ONNX Runtime 1.24."""
        assignments: list[Any] = getattr(
            self._session, "get_provider_graph_assignment_info", list
        )()
        return {
            node.op_type
            for assignment in assignments
            if assignment.ep_name == provider
            for node in assignment.get_nodes()
            if node.op_type in _WORK
        }

    def run(self, frames: NDArray[np.uint8]) -> Outputs:
        logits, embedding = self._session.run(["logits", "embedding"], {"frames": frames})
        return Outputs(logits, embedding)

    def close(self) -> None:
        del self._session
