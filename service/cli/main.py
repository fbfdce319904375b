"""The `timesformer` command. Each subcommand imports its layer when it runs, so that `--help` is
quick and serving never loads torch.

Exit codes: 0 done; 1 it could not be done, and the message says why; 2 the command line or a
setting is wrong; 3 `classify` or `label` failed on some of the files, `bundles` or `bundles verify`
on some of the bundles, `verify` on some of the artefacts, `data check` found videos that cannot be
used; 4 `refresh` published a version that its rule keeps from serving; 130 interrupted with Ctrl-C.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, get_args

import click

from model.config import ATTENTION_TYPES, VARIANTS
from service.cli.commands.bench import bench
from service.cli.commands.bundles import bundles
from service.cli.commands.data import data
from service.cli.commands.engines import engines
from service.cli.commands.evaluate import evaluate
from service.cli.commands.export import export
from service.cli.commands.keys import keys
from service.cli.commands.label import label
from service.cli.commands.refresh import refresh
from service.cli.commands.timeline import timeline
from service.cli.commands.train import train
from service.cli.commands.verify import verify
from service.cli.options import (
    EXIT_PARTLY_FAILED,
    Command,
    classify_parameters,
    json_option,
    local_model_options,
    print_rows,
    view_options,
)

EXIT_INTERRUPTED = 130

# Errors whose message is all that a user needs, by module: one can only be raised once its module
# is loaded, so nothing is imported to catch it.
_KNOWN_ERRORS = {
    "export.bundle.bundle": "BundleError",
    "export.graph.onnx_export": "ExportError",
    "export.runtime": "RuntimeUnavailableError",
    "export.runtime.plans": "PlanError",
    "model.checkpoints": "CheckpointError",
    "model.config": "ConfigError",
    "model.labels": "LabelError",
    "model.training.errors": "TrainingError",
    "model.video": "VideoError",
    "service.api.auth": "KeyFileError",
    "service.offline.errors": "LabellingError",
    "service.settings": "SettingsError",
}
_EXTRAS = {
    "fsspec": "label",
    "huggingface_hub": "export",
    "onnx": "export",
    "onnxruntime": "cpu` or `gpu",
    "onnxscript": "export",
    "pyarrow": "label",
    "ray": "ray",
    "safetensors": "export",
    "tensorboard": "train",
    "torch": "export",
}

_COUNT = click.IntRange(min=1)


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


for _command in (
    bench,
    bundles,
    data,
    engines,
    evaluate,
    export,
    keys,
    label,
    refresh,
    timeline,
    train,
    verify,
):
    cli.add_command(_command)


def _settings_options(command: Command) -> Command:
    """One flag for each field of `Settings`, in its order; a removed flag explains itself."""
    from service.settings import ENV_PREFIX, REMOVED, Settings, removal

    def refuse(_: click.Context, flag: click.Parameter, value: str | None) -> None:
        if value is not None:
            raise click.UsageError(removal(flag.opts[0]))

    for name, advice in REMOVED.items():
        flag = f"--{name.replace('_', '-')}"
        command = click.option(
            flag, hidden=True, expose_value=False, callback=refuse, help=f"Removed: {advice}."
        )(command)
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
    from service.server.serve import serve as run
    from service.settings import load_settings

    run(load_settings(**flags))


@cli.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@view_options
@click.option("--threshold", default=0.0, show_default=True, help="Leave out what scores less.")
@local_model_options
@json_option
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
    from service.offline.local import classify_files
    from service.settings import load_settings

    parameters = classify_parameters(top_k=top_k, views=views, crops=crops, threshold=threshold)
    settings = load_settings(store=store, model=model, device=device)
    if classify_files(files, settings, parameters, as_json):
        sys.exit(EXIT_PARTLY_FAILED)


@cli.command()
@click.option("--variant", type=click.Choice(list(VARIANTS)), help="By default all of them.")
@click.option("--scheme", type=click.Choice(ATTENTION_TYPES), help="Attention scheme.")
@click.option("--classes", type=_COUNT, help="Number of classes.")
@json_option
def info(variant: str | None, scheme: str | None, classes: int | None, as_json: bool) -> None:
    """Say what a variant costs: parameters, multiply-adds and memory of one view."""
    from model.network.cost import cost

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
    cells = [[str(row[column]) for column in columns] for row in readable]
    print_rows(f"{schemes}: one view, float32, batch 1", columns, cells)


if __name__ == "__main__":
    cli()
