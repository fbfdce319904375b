"""The one way from logits to scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.scores import mean_scores


@pytest.mark.parametrize("shape", [(1, 4), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_mean_scores_is_the_mean_softmax_of_divided_logits(
    shape: tuple[int, ...], temperature: float
) -> None:
    logits = np.random.default_rng(0).normal(0, 5, shape).astype(np.float32)
    expected = torch.softmax(torch.from_numpy(logits).double() / temperature, -1).mean(-2)
    np.testing.assert_allclose(mean_scores(logits, temperature), expected.numpy(), rtol=1e-12)


def test_mean_scores_of_extreme_logits_are_finite() -> None:
    scores = mean_scores(np.array([[3e38, -3e38], [-1000, -1000]], np.float32))
    np.testing.assert_array_equal(scores, [0.75, 0.25])
