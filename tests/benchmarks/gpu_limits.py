"""The limits of a GPU that `tests/benchmarks/gpu.py` measures in turns with the networks.

The limits are one large matrix product, the products of the network without anything between them,
and a copy of memory.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name the field uses
from torch.overrides import TorchFunctionMode

from export.graph.rewrite import InferenceTimeSformer
from tests.benchmarks.gpu_networks import Bench, captured

LARGE, PRODUCTS, MEMORY = "large product", "network's products", "memory"


class Limit(NamedTuple):
    """Work that is as fast as the device allows."""

    run: Callable[[], object]
    amount: int
    """Multiply-adds, or bytes of memory, of one call of `run`."""
    needed: int
    """The same of one batch through the network: no implementation needs less."""


def limits(bench: Bench, dtype: torch.dtype, frames: Tensor) -> dict[str, Limit]:
    """Returns the limits for one batch of clips."""
    network = bench.rewritten(dtype)
    side, copied_bytes = (8192, 2**30) if bench.cuda else (128, 2**20)
    one, other = (torch.randn(side, side, device=bench.device).to(dtype) for _ in range(2))
    source = torch.zeros(copied_bytes, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    replay = replay_of(products_of(network, len(frames)), bench.device)
    work = bench.multiply_adds * len(frames)
    return {
        LARGE: Limit(lambda: torch.mm(one, other), side**3, work),
        PRODUCTS: Limit(captured(replay)[0] if bench.cuda else replay, work, work),
        MEMORY: Limit(  # a copy reads and writes; a network reads at least its weights and frames
            lambda: target.copy_(source), 2 * copied_bytes, _size(network) + frames.numel()
        ),
    }


def _size(network: nn.Module) -> int:
    return sum(each.numel() * each.element_size() for each in network.state_dict().values())


class Factor(NamedTuple):
    """The layout of a tensor that is multiplied."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def random(self, device: torch.device) -> Tensor:
        reach = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        numbers = torch.randn(reach + 1, device=device).to(self.dtype)
        return numbers.as_strided(self.shape, self.stride)


Product = tuple[Callable[..., Tensor], tuple[Factor, ...]]


def products_of(network: InferenceTimeSformer, batch: int) -> Counter[Product]:
    """Returns the network's products on a batch and the number of each; nothing is computed."""
    config = network.config
    shape = (batch, config.num_frames, config.image_size, config.image_size, 3)
    network = copy.deepcopy(network).to("meta")
    with torch.no_grad(), _Recorder() as recorder:
        network(torch.zeros(shape, dtype=torch.uint8, device="meta"))
    return recorder.products


def replay_of(products: Counter[Product], device: torch.device) -> Callable[[], None]:
    """Returns a function that computes each product as often as the network does."""
    calls = [
        (function, [factor.random(device) for factor in factors], count)
        for (function, factors), count in products.items()
    ]

    def run() -> None:
        for function, factors, count in calls:
            for _ in range(count):
                function(*factors)

    return run


# The number of factors of each function that multiplies.
_FACTORS: dict[Any, int] = {
    F.linear: 2,
    F.scaled_dot_product_attention: 3,
    Tensor.matmul: 2,
}


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[Product] = Counter()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if count := _FACTORS.get(function):
            factors = (Factor(tuple(t.shape), t.stride(), t.dtype) for t in args[:count])
            self.products[function, tuple(factors)] += 1
        return function(*args, **(kwargs or {}))
