"""From videos to a served bundle by commands: check, train, evaluate, export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from model.checkpoints import load_checkpoint, save_safetensors
from model.data.lists import read_videos
from model.demo import STORE
from model.training.initialisation import fine_tuned_model, shared_classes
from service.cli.main import cli
from tests.model.conftest import random_model, tiny_config

TINY = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_frames": 2,
        "image_size": 16, "frame_stride": 4}  # fmt: skip
RECIPE = {"optimizer": "adamw", "schedule": "cosine", "layer_decay": 1.0, "ema": 0.0, "warm_up": 0,
          "mixup": 0, "cutmix": 0, "erasing": 0, "randaugment": 0}  # fmt: skip


def timesformer(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    unexpected = result.exception if not isinstance(result.exception, SystemExit) else None
    assert unexpected is None, repr(unexpected)
    assert result.exit_code == code, result.output
    return result


def training(folder: Path, source: Path, *more: object) -> list[object]:
    """The command, with everything that it needs to be quick."""
    for name, value in (("config", TINY), ("recipe", RECIPE)):
        (folder / f"{name}.json").write_text(json.dumps(value))
    return ["train", source, "--config", folder / "config.json", "--recipe",
            folder / "recipe.json", "--workers", 0, "--device", "cpu", *more]  # fmt: skip


@pytest.fixture(scope="module")
def trained(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    options = ("--variant", "demo", "--epochs", 10, "--batch-size", 4, "--learning-rate", 0.01)
    command = training(folder, colours, "--out", folder / "run", "--validation", colours, *options)
    result = timesformer(*command)
    assert "top1" in result.stdout
    assert f"timesformer export {folder}/run/weights.safetensors" in result.stdout
    assert "step 20 of 20, epoch 10.00" in result.stderr
    assert "after step 2: top-1" in result.stderr
    report = json.loads(timesformer(*command, "--json").stdout)  # finished: it only reports
    assert report["metrics"]["top1"] == 1.0
    assert report["steps"] == 20
    return folder / "run"


@pytest.mark.slow
def test_what_was_trained_is_exported_and_both_are_evaluated_alike(
    trained: Path, colours: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    weights = trained / "weights.safetensors"
    report = json.loads((trained / "training.json").read_text())
    # Eight videos, all right: the trial's temperature, of four, is worse for the other four.
    assert report["calibration"]["after"]["log_loss"] > report["calibration"]["before"]["log_loss"]
    assert report["temperature"] == 1.0
    (tmp_path / "training.json").write_text(json.dumps({**report, "temperature": 1.5}))
    timesformer("export", weights, "--name", "colours", "--training", tmp_path / "training.json",
                "--precision", "int8", "--precision", "fp16", "--store", store)  # fmt: skip
    manifest = json.loads((store / "colours" / "1" / "manifest.json").read_text())
    assert manifest["training"]["metrics"]["top1"] == 1.0
    assert manifest["labels"] == ["blue", "red"]
    assert manifest["temperature"] == 1.5

    bundle = store / "colours" / "1"
    (colours / "red" / "zz-broken.mp4").write_text("no video")
    try:
        reports = [
            json.loads(
                timesformer("evaluate", model, colours, "--json", *options,
                            "--workers", 0, "--device", "cpu").stdout
            )
            for model, *options in (
                (weights, "--fit-temperature"),
                (bundle, "--temperature", 1),
                (bundle, "--precision", "all"),
            )
        ]  # fmt: skip
    finally:
        (colours / "red" / "zz-broken.mp4").unlink()
    network, plain, calibrated = (each["metrics"] for each in reports)
    assert network["top1"] == plain["top1"] == 1.0
    assert network["log_loss"] == pytest.approx(plain["log_loss"], abs=1e-4)
    assert reports[0]["protocol"] == {"views": 1, "crops": 3}
    assert [failure["code"] for failure in reports[1]["undecodable"]] == ["undecodable_video"]
    assert reports[0]["calibration"] == report["calibration"]
    assert (report["calibration"]["fitted_on"], report["calibration"]["judged_on"]) == (4, 4)

    assert [each["temperature"] for each in reports] == [1.0, 1.0, 1.5]
    assert calibrated["log_loss"] != pytest.approx(plain["log_loss"], abs=1e-4)
    artefacts = reports[2]["artefacts"]
    assert list(artefacts) == ["float32", "fp16", "int8", "int8-qdq"]
    assert artefacts["float32"] == {**calibrated, "agreement_with_float32": 1.0}
    for lower in ("fp16", "int8", "int8-qdq"):
        assert artefacts[lower]["agreement_with_float32"] == 1.0
        assert artefacts[lower]["log_loss"] == pytest.approx(calibrated["log_loss"], abs=0.01)
    lacking = timesformer("evaluate", STORE / "demo" / "1", colours, "--precision", "fp16", code=1)
    assert "has no model.fp16.onnx" in lacking.stderr


def test_an_evaluation_is_a_table_and_a_page(trained: Path, colours: Path, tmp_path: Path) -> None:
    page = tmp_path / "evaluation.html"
    command = ("evaluate", trained / "weights.safetensors", colours, "--crops", 1, "--workers", 0)
    result = timesformer(*command, "--report", page)
    nowhere = timesformer(*command, "--report", tmp_path / "none" / "page.html", code=1)
    assert "cannot write" in nowhere.stderr
    assert "mean class accuracy" in result.stdout
    assert "red" in result.stdout
    assert page.read_text().startswith("<!doctype html>")
    assert "blue taken for blue: 4" in page.read_text()
    refused = timesformer("evaluate", trained / "weights.safetensors", colours, "--precision",
                          "int8", code=2)  # fmt: skip
    assert "MODEL is no bundle" in refused.stderr


def test_a_checkpoint_of_these_classes_keeps_its_head(
    trained: Path, colours: Path, tmp_path: Path
) -> None:
    """Also where the list has only some of them, in another order."""
    one = tmp_path / "list.csv"
    one.write_text(f"{colours}/red/0.mp4,red\n{colours}/red/1.mp4,red\n")
    options = ("--from", trained / "weights.safetensors", "--epochs", 1, "--batch-size", 2,
               "--train", "head")  # fmt: skip
    result = timesformer(*training(tmp_path, one, "--out", tmp_path / "run", *options))
    assert "2 classes; its head is kept" in result.stderr
    before, after = (
        load_checkpoint(folder / "weights.safetensors") for folder in (trained, tmp_path / "run")
    )
    assert after.labels == before.labels == ("blue", "red")
    changed = {key for key in after.state if not torch.equal(after.state[key], before.state[key])}
    assert changed == {"head.weight", "head.bias"}


def test_a_checkpoint_is_resized_by_the_configuration(
    trained: Path, colours: Path, tmp_path: Path
) -> None:
    (tmp_path / "size.json").write_text('{"num_frames": 4, "frame_stride": 2}')
    options = ("--from", trained / "weights.safetensors", "--epochs", 0.5, "--batch-size", 2)
    command = training(tmp_path, colours, "--out", tmp_path / "run", *options)
    timesformer(*command, "--config", tmp_path / "size.json")
    sees = load_checkpoint(tmp_path / "run" / "weights.safetensors").config.preprocessing
    assert (sees.num_frames, sees.frame_stride, sees.image_size) == (4, 2, 16)


def test_other_classes_get_a_new_head(trained: Path) -> None:
    checkpoint = load_checkpoint(trained / "weights.safetensors")
    assert shared_classes(checkpoint, ["red"]) == ("blue", "red")
    assert shared_classes(checkpoint, ["red", "green"]) is None
    model, kept = fine_tuned_model(checkpoint, ["green", "red", "x"])
    assert not kept
    assert model.config.num_classes == 3
    assert not fine_tuned_model(checkpoint, ["red", "blue"])[1]


def test_weights_without_labels_keep_a_head_of_as_many_classes(tmp_path: Path) -> None:
    config = tiny_config(num_classes=3)
    save_safetensors(random_model(config), tmp_path / "w.safetensors", config)
    checkpoint = load_checkpoint(tmp_path / "w.safetensors")
    assert fine_tuned_model(checkpoint, "abc")[1]
    assert not fine_tuned_model(checkpoint, "ab")[1]


def test_a_hold_out_by_group(colours: Path, tmp_path: Path) -> None:
    rows = [
        f"{sample.path},{sample.label},take {index % 4}"
        for index, sample in enumerate(read_videos(colours).samples)
    ]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,group", *rows]))
    options = ("--variant", "demo", "--epochs", 1, "--batch-size", 2, "--hold-out", 0.5)
    command = training(tmp_path, tmp_path / "list.csv", "--out", tmp_path / "run", *options)
    report = json.loads(timesformer(*command, "--json").stdout)
    assert report["videos"] + report["validation_videos"] == 8
    assert report["validation_videos"] % 2 == 0
    assert report["validation_videos"] == report["metrics"]["videos"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "either --from CHECKPOINT or --variant"),
        (("--variant", "demo", "--train", "tail"), 2, "--train takes"),
        (("--variant", "demo", "--lora-rank", "4"), 2, "--lora-rank goes with --train lora"),
        (("--variant", "demo", "--train", "lora", "--lora-rank", "0"), 1, "it must be above 0"),
        (("--variant", "demo", "--epochs", "-1"), 1, "epochs is -1.0"),
        (("--variant", "demo", "--train", "9"), 1, "the last 9 blocks cannot be trained"),
        (("--variant", "demo", "--columns", "path"), 2, "--columns takes"),
        (("--variant", "demo", "--validation", ".", "--hold-out", "0.5"), 2, "either --valid"),
    ],
)
def test_what_is_wrong_is_one_line(
    colours: Path, tmp_path: Path, options: tuple[str, ...], code: int, message: str
) -> None:
    command = training(tmp_path, colours, "--out", tmp_path / "run", *options)
    result = timesformer(*command, code=code)
    assert message in result.stderr
    assert "Error: " in result.stderr
    assert result.stdout == ""
