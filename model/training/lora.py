"""Low-rank adapters (LoRA; Hu et al., 2021): the product of two thin matrices is learned beside
each linear of the blocks, whose own weights stay. Merged into them, a plain network is left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name the field uses

from model.network.timesformer import TimeSformer
from model.training.errors import RecipeError

_DOWN, _UP = "adapter_down", "adapter_up"


class AdaptedLinear(nn.Linear):
    """A linear and its adapter; weight and bias are the linear's, under the names they had.

    `adapter_down` (rank, in) begins random and `adapter_up` (out, rank) zero: at first nothing
    is changed.
    """

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = scale
        self.adapter_down = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.adapter_up = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.adapter_down, a=math.sqrt(5))  # as a linear of torch begins

    def forward(self, x: Tensor) -> Tensor:
        change = F.linear(F.linear(x, self.adapter_down), self.adapter_up)
        return super().forward(x) + self.scale * change


def adapt(model: TimeSformer, rank: int, alpha: float, seed: int) -> None:
    """Gives every linear of the blocks an adapter, in place.

    Also the linears after the extra attentions: those of an image model are zero, and what
    is learned before them would go nowhere.

    Raises:
        RecipeError: adapters of this rank would have as many weights as what they adapt.
    """
    dim = model.config.embed_dim
    if 2 * rank >= dim:
        raise RecipeError(
            f"lora_rank is {rank}: adapters of a network of width {dim} need a rank below "
            f"{dim / 2:g}, or they have as many weights as it; `--train all` trains those"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in list(model.blocks.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, AdaptedLinear(child, rank, alpha / rank))


def is_adapter(name: str) -> bool:
    """Whether a weight of this name is an adapter's."""
    return name.endswith((_DOWN, _UP))


def merged(state: Mapping[str, Tensor], rank: int, alpha: float) -> dict[str, Tensor]:
    """The state dict of the plain network that computes the same; one without adapters as it is.

    In float64, rounded once.
    """
    plain = {name: value for name, value in state.items() if not is_adapter(name)}
    for name in state:
        if name.endswith(_UP):
            linear = name.removesuffix(_UP)
            change = state[name].double() @ state[linear + _DOWN].double()
            weight = plain[linear + "weight"]
            plain[linear + "weight"] = (weight.double() + alpha / rank * change).to(weight.dtype)
    return plain
