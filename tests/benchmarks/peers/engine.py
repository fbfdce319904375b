"""The engine that every peer serves: the ONNX file in `$ENGINE_MODEL`, with the service's options.

For the peers' environments: numpy and ONNX Runtime only.
"""

from __future__ import annotations

import os

import numpy as np
import onnxruntime
from numpy.typing import NDArray

MAX_BATCH = int(os.environ.get("ENGINE_BATCH", "16"))
# What the peers wait for company; the service's own default.
WAIT_S = 0.002


class Engine:
    """A session; clips as bytes in, rows of logits as bytes out."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ["ENGINE_THREADS"])
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(
            os.environ["ENGINE_MODEL"], options, providers=["CPUExecutionProvider"]
        )
        self._shape = self._session.get_inputs()[0].shape[1:]

    def run(self, clips: list[bytes]) -> list[bytes]:
        batch = [np.frombuffer(clip, np.uint8).reshape(self._shape) for clip in clips]
        logits, _ = self.infer(np.stack(batch))
        return [row.tobytes() for row in logits]

    def infer(self, frames: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        found: list[NDArray[np.float32]] = self._session.run(
            ["logits", "embedding"], {"frames": frames}
        )
        return found
