"""From logits to scores, for training, evaluation and serving alike. Needs numpy alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def mean_scores(logits: NDArray[np.floating[Any]], temperature: float = 1.0) -> NDArray[np.float64]:
    """Returns the scores (..., classes) of logits (..., views, classes), in float64.

    Scores are the softmax of `logits / temperature`, averaged over the views, as in published
    evaluations.
    """
    scaled = logits.astype(np.float64) / temperature
    powers = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return np.asarray((powers / powers.sum(axis=-1, keepdims=True)).mean(axis=-2))
