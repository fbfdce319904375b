"""TensorBoard reads every step once, whatever happened to the run."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model.data.lists import read_videos
from model.training.config import Machine, Step
from model.training.errors import StoppedError
from model.training.event_log import read_log
from model.training.loop import BOARD, LOG, train
from model.training.tensorboard import Board
from tests.model.training.test_loop import first_model, job


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def step(number: int, loss: float) -> Step:
    return Step(number, 10, number / 2, loss, 0.1, 1.0, 8.0)


def test_what_a_killed_process_wrote_after_its_checkpoint_is_hidden(tmp_path: Path) -> None:
    with Board(tmp_path, 0) as board:
        for number in range(1, 6):
            board.step(step(number, 1.0))
    with Board(tmp_path, 2) as board:
        for number in range(3, 5):
            board.step(step(number, 0.5))
    assert curve(tmp_path, "loss") == [(1, 1.0), (2, 1.0), (3, 0.5), (4, 0.5)]


def test_the_curves_are_those_of_the_log(colours: Path, tmp_path: Path) -> None:
    """Also of a run that was stopped and continued."""
    videos = read_videos(colours)

    def stop(step: Step) -> None:
        if step.step == 3:
            raise StoppedError

    for on_step in (stop, lambda step: None):
        machine = Machine(checkpoint_every=2, tensorboard=True)
        task = job(videos, tmp_path, validation=videos)
        try:
            train(first_model(), task, machine, on_step=on_step)
        except StoppedError:
            assert len(read_log(tmp_path / LOG)) == 5  # start, three steps, an evaluation
    events = read_log(tmp_path / LOG)
    steps = [event for event in events if event["event"] == "step"]
    for name in ("loss", "learning_rate", "gradient_norm"):
        expected = [(event["step"], pytest.approx(event[name])) for event in steps]
        assert curve(tmp_path / BOARD, name) == expected
    evaluated = [
        (event["step"], pytest.approx(event["log_loss"], abs=1e-6))
        for event in events
        if event["event"] == "evaluation"
    ]
    assert len(evaluated) == 2  # the last epoch's is the final one
    assert curve(tmp_path / BOARD, "validation/log_loss") == evaluated


def test_without_a_folder_nothing_is_written(tmp_path: Path) -> None:
    with Board(None, 0) as board:
        board.step(step(1, 1.0))
    assert not list(tmp_path.iterdir())
