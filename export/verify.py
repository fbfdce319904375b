"""The parity gate: an artefact's answers against the float32 network's on the same clips."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from export.bundle import Parity
from export.runtime.interface import Outputs, Runtime

# Float32 on another engine differs by rounding alone. Measured on ViT-B: below 1e-5 of the
# largest logit; a wrong graph is off by whole logits.
FLOAT32_LIMIT = 1e-4


def compare(reference: Outputs, actual: Outputs, limit: float = FLOAT32_LIMIT) -> Parity:
    """Compares two engines on one batch of clips.

    Args:
        limit: largest difference of two logits that passes, relative to the largest logit (or to
            1, if that is larger).
    """
    scale = max(1.0, float(np.abs(reference.logits).max()))
    difference = np.abs(reference.logits.astype(np.float64) - actual.logits)
    agreement = reference.logits.argmax(axis=1) == actual.logits.argmax(axis=1)
    embedding_difference = np.abs(reference.embedding.astype(np.float64) - actual.embedding)
    worst = float(difference.max())
    return Parity(
        clips=len(reference.logits),
        max_difference=worst,
        mean_difference=float(difference.mean()),
        embedding_max_difference=float(embedding_difference.max()),
        top1_agreement=float(agreement.mean()),
        limit=limit * scale,
        # Written so that a NaN anywhere fails.
        passed=worst <= limit * scale and bool(np.isfinite(embedding_difference).all()),
    )


def run_in_batches(runtime: Runtime, clips: NDArray[np.uint8]) -> Outputs:
    """Runs clips as a batch of one and a batch of the rest: a graph whose batch is not free fails.

    Args:
        clips: uint8 (clips, time, height, width, 3), two at least.
    """
    first, rest = runtime.run(clips[:1]), runtime.run(clips[1:])
    return Outputs(
        np.concatenate([first.logits, rest.logits]),
        np.concatenate([first.embedding, rest.embedding]),
    )
