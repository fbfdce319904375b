"""`timesformer data`: what a set of videos holds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from model.config import VARIANTS
from service.cli.options import (
    EXIT_PARTLY_FAILED,
    PATH,
    SOURCE,
    class_names,
    counting,
    json_option,
    print_rows,
    read_list,
    source_options,
    workers_option,
)


@click.group()
def data() -> None:
    """Work on sets of labelled videos."""


@data.command()
@click.argument("source", type=SOURCE)
@click.option("--clean", type=PATH, help="Write the list without its problems here, as CSV.")
@click.option(
    "--variant",
    type=click.Choice(list(VARIANTS)),
    default="base",
    show_default=True,
    help="Whose clips a video must be long enough for.",
)
@click.option("--keep-short", is_flag=True, help="Videos shorter than a clip are no problem.")
@source_options
@workers_option
@json_option
def check(
    source: str,
    clean: Path | None,
    variant: str,
    keep_short: bool,
    labels_file: Path | None,
    root: str | None,
    columns: str,
    workers: int,
    as_json: bool,
) -> None:
    """Read every video of SOURCE and say which cannot be used.

    SOURCE is a folder with a folder per class, a CSV of `path label` or `path,label`, a CSV with
    named columns, Parquet, or Something-Something JSON; a path or a URL. Undecodable, too short and
    duplicate files are named. Exit code 3 if there is any.
    """
    from model.data.check import check as run
    from model.data.lists import write_list

    videos = read_list(source, class_names(labels_file), root, columns)
    with counting("reading", len(videos.samples)) as done:
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
            print_rows("problems", ["video", "problem", "file", "why"], rows)
        counts = zip(videos.labels, map(str, videos.counts()), map(str, kept), strict=True)
        print_rows("classes", ["class", "videos", "usable"], [list(row) for row in counts])
        click.echo(
            f"{len(report.clean.samples)} of {report.videos} videos can be used; "
            f"{report.truncated} end early or are damaged in parts"
        )
        if clean is not None and report.clean.samples:
            click.echo(f"wrote {clean}")
    if report.problems:
        sys.exit(EXIT_PARTLY_FAILED)


@data.command()
@click.argument("folder", type=PATH)
@click.option(
    "--videos", type=click.IntRange(min=12), default=4800, show_default=True, help="To train on."
)
@click.option(
    "--held-out",
    type=click.IntRange(min=12),
    default=480,
    show_default=True,
    help="To validate on.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all.")
@workers_option
def demo(folder: Path, videos: int, held_out: int, seed: int, workers: int) -> None:
    """Render the demo set into FOLDER: videos of twelve motions, and the lists of them.

    Twelve motions (moving, approaching, turning, shaking ...) as mp4 files of many sizes, codecs
    and frame rates. FOLDER/train.csv and FOLDER/validation.csv are sources for `timesformer
    train` and `evaluate`. Interrupted, the same command continues.
    """
    from model.demo.dataset import write_demo_set

    with counting("rendering", videos + held_out) as done:
        write_demo_set(folder, videos, held_out, seed=seed, processes=workers, done=done)
    click.echo(f"{videos} videos to train on: {folder / 'train.csv'}")
    click.echo(f"{held_out} held out: {folder / 'validation.csv'}")
