"""From the network's logits to an answer: scores, labels, and what was looked at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from export.bundle.bundle import Bundle
from model.scores import mean_scores
from model.video import Clips, VideoFacts
from service.inference.parameters import ClassifyParameters, ViewParameters
from service.inference.results import (
    Classification,
    Embedding,
    ModelName,
    Prediction,
    SamplingFacts,
    VideoFactsSchema,
)


def classification(
    bundle: Bundle, clips: Clips, logits: NDArray[np.float32], parameters: ClassifyParameters
) -> Classification:
    """The answer for one video, whose clips have these logits (clips, classes)."""
    return Classification(
        predictions=best_scores(
            bundle.manifest.labels,
            mean_scores(logits, bundle.manifest.temperature),
            parameters.top_k,
            parameters.threshold,
        ),
        model=ModelName(name=bundle.name, version=bundle.version),
        sampling=sampling_facts(clips, parameters),
        video=video_facts(clips.facts, clips.truncated),
    )


def best_scores(
    labels: Sequence[str], scores: NDArray[np.float64], top_k: int, threshold: float
) -> tuple[Prediction, ...]:
    """Returns the best labels by their scores (classes,), the best first."""
    best = np.argsort(-scores, kind="stable")[:top_k]
    return tuple(
        Prediction(
            label=labels[index],
            class_index=int(index),
            score=round(float(scores[index]), 6),
        )
        for index in best
        if scores[index] >= threshold
    )


def embedding_of(
    bundle: Bundle, clips: Clips, embedding: NDArray[np.float32], parameters: ViewParameters
) -> Embedding:
    """The embedding of one video, whose clips have these (clips, dim)."""
    vector = mean_embedding(embedding)
    return Embedding(
        embedding=tuple(vector),
        dim=len(vector),
        model=ModelName(name=bundle.name, version=bundle.version),
        sampling=sampling_facts(clips, parameters),
        video=video_facts(clips.facts, clips.truncated),
    )


def mean_embedding(embedding: NDArray[np.float32]) -> list[float]:
    """(clips, dim) to the clips' mean, float32 in as few digits as tell it from its neighbours."""
    mean = embedding.mean(axis=0, dtype=np.float64).astype(np.float32)
    # By way of text: 0.1 in float32 would be 0.10000000149011612 in JSON.
    return [float(str(value)) for value in mean]


def sampling_facts(clips: Clips, parameters: ViewParameters) -> SamplingFacts:
    """What of the video the network was shown."""
    return SamplingFacts(
        mode=clips.sampling,
        views=parameters.views,
        crops=parameters.crops,
        times_s=tuple(tuple(round(float(seconds), 4) for seconds in view) for view in clips.times),
    )


def video_facts(facts: VideoFacts, truncated: bool) -> VideoFactsSchema:
    """What the file turned out to be."""
    return VideoFactsSchema(
        width=facts.width,
        height=facts.height,
        rotation=facts.rotation,
        duration_s=round(facts.duration_s, 4),
        frames=facts.frames,
        frame_rate=None if facts.frame_rate is None else round(facts.frame_rate, 4),
        codec=facts.codec,
        container=facts.container,
        truncated=truncated,
    )
