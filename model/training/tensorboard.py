"""The curves of a run for TensorBoard: the numbers of `log.jsonl`, as event files in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Self

from model.evaluation.metrics import Metrics

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from model.training.config import Step

_MEASURES = ("top1", "top5", "mean_class_accuracy", "log_loss", "calibration_error")


class Board:
    """Writes scalars into `folder`; nothing where that is None.

    Args:
        step: where the run goes on. What a killed process has written of later steps is hidden, so
            that no curve runs twice over them.
    """

    def __init__(self, folder: Path | None, step: int) -> None:
        self._writer: SummaryWriter | None = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(folder, purge_step=step + 1)

    def step(self, step: Step) -> None:
        self._write("loss", step.loss, step.step)
        self._write("learning_rate", step.learning_rate, step.step)
        self._write("gradient_norm", step.gradient_norm, step.step)
        self._write("clips_per_s", step.clips_per_s, step.step)
        self._write("epoch", step.epoch, step.step)

    def evaluation(self, step: int, metrics: Metrics) -> None:
        for name in _MEASURES:
            self._write(f"validation/{name}", getattr(metrics, name), step)

    def _write(self, name: str, value: float, step: int) -> None:
        if self._writer is not None:
            self._writer.add_scalar(name, value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.close()
