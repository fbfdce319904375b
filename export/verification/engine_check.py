"""The gate where an engine is to serve: its answers against those of the bundle's float32 graph in
ONNX Runtime on the CPU, on the bundled video's crops and a clip of noise. No torch.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from export.bundle.bundle import Bundle
from export.bundle.manifest import ONNX_FLOAT32, Parity
from export.runtime.interface import Outputs, Runtime, device_name
from export.runtime.onnxruntime import OnnxRuntime
from export.runtime.plans import PlanError
from export.verification.parity import LIMITS, hold, run_in_batches
from model.demo import SAMPLE_CLIP
from model.video import load_clips

logger = logging.getLogger(__name__)


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


def prove_or_close(runtimes: Sequence[Runtime], of: Bundle | Proof) -> None:
    """Compares engines with the bundle's float32 graph; closes all of them if one differs.

    Args:
        of: the bundle, or its proof if several calls share one.

    Raises:
        PlanError: an engine fails on clips, or its answers differ by more than the gate allows.
    """
    with contextlib.ExitStack() as closing:
        for runtime in runtimes:
            closing.callback(runtime.close)
        try:
            proof = of if isinstance(of, Proof) else Proof.of(of)
            parities = [proof.judge(runtime) for runtime in runtimes]
        except Exception as error:  # engines' exceptions share no base but Exception
            raise PlanError(f"the engine fails on clips: {error}") from error
        for runtime, parity in zip(runtimes, parities, strict=True):
            where = device_name(runtime)
            if not parity.passed:
                raise PlanError(
                    f"the engine's answers are not the network's on {where}: logits differ by "
                    f"{parity.max_difference:.3g}, cosine {parity.centred_cosine:.5f}, "
                    f"error {parity.relative_error:.3g} of their spread"
                )
            facts = {
                "engine": runtime.engine,
                "engine_device": where,
                "precision": runtime.precision,
                "clips": parity.clips,
                "max_difference": parity.max_difference,
                "cosine": parity.centred_cosine,
            }
            logger.info("engine proven", extra=facts)
        closing.pop_all()
