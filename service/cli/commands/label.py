"""`timesformer label`: an archive of videos to one table of labels."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from service.cli.options import (
    EXIT_PARTLY_FAILED,
    PATH,
    SOURCE,
    classify_parameters,
    json_option,
    local_model_options,
    view_options,
)

if TYPE_CHECKING:
    from service.offline.archive import Label, Output, Summary

_COUNT = click.IntRange(min=1)


@click.command()
@click.argument("source", type=SOURCE)
@click.option("--out", type=PATH, required=True, help="The table, a `.parquet`.")
@click.option("--column", default="path", show_default=True, help="Of a list: that of the paths.")
@click.option("--root", help="Folder or URL that relative paths in a list are relative to.")
@view_options
@local_model_options
@click.option(
    "--workers",
    type=_COUNT,
    envvar="TIMESFORMER_DECODE_WORKERS",
    help="Processes that decode videos, of this machine; by default one per core, two at least.",
)
@click.option(
    "--block",
    type=_COUNT,
    default=256,
    show_default=True,
    help="Videos that are written together: a killed run loses the answers of fewer.",
)
@click.option(
    "--retry-errors", is_flag=True, help="Try the videos again that failed in an earlier run."
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="`ray` decodes on the CPUs and infers on the GPUs of a Ray cluster, or on its CPUs.",
)
@click.option(
    "--ray-address",
    envvar="RAY_ADDRESS",
    help="Of the cluster: `auto`, HOST:6379 or ray://HOST:10001. Without it Ray starts here.",
)
@click.option(
    "--ray-engines",
    type=_COUNT,
    help="Engines in the cluster; by default one a GPU, without GPUs one for every four CPUs.",
)
@click.option(
    "--ray-decoders",
    type=_COUNT,
    help="Most decoders in the cluster; by default all CPUs that the engines leave.",
)
@click.option(
    "--cost-per-hour",
    type=click.FloatRange(min=0),
    help="What an hour of these machines costs: prints what a thousand videos cost.",
)
@json_option
def label(
    source: str,
    out: Path,
    column: str,
    root: str | None,
    top_k: int,
    views: int,
    crops: str,
    store: Path | None,
    model: str | None,
    device: str | None,
    workers: int | None,
    block: int,
    retry_errors: bool,
    engine: str,
    ray_address: str | None,
    ray_engines: int | None,
    ray_decoders: int | None,
    cost_per_hour: float | None,
    as_json: bool,
) -> None:
    """Name the action in every video of SOURCE, into one Parquet table.

    SOURCE is a folder, a list (.txt, or a column of .csv or .parquet), one video, or a URL of
    these (s3://, gs://, https://). What is done is not done again: killed or not, the same command
    goes on with what is new. Videos that cannot be used are listed in OUT.errors.parquet. Further
    settings come from the environment, as for `serve`.

    Exit code 3 if any video of the table has no labels.
    """
    from service.offline.archive import Output, label_archive
    from service.offline.videos import find_videos
    from service.settings import load_settings

    settings = load_settings(store=store, model=model, device=device, decode_workers=workers)
    parameters = classify_parameters(top_k=top_k, views=views, crops=crops)
    output = Output(out, block, retry_errors)
    summary = label_archive(
        find_videos(source, column, root),
        output,
        settings,
        parameters,
        _label(engine, ray_address, ray_engines, ray_decoders),
        say=lambda line: click.echo(line, err=True),
        quiet=as_json,
    )
    _say(summary, output, cost_per_hour, as_json)
    if summary.failed:
        sys.exit(EXIT_PARTLY_FAILED)


def _label(engine: str, address: str | None, engines: int | None, decoders: int | None) -> Label:
    if engine == "local":
        from service.offline.local_runner import label_here

        return label_here
    from service.offline.ray_runner import Cluster, label_on_ray

    return functools.partial(label_on_ray, cluster=Cluster(address, engines, decoders))


def _say(summary: Summary, output: Output, cost_per_hour: float | None, as_json: bool) -> None:
    cost = None if cost_per_hour is None else summary.cost_per_thousand(cost_per_hour)
    if as_json:
        facts = {
            **summary._asdict(),
            "videos_per_second": summary.videos_per_second,
            "cost_per_thousand": cost,
            "out": str(output.path),
        }
        click.echo(json.dumps(facts))
        return
    click.echo(f"{output.path}: {summary.videos:,} videos, {summary.failed:,} without labels")
    if summary.labelled:
        click.echo(
            f"this run: {summary.labelled:,} videos in {summary.seconds:,.1f} s, "
            f"{summary.videos_per_second:,.1f} videos/s, "
            f"{summary.clips / max(summary.seconds, 1e-9):,.1f} clips/s"
        )
    if cost is not None:
        click.echo(f"a thousand videos cost {cost:,.4f} at {cost_per_hour:g} an hour")
