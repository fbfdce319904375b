"""One network in several processes: gradients averaged by DDP, or weights sharded by FSDP.

Saved states do not show it: they are gathered to whole tensors, and shared out again when they are
read, so that a run goes on in any number of processes, and with either.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from model.network.timesformer import TimeSformer
from model.training.distributed.process_group import World


def spread(model: TimeSformer, world: World, shard: bool) -> nn.Module:
    """What is called in place of `model` to learn together with the other processes.

    Its gradients are the means over them. With `shard` the weights of `model` itself become parts
    of the whole: each process keeps its own and gets those of a block when they are needed.
    """
    if world.size == 1:
        return model
    if not shard:
        if model.recompute:
            # Its cuts of a compiled network to the size of its messages cannot go through this.
            torch._dynamo.config.optimize_ddp = False
        on_gpu = model.head.weight.is_cuda
        return DistributedDataParallel(
            model,
            device_ids=[world.local_rank] if on_gpu else None,
            gradient_as_bucket_view=True,
        )
    # It warns that the embedding is a view, which must not be changed in place; nobody does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    mesh = init_device_mesh(model.head.weight.device.type, (world.size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@contextmanager
def last_of_step(network: nn.Module, last: bool) -> Iterator[None]:
    """Gradients are exchanged after the last batch of a step; until then each adds up its own."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(last)
        yield
    elif isinstance(network, DistributedDataParallel) and not last:
        with network.no_sync():
            yield
    else:
        yield


def whole(values: Any, keep: bool = True) -> Any:
    """A tree of dicts, lists and tuples with each sharded tensor gathered, in the CPU's memory.

    Args:
        keep: whether this process wants them, or only gives its parts.
    """
    if isinstance(values, DTensor):
        gathered = values.full_tensor()
        return gathered.cpu() if keep else None
    if isinstance(values, Mapping):
        return {key: whole(value, keep) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(whole(value, keep) for value in values)
    return values


def part(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, cut as `like` is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def load_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`load_state_dict` from whole tensors."""
    ours = model.state_dict()
    model.load_state_dict({name: part(value, ours[name]) for name, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """`load_state_dict` from whole tensors."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    cut = {
        number: {
            name: part(value, weights[number])
            if isinstance(value, Tensor) and value.shape == weights[number].shape
            else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": cut})
