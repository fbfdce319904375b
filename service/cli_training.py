"""`timesformer data`, `train` and `evaluate`. Each imports what it needs when it runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from model.config import VARIANTS

if TYPE_CHECKING:
    from model.training.sources import VideoList

Command = Callable[..., Any]
_PATH = click.Path(path_type=Path)
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
