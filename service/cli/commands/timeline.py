"""`timesformer timeline`: a long video of this machine, without a server."""

from __future__ import annotations

from pathlib import Path

import click

from service.cli.options import Command, json_option, local_model_options, parameters_of


def _options(command: Command) -> Command:
    """One option for each parameter of `/v1/timeline`, in its order."""
    from service.inference.parameters import TimelineParameters

    for name, field in reversed(TimelineParameters.model_fields.items()):
        command = click.option(
            f"--{name.replace('_', '-')}",
            name,
            type=str,
            default=None if field.default is None else str(field.default),
            show_default=field.default is not None,
            help=field.description,
        )(command)
    return command


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@_options
@local_model_options
@json_option
def timeline(
    file: Path,
    store: Path | None,
    model: str | None,
    device: str | None,
    as_json: bool,
    **options: str | None,
) -> None:
    """Name the actions in a long video FILE over time, here, without a server.

    Prints segments as they are known; with --json, all that `/v1/timeline` sends, an object a line.
    """
    from model.video import WindowError
    from service.inference.parameters import TimelineParameters
    from service.offline.local import timeline_of_file
    from service.settings import load_settings

    wanted = {name: value for name, value in options.items() if value is not None}
    parameters = parameters_of(TimelineParameters, wanted)
    settings = load_settings(store=store, model=model, device=device)
    try:
        timeline_of_file(file, settings, parameters, as_json)
    except WindowError as error:
        raise click.UsageError(f"--{error}") from None
