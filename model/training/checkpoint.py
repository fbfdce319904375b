"""The state of a run on disk: whole or not there, proved by a hash, the one before kept.

`FOLDER/step-00000120.ckpt` is a line of ASCII with the SHA-256 of the rest, then what `torch.save`
writes. Reading executes no code (`weights_only`).
"""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
from pathlib import Path
from typing import Any

import torch

from model.files import replacing
from model.training.errors import CheckpointError

_MAGIC = b"timesformer training state 1 "
_PATTERN = "step-*.ckpt"
KEPT = 2  # the newest, and one for when that is damaged

logger = logging.getLogger(__name__)


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Writes the state after `step`, and removes all but the newest `KEPT`.

    It is on the disk, not in a cache, before it gets its name; a kill or a power cut leaves the
    states that there were.

    Raises:
        CheckpointError: the disk is full or cannot be written to.
    """
    content = io.BytesIO()
    torch.save(state, content)
    payload = content.getbuffer()
    path = folder / f"step-{step:08d}.ckpt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path, durable=True) as temporary, temporary.open("wb") as file:
            file.write(_MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n")
            file.write(payload)
        for old in _newest_first(folder)[KEPT:]:
            old.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}; those before it are as they were: "
            "make room, and the same command goes on from there"
        ) from error
    return path


def load_newest(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """The step and state of the newest file that is intact; None where there is no file at all.

    A damaged file is named in the log, and the one before it is taken.

    Raises:
        CheckpointError: there are files, and none of them is intact.
    """
    paths = _newest_first(folder)
    for path in paths:
        try:
            state = _load(path)
        except CheckpointError as error:
            logger.warning("%s; the one before it is taken", error)
            continue
        return int(path.stem.removeprefix("step-")), state
    if paths:
        raise CheckpointError(
            f"none of the {len(paths)} checkpoints in {folder} is intact; "
            "train into another folder, or empty this one to begin again"
        )
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob(_PATTERN), reverse=True)


def _load(path: Path) -> dict[str, Any]:
    try:
        header, _, payload = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if header != _MAGIC + hashlib.sha256(payload).hexdigest().encode():
        raise CheckpointError(f"{path} is damaged: its content is not what was written")
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds no state of a run")
    return state
