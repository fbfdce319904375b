"""The parity gate: an artefact's answers against the float32 network's on the same clips."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.bundle.manifest import Parity
from export.runtime.interface import Outputs, Runtime

Float64 = NDArray[np.float64]

# A label may change where the best two logits are closer than this many times the root mean square
# difference: errors of two of them add up to more in fewer than one of 50,000 cases.
_NOISE = 6
_TOP = 5


class Limits(NamedTuple):
    """What passes; None is measured and not judged.

    Finite answers, and the network's label on every clip where it is no matter of noise, are asked
    of every artefact.
    """

    difference: float | None
    """Largest difference of two logits, relative to the largest logit (or to 1, if that is larger);
    the same of the embedding."""
    cosine: float | None
    """Least cosine of a clip's logits, their mean taken away, and the same of its embedding."""
    error: float | None = None
    """Largest length of what a clip's logits are off by, relative to theirs with their mean taken
    away; the same of the embedding. A cosine alone would let any scale pass."""
    divergence: float | None = None
    """Largest Kullback-Leibler divergence of a clip's scores, in nats."""


# On another engine float32 differs by rounding alone. Measured on ViT-B: below 1e-5 of the largest
# logit; a wrong graph is off by whole logits.
FLOAT32 = Limits(difference=1e-4, cosine=None)
# Products rounded to eleven bits. Measured: see docs/export.md. A cosine of 0.9995 is an error of
# 0.03 where the scale is right.
FP16 = Limits(difference=None, cosine=0.9995, error=0.05, divergence=0.02)
# A cosine of 0.995 is an error of a tenth of the logits' spread.
INT8 = Limits(difference=None, cosine=0.995, error=0.15, divergence=0.25)
FP8 = INT8
LIMITS = {"float32": FLOAT32, "fp16": FP16, "int8": INT8, "int8-qdq": INT8, "fp8": FP8}
"""By precision or kind of graph: of graphs, and of the plans that are built from them."""

LARGEST_BATCH = 8
"""Clips that go through an engine together; more would only take more memory."""


def compare(reference: Outputs, actual: Outputs, limits: Limits = FLOAT32) -> Parity:
    """Compares two engines on one batch of clips.

    Raises:
        ValueError: they answer in different shapes.
    """
    for name, one, other in zip(Outputs._fields, reference, actual, strict=True):
        if one.shape != other.shape:
            raise ValueError(f"{name} has shape {other.shape} instead of {one.shape}")
    wanted, wanted_embedding = (part.astype(np.float64) for part in reference)
    given, given_embedding = (part.astype(np.float64) for part in actual)
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite fails below
        difference = np.abs(wanted - given)
        embedding_difference = np.abs(wanted_embedding - given_embedding)
        cosine = _centred_cosine(wanted, given)
        embedding_cosine = _centred_cosine(wanted_embedding, given_embedding)
        error = _relative_error(wanted, given)
        embedding_error = _relative_error(wanted_embedding, given_embedding)
        agreement = wanted.argmax(axis=1) == given.argmax(axis=1)
        confident = _margin(wanted) > _NOISE * _noise(wanted, difference, limits)
        divergence = _divergence(wanted, given)
    limit, embedding_limit = (
        None if limits.difference is None else limits.difference * _scale(part)
        for part in (wanted, wanted_embedding)
    )
    passed = (
        _within(difference, limit)
        and _within(embedding_difference, embedding_limit)
        and (limits.cosine is None or min(cosine, embedding_cosine) >= limits.cosine)
        and (limits.error is None or max(error, embedding_error) <= limits.error)
        and (limits.divergence is None or divergence <= limits.divergence)
        and bool(agreement[confident].all())
    )
    return Parity(
        clips=len(wanted),
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        embedding_max_difference=float(embedding_difference.max()),
        centred_cosine=cosine,
        embedding_cosine=embedding_cosine,
        relative_error=error,
        embedding_relative_error=embedding_error,
        softmax_divergence=divergence,
        top1_agreement=float(agreement.mean()),
        top5_agreement=_top_agreement(wanted, given),
        low_margin_clips=int((~confident).sum()),
        low_margin_agreement=float(agreement[~confident].mean()) if (~confident).any() else None,
        limit=limit,
        cosine_limit=limits.cosine,
        error_limit=limits.error,
        divergence_limit=limits.divergence,
        passed=passed,
    )


def _scale(values: Float64) -> float:
    return max(1.0, float(np.abs(values).max()))


def _within(difference: Float64, limit: float | None) -> bool:
    """NaN and infinity fail on either side, also where they make the limit infinite."""
    finite = bool(np.isfinite(difference).all())
    return finite and (limit is None or bool((difference <= limit).all()))


def _centred(values: Float64) -> Float64:
    return np.asarray(values - values.mean(axis=1, keepdims=True))


def _centred_cosine(wanted: Float64, given: Float64) -> float:
    """Of the clip that fares worst; what all logits have in common, a softmax does not see."""
    wanted, given = _centred(wanted), _centred(given)
    lengths = np.linalg.norm(wanted, axis=1) * np.linalg.norm(given, axis=1)
    products = (wanted * given).sum(axis=1)
    same = (wanted == given).all(axis=1)  # also where there is no direction at all
    cosines = np.divide(products, lengths, out=np.zeros_like(products), where=lengths != 0)
    return float(np.where(same, 1.0, cosines).min())


def _relative_error(wanted: Float64, given: Float64) -> float:
    """Of the clip that fares worst. Not centred: clients that get logits see what all of them have
    in common."""
    off = np.linalg.norm(wanted - given, axis=1)
    lengths = np.linalg.norm(_centred(wanted), axis=1)
    errors = np.full_like(off, np.inf)  # also where there is no spread to compare with
    np.divide(off, lengths, out=errors, where=lengths > 0)
    return float(np.where(off > 0, errors, 0.0).max())


def _noise(wanted: Float64, difference: Float64, limits: Limits) -> Float64:
    """Root mean square difference, clip by clip; no more than the limits leave to a logit, or what
    is off by much would excuse itself."""
    allowed = np.full(len(wanted), np.inf)
    if limits.difference is not None:
        allowed[:] = limits.difference * _scale(wanted)
    if limits.error is not None:
        lengths = np.linalg.norm(_centred(wanted), axis=1)
        allowed = np.minimum(allowed, limits.error * lengths / np.sqrt(wanted.shape[1]))
    return np.asarray(np.minimum(allowed, np.sqrt(np.mean(difference**2, axis=1))))


def _margin(logits: Float64) -> Float64:
    """How far the best class is ahead of the second, clip by clip; no second, no doubt."""
    if logits.shape[1] < 2:
        return np.full(len(logits), np.inf)
    second, best = np.partition(logits, -2, axis=1)[:, -2:].T
    return np.asarray(best - second)


def _divergence(wanted: Float64, given: Float64) -> float:
    """Kullback-Leibler, of the network's scores from the artefact's; the worst clip's, in nats."""
    expected, actual = _log_softmax(wanted), _log_softmax(given)
    return float((np.exp(expected) * (expected - actual)).sum(axis=1).max())


def _log_softmax(logits: Float64) -> Float64:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _top_agreement(wanted: Float64, given: Float64) -> float:
    """Share of the network's five best classes that are among the artefact's five best."""
    count = min(_TOP, wanted.shape[1])
    best = (np.argsort(-logits, axis=1)[:, :count] for logits in (wanted, given))
    shared = [len(set(a) & set(b)) / count for a, b in zip(*best, strict=True)]
    return float(np.mean(shared))


def hold(runtime: Runtime, clips: NDArray[np.uint8], reference: Outputs, limits: Limits) -> Parity:
    """Compares an engine with the reference's answers, each way that it batches clips.

    All clips go through it as a batch of one and larger ones: a graph of a fixed batch fails.
    Where batch sizes have kernels of their own, as in a TensorRT plan, the least and the largest
    batch of each is run too, in every slot: what is wrong in one of them alone is served as well. A
    clip counts as often as it was run.

    Args:
        clips: uint8 (clips, time, height, width, 3), two at least.
        reference: of these clips.
    """
    rows = np.concatenate(taken := list(_batches(runtime, len(clips))))
    given = run_batches(runtime, clips, taken)
    return compare(Outputs(*(part[rows] for part in reference)), given, limits)


def run_in_batches(runtime: Runtime, clips: NDArray[np.uint8]) -> Outputs:
    """Answers to all clips, each once; of the engine that others are compared with."""
    return run_batches(runtime, clips, _all_once(len(clips)))


def run_batches(
    runtime: Runtime, clips: NDArray[np.uint8], batches: Iterable[NDArray[np.intp]]
) -> Outputs:
    """Answers to batches of clips, by their indices, one after the other."""
    logits, embedding = zip(*(runtime.run(clips[batch]) for batch in batches), strict=True)
    return Outputs(np.concatenate(logits), np.concatenate(embedding))


def _batches(runtime: Runtime, clips: int) -> Iterator[NDArray[np.intp]]:
    yield from _all_once(clips)
    below = 0
    for size in runtime.batches:
        for edge in sorted({below + 1, size}):
            # Idle slots take turns.
            for turn in range(runtime.slots):
                yield np.arange(turn, turn + edge) % clips
        below = size


def _all_once(clips: int) -> list[NDArray[np.intp]]:
    starts = range(1, clips, LARGEST_BATCH)
    return [
        np.arange(1),
        *(np.arange(start, min(start + LARGEST_BATCH, clips)) for start in starts),
    ]
