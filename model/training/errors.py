"""Every way training can fail, on one page. `str(error)` says what to do.

TrainingError
├── DataError          a list of videos that cannot be read or used
├── RecipeError        settings that describe no training
├── CheckpointError    the state of a run that cannot be written or read
│   └── MismatchError  a run that was begun with other data or settings
├── DivergedError      the loss is no number any more
└── StoppedError       asked to stop; the state is saved
"""

from __future__ import annotations


class TrainingError(Exception):
    """Training, checking or evaluating could not be done."""


class DataError(TrainingError):
    """A list of videos that cannot be read or used."""


class RecipeError(TrainingError, ValueError):
    """Settings that describe no training; the message says which one and why."""


class CheckpointError(TrainingError):
    """The state of a run cannot be written or read; an older state, if any, is as it was."""


class MismatchError(CheckpointError):
    """The folder holds a run that was begun with other data or settings."""


class DivergedError(TrainingError):
    """The loss is infinite or no number."""


class StoppedError(TrainingError):
    """SIGTERM or Ctrl-C; the state was saved and the same command continues."""
