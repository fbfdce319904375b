"""Limits for `tests/benchmarks/gpu.py`: one large matrix product, and all products of the network.

Both take their turns beside the entrants, so that clocks and heat are the same for all.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name the field uses
from torch.overrides import TorchFunctionMode

from export.rewrite import InferenceTimeSformer
from tests.benchmarks.gpu_bench import Bench, Entrant
from tests.benchmarks.gpu_networks import captured

LARGE = "one large product"
OWN = "the network's products alone"


class Factor(NamedTuple):
    """A tensor that is multiplied, as it lies in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self, device: torch.device) -> Tensor:
        """One of random numbers."""
        reach = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        numbers = torch.randn(reach + 1, device=device).to(self.dtype)
        return numbers.as_strided(self.shape, self.stride)


class Product(NamedTuple):
    """A product of the network: `linear`, `matmul` or `attention`, which is two in one kernel."""

    kind: str
    factors: tuple[Factor, ...]


def large_side(bench: Bench) -> int:
    return 8192 if bench.cuda else 128


def large(bench: Bench, dtype: torch.dtype) -> Entrant:
    """A square product, as large as fills the device."""
    side = large_side(bench)
    one, other = (torch.randn(side, side, device=bench.device).to(dtype) for _ in range(2))
    torch.mm(one, other)
    return Entrant(lambda: torch.mm(one, other), bench.wait)


def own(bench: Bench, network: InferenceTimeSformer, batch: int) -> Entrant:
    """Each product of a network as often as it is there, one after another and nothing between."""
    calls = [
        (_multiply(product, bench.device), count)
        for product, count in products_of(network, batch).items()
    ]

    def run() -> None:
        for multiply, count in calls:
            for _ in range(count):
                multiply()

    run()
    return Entrant(captured(run)[0] if bench.cuda else run, bench.wait)


def products_of(network: InferenceTimeSformer, batch: int) -> Counter[Product]:
    """The products that a network makes of a batch, and how often; nothing is computed."""
    config = network.config
    shape = (batch, config.num_frames, config.image_size, config.image_size, 3)
    network = copy.deepcopy(network).to("meta")
    with torch.no_grad(), _Recorder() as recorder:
        network(torch.zeros(shape, dtype=torch.uint8, device="meta"))
    return recorder.products


_KINDS: dict[Any, str] = {
    F.linear: "linear",
    F.scaled_dot_product_attention: "attention",
    torch.matmul: "matmul",
    Tensor.matmul: "matmul",
    Tensor.__matmul__: "matmul",
}


class _Recorder(TorchFunctionMode):
    """Notes what is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[Product] = Counter()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if kind := _KINDS.get(function):
            tensors = args[: 3 if kind == "attention" else 2]
            if kind == "linear":  # the tokens of all groups and clips are rows of one matrix
                tensors = (tensors[0].reshape(-1, tensors[0].shape[-1]), tensors[1])
            factors = tuple(Factor(tuple(t.shape), t.stride(), t.dtype) for t in tensors)
            self.products[Product(kind, factors)] += 1
        return function(*args, **(kwargs or {}))


def _multiply(product: Product, device: torch.device) -> Callable[[], Tensor]:
    tensors = [factor.make(device) for factor in product.factors]
    if product.kind == "attention":
        query, key, value = tensors
        return lambda: F.scaled_dot_product_attention(query, key, value)
    one, other = tensors
    if product.kind == "linear":
        rows = other.t()
        return lambda: torch.mm(one, rows)
    return lambda: torch.matmul(one, other)
