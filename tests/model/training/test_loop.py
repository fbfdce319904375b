"""A run ends with the same weights however often it was killed, and never ruins what it has."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.checkpoints import load_checkpoint
from model.config import VARIANTS, ModelConfig
from model.data.lists import Sample, VideoList, read_videos
from model.network.timesformer import TimeSformer
from model.reports.training_report import PAGE
from model.training import checkpoint
from model.training.config import Job, Machine, Step
from model.training.errors import (
    DivergedError,
    MismatchError,
    StoppedError,
    TrainingError,
)
from model.training.event_log import read_log
from model.training.loop import LOG, train
from model.training.recipe import PRESETS, Recipe
from model.training.trainer import CHECKPOINTS, REPORT, WEIGHTS, Run
from tests.model.conftest import tiny_config

REPOSITORY = Path(__file__).parents[3]


def config() -> ModelConfig:
    return tiny_config(
        num_classes=2, num_frames=2, image_size=16, frame_stride=4, drop_path_rate=0.2
    )


def first_model() -> TimeSformer:
    torch.manual_seed(1)
    return TimeSformer(config())


# Everything that draws random numbers or keeps a state is on.
RECIPE = PRESETS["modern"].replace(
    {"epochs": 3.0, "batch_size": 2, "accumulate": 2, "learning_rate": 0.01, "colour": 0.2}
)
EVERY_OTHER = Machine(checkpoint_every=2)


def job(videos: Path | VideoList, out: Path, recipe: Recipe = RECIPE, **changes: Any) -> Job:
    listed = videos if isinstance(videos, VideoList) else read_videos(videos)
    validation = changes.pop("validation", None)
    return Job(recipe.replace(changes), listed, validation, out)


def run(videos: Path | VideoList, out: Path, **more: Any) -> dict[str, Any]:
    machine = more.pop("machine", EVERY_OTHER)
    on_step = more.pop("on_step", lambda step: None)
    return train(first_model(), job(videos, out, **more), machine, on_step=on_step)


@pytest.fixture(scope="module")
def whole(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that nothing has interrupted."""
    out = tmp_path_factory.mktemp("whole")
    run(colours, out)
    return out


def step_lines(out: Path) -> list[tuple[int, float, float]]:
    events = (event for event in read_log(out / LOG) if event["event"] == "step")
    return [(event["step"], event["loss"], event["gradient_norm"]) for event in events]


def same_result(out: Path, whole: Path) -> None:
    # Not the files' bytes: safetensors writes the two entries of the header in any order.
    ours, theirs = load_file(out / WEIGHTS), load_file(whole / WEIGHTS)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.numpy().tobytes() == theirs[name].numpy().tobytes(), name
    assert step_lines(out) == step_lines(whole)


# ---- killed and resumed -----------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from tests.model.training.test_loop import run

colours, out, moment = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

if moment == "while a checkpoint is written":
    os.fsync = lambda file: kill()
run(colours, out, on_step=lambda step: print(step.step, flush=True))
"""


def subprocess_run(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", KILLED, *map(str, arguments)],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_killed_and_resumed_ends_with_the_same_weights(
    colours: Path, whole: Path, tmp_path: Path
) -> None:
    """Bit for bit: after a kill between checkpoints, and one in the middle of writing one."""
    with subprocess_run(colours, tmp_path, "when the parent wants") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "3\n":
                process.kill()
                break
        assert process.wait() == -signal.SIGKILL
    at = checkpoint.load_newest(tmp_path / CHECKPOINTS)
    assert at is not None
    assert 2 <= at[0] < 6

    with subprocess_run(colours, tmp_path, "while a checkpoint is written") as process:
        assert process.wait() == -signal.SIGKILL
    after = checkpoint.load_newest(tmp_path / CHECKPOINTS)
    assert after is not None
    assert after[0] == at[0]
    assert not (tmp_path / WEIGHTS).exists()

    run(colours, tmp_path)
    same_result(tmp_path, whole)


@contextmanager
def interrupted_at(at: int, action: Callable[[], object]) -> Iterator[Callable[[Step], None]]:
    def on_step(step: Step) -> None:
        if step.step == at:
            action()

    yield on_step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_the_next_run_goes_on(
    colours: Path, whole: Path, tmp_path: Path, number: int
) -> None:
    before = signal.getsignal(number)
    with (
        interrupted_at(3, lambda: os.kill(os.getpid(), number)) as on_step,
        pytest.raises(StoppedError, match="stopped after step 3 of 6"),
    ):
        run(colours, tmp_path, on_step=on_step)
    assert signal.getsignal(number) == before
    seen: list[int] = []
    run(colours, tmp_path, on_step=lambda step: seen.append(step.step))
    assert seen == [4, 5, 6]
    same_result(tmp_path, whole)


def test_adapters_go_on_as_exactly(colours: Path, tmp_path: Path) -> None:
    adapters = {"train": "lora", "lora_rank": 2}
    run(colours, tmp_path / "whole", **adapters)
    with (
        interrupted_at(3, lambda: os.kill(os.getpid(), signal.SIGTERM)) as on_step,
        pytest.raises(StoppedError),
    ):
        run(colours, tmp_path / "stopped", on_step=on_step, **adapters)
    run(colours, tmp_path / "stopped", **adapters)
    same_result(tmp_path / "stopped", tmp_path / "whole")


def test_a_finished_run_is_not_run_again(colours: Path, whole: Path) -> None:
    written = (whole / WEIGHTS).stat().st_mtime_ns
    report = run(colours, whole, on_step=lambda step: pytest.fail("it trains"))
    assert report == json.loads((whole / REPORT).read_text())
    assert (whole / WEIGHTS).stat().st_mtime_ns == written


# ---- how it is computed -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, "eager"])
def test_recomputed_activations_and_compiled_networks_give_the_same_weights(
    colours: Path, whole: Path, tmp_path: Path, backend: str | None
) -> None:
    """The backend `eager` replaces the kernels, which take a minute to build, and nothing else.

    The gradients of a compiled network need the same dropped branches as its forward pass.
    """
    run(colours, tmp_path, machine=Machine(recompute=True, compile=backend))
    found = checkpoint.load_newest(tmp_path / CHECKPOINTS)
    assert found is not None
    assert found[1]["model"].keys() == TimeSformer(config()).state_dict().keys()
    same_result(tmp_path, whole)


def test_only_clips_of_many_patches_are_recomputed_unasked(colours: Path, tmp_path: Path) -> None:
    """`hr` and `large` do not fit otherwise; on the others it would only cost time."""
    for variant, expected in (("base", False), ("long-32", False), ("hr", True), ("large", True)):
        small = VARIANTS[variant].replace(embed_dim=12, depth=1, num_classes=2)
        assert (
            Run(TimeSformer(small), job(colours, tmp_path), Machine()).model.recompute is expected
        )
    forbidden = Run(TimeSformer(small), job(colours, tmp_path), Machine(recompute=False))
    assert not forbidden.model.recompute


# ---- refusals ---------------------------------------------------------------------------------


def test_a_run_of_other_settings_or_data_is_left_alone(colours: Path, whole: Path) -> None:
    with pytest.raises(MismatchError, match="begun with another recipe:"):
        run(colours, whole, learning_rate=0.5)
    fewer = read_videos(colours)
    with pytest.raises(MismatchError, match="begun with another videos:"):
        run(VideoList(fewer.samples[1:], fewer.labels), whole)
    with pytest.raises(MismatchError, match="another first weights:"):
        train(TimeSformer(config()), job(colours, whole), EVERY_OTHER)


def test_two_runs_do_not_share_a_folder(colours: Path, tmp_path: Path) -> None:
    with (
        interrupted_at(1, lambda: run(colours, tmp_path)) as on_step,
        pytest.raises(TrainingError, match="another process trains into"),
    ):
        run(colours, tmp_path, on_step=on_step)


def test_a_loss_that_is_no_number_ends_the_run(colours: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"the loss of step \d is nan"):
        run(colours, tmp_path, learning_rate=1e20, warm_up=0, clip_norm=0, ema=0)


# ---- what is learned, and what is written -----------------------------------------------------


def test_it_learns_and_writes_what_export_takes(colours: Path, tmp_path: Path) -> None:
    """Colours are learned in seconds; one video is broken and is replaced."""
    (tmp_path / "broken.mp4").write_text("no video")
    good = read_videos(colours)
    videos = VideoList((*good.samples, Sample(str(tmp_path / "broken.mp4"), 0, "x")), good.labels)
    recipe = Recipe().replace(
        {"optimizer": "adamw", "epochs": 8.0, "learning_rate": 0.01, "batch_size": 4,
         "schedule": "cosine", "flip": 0.5, "balanced": True}
    )  # fmt: skip
    out = tmp_path / "out"
    report = run(videos, out, recipe=recipe, validation=good, machine=Machine())
    assert report["metrics"]["top1"] == 1.0
    assert report["metrics"]["per_class"]["red"] == {"videos": 4, "accuracy": 1.0}
    assert report["protocol"] == {"views": 1, "crops": 3}
    assert report["identity"]["recipe"]["optimisation"]["learning_rate"] == 0.01
    assert report["software"]["torch"] == torch.__version__
    assert report["replaced_videos"] == 1
    assert str(tmp_path) not in json.dumps(report)

    events = read_log(out / LOG)
    replaced = [event for event in events if event["event"] == "replaced"]
    assert len(replaced) == report["replaced_clips"] >= 1
    assert replaced[0]["path"] == str(tmp_path / "broken.mp4")
    evaluations = [event["top1"] for event in events if event["event"] == "evaluation"]
    assert len(evaluations) == 7  # the last epoch's is the report's
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])

    page = (out / PAGE).read_text()
    assert "Training of out" in page
    assert "Validation: top-1" in page
    assert "blue taken for blue: 4" in page
    assert f"{tmp_path}/broken.mp4" in page

    loaded = load_checkpoint(out / WEIGHTS)
    assert loaded.kind == "timesformer"
    assert loaded.labels == ("blue", "red")
    assert loaded.config == config()


def test_what_is_written_is_the_average_of_the_weights(whole: Path) -> None:
    found = checkpoint.load_newest(whole / CHECKPOINTS)
    assert found is not None
    state = found[1]
    assert state["average"]["steps"] == 6
    written = load_file(whole / WEIGHTS)
    for name, value in written.items():
        assert torch.equal(value, state["average"]["weights"][name])
    assert not torch.equal(written["head.weight"], state["model"]["head.weight"])


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_trains_and_keeps_float32_weights(
    colours: Path, tmp_path: Path, precision: str
) -> None:
    run(colours, tmp_path, precision=precision)
    state = load_checkpoint(tmp_path / WEIGHTS).state
    assert {value.dtype for value in state.values()} == {torch.float32}


def test_two_small_batches_are_one_large_one(colours: Path, tmp_path: Path) -> None:
    plain = {"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "randaugment": 0, "colour": 0.0,
             "flip": 0.0, "epochs": 2.0, "clip_norm": 0.0}  # fmt: skip
    settings = tiny_config(
        num_classes=2, num_frames=2, image_size=16, frame_stride=4, drop_path_rate=0.0
    )
    losses = []
    for batch_size, accumulate in ((2, 2), (4, 1)):
        torch.manual_seed(1)
        out = tmp_path / str(batch_size)
        changes = {**plain, "batch_size": batch_size, "accumulate": accumulate}
        train(TimeSformer(settings), job(colours, out, **changes))
        losses.append([loss for _, loss, _ in step_lines(out)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
