"""First weights learn how patches move, and again the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.config import ATTENTION_TYPES, VARIANTS
from model.demo import clips, pretrain
from model.demo.clips import Rendered
from model.network.timesformer import TimeSformer

SMALL = VARIANTS["demo"].replace(image_size=32, embed_dim=64, depth=2, num_heads=2)
SHORT = pretrain.Pretraining(steps=40, clips=12, batch=8, warm_up=5)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    cache = tmp_path_factory.mktemp("cache")
    first = clips.training_set(3, SHORT.clips, SMALL, cache, workers=1)
    again = clips.training_set(3, SHORT.clips, SMALL, cache, workers=1)
    assert np.array_equal(first.frames, again.frames)
    return again


def test_the_flow_of_clips_that_it_sees_is_learned(rendered: Rendered) -> None:
    torch.manual_seed(0)
    network = TimeSformer(SMALL)
    losses = pretrain.learn_flow(network, SHORT, rendered, np.random.default_rng(0))
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


@pytest.mark.parametrize("scheme", ATTENTION_TYPES)
def test_every_scheme_gets_first_weights_that_the_seed_decides(
    rendered: Rendered, scheme: str
) -> None:
    config = SMALL.replace(attention_type=scheme)
    settings = pretrain.Pretraining(steps=2, batch=2)
    one, other = (pretrain.first_weights(settings, config, rendered) for _ in range(2))
    theirs = other.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())
    assert torch.isfinite(one(torch.from_numpy(rendered.frames[:1].copy()))[0]).all()
