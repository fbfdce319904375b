"""PyTorch's entrants for `tests/benchmarks/gpu.py`: original and rewritten, in every way to run.

The names of all entrants are here too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from tests.benchmarks.gpu_bench import Answers, Bench, Entrant
from tests.benchmarks.published import AsPublished, write_plainly

ORIGINAL = "original, eager"
ORIGINAL_COMPILED = "original, torch.compile"
FUSED_COMPILED = "original with fused attention, torch.compile"
FUSED_COMPILED_GRAPH = "original with fused attention, torch.compile and CUDA graph"
REWRITTEN = "rewritten, eager"
REWRITTEN_GRAPH = "rewritten, CUDA graph"
REWRITTEN_COMPILED = "rewritten, torch.compile"
REWRITTEN_COMPILED_GRAPH = "rewritten, torch.compile and CUDA graph"
# Of `gpu_engines`, which not every machine can import.
ONNX_RUNTIME = "rewritten, ONNX Runtime CUDA"
ONNX_RUNTIME_SERVED = "rewritten, ONNX Runtime CUDA as served"
TENSORRT = "rewritten, TensorRT"
TENSORRT_SERVED = "rewritten, TensorRT as served"

COMPILED_ORIGINALS = (ORIGINAL_COMPILED, FUSED_COMPILED, FUSED_COMPILED_GRAPH)
GRAPHS = (REWRITTEN_GRAPH, REWRITTEN_COMPILED_GRAPH)

Network = Callable[[Tensor], Answers]
_Made = TypeVar("_Made")


def eager(bench: Bench, frames: Tensor) -> dict[str, Entrant]:
    """Without a compiler."""
    entrants: dict[str, Entrant] = {}
    _enter(bench, entrants, ORIGINAL, _plain(bench), frames)
    ours = bench.rewritten(bench.dtype)
    _enter(bench, entrants, REWRITTEN, ours, frames)
    _enter_graph(bench, entrants, REWRITTEN_GRAPH, ours, frames)
    return entrants


def compiled(bench: Bench, frames: Tensor) -> dict[str, Entrant]:
    """By `torch.compile`, each for this one batch size."""
    torch.compiler.reset()
    entrants: dict[str, Entrant] = {}

    def compile_(network: Network) -> Network:
        return torch.compile(network, dynamic=False, backend=bench.options.backend)

    fused = compile_(AsPublished.of(bench.model).to(bench.device, bench.dtype))
    ours = compile_(bench.rewritten(bench.dtype))
    _enter(bench, entrants, ORIGINAL_COMPILED, compile_(_plain(bench)), frames)
    _enter(bench, entrants, FUSED_COMPILED, fused, frames)
    _enter_graph(bench, entrants, FUSED_COMPILED_GRAPH, fused, frames)
    _enter(bench, entrants, REWRITTEN_COMPILED, ours, frames)
    _enter_graph(bench, entrants, REWRITTEN_COMPILED_GRAPH, ours, frames)
    return entrants


def _plain(bench: Bench) -> AsPublished:
    return write_plainly(AsPublished.of(bench.model)).to(bench.device, bench.dtype)


def _enter(
    bench: Bench, entrants: dict[str, Entrant], name: str, network: Network, frames: Tensor
) -> None:
    with bench.attempt(name):
        network(frames)
        entrants[name] = Entrant(
            lambda: network(frames), bench.wait, answers=lambda: network(frames)
        )


def _enter_graph(
    bench: Bench, entrants: dict[str, Entrant], name: str, network: Network, frames: Tensor
) -> None:
    if not bench.cuda:
        bench.left_out[name] = "CUDA graphs want a GPU"
        return
    with bench.attempt(name):
        replay, kept = captured(lambda: network(frames))

        def answers() -> Answers:
            for each in kept:
                each.zero_()  # so that what is read was written by the graph
            replay()
            return kept

        entrants[name] = Entrant(replay, bench.wait, answers)


def captured(work: Callable[[], _Made]) -> tuple[Callable[[], None], _Made]:
    """What launches work on the device whole, recorded once; and what it made, which each launch
    writes anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels are chosen and memory is taken before, not while it records
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = work()
    return graph.replay, made
