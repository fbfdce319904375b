"""The networks that `tests/benchmarks/gpu.py` times, and the check of each network's answers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name the field uses

from export.graph.rewrite import InferenceTimeSformer, multiply_adds, rewrite
from model.config import VARIANTS
from tests.benchmarks.half import halve
from tests.benchmarks.networks import random_model
from tests.benchmarks.published import AsPublished, write_plainly

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# For each dtype, the least cosine and the largest error of a clip's answers. FP16 has the limits of
# the export's gate; bfloat16 has three bits less.
COSINES = {"fp16": 0.9995, "bf16": 0.99}
ERRORS = {"fp16": 0.05, "bf16": 0.2}
_EXACT_BATCH = 8
"""Limit on the clips that go through the float32 network together."""

Answers = tuple[Tensor, Tensor]
"""Logits (batch, classes) and embedding (batch, dim)."""
_Output = TypeVar("_Output")


class Entrant(NamedTuple):
    """A network on one batch."""

    run: Callable[[], object]
    """Starts the work of one batch; `Bench.wait` waits for the work."""
    answers: Callable[[], Answers]
    """Runs the batch once more and returns the answers."""


class Bench:
    """A network of random weights in each form that is measured, on one device.

    Args:
        backend: of `torch.compile`.
    """

    def __init__(self, device: str, variant: str, backend: str = "inductor") -> None:
        self.device, self.config, self.backend = torch.device(device), VARIANTS[variant], backend
        self.model = random_model(self.config)
        self._rewritten = rewrite(self.model)
        self._exact = self.original()
        self.multiply_adds = multiply_adds(self._rewritten)
        """Of one clip through the rewritten network."""

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def original(self, dtype: torch.dtype = torch.float32) -> AsPublished:
        return AsPublished.of(self.model).to(self.device, dtype)

    def rewritten(self, dtype: torch.dtype) -> InferenceTimeSformer:
        """Returns our network with its large products in a 16-bit type."""
        return halve(copy.deepcopy(self._rewritten), dtype).to(self.device).eval()

    def frames(self, batch: int) -> Tensor:
        """Returns clips of noise over a colour, so that the answers differ from clip to clip."""
        config = self.config
        shape = (batch, config.num_frames, config.image_size, config.image_size, 3)
        generator = torch.Generator().manual_seed(0)
        colours = torch.randint(0, 192, (batch, 1, 1, 1, 3), generator=generator)
        noise = torch.randint(0, 64, shape, dtype=torch.uint8, generator=generator)
        return (colours.to(torch.uint8) + noise).to(self.device)

    def exact(self, frames: Tensor) -> Answers:
        """Returns the original network's answers in float32."""
        parts = [self._exact(part) for part in frames.split(_EXACT_BATCH)]
        logits, embedding = (torch.cat(part) for part in zip(*parts, strict=True))
        return logits, embedding

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def entrants(
    bench: Bench, how: str, dtype: torch.dtype, frames: Tensor
) -> dict[str, Callable[[], Entrant]]:
    """Returns what makes each entrant ready, by the entrant's name.

    The CUDA graphs are for a GPU. On a CPU the same networks run without a graph.

    Args:
        how: `eager` or `torch.compile`.
    """
    graph = ", CUDA graph" if bench.cuda else ""

    def ready(network: nn.Module, *, graph: bool) -> Entrant:
        if how == "torch.compile":
            network = torch.compile(network, dynamic=False, backend=bench.backend)
        if graph:
            return _entrant_of_graph(network, frames)
        network(frames)
        return Entrant(lambda: network(frames), lambda: network(frames))

    def original() -> Entrant:
        return ready(write_plainly(bench.original(dtype)), graph=False)

    def fused() -> Entrant:
        return ready(bench.original(dtype), graph=bench.cuda)

    def rewritten() -> Entrant:
        return ready(bench.rewritten(dtype), graph=bench.cuda)

    found = {f"original, {how}": original, f"rewritten, {how}{graph}": rewritten}
    if how == "torch.compile":
        found[f"original with fused attention, {how}{graph}"] = fused
    return found


def _entrant_of_graph(network: nn.Module, frames: Tensor) -> Entrant:
    replay, outputs = captured(lambda: network(frames))

    def answers() -> Answers:
        for output in outputs:
            output.zero_()  # so that only what this replay writes is read
        replay()
        return outputs

    return Entrant(replay, answers)


def captured(work: Callable[[], _Output]) -> tuple[Callable[[], None], _Output]:
    """Records GPU work as a CUDA graph.

    Returns:
        The graph's replay, and the output that each replay overwrites.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels are chosen and memory is allocated before the recording
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = work()
    return graph.replay, output


def check(exact: Answers, given: Answers, dtype: str) -> dict[str, float]:
    """Compares answers with the float32 network's.

    Returns:
        `cosine`: the least of a clip's logits or embedding, without their mean.
        `error`: the largest length of a clip's difference, relative to the exact answer's length
        without its mean. A cosine does not see a wrong scale.

    Raises:
        ValueError: the answers have another shape, are not finite, or are further off than the
            dtype may be.
    """
    cosines, errors = [], []
    for wanted, found in zip(exact, given, strict=True):
        if wanted.shape != found.shape:
            raise ValueError(f"answers of {tuple(found.shape)} instead of {tuple(wanted.shape)}")
        if not found.isfinite().all():
            raise ValueError("answers are not finite")
        one, other = wanted.double(), found.double()
        spread, other_spread = (each - each.mean(dim=1, keepdim=True) for each in (one, other))
        cosines.append(F.cosine_similarity(spread, other_spread).min().item())
        errors.append(((one - other).norm(dim=1) / spread.norm(dim=1)).max().item())
    cosine, error = min(cosines), max(errors)
    if cosine < COSINES[dtype] or error > ERRORS[dtype]:
        raise ValueError(f"answers are wrong: cosine {cosine:.6f}, error {error:.1e}")
    return {"cosine": cosine, "error": error}
