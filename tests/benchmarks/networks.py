"""Networks of random weights for the benchmarks; torch alone."""

from __future__ import annotations

import torch

from model.config import ModelConfig
from model.network.timesformer import TimeSformer


def random_model(config: ModelConfig) -> TimeSformer:
    """The same in every run. No weight is zero; the scale is that of trained weights, so that
    attention is not uniform."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for what the constructor draws
        model = TimeSformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)
    return model
