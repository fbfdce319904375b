from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from model.config import ATTENTION_TYPES, VARIANTS, ModelConfig
from model.network.cost import cost
from model.network.timesformer import TimeSformer
from tests.model.conftest import random_frames, tiny_config


@pytest.mark.parametrize(
    ("attention_type", "millions"),
    [
        ("space_only", 85.9),
        ("joint_space_time", 85.9),
        ("divided_space_time", 121.4),
        ("sparse_local_global", 121.4),
        ("axial", 156.8),
    ],
)
def test_parameters_are_the_papers(attention_type: Any, millions: float) -> None:
    config = ModelConfig(attention_type=attention_type, num_classes=174)
    assert round(cost(config).parameters / 1e6, 1) == millions


def test_the_published_kinetics_model_has_its_parameters_to_the_last() -> None:
    assert cost(VARIANTS["base"]).parameters == 121_566_352


@pytest.mark.parametrize(("name", "tera"), [("base", 0.59), ("hr", 5.11), ("large", 7.14)])
def test_three_views_cost_what_the_paper_says(name: str, tera: float) -> None:
    assert round(3 * cost(VARIANTS[name]).multiply_adds / 1e12, 2) == tera


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_parameters_are_those_of_the_network(attention_type: str) -> None:
    config = ModelConfig().replace(attention_type=attention_type, mlp_ratio=3.0, depth=5)
    with torch.device("meta"):
        model = TimeSformer(config)
    assert cost(config).parameters == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_multiply_adds_are_those_of_the_network(attention_type: str) -> None:
    config = tiny_config(attention_type, mlp_ratio=3.0)
    model = TimeSformer(config).eval()
    # The counter knows no fused attention on a CPU; the unfused one has the same two products.
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(random_frames(config, batch=1))
    assert 2 * cost(config).multiply_adds == counter.get_total_flops()


class LiveBytes(TorchDispatchMode):
    """The most that tensors made under it held at one time."""

    def __init__(self, before: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize(
    "changes",
    [
        {"embed_dim": 64, "image_size": 64},
        {"embed_dim": 192, "image_size": 64, "mlp_ratio": 1.0},
        {"embed_dim": 8, "patch_size": 16},
    ],
    ids=["gelu", "attention", "input"],
)
def test_activations_are_what_a_clip_really_holds(
    attention_type: str, changes: dict[str, Any]
) -> None:
    config = tiny_config(attention_type, **changes)
    model, frames = TimeSformer(config).eval(), random_frames(config, batch=1)
    live = LiveBytes([*model.parameters(), *model.buffers(), frames])
    with torch.inference_mode(), live:
        model(frames)
    assert cost(config).activation_bytes == pytest.approx(live.peak, rel=0.15)
