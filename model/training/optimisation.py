"""How weights are changed: what is trained, in which groups, at which rate, and their average.

No state lives here but the average's: a rate is a function of the step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from model.network.timesformer import TimeSformer
from model.training.distributed.parallel import part
from model.training.errors import RecipeError
from model.training.lora import is_adapter

_EMBEDDINGS = frozenset({"cls_token", "pos_embed", "time_embed"})


Trained = Literal["all", "head", "lora"] | int


@dataclasses.dataclass(frozen=True)
class Optimisation:
    """All that decides how weights change.

    Attributes:
        epochs: times that every video is seen; need not be whole.
        learning_rate: at its highest, for a step of `Recipe.batch_size` x `accumulate` clips.
        schedule: `steps` multiplies the rate by `decay` at each of `decay_epochs`; `cosine` lets it
            fall to zero along half a cosine.
        warm_up: epochs in which the rate rises from zero in a line.
        layer_decay: factor on the rate for each block further from the head.
        ema: how much of the average of the weights each step keeps; 0 for no average. In the first
            steps it keeps less. The average is what is evaluated and written.
        clip_norm: longest gradient; longer ones are scaled down. 0 for no limit.
        accumulate: batches whose gradients are added up to one step.
        train: `all`, `head` (linear probe), `lora` (adapters and head), or the number of last
            blocks that are trained with the head and the last norm.
        lora_rank: of the adapters, see `adapters.py`; what they add is scaled by `lora_alpha` over
            it, so that the rate need not change with the rank.
        patience: evaluations without a better `watch` before the run ends; its result is then the
            best that was evaluated. 0 trains to the end, and takes the last.
        watch: what is better when it is lower (`log_loss`) or higher (`top1`).
    """

    optimizer: Literal["sgd", "adamw"] = "sgd"
    epochs: float = 15
    learning_rate: float = 0.005
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    schedule: Literal["steps", "cosine"] = "steps"
    decay_epochs: tuple[float, ...] = (11, 14)
    decay: float = 0.1
    warm_up: float = 0
    layer_decay: float = 1.0
    ema: float = 0.0
    clip_norm: float = 0.0
    accumulate: int = 1
    train: Trained = "all"
    lora_rank: int = 8
    lora_alpha: float = 16
    patience: int = 0
    watch: Literal["log_loss", "top1"] = "log_loss"

    def __post_init__(self) -> None:
        positive = (
            "epochs",
            "learning_rate",
            "layer_decay",
            "accumulate",
            "lora_rank",
            "lora_alpha",
        )
        for field in positive:
            if not 0 < getattr(self, field) < math.inf:
                raise RecipeError(f"{field} is {getattr(self, field)}; it must be above 0")
        for field in ("accumulate", "patience", "lora_rank"):
            if type(getattr(self, field)) is not int:
                raise RecipeError(f"{field} is {getattr(self, field)!r}; it must be a whole number")
        for field in ("momentum", "weight_decay", "warm_up", "ema", "clip_norm", "patience"):
            if not 0 <= getattr(self, field) < math.inf:
                raise RecipeError(f"{field} is {getattr(self, field)}; it must not be negative")
        if self.ema >= 1 or self.momentum >= 1:
            raise RecipeError("ema and momentum must be below 1")
        if self.watch not in ("log_loss", "top1"):
            raise RecipeError(f"watch is {self.watch!r}; it must be log_loss or top1")
        if not (self.train in ("all", "head", "lora") or type(self.train) is int):
            raise RecipeError(
                f"train is {self.train!r}; it must be all, head, lora or a number of blocks"
            )


def layer_of(name: str, depth: int) -> int:
    """0 for the embeddings, 1 to `depth` for the blocks, `depth` + 1 for the last norm and head."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1 if name.startswith(("norm.", "head.")) else 0


def freeze(model: TimeSformer, train: Trained) -> None:
    """Sets which weights are trained, and leaves blocks without any in eval mode.

    Frozen blocks drop no paths: the features of a linear probe are those that will be served.

    Raises:
        RecipeError: more blocks are asked for than there are.
    """
    depth = model.config.depth
    if isinstance(train, int) and not 0 < train <= depth:
        raise RecipeError(f"the last {train} blocks cannot be trained: the model has {depth}")
    firsts = {"all": 0, "lora": 1, "head": depth + 1}
    first = firsts[train] if isinstance(train, str) else depth + 1 - train
    for name, parameter in model.named_parameters():
        wanted = layer_of(name, depth) >= first
        if train in ("head", "lora"):  # not the norm before the head
            wanted = name.startswith("head.") or is_adapter(name)
        parameter.requires_grad_(wanted)
    model.train()
    for index, block in enumerate(model.blocks, start=1):
        block.train(index >= first)


def build_optimizer(model: TimeSformer, settings: Optimisation) -> torch.optim.Optimizer:
    """An optimiser over the weights that are trained.

    Biases, norms and embeddings are not decayed. Every group has its share of the rate in
    `rate_scale`, and the names of its weights, in order, in `names`.
    """
    depth = model.config.depth
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = parameter.ndim > 1 and name not in _EMBEDDINGS
        layer = layer_of(name, depth)
        group = groups.setdefault(
            (layer, decayed),
            {
                "params": [],
                "names": [],
                "weight_decay": settings.weight_decay if decayed else 0.0,
                "rate_scale": settings.layer_decay ** (depth + 1 - layer),
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            groups.values(), lr=settings.learning_rate, momentum=settings.momentum
        )
    return torch.optim.AdamW(groups.values(), lr=settings.learning_rate, betas=settings.betas)


def rate(epoch: float, settings: Optimisation) -> float:
    """The learning rate at a point of the training, in epochs since its beginning."""
    if epoch < settings.warm_up:
        return settings.learning_rate * epoch / settings.warm_up
    if settings.schedule == "steps":
        passed = sum(epoch >= at for at in settings.decay_epochs)
        return settings.learning_rate * settings.decay**passed
    falling = max(settings.epochs - settings.warm_up, 1e-9)
    progress = min((epoch - settings.warm_up) / falling, 1.0)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def set_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Gives every group its share of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = value * group["rate_scale"]


class Average:
    """Exponential moving average of the trained weights, float32.

    `weights` are by name, as in the model's state dict.
    """

    def __init__(self, model: nn.Module, keep: float) -> None:
        self.keep = keep
        self.steps = 0
        self.weights = {name: value.detach().clone() for name, value in _trained(model)}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes in the weights after a step."""
        self.steps += 1
        # Young averages forget their beginning faster, or they would be mostly that.
        keep = min(self.keep, self.steps / (self.steps + 9))
        names = [name for name, _ in _trained(model)]
        slow = [self.weights[name] for name in names]
        fast = [value.detach() for _, value in _trained(model)]
        torch._foreach_lerp_(slow, fast, 1 - keep)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        for name, value in cast(dict[str, Tensor], state["weights"]).items():
            self.weights[name].copy_(part(value, self.weights[name]))


def _trained(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, value) for name, value in model.named_parameters() if value.requires_grad)
