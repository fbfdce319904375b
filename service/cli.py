"""The `timesformer` command. Each subcommand imports its layer when it runs, so that `--help` is
quick and serving never loads torch.

Exit codes: 0 done; 1 it could not be done, and the message says why; 2 the command line or a
setting is wrong; 3 `classify` failed on some of the files, `bundles` or `bundles verify` on some of
the bundles, `data check` found videos that cannot be used; 130 interrupted with Ctrl-C.
"""

from __future__ import annotations

import functools
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from model.config import ATTENTION_TYPES, VARIANTS, ConfigError
from service import cli_training
from service.cli_keys import keys

if TYPE_CHECKING:
    from export.bundle import BundleStore, Parity
    from export.pipeline import Precision

EXIT_PARTLY_FAILED = 3
EXIT_INTERRUPTED = 130

# Errors whose message is all that a user needs, by module: one can only be raised once its module
# is loaded, so nothing is imported to catch it.
_KNOWN_ERRORS = {
    "export.bundle": "BundleError",
    "export.onnx": "ExportError",
    "export.runtime": "RuntimeUnavailableError",
    "model.checkpoints": "CheckpointError",
    "model.config": "ConfigError",
    "model.labels": "LabelError",
    "model.training.errors": "TrainingError",
    "model.video": "VideoError",
    "service.auth": "KeyFileError",
    "service.settings": "SettingsError",
}
_EXTRAS = {
    "huggingface_hub": "export",
    "onnx": "export",
    "onnxruntime": "cpu` or `gpu",
    "onnxscript": "export",
    "safetensors": "export",
    "torch": "export",
}

Command = Callable[..., Any]
_COUNT = click.IntRange(min=1)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
_store_option = click.option(
    "--store",
    type=click.Path(path_type=Path),
    envvar="TIMESFORMER_STORE",
    help="Folder of bundles; by default that of the bundled demo model.",
)


class _Cli(click.Group):
    """Turns the errors that we know into one message and an exit code."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            raise click.exceptions.Exit(EXIT_INTERRUPTED) from None
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in _EXTRAS:
                raise
            raise click.ClickException(
                f"{package} is not installed: "
                f"this needs the extra `{_EXTRAS[package]}` of the package timesformer-service"
            ) from error
        except Exception as error:
            if not isinstance(error, _known_errors()):
                raise
            if type(error).__name__ == "SettingsError":
                raise click.UsageError(str(error)) from error
            raise click.ClickException(str(error)) from error


def _known_errors() -> tuple[type[Exception], ...]:
    return tuple(
        getattr(sys.modules[module], name)
        for module, name in _KNOWN_ERRORS.items()
        if module in sys.modules
    )


@click.group(cls=_Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="timesformer-service")
def cli() -> None:
    """TimeSformer: export it, serve it, classify videos with it."""


cli.add_command(cli_training.data)
cli.add_command(cli_training.train)
cli.add_command(cli_training.evaluate)


cli.add_command(keys)


def main() -> None:
    """Entry point of the `timesformer` command."""
    cli()


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
@click.option(
    "--crops",
    type=click.Choice(["1", "3"]),
    default="1",
    show_default=True,
    help="1: the centre. 3: the two ends and the centre of the long side.",
)
@click.option("--threshold", default=0.0, show_default=True, help="Leave out what scores less.")
@_store_option
@click.option(
    "--model",
    envvar="TIMESFORMER_MODEL",
    help="Name of the bundle; needed only when the store has more than one.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    envvar="TIMESFORMER_DEVICE",
    help="`auto`, the default, takes the GPU if it can be used, else warns and takes the CPU.",
)
@_json_option
def classify(
    files: tuple[Path, ...],
    top_k: int,
    views: int,
    crops: str,
    threshold: float,
    store: Path | None,
    model: str | None,
    device: str | None,
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
        option = str(problem["loc"][0]).replace("_", "-")
        raise click.UsageError(f"--{option}: {problem['msg']}") from None
    given = {"store": store, "model": model, "device": device}
    settings = load_settings(**{name: value for name, value in given.items() if value is not None})
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
@click.option("--num-frames", type=_COUNT, help="Frames of a clip; the time embedding is resized.")
@click.option("--image-size", type=_COUNT, help="Pixels; the position embedding is resized.")
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
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(["float32", "int8"]),
    multiple=True,
    help="What the bundle shall hold besides float32, which it always holds; repeatable. int8 is "
    "for CPUs and is served with TIMESFORMER_PRECISION.",
)
@click.option(
    "--training",
    "training_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON with metrics of the training, to be kept in the manifest.",
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
    precisions: tuple[Precision, ...],
    training_file: Path | None,
    activate: bool,
    as_json: bool,
) -> None:
    """Export CHECKPOINT to a verified bundle.

    CHECKPOINT is an official .pyth file, a Hugging Face folder or hub name, an image ViT to start
    from, or a safetensors file of our own. The first version of a name becomes active by itself.
    """
    from export.bundle import BundleStore
    from export.pipeline import export_bundle
    from model.checkpoints import load_checkpoint
    from model.demo import SAMPLE_CLIP
    from model.labels import read_labels
    from service.progress import steps

    # What is quickly found wrong is found before the long work.
    bundles = BundleStore(store)
    bundles.active(name)
    config, training = _read_object(config_file), _read_object(training_file)
    labels = read_labels(labels_file) if labels_file else None
    with steps(as_json) as report:
        report(f"reading {checkpoint}")
        loaded = load_checkpoint(
            checkpoint,
            config=config,
            num_frames=num_frames,
            image_size=image_size,
        )
        bundle = export_bundle(
            loaded,
            name,
            bundles,
            labels=labels,
            videos=(SAMPLE_CLIP, *videos),
            precisions=precisions,
            training=training,
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
        click.echo(f"{file}: {_agreement(result)}")
    where = shlex.quote(str(store))
    click.echo(f"published {name} version {bundle.version} in {bundle.path}")
    if not active:
        click.echo(
            f"activate: timesformer bundles activate {name} {bundle.version} --store {where}"
        )
    click.echo(f"serve it: timesformer serve --store {where} --model {name}")


def _agreement(parity: Parity) -> str:
    """In one line how near an artefact's answers are to the network's."""
    off = f"logits within {parity.max_difference:.2g} of the network's on {parity.clips} clips"
    if parity.limit is not None:
        return f"{off} (limit {parity.limit:.2g})"
    return f"{off}, cosine {parity.centred_cosine:.4f} (limit {parity.cosine_limit})"


def _read_object(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return config


@cli.group(invoke_without_command=True)
@_store_option
@_json_option
@click.pass_context
def bundles(context: click.Context, store: Path | None, as_json: bool) -> None:
    """List the bundles of a store; activate, roll back or verify one."""
    from export.bundle import BundleStore
    from model.demo import STORE

    context.obj = BundleStore(store or STORE), as_json
    if context.invoked_subcommand is None and _list_bundles(*context.obj):
        sys.exit(EXIT_PARTLY_FAILED)


def _bundles_options(command: Command) -> Command:
    """`--store` and `--json` also after the subcommand, where people write them."""

    @functools.wraps(command)
    def with_store(*, store: Path | None, as_json: bool, **arguments: Any) -> None:
        from export.bundle import BundleStore

        outer_store, outer_json = click.get_current_context().obj
        command(BundleStore(store) if store else outer_store, as_json or outer_json, **arguments)

    option = click.option("--store", type=click.Path(path_type=Path), help="Folder of bundles.")
    return option(_json_option(with_store))


def _list_bundles(store: BundleStore, as_json: bool) -> int:
    """Prints what there is; returns how many versions cannot be read, each named on stderr."""
    from export.bundle import BundleError

    rows, unreadable = [], 0
    for name in store.names():
        for version in store.versions(name):
            try:
                rows.append(_bundle_row(store, name, version))
            except BundleError as error:
                unreadable += 1
                click.secho(f"{name} {version}: {error}", fg="red", err=True)
    columns = ["name", "version", "active", "created", "attention_type", "classes", "verified"]
    if as_json:
        click.echo(json.dumps(rows))
    elif rows:
        _print_table(str(store.root), columns, rows)
    elif not unreadable:
        click.echo(f"no bundles in {store.root}; `timesformer export` makes one")
    return unreadable


def _bundle_row(store: BundleStore, name: str, version: str) -> dict[str, Any]:
    bundle = store.open(name, version)
    return {
        "name": name,
        "version": version,
        "active": store.active(name) == version,
        "created": bundle.manifest.created.isoformat(timespec="seconds"),
        "attention_type": bundle.config.attention_type,
        "classes": bundle.config.num_classes,
        "verified": all(result.passed for result in bundle.manifest.verification.values()),
        "path": str(bundle.path),
    }


@bundles.command()
@click.argument("name")
@click.argument("version")
@_bundles_options
def activate(store: BundleStore, as_json: bool, name: str, version: str) -> None:
    """Make VERSION of NAME the one that serves, after checking it."""
    store.activate(name, version)
    _say_active(name, version, as_json)


@bundles.command()
@click.argument("name")
@_bundles_options
def rollback(store: BundleStore, as_json: bool, name: str) -> None:
    """Go back to the version of NAME that was active before."""
    _say_active(name, store.rollback(name).version, as_json)


def _say_active(name: str, version: str, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"name": name, "version": version, "active": True}))
    else:
        click.echo(f"{name} version {version} is active")


@bundles.command()
@click.argument("name", required=False)
@click.argument("version", required=False)
@_bundles_options
def verify(store: BundleStore, as_json: bool, name: str | None, version: str | None) -> None:
    """Check files against their hashes: one VERSION, all of NAME, or the whole store.

    With --json, one object a bundle. Exit code 3 if any is not as it was published.
    """
    from export.bundle import BundleError

    failed = False
    names = [name] if name else store.names()
    if not names:
        raise BundleError(f"there are no bundles in {store.root}")
    for each in names:
        versions = [version] if version else store.versions(each)
        if not versions:
            raise BundleError(f"{store.root} has no bundle named {each}")
        for number in versions:
            problem = None
            try:
                store.open(each, number).verify()
            except BundleError as error:
                failed, problem = True, str(error)
            _say_verified(each, number, problem, as_json)
    if failed:
        sys.exit(EXIT_PARTLY_FAILED)


def _say_verified(name: str, version: str, problem: str | None, as_json: bool) -> None:
    if as_json:
        row = {"name": name, "version": version, "ok": problem is None, "problem": problem}
        click.echo(json.dumps(row))
    else:
        click.secho(f"{name} {version}: {problem or 'ok'}", fg="red" if problem else None)


@cli.command()
@click.option("--variant", type=click.Choice(list(VARIANTS)), help="By default all of them.")
@click.option("--scheme", type=click.Choice(ATTENTION_TYPES), help="Attention scheme.")
@click.option("--classes", type=_COUNT, help="Number of classes.")
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
            "stride": row["frame_stride"],
            "parameters": f"{row['parameters'] / 1e6:,.1f} M",
            "multiply-adds": f"{row['multiply_adds'] / 1e9:,.1f} G",
            "activations": f"{row['activation_bytes'] / 2**20:,.0f} MiB",
        }
        for row in rows
    ]
    columns = ["variant", "classes", "clip", "stride", "parameters", "multiply-adds", "activations"]
    schemes = ", ".join(sorted({row["scheme"] for row in rows}))
    _print_table(f"{schemes}: one view, float32, batch 1", columns, readable)


def _print_table(title: str, columns: list[str], rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from service.progress import print_table

    table = Table()
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(_cell(row[column]) for column in columns))
    print_table(title, table)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
