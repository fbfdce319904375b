"""A training run, from first weights to `weights.safetensors`.

    OUT/log.jsonl            every step and evaluation, one JSON object a line
    OUT/checkpoints/         the newest states of the run, see `checkpoint.py`
    OUT/weights.safetensors  the result, with its configuration and labels
    OUT/tensorboard/         the same for TensorBoard, where it is asked for
    OUT/training.json        metrics, recipe, software; for `timesformer export --training`
    OUT/report.html          the same for people, see `report.py`

A run that was killed goes on from its last checkpoint and ends with the same weights as one that
was not; on a CPU bit for bit. tests/model/training/test_loop.py holds it.
"""

from __future__ import annotations

import dataclasses
import datetime
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from model.evaluation.metrics import Metrics
from model.files import LockTakenError, lock_file
from model.network.timesformer import TimeSformer
from model.training.config import Job, Machine, Step
from model.training.distributed.process_group import ALONE, World
from model.training.errors import StoppedError, TrainingError
from model.training.event_log import LOG, RunLog
from model.training.tensorboard import Board
from model.training.trainer import CHECKPOINTS, Run

BOARD = "tensorboard"


def train(
    model: TimeSformer,
    job: Job,
    machine: Machine = Machine(),  # noqa: B008 (immutable)
    *,
    world: World = ALONE,
    on_step: Callable[[Step], object] = lambda step: None,
    on_evaluation: Callable[[int, Metrics], object] = lambda step, metrics: None,
    on_cached: Callable[[int, int], object] = lambda count, videos: None,
) -> dict[str, Any]:
    """Trains to the end, from the beginning or from where a run in `job.out` was ended.

    Args:
        model: the first weights; trained in place.
        world: the processes that train together; each calls this with the same. The first of them
            writes, and tells the listeners.
        on_cached: told how many videos the cache holds, of how many, while it fills.

    Returns:
        What stands in `training.json`.

    Raises:
        TrainingError: see `errors.py`.
    """
    speaks = world.rank == 0
    with ExitStack() as stack:
        world.first(lambda: stack.enter_context(_alone(job.out)))
        run = Run(model, job, machine, world)
        finished = world.first(run.finished)
        if finished is not None:
            return finished
        run.resume()
        run.open_cache(on_cached)
        with (
            RunLog(job.out / LOG if speaks else None, run.step) as log,
            Board(job.out / BOARD if machine.tensorboard and speaks else None, run.step) as board,
            _stop_signal() as stop,
        ):
            log.write("start", run.step, time=_now(), **run.about())
            for step in run.steps():
                log.write("step", **_rounded(step))
                for each in run.replaced_now:
                    log.write("replaced", run.step, **each._asdict())
                board.step(step)
                if speaks:
                    on_step(step)
                if run.is_evaluated():
                    metrics = run.evaluate_epoch()
                    if metrics is not None:
                        log.write("evaluation", run.step, **metrics.to_dict())
                        board.evaluation(run.step, metrics)
                        if speaks:
                            on_evaluation(run.step, metrics)
                (stopped,) = world.sum(len(stop))  # the signal reaches each at another moment
                if run.step % machine.checkpoint_every == 0 or stopped or run.complete:
                    run.save()
                if stopped and not run.complete:
                    raise StoppedError(
                        f"stopped after step {run.step} of {run.last}, which is saved in "
                        f"{job.out / CHECKPOINTS}; the same command goes on from there"
                    )
        return run.finish()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _rounded(step: Step) -> dict[str, Any]:
    fields = dataclasses.asdict(step)
    return {**fields, "epoch": round(step.epoch, 4), "clips_per_s": round(step.clips_per_s, 2)}


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Locks `out` for this process.

    Raises:
        TrainingError: another process trains into it, or it cannot be written.
    """
    with ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_file(out / ".lock", wait=False))
        except LockTakenError:
            raise TrainingError(
                f"another process trains into {out}; wait for it or take another folder"
            ) from None
        except OSError as error:
            raise TrainingError(f"cannot write into {out}: {error.strerror}") from error
        yield


@contextmanager
def _stop_signal() -> Iterator[list[int]]:
    """Gives a list that gets the number of the first SIGTERM or SIGINT; the second one acts as
    usual.
    """
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        restore()

    for number in before:
        signal.signal(number, stop)
    try:
        yield seen
    finally:
        restore()
