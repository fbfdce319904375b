"""What a training run is given, and what it tells: values, no code."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from model.data.lists import VideoList
from model.training.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained on what. `validation` is evaluated after every epoch and at the end."""

    recipe: Recipe
    videos: VideoList
    validation: VideoList | None
    out: Path


@dataclasses.dataclass(frozen=True)
class Machine:
    """How it is run; nothing of this decides what is learned.

    `workers` decode; 0 decodes in the training process. A state is written every
    `checkpoint_every` steps.

    `recompute` is that of `TimeSformer`; None does it for long or large clips, which would not fit.
    `compile` is a backend of `torch.compile`, such as `inductor`; None computes step by step.
    `shard` keeps a part of the weights in each process, and not all of them; see `parallel.py`.
    `tensorboard` also writes the curves for TensorBoard, see `board.py`.
    `cache` is a folder that the views of `View.cached` are kept in, decoded, for any run.
    """

    device: str = "cpu"
    workers: int = 0
    checkpoint_every: int = 500
    recompute: bool | None = None
    compile: str | None = None
    cache: Path | None = None
    tensorboard: bool = False
    shard: bool = False


@dataclasses.dataclass(frozen=True)
class Step:
    """What is told after each step. `clips_per_s` is of this step alone."""

    step: int
    steps: int
    epoch: float
    loss: float
    learning_rate: float
    gradient_norm: float
    clips_per_s: float
