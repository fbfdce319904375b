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
            1, if that is larger); the same of the embedding.

    Raises:
        ValueError: they answer in different shapes.
    """
    for name, expected, given in zip(Outputs._fields, reference, actual, strict=True):
        if expected.shape != given.shape:
            raise ValueError(f"{name} has shape {given.shape} instead of {expected.shape}")
    difference = np.abs(reference.logits.astype(np.float64) - actual.logits)
    embedding_difference = np.abs(reference.embedding.astype(np.float64) - actual.embedding)
    agreement = reference.logits.argmax(axis=1) == actual.logits.argmax(axis=1)
    scaled_limit = limit * _scale(reference.logits)
    return Parity(
        clips=len(reference.logits),
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        embedding_max_difference=float(embedding_difference.max()),
        top1_agreement=float(agreement.mean()),
        limit=scaled_limit,
        passed=_within(difference, scaled_limit)
        and _within(embedding_difference, limit * _scale(reference.embedding)),
    )


def _scale(values: NDArray[np.float32]) -> float:
    return max(1.0, float(np.abs(values).max()))


def _within(difference: NDArray[np.float64], limit: float) -> bool:
    """NaN and infinity fail on either side, also where they make the limit infinite."""
    return bool(np.isfinite(difference).all() and (difference <= limit).all())


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
