"""A training process for `test_together.py`, to be started alone or by torchrun.

    together.py VIDEOS OUT '{"machine": {...}, "recipe": {...}, "send": [signal, rank, step], ...}'

With the random draws of `test_loop.RECIPE`, and drop path. `send` is for one process, before it
does that step, in the first life of the run.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from model.data.lists import read_videos
from model.training.config import Machine
from model.training.distributed.process_group import joined
from model.training.errors import TrainingError
from model.training.loop import train
from model.training.trainer import Run
from tests.model.training.test_loop import RECIPE, first_model, job


def main(videos: Path, out: Path, plan: dict[str, Any]) -> None:
    listed = read_videos(videos)
    recipe = RECIPE.replace(plan.get("recipe", {}))
    validation = listed if plan.get("validate") else None
    machine = Machine(**{"checkpoint_every": 2, **plan.get("machine", {})})
    if "send" in plan and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        send(*plan["send"])
    with joined("cpu", plan.get("lost_after", 120.0)) as world:
        train(first_model(), job(listed, out, recipe, validation=validation), machine, world=world)


def send(name: str, rank: int, step: int) -> None:
    do_step = Run._do_step

    def wrapped(run: Run, *arguments: Any) -> Any:
        if (run.world.rank, run.step + 1) == (rank, step):
            os.kill(os.getpid(), signal.Signals[name])
        return do_step(run, *arguments)

    Run._do_step = wrapped  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
    except TrainingError as error:
        sys.exit(f"Error: {error}")
