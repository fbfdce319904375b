"""Training for `tests/benchmarks/gpu.py`: ours and the original written plainly, in bfloat16."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name the field uses

from model.timesformer import TimeSformer
from tests.benchmarks.gpu_bench import Bench, Entrant
from tests.benchmarks.published import AsPublished, write_plainly


def steps(bench: Bench, batch: int, *, compiled: bool) -> tuple[dict[str, Entrant], dict[str, int]]:
    """Steps of SGD, and the most memory that the first two of each took; none on a CPU."""
    networks: dict[str, Callable[[], nn.Module]] = {
        "ours": lambda: _trainable(bench, TimeSformer(bench.config)),
        "original": lambda: write_plainly(_trainable(bench, AsPublished(bench.config))),
    }
    how = "torch.compile" if compiled else "eager"
    entrants: dict[str, Entrant] = {}
    memory: dict[str, int] = {}
    for name, make in networks.items():
        title = f"{name}, {how}"
        with bench.attempt(title):
            before = torch.cuda.memory_allocated() if bench.cuda else 0
            run = _step(bench, make(), batch, compiled)
            if bench.cuda:
                torch.cuda.reset_peak_memory_stats()
            run(), run()
            if bench.cuda:
                memory[title] = torch.cuda.max_memory_allocated() - before
            entrants[title] = Entrant(run, bench.wait)
    return entrants, memory


def _trainable(bench: Bench, network: TimeSformer) -> TimeSformer:
    network.load_state_dict(bench.model.state_dict())
    return network.to(bench.device).train()


def _step(bench: Bench, network: nn.Module, batch: int, compiled: bool) -> Callable[[], None]:
    optimiser = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)
    forward = network
    if compiled:
        forward = torch.compile(network, dynamic=False, backend=bench.options.backend)
    frames = bench.frames(batch)
    targets = torch.arange(batch, device=bench.device) % bench.config.num_classes

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(bench.device.type, torch.bfloat16):
            logits, _ = forward(frames)
        F.cross_entropy(logits.float(), targets).backward()
        optimiser.step()

    return step
