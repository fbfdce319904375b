"""The `timesformer` command. Each subcommand imports its layer when it runs, so that `--help` is
quick and serving never loads torch.

Exit codes: 0 done; 1 it could not be done, and the message says why; 2 the command line is wrong;
3 `classify` failed on some of the files, `bundles verify` on some of the bundles.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from model.config import ATTENTION_TYPES, VARIANTS, ConfigError

if TYPE_CHECKING:
    from export.bundle import BundleStore

EXIT_FAILED = 1
EXIT_PARTLY_FAILED = 3

Command = Callable[..., Any]
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
_store_option = click.option(
    "--store",
    type=click.Path(path_type=Path),
    envvar="TIMESFORMER_STORE",
    help="Folder of bundles; by default that of the bundled demo model.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="timesformer-service")
def cli() -> None:
    """TimeSformer: export it, serve it, classify videos with it."""


def main() -> None:
    """Entry point: turns the errors that we know into one line and an exit code."""
    try:
        cli()
    except _known_errors() as error:
        click.secho(f"error: {error}", fg="red", err=True)
        sys.exit(EXIT_FAILED)


def _known_errors() -> tuple[type[Exception], ...]:
    """Errors whose message is all that a user needs. Those of torch's side count once loaded."""
    from export.bundle import BundleError
    from export.runtime import RuntimeUnavailableError
    from model.labels import LabelError
    from model.video import VideoError
    from service.settings import SettingsError

    known: list[type[Exception]] = [
        BundleError,
        ConfigError,
        LabelError,
        RuntimeUnavailableError,
        SettingsError,
        VideoError,
    ]
    if "export.pipeline" in sys.modules:
        from export.onnx import ExportError
        from model.checkpoints import CheckpointError

        known += [CheckpointError, ExportError]
    return tuple(known)


def _settings_options(command: Command) -> Command:
    """One flag for each field of `Settings`, in its order."""
    from service.settings import ENV_PREFIX, Settings

    for name, field in reversed(Settings.model_fields.items()):
        choices = [value for value in get_args(field.annotation) if isinstance(value, str)]
        command = click.option(
            f"--{name.replace('_', '-')}",
            name,
            type=click.Choice(choices) if choices else str,
            help=f"{field.description} [env: {ENV_PREFIX}{name.upper()}]",
        )(command)
    return command


@cli.command()
@_settings_options
def serve(**flags: str | None) -> None:
    """Serve a bundle over HTTP."""
    from service.server import serve as run
    from service.settings import load_settings

    run(load_settings(**{name: value for name, value in flags.items() if value is not None}))


@cli.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--top-k", default=5, show_default=True, help="Labels per video, best first.")
@click.option("--views", default=1, show_default=True, help="Clips spread over the video.")
@click.option("--crops", type=click.Choice(["1", "3"]), default="1", show_default=True)
@click.option("--threshold", default=0.0, show_default=True, help="Leave out what scores less.")
@_store_option
@click.option("--model", envvar="TIMESFORMER_MODEL", help="Name of the bundle.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@_json_option
def classify(
    files: tuple[Path, ...],
    top_k: int,
    views: int,
    crops: str,
    threshold: float,
    store: Path | None,
    model: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Name the action in video FILES, here, without a server.

    With --json, one object a line, also for the files that failed. Exit code 3 if any failed.
    """
    from pydantic import ValidationError

    from service.local import classify_files
    from service.schemas import ClassifyParameters
    from service.settings import load_settings

    try:
        parameters = ClassifyParameters.model_validate(
            {"top_k": top_k, "views": views, "crops": crops, "threshold": threshold}
        )
    except ValidationError as error:
        problem = error.errors()[0]
        raise click.UsageError(f"--{problem['loc'][0]}: {problem['msg']}") from None
    settings = load_settings(store=store, model=model, device=device)
    if classify_files(files, settings, parameters, as_json):
        sys.exit(EXIT_PARTLY_FAILED)


@cli.command()
@click.argument("checkpoint")
@click.option("--name", required=True, help="Name of the bundle.")
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    default="bundles",
    show_default=True,
    envvar="TIMESFORMER_STORE",
    help="Folder of bundles; made if it is not there.",
)
@click.option(
    "--config",
    "config_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON with what the checkpoint does not say of its architecture, such as num_heads.",
)
@click.option("--num-frames", type=int, help="Frames of a clip; the time embedding is resized.")
@click.option("--image-size", type=int, help="Pixels; the position embedding is resized.")
@click.option(
    "--labels",
    "labels_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Label file: one a line, or a JSON list or object.",
)
@click.option(
    "--verify-on",
    "videos",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Video whose clips the export is compared on, besides the bundled one; repeatable.",
)
@click.option("--activate", is_flag=True, help="Make it the active version, also if there is one.")
@_json_option
def export(
    checkpoint: str,
    name: str,
    store: Path,
    config_file: Path | None,
    num_frames: int | None,
    image_size: int | None,
    labels_file: Path | None,
    videos: tuple[Path, ...],
    activate: bool,
    as_json: bool,
) -> None:
    """Export CHECKPOINT to a verified bundle.

    CHECKPOINT is an official .pyth file, a Hugging Face folder or hub name, an image ViT to start
    from, or a safetensors file of our own. The first version of a name becomes active by itself.
    """
    try:
        from export.pipeline import export_bundle
        from model.checkpoints import load_checkpoint
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"{error.name} is not installed: exporting needs the extra `export` of this package"
        ) from None
    from export.bundle import BundleStore
    from model.demo import SAMPLE_CLIP
    from model.labels import read_labels

    with _progress(as_json) as report:
        report(f"reading {checkpoint}")
        loaded = load_checkpoint(
            checkpoint,
            config=_read_config(config_file),
            num_frames=num_frames,
            image_size=image_size,
        )
        bundles = BundleStore(store)
        bundle = export_bundle(
            loaded,
            name,
            bundles,
            labels=read_labels(labels_file) if labels_file else None,
            videos=(SAMPLE_CLIP, *videos),
            report=report,
        )
    if activate or bundles.active(name) is None:
        bundles.activate(name, bundle.version)
    active = bundles.active(name) == bundle.version
    if as_json:
        summary = {"name": name, "version": bundle.version, "path": str(bundle.path)}
        parity = {
            file: result.model_dump() for file, result in bundle.manifest.verification.items()
        }
        click.echo(json.dumps({**summary, "active": active, "verification": parity}))
        return
    for file, result in bundle.manifest.verification.items():
        click.echo(
            f"{file}: logits within {result.max_difference:.2g} of the network's "
            f"on {result.clips} clips (limit {result.limit:.2g})"
        )
    click.echo(f"published {name} version {bundle.version} in {bundle.path}")
    if not active:
        click.echo(
            f"activate: timesformer bundles activate {name} {bundle.version} --store {store}"
        )
    click.echo(f"serve it: timesformer serve --store {store} --model {name}")


def _read_config(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return config


def _progress(quiet: bool) -> Any:
    """A context whose value reports a step: a spinner on a terminal, lines elsewhere."""
    from service.progress import steps

    return steps(quiet)


@cli.group(invoke_without_command=True)
@_store_option
@_json_option
@click.pass_context
def bundles(context: click.Context, store: Path | None, as_json: bool) -> None:
    """List the bundles of a store; activate, roll back or verify one."""
    from export.bundle import BundleStore
    from model.demo import STORE

    context.obj = BundleStore(store or STORE)
    if context.invoked_subcommand is None:
        _list_bundles(context.obj, as_json)


def _list_bundles(store: BundleStore, as_json: bool) -> None:
    rows = [
        {
            "name": name,
            "version": version,
            "active": store.active(name) == version,
            "created": bundle.manifest.created.isoformat(timespec="seconds"),
            "attention_type": bundle.config.attention_type,
            "classes": bundle.config.num_classes,
            "verified": all(result.passed for result in bundle.manifest.verification.values()),
            "path": str(bundle.path),
        }
        for name in store.names()
        for version in store.versions(name)
        for bundle in [store.open(name, version)]
    ]
    if as_json:
        click.echo(json.dumps(rows))
        return
    if not rows:
        click.echo(f"no bundles in {store.root}; `timesformer export` makes one")
        return
    _print_table(
        str(store.root),
        ["name", "version", "active", "created", "attention_type", "classes", "verified"],
        rows,
    )


@bundles.command()
@click.argument("name")
@click.argument("version")
@click.pass_obj
def activate(store: BundleStore, name: str, version: str) -> None:
    """Make VERSION of NAME the one that serves, after checking it."""
    store.activate(name, version)
    click.echo(f"{name} version {version} is active")


@bundles.command()
@click.argument("name")
@click.pass_obj
def rollback(store: BundleStore, name: str) -> None:
    """Go back to the version of NAME that was active before."""
    bundle = store.rollback(name)
    click.echo(f"{name} version {bundle.version} is active")


@bundles.command()
@click.argument("name", required=False)
@click.argument("version", required=False)
@click.pass_obj
def verify(store: BundleStore, name: str | None, version: str | None) -> None:
    """Check files against their hashes: one VERSION, all of NAME, or the whole store."""
    from export.bundle import BundleError

    failed = False
    for each in [name] if name else store.names():
        versions = [version] if version else store.versions(each)
        if not versions:
            raise BundleError(f"{store.root} has no bundle named {each}")
        for number in versions:
            try:
                store.open(each, number).verify()
                click.echo(f"{each} {number}: ok")
            except BundleError as error:
                failed = True
                click.secho(f"{each} {number}: {error}", fg="red")
    if failed:
        sys.exit(EXIT_PARTLY_FAILED)


@cli.command()
@click.option("--variant", type=click.Choice(list(VARIANTS)), help="By default all of them.")
@click.option("--scheme", type=click.Choice(ATTENTION_TYPES), help="Attention scheme.")
@click.option("--classes", type=int, help="Number of classes.")
@_json_option
def info(variant: str | None, scheme: str | None, classes: int | None, as_json: bool) -> None:
    """Say what a variant costs: parameters, multiply-adds and memory of one view."""
    from model.cost import cost

    changes = {"attention_type": scheme, "num_classes": classes}
    changes = {key: value for key, value in changes.items() if value is not None}
    rows: list[dict[str, Any]] = []
    for name in [variant] if variant else VARIANTS:
        config = VARIANTS[name].replace(**changes)
        costs = cost(config)
        rows.append(
            {
                "variant": name,
                "scheme": config.attention_type,
                "classes": config.num_classes,
                "clip": f"{config.num_frames} x {config.image_size}",
                "frame_stride": config.preprocessing.frame_stride,
                "parameters": costs.parameters,
                "multiply_adds": costs.multiply_adds,
                "activation_bytes": costs.activation_bytes,
            }
        )
    if as_json:
        click.echo(json.dumps(rows[0] if variant else rows))
        return
    readable = [
        {
            **row,
            "parameters": f"{row['parameters'] / 1e6:,.1f} M",
            "multiply-adds": f"{row['multiply_adds'] / 1e9:,.1f} G",
            "activations": f"{row['activation_bytes'] / 2**20:,.0f} MiB",
        }
        for row in rows
    ]
    columns = ["variant", "scheme", "classes", "clip", "frame_stride", "parameters"]
    _print_table("one view, float32, batch 1", [*columns, "multiply-adds", "activations"], readable)


def _print_table(title: str, columns: list[str], rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(_cell(row[column]) for column in columns))
    Console().print(table)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
