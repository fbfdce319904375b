"""Processes that train together learn what one would, and outlive each other's deaths."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.data.lists import read_videos
from model.training import checkpoint
from model.training.config import Machine
from model.training.distributed.batch_shards import share
from model.training.errors import RecipeError, StoppedError
from model.training.event_log import read_log
from model.training.loop import LOG, train
from model.training.trainer import CHECKPOINTS, REPORT, WEIGHTS, Run
from tests.model.conftest import Painter, flat, write_video
from tests.model.training.test_cli import training
from tests.model.training.test_loop import RECIPE, first_model, interrupted_at, job
from tests.processes import free_port

REPOSITORY = Path(__file__).parents[4]
PROGRAM = "tests.model.training.distributed.together"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
PATIENCE_S = 400  # on a machine that has other work, torch alone takes seconds to start

pytestmark = pytest.mark.slow

# Pairs are mixed, batches add up to steps, paths are dropped, weights averaged, gradients clipped.
SHARED = {"batch_size": 4, "epochs": 6.0}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Red and blue, and one that is broken; an uneven number, so that shares are uneven."""
    folder = tmp_path_factory.mktemp("videos")
    paints: dict[str, Painter] = {"red": flat(200, 20, 20), "blue": flat(20, 20, 200)}
    for name, paint in paints.items():
        (folder / name).mkdir()
        for index in range(4):
            write_video(folder / name / f"{index}.mp4", paint=paint)
    (folder / "red" / "broken.mp4").write_text("no video")
    return folder


@pytest.fixture(scope="module")
def alone(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in one process."""
    out = tmp_path_factory.mktemp("alone")
    train_alone(videos, out)
    return out


def train_alone(videos: Path, out: Path, **listeners: Any) -> None:
    listed = read_videos(videos)
    recipe = RECIPE.replace(SHARED)
    train(first_model(), job(listed, out, recipe, validation=listed), Machine(), **listeners)


@contextmanager
def torchrun(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Two processes of a program."""
    program = Path(sys.executable).with_name("torchrun")
    command = [program, "--standalone", "--nproc-per-node", 2, *arguments]
    with subprocess.Popen(
        [str(word) for word in command],
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()


def together(videos: Path, out: Path, **plan: Any) -> list[object]:
    """The program `together.py`."""
    return ["-m", PROGRAM, videos, out, json.dumps({"recipe": SHARED, "validate": True, **plan})]


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """What was written to stdout and stderr."""
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code, errors
    return output, errors


def train_together(videos: Path, out: Path, *options: object, code: int = 0, **plan: Any) -> str:
    """What was written to stderr."""
    with torchrun(*options, *together(videos, out, **plan)) as process:
        return finish(process, code)[1]


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_log(out / LOG) if event["event"] == kind]


def curve(out: Path) -> list[float]:
    steps = events(out, "step")
    assert [event["step"] for event in steps] == [1, 2, 3, 4, 5, 6]
    return [event[name] for event in steps for name in ("loss", "gradient_norm", "epoch")]


def same_run(out: Path, alone: Path) -> None:
    """Within what adding in another order makes of float32."""
    assert curve(out) == pytest.approx(curve(alone), rel=1e-4)
    ours, theirs = load_file(out / WEIGHTS), load_file(alone / WEIGHTS)
    for name, value in theirs.items():
        # The gradient of the bias of keys is rounding alone, and AdamW makes steps of it.
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=3e-4)
    for ours, theirs in zip(events(out, "evaluation"), events(alone, "evaluation"), strict=True):
        assert ours["log_loss"] == pytest.approx(theirs["log_loss"], abs=1e-4)
        assert ours["videos"] == theirs["videos"] == 8
    replaced = [(event["step"], event["path"]) for event in events(alone, "replaced")]
    assert sorted((e["step"], e["path"]) for e in events(out, "replaced")) == sorted(replaced)
    assert replaced
    reports = [json.loads((folder / REPORT).read_text()) for folder in (out, alone)]
    assert reports[0]["replaced_clips"] == reports[1]["replaced_clips"] == len(replaced)
    assert reports[0]["metrics"]["top1"] == reports[1]["metrics"]["top1"]


# ---- the same as one --------------------------------------------------------------------------


def test_two_processes_that_share_the_weights_learn_what_one_does(
    videos: Path, alone: Path, tmp_path: Path
) -> None:
    """The recipe's batch is the clips of both processes: the same clips, changed and mixed alike.

    Two processes that each have all weights end the same in the test of a killed process.
    """
    train_together(videos, tmp_path, machine={"shard": True})
    assert events(tmp_path, "start")[0]["processes"] == 2
    same_run(tmp_path, alone)


def test_a_run_goes_on_in_any_number_of_processes(
    videos: Path, alone: Path, tmp_path: Path
) -> None:
    """From two with the weights sharded, over one, to two that each have all."""
    machine = {"shard": True}
    errors = train_together(videos, tmp_path, code=1, send=["SIGTERM", 1, 2], machine=machine)
    assert "stopped after step 2 of 6" in errors
    step, state = checkpoint.load_newest(tmp_path / CHECKPOINTS) or pytest.fail("no state")
    assert step == 2
    shapes = {name: value.shape for name, value in first_model().state_dict().items()}
    assert {name: value.shape for name, value in state["model"].items()} == shapes
    with (
        interrupted_at(4, lambda: os.kill(os.getpid(), signal.SIGTERM)) as on_step,
        pytest.raises(StoppedError),
    ):
        train_alone(videos, tmp_path, on_step=on_step)
    train_together(videos, tmp_path)
    assert [event["processes"] for event in events(tmp_path, "start")] == [2, 1, 2]
    same_run(tmp_path, alone)


def test_the_command_is_the_same_under_torchrun(videos: Path, tmp_path: Path) -> None:
    """The clips of a machine are decoded once, and one process speaks for all."""
    options = ("--variant", "demo", "--epochs", 2, "--batch-size", 4, "--cached-views", 1,
               "--cache", tmp_path / "cache", "--validation", videos)  # fmt: skip
    command = training(tmp_path, videos, "--out", tmp_path / "run", *options)
    with torchrun(
        "--no-python", Path(sys.executable).with_name("timesformer"), *command
    ) as process:
        output, errors = finish(process)
    for text in (
        "video 9 of 9, decoded for the cache",
        "step 4 of 4, epoch",
        "after step 3: top-1",
    ):
        assert errors.count(text) == 1, errors
    assert output.count("export it: timesformer export") == 1
    assert (tmp_path / "run" / WEIGHTS).exists()
    assert len(list((tmp_path / "cache").glob("[!.]*"))) == 1


def test_an_error_of_every_process_is_shown_once_by_the_filter(
    videos: Path, tmp_path: Path
) -> None:
    """As the docs start it, without the command on the path."""
    command = training(tmp_path, videos, "--out", tmp_path / "run", "--variant", "demo",
                       "--train", 9)  # fmt: skip
    with torchrun("--local-ranks-filter", 0, "-m", "service.cli.main", *command) as process:
        output, errors = finish(process, code=1)
    assert (output + errors).count("Error: the last 9 blocks cannot be trained") == 1


def test_every_clip_of_a_batch_is_somewhere_and_pairs_stay_together() -> None:
    for count, size, pairs in ((16, 8, True), (7, 3, True), (7, 3, False), (5, 5, False)):
        shares = [share(count, rank, size, pairs) for rank in range(size)]
        assert sorted(row for each in shares for row in each.rows) == list(range(count))
        for each in shares:
            assert each.rows
            assert not pairs or {count - 1 - row for row in each.rows} == set(each.rows)
    with pytest.raises(RecipeError, match="3 clips, too few for 4 processes"):
        share(3, 0, 4, pairs=False)
    with pytest.raises(RecipeError, match="2 pairs of clips, as mixup and cutmix need them"):
        share(4, 0, 3, pairs=True)


def test_one_process_has_nobody_to_share_weights_with(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="start several with torchrun"):
        Run(first_model(), job(read_videos(videos), tmp_path), Machine(shard=True))


# ---- processes that die -----------------------------------------------------------------------


def test_a_killed_process_is_started_again_and_the_run_ends_the_same(
    videos: Path, alone: Path, tmp_path: Path
) -> None:
    """The second life must not meet the first one's addresses in the store that torchrun keeps."""
    train_together(videos, tmp_path, "--max-restarts", 1, send=["SIGKILL", 1, 4])
    same_run(tmp_path, alone)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_a_process_that_is_lost_ends_the_others_with_a_clear_error(
    videos: Path, tmp_path: Path, name: str
) -> None:
    """Whatever has started them: nothing but its silence says that a stopped one is lost."""
    plan, port = {"recipe": SHARED, "send": [name, 1, 4], "lost_after": 40.0}, str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", PROGRAM, str(videos), str(tmp_path), json.dumps(plan)],
            cwd=REPOSITORY,
            env={**ENVIRONMENT, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    try:
        _, errors = processes[0].communicate(timeout=PATIENCE_S)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[0].returncode == 1
    assert "another process of this run has ended, or has not answered for 40 s" in errors
    assert "The same command goes on from the last checkpoint" in errors
    found = checkpoint.load_newest(tmp_path / CHECKPOINTS)
    assert found is not None
    assert found[0] == 2
