"""`timesformer refresh`: from new data to the next served version, in one command."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.cli.commands.train import given, preset_option, recipe_options, training_progress
from service.cli.options import (
    PATH,
    SOURCE,
    class_names,
    device_option,
    json_option,
    model_option,
    print_rows,
    read_list,
    read_object,
    source_options,
    workers_option,
)

if TYPE_CHECKING:
    from export.bundle.bundle import Bundle, BundleStore
    from export.graph.build import Precision
    from export.refresh.refresh import Refreshed
    from export.runtime import Device
    from export.runtime.interface import Precision as ServedPrecision
    from model.data.lists import VideoList

EXIT_NOT_ACTIVATED = 4


@click.command()
@click.option(
    "--data",
    "source",
    type=SOURCE,
    required=True,
    help="Source of labelled videos, the new ones and those of before.",
)
@click.option("--from", "parent", type=PATH, help="STORE/NAME, or STORE/NAME/VERSION.")
@click.option("--store", type=PATH, envvar="TIMESFORMER_STORE", help="Folder of bundles.")
@model_option
@click.option(
    "--validation",
    type=SOURCE,
    help="Source that both models are judged on; its videos are not trained on.",
)
@click.option(
    "--hold-out",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of the groups to judge on; by default the parent's, or 0.1.",
)
@click.option("--out", type=PATH, help="Folder of the work; by default .refresh beside versions.")
@click.option(
    "--rule",
    type=click.Choice(["better", "not-worse"]),
    default="better",
    show_default=True,
    help="`better` wants a gain of more than --min-gain, `not-worse` one of at least that.",
)
@click.option(
    "--metric",
    type=click.Choice(["top1", "mean_class_accuracy", "log_loss"]),
    default="top1",
    show_default=True,
    help="Whose gain the rule looks at; the gain of a log loss is its fall.",
)
@click.option(
    "--min-gain",
    type=float,
    default=0.0,
    show_default=True,
    help="On a small hold-out a gain of a video or two is chance: ask for more.",
)
@click.option(
    "--max-old-drop",
    type=float,
    default=0.01,
    show_default=True,
    help="How much accuracy on the classes that the active version knows may fall.",
)
@click.option(
    "--max-class-drop", type=float, help="How much that of any one of them may fall; else no limit."
)
@preset_option("refresh")
@recipe_options
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(["float32", "fp16", "int8", "fp8", "auto"]),
    multiple=True,
    help="What the bundle shall hold besides float32 and what the parent holds; repeatable.",
)
@click.option(
    "--served-precision",
    type=click.Choice(["float32", "fp16", "int8", "fp8", "auto"]),
    envvar="TIMESFORMER_PRECISION",
    default="float32",
    show_default=True,
    help="In which precision both are compared: what the service is set to. fp16 and fp8 are "
    "computed on the CPU, rounded as a GPU rounds.",
)
@click.option("--no-activate", is_flag=True, help="Only publish.")
@click.option(
    "--checkpoint-every",
    type=click.IntRange(min=1),
    default=500,
    show_default=True,
    help="Steps between saved states.",
)
@click.option("--cache", type=PATH, help="Folder of decoded clips, with --cached-views.")
@source_options
@device_option
@workers_option
@json_option
def refresh(
    source: str,
    parent: Path | None,
    store: Path | None,
    model: str | None,
    validation: str | None,
    hold_out: float | None,
    out: Path | None,
    preset: str,
    recipe_file: Path | None,
    precisions: tuple[Precision, ...],
    served_precision: ServedPrecision,
    no_activate: bool,
    checkpoint_every: int,
    cache: Path | None,
    labels_file: Path | None,
    root: str | None,
    columns: str,
    device: Device,
    workers: int,
    as_json: bool,
    **changes: Any,
) -> None:
    """Train a bundle on with new data, and activate the result if it is better.

    The active version's own weights are trained on, exported and verified; old and new are compared
    on the same held-out videos, and the new one is published, with both models' figures, and
    activated if the rule allows. A running service takes it over. The same command continues what
    was killed, and does nothing where the data is what the version was made from. Exit code 4 if
    the version was published and the rule keeps it from serving.
    """
    from export.refresh.refresh import HoldOut, Listeners, Task, record
    from export.refresh.refresh import refresh as run
    from model.training.config import Machine
    from model.training.initialisation import choose_device
    from model.training.recipe import PRESETS

    if validation is not None and hold_out is not None:
        raise click.UsageError("give either --validation or --hold-out")
    rule = _rule(changes)
    recipe = PRESETS[preset].replace({**read_object(recipe_file), **given(changes)})
    bundles, bundle = _parent(parent, store, model)
    names, known = class_names(labels_file), bundle.manifest.labels
    judged = None
    if validation is not None:
        judged = _read(validation, names, known, root, columns)
    seed = (record(bundle).get("hold_out") or {}).get("seed") or 0
    wanted: set[Precision] = set(precisions) - {"float32"}
    if served_precision not in ("float32", "auto"):
        wanted.add(served_precision)
    task = Task(
        store=bundles,
        parent=bundle,
        data=_read(source, names, known, root, columns),
        validation=judged,
        hold_out=HoldOut(hold_out, seed) if hold_out is not None else None,
        recipe=recipe,
        rule=rule,
        precisions=frozenset(wanted),
        served=served_precision,
        activate=not no_activate,
        work=out,
    )
    machine = Machine(choose_device(device), workers, checkpoint_every, cache=cache)
    with training_progress() as told:
        stage = Listeners(lambda text: click.echo(f"{text} ...", err=True), told)
        refreshed = run(task, machine, device, stage)
    _say(refreshed, bundles, as_json)
    if not refreshed.accepted:
        sys.exit(EXIT_NOT_ACTIVATED)


def _rule(changes: dict[str, Any]) -> Any:
    """Takes the rule's options out of `changes`."""
    from export.refresh.comparison import Rule

    names = ("metric", "min_gain", "max_old_drop", "max_class_drop")
    return Rule(changes.pop("rule"), **{name: changes.pop(name) for name in names})


def _parent(
    parent: Path | None, store: Path | None, model: str | None
) -> tuple[BundleStore, Bundle]:
    """The version that is trained on: the one that is named, or the active one."""
    from export.bundle.bundle import BundleStore
    from export.bundle.manifest import MANIFEST

    version = None
    if parent is not None:
        path = parent.absolute()
        if (path / MANIFEST).exists():
            path, version = path.parent, path.name
        store, model = path.parent, path.name
    elif store is None:
        raise click.UsageError("give --from STORE/NAME, or --store STORE with --model NAME")
    bundles = BundleStore(store)
    if model is None:
        names = bundles.names()
        if len(names) != 1:
            raise click.UsageError(f"{store} holds {', '.join(names) or 'nothing'}: give --model")
        model = names[0]
    return bundles, bundles.open(model, version)


def _read(
    source: str,
    names: tuple[str, ...] | None,
    known: tuple[str, ...],
    root: str | None,
    columns: str,
) -> VideoList:
    """A list whose indices, where it has no names, are those of the label file or of the parent."""
    from model.training.errors import DataError

    if names is not None:
        return read_list(source, names, root, columns)
    try:
        return read_list(source, known, root, columns)
    except DataError:  # a class that the parent lacks, or a list that is wrong either way
        videos = read_list(source, None, root, columns)
    numbered = tuple(f"class {index}" for index in range(len(videos.labels)))
    if videos.labels == numbered and "class 0" not in known:
        raise DataError(
            f"{source} has indices beyond the {len(known)} classes of the parent: "
            "give the names of all of them with --labels FILE"
        )
    return videos


def _say(refreshed: Refreshed, store: BundleStore, as_json: bool) -> None:
    from export.refresh.refresh import record

    bundle, kept = refreshed.bundle, record(refreshed.bundle)
    where = shlex.quote(str(store.root))
    command = f"timesformer bundles activate {bundle.name} {bundle.version} --store {where}"
    if as_json:
        summary = {
            "name": bundle.name,
            "version": bundle.version,
            "path": str(bundle.path),
            **refreshed._asdict(),
            "refresh": kept,
        }
        del summary["bundle"]
        click.echo(json.dumps(summary))
        return
    if refreshed.again:
        click.echo(f"{bundle.name} version {bundle.version} was made from these data and settings")
    else:
        _print_comparison(kept)
    verb = "is active" if refreshed.activated else "is published, not activated"
    click.echo(f"{bundle.name} version {bundle.version} {verb}: {refreshed.reason}")
    if not refreshed.activated:
        click.echo(f"activate it by hand: {command}")


def _print_comparison(kept: Any) -> None:
    measures = ("videos", "top1", "top5", "mean_class_accuracy", "log_loss")
    for part, models in kept["comparison"].items():
        rows = [
            [name.replace("_", " "), *(f"{models[model][name]:.4g}" for model in ("active", "new"))]
            for name in measures
        ]
        title = part.replace("_", " ")
        print_rows(title, ["measure", f"version {kept['compared_with']}", "new"], rows)
