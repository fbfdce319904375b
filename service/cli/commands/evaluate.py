"""`timesformer evaluate`: accuracy and calibration of weights or of a bundle."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.cli.options import (
    PATH,
    SOURCE,
    class_names,
    counting,
    device_option,
    json_option,
    print_rows,
    read_list,
    source_options,
    workers_option,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from export.runtime import Device, Runtime
    from model.config import Preprocessing
    from model.evaluation.calibration import Calibration
    from model.evaluation.metrics import Classify, Predictions

_MEASURES = ("top1", "top5", "mean_class_accuracy", "calibration_error", "log_loss")


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """What is evaluated: what it sees, its classes, and functions from clips to logits.

    `temperature` is the bundle's own. `artefacts` are a bundle's, by precision; of a checkpoint
    there is the network alone.
    """

    preprocessing: Preprocessing
    labels: tuple[str, ...]
    temperature: float
    artefacts: dict[str, Classify]


@click.command()
@click.argument("model")
@click.argument("source", type=SOURCE)
@click.option("--views", type=click.IntRange(min=1), default=1, show_default=True, help="In time.")
@click.option(
    "--crops",
    type=click.Choice(["1", "3"]),
    default="3",
    show_default=True,
    help="In space. 1 view x 3 crops is the paper's protocol.",
)
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(["float32", "fp16", "int8", "int8-qdq", "fp8", "all"]),
    multiple=True,
    help="Which of a bundle's artefacts; repeatable, compared in one table. By default float32. "
    "int8-qdq is the INT8 of TensorRT. On a CPU, what is for GPUs is rounded as they round, which "
    "takes the package `onnx`.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, min_open=True),
    help="What logits are divided by; by default the bundle's temperature, 1 for a checkpoint.",
)
@click.option(
    "--fit-temperature",
    is_flag=True,
    help="Also find the temperature that calibrates the scores, on one half of these videos, and "
    "judge it on the other.",
)
@click.option(
    "--report", "page", type=PATH, help="Also write a page for people here; of the first precision."
)
@source_options
@device_option
@workers_option
@json_option
def evaluate(
    model: str,
    source: str,
    views: int,
    crops: str,
    precisions: tuple[str, ...],
    temperature: float | None,
    fit_temperature: bool,
    page: Path | None,
    labels_file: Path | None,
    root: str | None,
    columns: str,
    device: Device,
    workers: int,
    as_json: bool,
) -> None:
    """Measure the accuracy and calibration of MODEL on the videos of SOURCE.

    MODEL is a bundle's folder (STORE/NAME/VERSION), which its engine runs, or a checkpoint as
    `timesformer export` reads.
    """
    from model.evaluation.calibration import calibrate
    from model.evaluation.metrics import Protocol, predict_each
    from model.reports.training_report import Evaluated, write_report

    names = class_names(labels_file)
    if (Path(model) / "manifest.json").exists():
        loaded = _load_bundle(Path(model), names, device, precisions)
    elif precisions:
        raise click.UsageError("--precision chooses among a bundle's artefacts; MODEL is no bundle")
    else:
        loaded = _load_network(model, names, device)
    videos = read_list(source, loaded.labels, root, columns)
    protocol = Protocol(views, 1 if crops == "1" else 3)
    with counting("evaluating", len(videos.samples)) as done:
        found = predict_each(
            videos,
            loaded.preprocessing,
            tuple(loaded.artefacts.values()),
            protocol,
            processes=workers,
            done=done,
        )
    scale = temperature or loaded.temperature
    metrics = _metrics(dict(zip(loaded.artefacts, found, strict=True)), scale)
    first = next(iter(metrics.values()))
    calibration = calibrate(found[0]) if fit_temperature or page else None
    if page is not None:
        seen = Evaluated(found[0], loaded.preprocessing, scale, calibration)
        try:
            write_report(page, model, {}, (), seen, processes=workers)
        except OSError as error:
            raise click.ClickException(f"cannot write {page}: {error.strerror}") from error
    if as_json:
        report = {
            "model": model,
            "protocol": protocol._asdict(),
            "temperature": scale,
            "metrics": first,
            "artefacts": metrics,
            "calibration": calibration.to_dict() if calibration else None,
            "undecodable": [failure._asdict() for failure in found[0].failures],
        }
        click.echo(json.dumps(report))
        return
    for failure in found[0].failures:
        click.secho(f"{failure.path}: {failure.detail}", fg="red", err=True)
    title = f"{model}, {views} x {crops} clips a video, temperature {scale:g}"
    if len(metrics) > 1:
        _print_comparison(title, metrics)
    else:
        print_metrics(title, first)
    if fit_temperature:
        click.echo(_calibration_in_words(calibration))


def _load_bundle(
    path: Path, labels: tuple[str, ...] | None, device: Device, precisions: tuple[str, ...]
) -> _Loaded:
    from export.bundle.bundle import Bundle
    from export.bundle.manifest import GRAPHS
    from export.runtime import Precision, load_runtime
    from export.verification.artefacts import open_graph

    bundle = Bundle(path)
    present = [name for name, file in GRAPHS.items() if file in bundle.manifest.files]
    chosen = present if "all" in precisions else precisions or ("float32",)
    served: dict[str, Precision] = {"float32": "float32", "int8": "int8"}
    artefacts: dict[str, Classify] = {}
    for precision in sorted(set(chosen), key=list(GRAPHS).index):
        if precision in served:
            runtime = load_runtime(bundle, device, precision=served[precision])
        else:
            cuda = load_runtime(bundle, device).device == "cuda"
            runtime = open_graph(bundle, precision, cuda=cuda)
        artefacts[precision] = functools.partial(_logits, runtime)
    return _Loaded(
        bundle.config.preprocessing,
        labels or bundle.manifest.labels,
        bundle.manifest.temperature,
        artefacts,
    )


def _logits(runtime: Runtime, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    return runtime.run(frames).logits


def _load_network(name: str, labels: tuple[str, ...] | None, device: Device) -> _Loaded:
    from model.checkpoints import load_checkpoint
    from model.training.initialisation import choose_device
    from model.training.trainer import classifier

    loaded = load_checkpoint(name)
    classes = labels or loaded.labels
    if classes is None:
        classes = tuple(f"class {index}" for index in range(loaded.config.num_classes))
    network = loaded.build().to(choose_device(device))
    return _Loaded(loaded.config.preprocessing, classes, 1.0, {"network": classifier(network)})


def _metrics(found: dict[str, Predictions], temperature: float) -> dict[str, dict[str, Any]]:
    """The metrics of each artefact, and how often its label is that of float32."""
    from model.evaluation.metrics import agreement, measure

    answer = {}
    for name, predictions in found.items():
        answer[name] = measure(predictions, temperature).to_dict()
        if "float32" in found:
            same = agreement(predictions, found["float32"])
            answer[name]["agreement_with_float32"] = round(same, 6)
    return answer


def _print_comparison(title: str, metrics: dict[str, dict[str, Any]]) -> None:
    names = [*_MEASURES, "agreement_with_float32"]
    print_rows(
        f"{title}, {next(iter(metrics.values()))['videos']} videos",
        ["artefact", *(name.replace("_", " ") for name in names)],
        [[each, *(f"{row[name]:.4f}" for name in names)] for each, row in metrics.items()],
    )


def _calibration_in_words(calibration: Calibration | None) -> str:
    if calibration is None:
        return "no temperature: all videos are of one group, so there is nothing to judge it on"
    before, after = calibration.before, calibration.after
    return (
        f"temperature {calibration.temperature:g}; fitted on {calibration.fitted_on} videos it "
        f"takes, on {calibration.judged_on} others, the log loss from {before['log_loss']:.4f} to "
        f"{after['log_loss']:.4f} and the calibration error from "
        f"{before['calibration_error']:.4f} to {after['calibration_error']:.4f}"
    )


def print_metrics(title: str, metrics: dict[str, Any]) -> None:
    rows = [["videos", str(metrics["videos"])]]
    rows += [[name.replace("_", " "), f"{metrics[name]:.4f}"] for name in _MEASURES]
    print_rows(title, ["measure", "value"], rows)
    each = metrics["per_class"].items()
    print_rows(
        "classes",
        ["class", "videos", "accuracy"],
        [[name, str(row["videos"]), f"{row['accuracy']:.4f}"] for name, row in each],
    )
