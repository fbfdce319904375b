"""The small files beside a name's versions, each replaced atomically.

`active.json` says which version serves, `candidate.json` which other one is tried beside it. All
replicas of a service read them, so that they agree.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model.files import write_atomic

ACTIVE = "active.json"
CANDIDATE = "candidate.json"
VERSION = re.compile(r"[1-9][0-9]{0,8}")
# Older active versions that the pointer remembers, the newest first.
_HISTORY = 20


class BundleError(Exception):
    """A bundle or store that cannot be used; the message says which, why and what to do."""


class Candidate(BaseModel):
    """A version that is tried beside the active one."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    version: str = Field(pattern=rf"^{VERSION.pattern}$")
    mode: Literal["shadow", "canary"]
    share: float = Field(gt=0, le=1, description="of the requests")
    since: datetime = Field(default_factory=lambda: datetime.now(UTC))


def read_history(folder: Path) -> list[str]:
    """Versions of a name that were active, the present one first; as many as are remembered.

    Raises:
        BundleError: the pointer is there and unreadable.
    """
    pointer = folder / ACTIVE
    content = _read(pointer)
    return [] if content is None else parse_history(content, pointer)


def parse_history(content: bytes, pointer: object) -> list[str]:
    """What is in a pointer that lies at `pointer`.

    Raises:
        BundleError: it is damaged.
    """
    try:
        loaded = json.loads(content)
        history = [loaded["version"], *loaded["previous"]]
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(
            f"{pointer} is damaged ({error!r}): remove it and activate a version"
        ) from error
    if not all(isinstance(item, str) and VERSION.fullmatch(item) for item in history):
        raise BundleError(f"{pointer} names no version: remove it and activate one")
    return history


def write_history(folder: Path, history: list[str]) -> None:
    """Makes the first of these versions the active one; the caller holds the name's lock.

    Raises:
        BundleError: it cannot be written; the old pointer is as it was.
    """
    _replace(folder / ACTIVE, history_text(history))


def history_text(history: list[str]) -> str:
    """What a pointer to the first of these versions holds."""
    content = {"version": history[0], "previous": history[1 : _HISTORY + 1]}
    return json.dumps(content) + "\n"


def read_candidate(folder: Path) -> Candidate | None:
    """The candidate of a name, if there is one.

    Raises:
        BundleError: the file is there and unreadable.
    """
    path = folder / CANDIDATE
    content = _read(path)
    return None if content is None else parse_candidate(content, path)


def parse_candidate(content: bytes, path: object) -> Candidate:
    """What is in the file of a candidate that lies at `path`.

    Raises:
        BundleError: it is damaged.
    """
    try:
        return Candidate.model_validate_json(content)
    except ValidationError as error:
        raise BundleError(
            f"{path} is damaged: remove it, or name a candidate again ({error.errors()[0]['msg']})"
        ) from error


def write_candidate(folder: Path, candidate: Candidate | None) -> None:
    """Names the candidate, or none; the caller holds the name's lock.

    Raises:
        BundleError: it cannot be written; the old file is as it was.
    """
    path = folder / CANDIDATE
    if candidate is not None:
        _replace(path, candidate.model_dump_json() + "\n")
        return
    with writing(path):
        path.unlink(missing_ok=True)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error


def _replace(path: Path, content: str) -> None:
    with writing(path):
        write_atomic(path, content, durable=True)


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """A full disk, a quota, a missing right: a sentence that says what could not be written."""
    try:
        yield
    except OSError as error:
        raise BundleError(
            f"cannot write {target}: {error.strerror or error}; nothing has changed"
        ) from error
