"""Early stopping: the best evaluated weights of a run, and when to look for better ones no more."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from model.evaluation.metrics import Metrics
from model.training.optimisation import Optimisation


class Best:
    """Keeps the weights of the best evaluation; without `Optimisation.patience` nothing.

    `step` is when they were evaluated, `weights` a state dict in the memory of the CPU.
    """

    def __init__(self, settings: Optimisation) -> None:
        self.patience = settings.patience
        self.watch = settings.watch
        self.step = 0
        self.loss = math.inf  # of what is watched; the share of wrong videos for top-1
        self.waited = 0
        self.weights: dict[str, Tensor] | None = None

    @property
    def over(self) -> bool:
        """Whether the last `patience` evaluations were all no better than the best."""
        return 0 < self.patience <= self.waited

    def take(self, step: int, metrics: Metrics, weights: dict[str, Tensor]) -> None:
        """Takes in an evaluation; equal is not better."""
        if not self.patience:
            return
        loss = metrics.log_loss if self.watch == "log_loss" else 1 - metrics.top1
        if loss < self.loss:
            self.step, self.loss, self.waited = step, loss, 0
            self.weights = {name: value.detach().cpu().clone() for name, value in weights.items()}
        else:
            self.waited += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "loss": self.loss,
            "waited": self.waited,
            "weights": self.weights,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.loss = state["step"], state["loss"]
        self.waited, self.weights = state["waited"], state["weights"]
