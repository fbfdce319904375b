"""Every way training can fail, on one page. `str(error)` says what to do.

TrainingError
├── DataError          a list of videos that cannot be read or used
├── RecipeError        settings that describe no training
├── CheckpointError    the state of a run that cannot be written or read
│   └── MismatchError  a run that was begun with other data or settings
├── DivergedError      the loss is no number any more
├── LostError          another process of the run has ended or does not answer
└── StoppedError       asked to stop; the state is saved

VideoError, of model/video/errors.py
├── MissingVideo       there is none where the list says, or it is not ours to read
└── UnreachableVideo   it could not be fetched; it may be there
"""

# ruff: noqa: N818 (as in model/video/errors.py)

from __future__ import annotations

from model.video.errors import VideoError


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


class LostError(TrainingError):
    """Another process of the run has ended or does not answer."""


class StoppedError(TrainingError):
    """SIGTERM or Ctrl-C; the state was saved and the same command continues."""


class MissingVideo(VideoError):
    code = "missing_video"


class UnreachableVideo(VideoError):
    code = "unreachable_video"
