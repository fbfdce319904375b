"""What happened in a run, one JSON object a line, so that a resumed run's log has no step twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any, Self

from model.data.remote import without_secrets
from model.files import write_atomic
from model.training.errors import TrainingError

LOG = "log.jsonl"  # in the run's folder


class RunLog:
    """Appends events to `path`, each with its `step`, and flushes each; nothing where that is None.

    Args:
        step: where the run goes on; what the file says of later steps, and a line that a kill cut
            off, are removed.

    Raises:
        TrainingError: the file cannot be written, here or later.
    """

    def __init__(self, path: Path | None, step: int) -> None:
        self._path = path
        self._file: IO[str] | None = None
        if path is None:
            return
        try:
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            kept = b"".join(line for line in lines if _is_of(line, step))
            write_atomic(path, kept)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise _cannot_write(path, error) from error

    def write(self, event: str, step: int, **fields: Any) -> None:
        """One line: {"event": ..., "step": ..., ...}; of URLs what `without_secrets` leaves."""
        if self._path is None or self._file is None:
            return
        line = json.dumps({"event": event, "step": step, **fields})
        try:
            self._file.write(without_secrets(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise _cannot_write(self._path, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """All events of a log, but a line that a kill cut off."""
    lines = path.read_bytes().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def _is_of(line: bytes, last: int) -> bool:
    try:
        return line.endswith(b"\n") and int(json.loads(line)["step"]) <= last
    except (ValueError, KeyError, TypeError):
        return False


def _cannot_write(path: Path, error: OSError) -> TrainingError:
    return TrainingError(
        f"cannot write {path}: {error.strerror or error}; "
        "make room, and the same command goes on from the last checkpoint"
    )
