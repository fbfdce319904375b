"""`timesformer data`, `train` and `evaluate`. Each imports what it needs when it runs."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from model.config import VARIANTS, ConfigError

if TYPE_CHECKING:
    from export.runtime import Device
    from model.config import Preprocessing
    from model.training.evaluation import Classify, Metrics
    from model.training.run import Step
    from model.training.sources import VideoList

Command = Callable[..., Any]
_PATH = click.Path(path_type=Path)
_LINE_EVERY_S = 10.0  # of progress, where it goes into a log
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
_workers_option = click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    help="Processes that decode videos; 0 decodes in the command's own.",
)


def _source_options(command: Command) -> Command:
    """How a list of videos is read."""
    for option in (
        click.option("--labels", "labels_file", type=_FILE, help="Label file; orders the classes."),
        click.option("--root", type=_PATH, help="What relative paths in lists are relative to."),
        click.option(
            "--columns",
            default="path,label,group",
            show_default=True,
            help="Names of a table's columns for path, label and group.",
        ),
    ):
        command = option(command)
    return command


def _read(
    source: str | Path,
    labels: tuple[str, ...] | None,
    root: Path | None,
    columns: str,
) -> VideoList:
    from model.training.sources import Columns, read_videos

    names = [name.strip() for name in columns.split(",")]
    if len(names) not in (2, 3) or not all(names):
        raise click.UsageError("--columns takes PATH,LABEL or PATH,LABEL,GROUP")
    return read_videos(source, labels=labels, root=root, columns=Columns(*names))


def _class_names(labels_file: Path | None) -> tuple[str, ...] | None:
    from model.training.sources import read_class_names

    return read_class_names(labels_file) if labels_file else None


@contextmanager
def _counting(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Gives a function that is told how many are done: a bar on stderr, on terminals only."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.update(task, completed=count)


def _print_rows(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    from service.progress import print_table

    table = Table()
    for column in columns:
        table.add_column(column)
    for row in rows:  # as text: "Pushing [something]" is no markup
        table.add_row(*map(Text, row))
    print_table(title, table)


# ---- data -------------------------------------------------------------------------------------


@click.group()
def data() -> None:
    """Work on sets of labelled videos."""


@data.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.option("--clean", type=_PATH, help="Write the list without its problems here, as CSV.")
@click.option(
    "--variant",
    type=click.Choice(list(VARIANTS)),
    default="base",
    show_default=True,
    help="Whose clips a video must be long enough for.",
)
@click.option("--keep-short", is_flag=True, help="Videos shorter than a clip are no problem.")
@_source_options
@_workers_option
@_json_option
def check(
    source: Path,
    clean: Path | None,
    variant: str,
    keep_short: bool,
    labels_file: Path | None,
    root: Path | None,
    columns: str,
    workers: int,
    as_json: bool,
) -> None:
    """Read every video of SOURCE and say which cannot be used.

    SOURCE is a folder with a folder per class, a CSV of `path label` or `path,label`, a CSV with
    named columns, or Something-Something JSON. Undecodable, too short and duplicate files are
    named. Exit code 3 if there is any.
    """
    from model.training.check import check as run
    from model.training.sources import write_list

    videos = _read(source, _class_names(labels_file), root, columns)
    with _counting("reading", len(videos.samples)) as done:
        report = run(
            videos,
            VARIANTS[variant].preprocessing,
            processes=workers,
            keep_short=keep_short,
            done=done,
        )
    if clean is not None and report.clean.samples:
        write_list(report.clean, clean)
    kept = report.clean.counts()
    if as_json:
        summary = {
            "videos": report.videos,
            "usable": len(report.clean.samples),
            "truncated": report.truncated,
            "duration_s": round(report.duration_s, 3),
            "problems": [problem._asdict() for problem in report.problems],
            "classes": dict(zip(videos.labels, kept, strict=True)),
        }
        click.echo(json.dumps(summary))
    else:
        if report.problems:
            rows = [
                [str(line), kind.replace("_", " "), path, detail]
                for line, path, kind, detail in report.problems
            ]
            _print_rows("problems", ["video", "problem", "file", "why"], rows)
        counts = zip(videos.labels, map(str, videos.counts()), map(str, kept), strict=True)
        _print_rows("classes", ["class", "videos", "usable"], [list(row) for row in counts])
        click.echo(
            f"{len(report.clean.samples)} of {report.videos} videos can be used; "
            f"{report.truncated} end early or are damaged in parts"
        )
        if clean is not None and report.clean.samples:
            click.echo(f"wrote {clean}")
    if report.problems:
        sys.exit(3)


# ---- train ------------------------------------------------------------------------------------

_device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="`auto` takes the GPU where there is one.",
)


def _recipe_options(command: Command) -> Command:
    """The fields of a recipe that are changed most; `--recipe` changes any."""
    for option in (
        click.option("--epochs", type=float, help="Times that every video is seen."),
        click.option("--batch-size", type=int, help="Clips that go through the network together."),
        click.option("--accumulate", type=int, help="Batches that make one step."),
        click.option("--learning-rate", type=float, help="At its highest."),
        click.option(
            "--precision",
            type=click.Choice(["float32", "bfloat16", "float16"]),
            help="Of matrix products; weights stay float32.",
        ),
        click.option("--flip", type=float, help="Probability of mirroring; 0 where sides matter."),
        click.option("--train", help="`all`, `head`, or how many of the last blocks."),
        click.option("--seed", type=int, help="Decides everything random."),
        click.option(
            "--recipe",
            "recipe_file",
            type=_FILE,
            help="JSON with any fields of the recipe; the command's other options win.",
        ),
        click.option(
            "--preset",
            type=click.Choice(["paper", "modern"]),
            default="modern",
            show_default=True,
            help="The recipe to begin from.",
        ),
    ):
        command = option(command)
    return command


@click.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=_PATH, required=True, help="Folder of the run; continued if it is one.")
@click.option(
    "--validation",
    type=click.Path(exists=True, path_type=Path),
    help="Source that is evaluated on, after every epoch and at the end.",
)
@click.option(
    "--hold-out",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of the groups of SOURCE to evaluate on instead of training on them.",
)
@click.option("--from", "checkpoint", help="Weights to begin with; as `timesformer export` reads.")
@click.option(
    "--variant", type=click.Choice(list(VARIANTS)), help="Architecture to begin from scratch."
)
@click.option(
    "--config",
    "config_file",
    type=_FILE,
    help="JSON that changes what a checkpoint or variant is, such as num_frames.",
)
@click.option(
    "--checkpoint-every",
    type=click.IntRange(min=1),
    default=500,
    show_default=True,
    help="Steps between saved states.",
)
@_recipe_options
@_source_options
@_device_option
@_workers_option
@_json_option
def train(
    source: Path,
    out: Path,
    validation: Path | None,
    hold_out: float | None,
    checkpoint: str | None,
    variant: str | None,
    config_file: Path | None,
    checkpoint_every: int,
    labels_file: Path | None,
    root: Path | None,
    columns: str,
    device: str,
    workers: int,
    as_json: bool,
    preset: str,
    recipe_file: Path | None,
    **changes: Any,
) -> None:
    """Train on the videos of SOURCE and write weights that `timesformer export` takes.

    The same command continues a run that was stopped or killed; the weights end the same. Ctrl-C
    or SIGTERM stops it after the step, which is saved.
    """
    from model.checkpoints import load_checkpoint
    from model.training.loop import train as run
    from model.training.recipe import PRESETS
    from model.training.run import WEIGHTS, Job, Machine
    from model.training.start import choose_device, fine_tuned_model, fresh_model, shared_classes

    if (checkpoint is None) == (variant is None):
        raise click.UsageError("give either --from CHECKPOINT or --variant NAME")
    if validation is not None and hold_out is not None:
        raise click.UsageError("give either --validation or --hold-out")
    recipe = PRESETS[preset].replace({**_object(recipe_file), **_given(changes)})
    config = _object(config_file)
    videos = _read(source, _class_names(labels_file), root, columns)
    if checkpoint is not None:
        # Sizes that differ from the checkpoint's are wanted, not claimed of it.
        size = {key: config.pop(key, None) for key in ("num_frames", "image_size")}
        loaded = load_checkpoint(checkpoint, config=config, **size)
        known = shared_classes(loaded, videos.labels) if labels_file is None else None
        if known is not None:
            videos = _read(source, known, root, columns)
        model, kept = fine_tuned_model(loaded, videos.labels)
        head = "its head is kept" if kept else "its head is new"
        click.echo(f"{checkpoint}: {len(videos.labels)} classes; {head}", err=True)
    else:
        classes = {"num_classes": len(videos.labels)}
        model = fresh_model(VARIANTS[variant or ""].replace(**{**config, **classes}), recipe.seed)
    held_out = None
    if validation is not None:
        held_out = _read(validation, videos.labels, root, columns)
    elif hold_out is not None:
        videos, held_out = videos.split(hold_out)
    job = Job(recipe, videos, held_out, out)
    machine = Machine(choose_device(device), workers, checkpoint_every)
    with _training_progress() as (on_step, on_evaluation):
        report = run(model, job, machine, on_step=on_step, on_evaluation=on_evaluation)
    if as_json:
        click.echo(json.dumps(report))
        return
    if report["metrics"] is not None:
        _print_metrics(f"{out / WEIGHTS}, 1 view x 3 crops", report["metrics"])
    if report["replaced_clips"]:
        click.echo(
            f"{report['replaced_clips']} clips of {report['replaced_videos']} videos could not be "
            f"decoded and were replaced; {out / 'log.jsonl'} says which"
        )
    where = shlex.quote(str(out))
    click.echo(
        f"export it: timesformer export {where}/weights.safetensors --name NAME "
        f"--training {where}/training.json"
    )


def _given(changes: dict[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in changes.items() if value is not None}
    train = given.get("train")
    if train is not None and train not in ("all", "head"):
        if not train.isdecimal():
            raise click.UsageError("--train takes `all`, `head` or a number of blocks")
        given["train"] = int(train)
    return given


def _object(path: Path | None) -> dict[str, Any]:
    """The JSON object in a file, lists as tuples; empty without a file."""
    if path is None:
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return {key: tuple(v) if isinstance(v, list) else v for key, v in value.items()}


@contextmanager
def _training_progress() -> Iterator[tuple[Callable[[Step], None], Callable[[int, Metrics], None]]]:
    """Gives what is told of steps and evaluations: a bar on a terminal, lines in a log."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    console = Console(stderr=True)
    live = console.is_terminal
    columns = (
        TextColumn("step {task.completed:.0f} of {task.total:.0f}"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        TimeLeft(),
    )
    last_line = -_LINE_EVERY_S

    def on_step(step: Step) -> None:
        nonlocal last_line
        state = f"epoch {step.epoch:.2f}, loss {step.loss:.4f}, {step.clips_per_s:.1f} clips/s"
        progress.update(task, completed=step.step, total=step.steps, state=state)
        if not live and (time.monotonic() - last_line > _LINE_EVERY_S or step.step == step.steps):
            last_line = time.monotonic()
            left = progress.tasks[task].time_remaining
            remaining = "" if left is None else f", {left:.0f} s left"
            click.echo(f"step {step.step} of {step.steps}, {state}{remaining}", err=True)

    def on_evaluation(step: int, metrics: Metrics) -> None:
        text = f"after step {step}: top-1 {metrics.top1:.4f}, log loss {metrics.log_loss:.4f}"
        console.print(text, highlight=False, soft_wrap=True)

    with Progress(*columns, console=console, disable=not live) as progress:
        task = progress.add_task("training", total=1, state="")
        yield on_step, on_evaluation


# ---- evaluate ---------------------------------------------------------------------------------


@click.command()
@click.argument("model")
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.option("--views", type=click.IntRange(min=1), default=1, show_default=True, help="In time.")
@click.option(
    "--crops",
    type=click.Choice(["1", "3"]),
    default="3",
    show_default=True,
    help="In space. 1 view x 3 crops is the paper's protocol.",
)
@click.option(
    "--fit-temperature",
    is_flag=True,
    help="Also find the temperature that calibrates the scores on these videos.",
)
@_source_options
@_device_option
@_workers_option
@_json_option
def evaluate(
    model: str,
    source: Path,
    views: int,
    crops: str,
    fit_temperature: bool,
    labels_file: Path | None,
    root: Path | None,
    columns: str,
    device: Device,
    workers: int,
    as_json: bool,
) -> None:
    """Measure the accuracy and calibration of MODEL on the videos of SOURCE.

    MODEL is a bundle's folder (STORE/NAME/VERSION), which its engine runs, or a checkpoint as
    `timesformer export` reads.
    """
    from model.training.evaluation import Protocol, measure, predict
    from model.training.evaluation import fit_temperature as fit

    preprocessing, labels, classify = _load_model(model, _class_names(labels_file), device)
    videos = _read(source, labels, root, columns)
    protocol = Protocol(views, 1 if crops == "1" else 3)
    with _counting("evaluating", len(videos.samples)) as done:
        found = predict(videos, preprocessing, classify, protocol, processes=workers, done=done)
    metrics = measure(found).to_dict()
    temperature = round(fit(found), 4) if fit_temperature else None
    calibrated = measure(found, temperature).to_dict() if temperature else None
    if as_json:
        report = {
            "model": model,
            "protocol": protocol._asdict(),
            "metrics": metrics,
            "temperature": temperature,
            "calibrated": calibrated,
            "undecodable": [failure._asdict() for failure in found.failures],
        }
        click.echo(json.dumps(report))
        return
    for failure in found.failures:
        click.secho(f"{failure.path}: {failure.detail}", fg="red", err=True)
    _print_metrics(f"{model}, {views} x {crops} clips a video", metrics)
    if calibrated is not None:
        click.echo(
            f"temperature {temperature}: calibration error {calibrated['calibration_error']:.4f}, "
            f"log loss {calibrated['log_loss']:.4f} on these videos"
        )


def _load_model(
    name: str, labels: tuple[str, ...] | None, device: Device
) -> tuple[Preprocessing, tuple[str, ...], Classify]:
    """What a model sees, its classes, and the function from clips to logits."""
    if (Path(name) / "manifest.json").exists():
        from export.bundle import Bundle
        from export.runtime import load_runtime

        bundle = Bundle(Path(name))
        runtime = load_runtime(bundle, device)
        return (
            bundle.config.preprocessing,
            labels or bundle.manifest.labels,
            lambda frames: runtime.run(frames).logits,
        )
    from model.checkpoints import load_checkpoint
    from model.training.run import classifier
    from model.training.start import choose_device

    loaded = load_checkpoint(name)
    classes = labels or loaded.labels
    if classes is None:
        classes = tuple(f"class {index}" for index in range(loaded.config.num_classes))
    network = loaded.build().to(choose_device(device))
    return loaded.config.preprocessing, classes, classifier(network)


def _print_metrics(title: str, metrics: dict[str, Any]) -> None:
    names = ["top1", "top5", "mean_class_accuracy", "calibration_error", "log_loss"]
    rows = [["videos", str(metrics["videos"])]]
    rows += [[name.replace("_", " "), f"{metrics[name]:.4f}"] for name in names]
    _print_rows(title, ["measure", "value"], rows)
    each = metrics["per_class"].items()
    _print_rows(
        "classes",
        ["class", "videos", "accuracy"],
        [[name, str(row["videos"]), f"{row['accuracy']:.4f}"] for name, row in each],
    )
