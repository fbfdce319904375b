"""What the commands share: options, how a list of videos is read, progress and tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from model.config import ConfigError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from export.bundle.bundle import Bundle
    from model.data.lists import VideoList
    from service.inference.parameters import ClassifyParameters

Command = Callable[..., Any]
T = TypeVar("T", bound="BaseModel")


class Source(click.ParamType[str]):
    """A list or folder of videos: a local one that exists, or a URL."""

    name = "source"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from model.data.remote import is_url

        if not is_url(str(value)) and not Path(value).exists():
            self.fail(f"{value!r} does not exist.", param, ctx)
        return str(value)


class Sizes(click.ParamType[tuple[int, ...]]):
    """Rising batch sizes, such as `1,8,32`."""

    name = "sizes"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        from export.runtime.plans import PlanError, profiles

        if isinstance(value, tuple):
            return value
        try:
            batches = tuple(int(part) for part in str(value).split(","))
            profiles(batches)
        except (ValueError, PlanError):
            self.fail(f"{value!r} is not a list of rising sizes such as 1,8,32.", param, ctx)
        return batches


EXIT_PARTLY_FAILED = 3

SOURCE = Source()
PATH = click.Path(path_type=Path)
EXISTING = click.Path(exists=True, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
store_option = click.option(
    "--store",
    type=PATH,
    envvar="TIMESFORMER_STORE",
    help="Folder of bundles; by default that of the bundled demo model.",
)
model_option = click.option(
    "--model",
    envvar="TIMESFORMER_MODEL",
    help="Name of the bundle; needed only when the store has more than one.",
)
engines_option = click.option(
    "--engines",
    type=PATH,
    envvar="TIMESFORMER_ENGINES",
    help="Folder of plans; by default each bundle's own `engines`.",
)
gpu_option = click.option("--gpu", default=0, show_default=True, help="Which GPU.")
threads_option = click.option(
    "--threads",
    type=click.IntRange(min=0),
    default=0,
    help="On the CPU; 0: one a usable core. With 1, where no thread waits for another, processor "
    "time is comparable, which hardly sees who else is busy.",
)
workers_option = click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    help="Processes that decode videos; 0 decodes in the command's own.",
)
device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="`auto` takes the GPU where there is one.",
)


def source_options(command: Command) -> Command:
    """How a list of videos is read."""
    for option in (
        click.option("--labels", "labels_file", type=FILE, help="Label file; orders the classes."),
        click.option("--root", help="Folder or URL that relative paths in lists are relative to."),
        click.option(
            "--columns",
            default="path,label,group",
            show_default=True,
            help="Names of a table's columns for path, label and group.",
        ),
    ):
        command = option(command)
    return command


def read_list(
    source: str | Path,
    labels: tuple[str, ...] | None,
    root: str | None,
    columns: str,
) -> VideoList:
    from model.data.lists import Columns, read_videos

    names = [name.strip() for name in columns.split(",")]
    if len(names) not in (2, 3) or not all(names):
        raise click.UsageError("--columns takes PATH,LABEL or PATH,LABEL,GROUP")
    return read_videos(source, labels=labels, root=root, columns=Columns(*names))


def class_names(labels_file: Path | None) -> tuple[str, ...] | None:
    from model.data.lists import read_class_names

    return read_class_names(labels_file) if labels_file else None


def find_bundles(
    bundle: str | None, store: Path | None, all_versions: bool = False
) -> Iterator[Bundle]:
    """The bundle of a folder, or the active version of a name, or of each; or all versions."""
    from export.bundle.bundle import Bundle, BundleError, BundleStore
    from export.bundle.manifest import MANIFEST
    from model.demo import STORE

    if bundle is not None and (Path(bundle) / MANIFEST).is_file():
        yield Bundle(Path(bundle))
        return
    bundles = BundleStore(store or STORE)
    names = [bundle] if bundle else bundles.names()
    if not names:
        raise BundleError(f"there are no bundles in {bundles.root}")
    for name in names:
        for version in bundles.versions(name) if all_versions else [None]:
            yield bundles.open(name, version)


def classify_parameters(**given: object) -> ClassifyParameters:
    """How videos are to be looked at, as options say it."""
    from service.inference.parameters import ClassifyParameters

    return parameters_of(ClassifyParameters, given)


def parameters_of(model: type[T], given: Mapping[str, object]) -> T:
    """An endpoint's parameters from a command's options; an error names the option."""
    from pydantic import ValidationError

    try:
        return model.model_validate(given)
    except ValidationError as error:
        problem = error.errors()[0]
        option = "".join(f"--{str(part).replace('_', '-')}: " for part in problem["loc"][:1])
        raise click.UsageError(f"{option}{problem['msg']}") from None


def view_options(command: Command) -> Command:
    """How a video is looked at, and how many labels it gets."""
    for option in (
        click.option(
            "--crops",
            type=click.Choice(["1", "3"]),
            default="1",
            show_default=True,
            help="1: the centre. 3: the two ends and the centre of the long side.",
        ),
        click.option("--views", default=1, show_default=True, help="Clips spread over the video."),
        click.option("--top-k", default=5, show_default=True, help="Labels per video, best first."),
    ):
        command = option(command)
    return command


def local_model_options(command: Command) -> Command:
    """Which model a command runs here, and on what."""
    for option in (
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda"]),
            envvar="TIMESFORMER_DEVICE",
            help="`auto`, the default, takes the GPU if it can be used, else warns and takes the "
            "CPU.",
        ),
        model_option,
        store_option,
    ):
        command = option(command)
    return command


@contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that shows how many videos are done."""
    from service.observability.progress import bar

    with bar() as progress:
        yield lambda count: progress.show(f"{what} {count:,} of {total:,} videos", count, total)


def print_rows(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    from service.observability.progress import print_table

    table = Table()
    for column in columns:
        table.add_column(column)
    for row in rows:  # as text: "Pushing [something]" is no markup
        table.add_row(*map(Text, row))
    print_table(title, table)


def read_object(path: Path | None) -> dict[str, Any]:
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
