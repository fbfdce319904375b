"""The gate where an engine is to serve: its answers against those of the bundle's float32 graph in
ONNX Runtime on the CPU, on the bundled video's crops and a clip of noise. No torch.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from export.bundle import Bundle
from export.manifest import ONNX_FLOAT32, Parity
from export.runtime.interface import Outputs, Runtime
from export.runtime.onnxruntime import OnnxRuntime
from export.verify import LIMITS, hold, run_in_batches
from model.demo import SAMPLE_CLIP
from model.video import load_clips


class Proof(NamedTuple):
    """What engines of a bundle are held to."""

    clips: NDArray[np.uint8]
    """(clips, time, height, width, 3)"""
    answers: Outputs

    @classmethod
    def of(cls, bundle: Bundle) -> Self:
        seen = load_clips(SAMPLE_CLIP, bundle.config.preprocessing, crops=3).frames
        noise = np.random.default_rng(0).integers(0, 256, (1, *seen.shape[1:]), dtype=np.uint8)
        clips = np.concatenate([seen, noise])
        reference = OnnxRuntime(bundle.file(ONNX_FLOAT32), cuda=False)
        try:
            return cls(clips, run_in_batches(reference, clips))
        finally:
            reference.close()

    def judge(self, runtime: Runtime) -> Parity:
        """By the limits of the engine's precision; engines' exceptions come through."""
        return hold(runtime, self.clips, self.answers, LIMITS[runtime.precision])


def shortfall(parity: Parity) -> str:
    """How far answers are off, in words."""
    return (
        f"logits differ by {parity.max_difference:.3g}, cosine {parity.centred_cosine:.5f}, "
        f"error {parity.relative_error:.3g} of their spread"
    )
