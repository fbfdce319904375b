"""`timesformer engines`: TensorRT plans of the bundles, built ahead of serving."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from service.commands.options import (
    PATH,
    Sizes,
    find_bundles,
    json_option,
    print_rows,
    store_option,
)

if TYPE_CHECKING:
    from export.runtime.plans import Plan

_COUNT = click.IntRange(min=1)
_MIB = 1024 * 1024

engines_option = click.option(
    "--engines",
    type=PATH,
    envvar="TIMESFORMER_ENGINES",
    help="Folder of plans; by default each bundle's own `engines`.",
)


@click.group()
def engines() -> None:
    """Build and list TensorRT plans."""


@engines.command()
@click.argument("bundle", required=False)
@store_option
@engines_option
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp8", "int8", "fp16", "float32"]),
    default="auto",
    show_default=True,
    help="Which graph of the bundle; `auto` takes the first of these that the bundle has and the "
    "GPU can compute in. What the service is to serve: set TIMESFORMER_PRECISION to the same.",
)
@click.option(
    "--batches",
    type=Sizes(),
    default="1,8,32",
    show_default=True,
    help="Batch sizes to be fastest at. The plan takes every batch up to the last of them.",
)
@click.option(
    "--level",
    type=click.IntRange(0, 5),
    default=3,
    show_default=True,
    help="How hard the builder tries; 5 may take an hour.",
)
@click.option("--workspace", type=_COUNT, help="Most scratch memory of a layer, in MiB.")
@click.option(
    "--timing-cache",
    type=PATH,
    help="File that remembers measurements between builds, for one kind of GPU.",
)
@click.option(
    "--refittable",
    is_flag=True,
    help="Plans whose weights can be replaced: the next version of the same network then takes "
    "seconds. May be slower; measure it.",
)
@click.option("--gpu", default=0, show_default=True, help="Which GPU.")
@json_option
def build(
    bundle: str | None,
    store: Path | None,
    engines: Path | None,
    precision: str,
    batches: tuple[int, ...],
    level: int,
    workspace: int | None,
    timing_cache: Path | None,
    refittable: bool,
    gpu: int,
    as_json: bool,
) -> None:
    """Build the plan of BUNDLE for this machine's GPU; it may be there already.

    BUNDLE is a bundle's folder, or a name in the store, of which the active version is taken;
    without it, every name's.
    """
    from export.runtime.plans import find_plan
    from export.runtime.tensorrt import TensorRt
    from export.tensorrt import BuildJob, build_plan, refit_source

    here = TensorRt(gpu, engines)
    for each in find_bundles(bundle, store):
        wanted = here.wanted(each, precision, batches)
        title = f"{each.name} version {each.version}"
        plan = find_plan(wanted.folder, wanted.key, wanted.graph_sha256)
        there = plan is not None
        if plan is None:
            job = BuildJob.of(
                wanted,
                gpu_index=gpu,
                level=level,
                workspace_bytes=workspace * _MIB if workspace else None,
                timing_cache=timing_cache,
                refittable=refittable,
                refit_from=refit_source(wanted.folder, wanted.key) if refittable else None,
            )
            with _progress(title, as_json) as progress:
                plan = build_plan(job, progress)
        _say(plan, title, there, as_json)


@engines.command(name="list")
@click.argument("bundle", required=False)
@store_option
@engines_option
@json_option
def list_plans(bundle: str | None, store: Path | None, engines: Path | None, as_json: bool) -> None:
    """List the plans of BUNDLE, or of every version of the store.

    With --json also what each computes in: layers by kind and type, of the network as it was read
    and of the engine that TensorRT made of it, and the file with all that its inspector says.
    """
    from export.runtime.plans import engines_folder, layers_file, plans_in

    rows = []
    for each in find_bundles(bundle, store, all_versions=True):
        for plan in plans_in(engines_folder(each, engines)):
            current = plan.facts.graph_sha256 in {
                entry.sha256 for entry in each.manifest.files.values()
            }
            layers = layers_file(plan.path)
            rows.append(
                {
                    "name": each.name,
                    "version": each.version,
                    **plan.facts.key.model_dump(),
                    "bytes": plan.facts.plan.size,
                    "refittable": plan.facts.refittable,
                    "of_this_graph": current,
                    "path": str(plan.path),
                    "seconds": plan.facts.seconds,
                    "network": plan.facts.network,
                    "engine": plan.facts.engine,
                    "layers": str(layers) if layers.is_file() else None,
                    "warnings": plan.facts.warnings,
                }
            )
    if as_json:
        click.echo(json.dumps(rows))
    elif rows:
        columns = ["name", "version", "gpu", "tensorrt", "precision", "batches", "MiB"]
        cells = [
            [str(row[column]) for column in columns[:5]]
            + [",".join(map(str, row["batches"])), f"{row['bytes'] / _MIB:.0f}"]
            for row in rows
        ]
        print_rows("TensorRT plans", columns, cells)
    else:
        click.echo("no plans; `timesformer engines build` makes one")


@contextlib.contextmanager
def _progress(title: str, quiet: bool) -> Iterator[Callable[[float, str], None]]:
    """A bar on a terminal, a line for every tenth in a log; on stderr."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal:
        told = -1

        def line(share: float, step: str) -> None:
            nonlocal told
            if int(share * 10) > told:
                told = int(share * 10)
                console.print(f"{title}: {share:.0%}, {step}", highlight=False, markup=False)

        yield line
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda share, step: bar.update(task, completed=share, description=step)


def _say(plan: Plan, title: str, there: bool, as_json: bool) -> None:
    if as_json:
        facts = plan.facts.model_dump(mode="json")
        click.echo(json.dumps({**facts, "path": str(plan.path), "built": not there}))
        return
    if there:
        click.echo(f"{title}: already there, {plan.path}")
        return
    did = "refitted" if plan.facts.refitted else "built"
    click.echo(
        f"{title}: {did} in {plan.facts.seconds:.0f} s, "
        f"{plan.facts.plan.size / _MIB:.0f} MiB, {plan.path}"
    )
    for warning in plan.facts.warnings:
        click.secho(f"  {warning}", err=True)
