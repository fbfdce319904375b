"""What a run must have been begun with to be continued, and what it was computed with."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from model.data.lists import VideoList
from model.network.timesformer import TimeSformer
from model.training.errors import MismatchError
from model.training.recipe import Recipe


def identity_of(
    model: TimeSformer, recipe: Recipe, videos: VideoList, validation: VideoList | None
) -> dict[str, Any]:
    """Of a run that begins from `model`; as JSON gives it back."""
    weights = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        weights.update(name.encode())
        weights.update(value.detach().cpu().contiguous().numpy().tobytes())
    identity = {
        "recipe": recipe.to_dict(),
        "config": model.config.to_dict(),
        "videos": videos.fingerprint(),
        "validation": validation.fingerprint() if validation else None,
        "first weights": weights.hexdigest(),
    }
    returned: dict[str, Any] = json.loads(json.dumps(identity))
    return returned


def check_identity(theirs: dict[str, Any], ours: dict[str, Any], out: Path) -> None:
    """
    Raises:
        MismatchError: the run in `out` is another one.
    """
    differ = _differences(theirs, ours)
    if differ:
        raise MismatchError(
            f"{out} holds a run that was begun with another {differ}: "
            "train into another folder, or give what it was begun with"
        )


def check_alike(identities: list[dict[str, Any]]) -> None:
    """
    Raises:
        MismatchError: the processes of a run, whose identities these are, begin differently.
    """
    for rank, theirs in enumerate(identities):
        differ = _differences(theirs, identities[0])
        if differ:
            raise MismatchError(
                f"process {rank} has another {differ} than process 0: all of them must be given "
                "the same command, and find the same files"
            )


def software() -> dict[str, str]:
    """Versions of what decides the weights."""
    packages = {name: version(name) for name in ("torch", "numpy", "av")}
    return {"python": platform.python_version(), **packages}


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    return ", ".join(sorted(key for key in ours if theirs.get(key) != ours[key]))
