"""What `tests/benchmarks/gpu.py` measures with: entrants that take turns, held to exact answers.

Nothing but PyTorch.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name the field uses

from export.rewrite import InferenceTimeSformer, multiply_adds, rewrite
from model.config import VARIANTS, ModelConfig
from model.timesformer import TimeSformer
from tests.benchmarks.half import halve
from tests.benchmarks.networks import random_model
from tests.benchmarks.published import AsPublished

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Least cosine and largest error of the worst clip's answers, and what float32 may be off by: as in
# the gate of the export, which wants more than PyTorch; for bfloat16 what three bits less allow.
COSINES = {"fp16": 0.9995, "bf16": 0.99}
ERRORS = {"fp16": 0.05, "bf16": 0.2}
DIFFERENCE = 1e-4
# Clips that go through the exact network at once.
_EXACT_BATCH = 8
_MOST_CALLS = 10_000

Answers = tuple[Tensor, Tensor]
"""Logits and embedding of a batch."""
Shares = list[float]
"""Lower quartile, median and upper quartile over the rounds."""


class Entrant(NamedTuple):
    """What is timed on one batch."""

    run: Callable[[], object]
    """Begins one call's work, or does it."""
    finish: Callable[[], object]
    """Waits for all that was begun."""
    answers: Callable[[], Answers] | None = None
    """Does it once more and gives what came out; None for what answers nothing."""


class Agreement(NamedTuple):
    off_by: float | None
    """Largest difference of two logits, of the largest logit; None if not all are finite."""
    cosine: float | None
    """Least one of a clip's logits or embedding, their mean taken away; None as above."""
    error: float | None
    """Largest length of what a clip's logits or embedding are off by, of theirs without the mean:
    a cosine sees no scale."""
    passed: bool


class Bench:
    """A network, what it is measured on, and what was left out."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.dtype = DTYPES[options.dtype]
        self.config: ModelConfig = VARIANTS[options.variant]
        self.work: Path = options.work
        self.model: TimeSformer = random_model(self.config)
        self.left_out: dict[str, str] = {}

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @functools.cached_property
    def multiply_adds(self) -> int:
        """Of the rewritten network for a clip: what cannot be saved."""
        return multiply_adds(self._rewritten)

    @functools.cached_property
    def _rewritten(self) -> InferenceTimeSformer:
        return rewrite(self.model)

    def rewritten(self, dtype: torch.dtype | None) -> InferenceTimeSformer:
        """On the device; with its large products in 16 bits, or all float32."""
        network = copy.deepcopy(self._rewritten)
        return (halve(network, dtype) if dtype else network).to(self.device).eval()

    @functools.cached_property
    def _exact(self) -> AsPublished:
        return AsPublished.of(self.model).to(self.device)

    def exact(self, frames: Tensor) -> Answers:
        """The original network's answers in float32."""
        with torch.inference_mode():
            parts = [self._exact(part) for part in frames.split(_EXACT_BATCH)]
        logits, embedding = (torch.cat(part) for part in zip(*parts, strict=True))
        return logits, embedding

    def frames(self, batch: int) -> Tensor:
        """Clips of noise over a colour of their own each: no clip's answer is another one's."""
        config = self.config
        shape = (batch, config.num_frames, config.image_size, config.image_size, 3)
        generator = torch.Generator().manual_seed(0)
        colours = torch.randint(0, 192, (batch, 1, 1, 1, 3), generator=generator)
        noise = torch.randint(0, 64, shape, dtype=torch.uint8, generator=generator)
        return (colours.to(torch.uint8) + noise).to(self.device)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """What fails inside is left out with its reason; the rest goes on."""
        try:
            yield
        except Exception as error:  # of compilers, drivers and engines
            lines = str(error).strip().splitlines() or [""]
            self.left_out[what] = f"{type(error).__name__}: {lines[0][:200]}"
            print(f"left out: {what}: {self.left_out[what]}", file=sys.stderr)

    def tidy(self) -> None:
        """Gives the device's memory back that nobody holds any more."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def take_turns(self, entrants: dict[str, Entrant]) -> dict[str, list[float]]:
        """Seconds a call, a figure a round; all have run before.

        The calls of a turn follow each other as fast as they can be given, and the last is waited
        for: what is timed is the device, as long as it is the slower of the two.
        """
        turn = self.options.turn_seconds
        calls = {}
        for name, entrant in entrants.items():
            once = _seconds(entrant, 1)
            calls[name] = min(_MOST_CALLS, max(1, math.ceil(turn / once)))
        found: dict[str, list[float]] = {name: [] for name in entrants}
        for _ in range(self.options.rounds):
            for name, entrant in entrants.items():
                found[name].append(_seconds(entrant, calls[name]))
        return found


def _seconds(entrant: Entrant, calls: int) -> float:
    entrant.finish()
    start = time.perf_counter()
    for _ in range(calls):
        entrant.run()
    entrant.finish()
    return (time.perf_counter() - start) / calls


def share(of: list[float], over: list[float], factor: float = 1.0) -> Shares:
    """How much faster than `over`, round by round, times a factor."""
    ratios = [factor * slow / fast for fast, slow in zip(of, over, strict=True)]
    if len(ratios) == 1:
        return ratios * 3
    return statistics.quantiles(ratios, method="inclusive")


def agreement(exact: Answers, given: Answers, precision: str) -> Agreement:
    """Answers beside the exact ones.

    Args:
        precision: `float32`, or one of `DTYPES`.

    Raises:
        ValueError: they are not answers to that batch.
    """
    cosines, errors = [], []
    for wanted, found in zip(exact, given, strict=True):
        if wanted.shape != found.shape:
            raise ValueError(f"answers of {tuple(found.shape)} instead of {tuple(wanted.shape)}")
        one, other = wanted.double(), found.to(wanted.device).double()
        if not other.isfinite().all():
            return Agreement(None, None, None, False)
        spread, other_spread = (each - each.mean(dim=1, keepdim=True) for each in (one, other))
        cosines.append(F.cosine_similarity(spread, other_spread).min().item())
        errors.append(((one - other).norm(dim=1) / spread.norm(dim=1)).max().item())
    logits, others = exact[0].double(), given[0].to(exact[0].device).double()
    off_by = ((logits - others).abs().max() / logits.abs().max()).item()
    cosine, error = min(cosines), max(errors)
    if precision == "float32":
        passed = off_by <= DIFFERENCE
    else:
        passed = cosine >= COSINES[precision] and error <= ERRORS[precision]
    return Agreement(off_by, cosine, error, passed)
