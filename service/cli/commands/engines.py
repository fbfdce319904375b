"""`timesformer engines`: TensorRT plans of the bundles, built ahead of serving."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.cli.options import (
    Sizes,
    engines_option,
    find_bundles,
    gpu_option,
    json_option,
    print_rows,
    store_option,
)

if TYPE_CHECKING:
    from export.bundle.bundle import Bundle
    from export.runtime.plans import Plan
    from export.tensorrt.builder import BuildJob

_COUNT = click.IntRange(min=1)
_COLUMNS = ("name", "version", "gpu", "tensorrt", "precision")
_COUNTED = ("batches", "MiB", "layers give", "matrix products in")
_MIB = 1024 * 1024

_batches_option = click.option(
    "--batches",
    type=Sizes(),
    default="1,8,32",
    show_default=True,
    help="Batch sizes to be fastest at. The plan takes every batch up to the last of them.",
)
_level_option = click.option(
    "--level",
    type=click.IntRange(0, 5),
    default=3,
    show_default=True,
    help="How hard the builder tries; 5 may take an hour.",
)


@click.group()
def engines() -> None:
    """Build, measure and list TensorRT plans."""


@engines.command()
@click.argument("bundle", required=False)
@store_option
@engines_option
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp8", "int8", "fp16", "float32"]),
    envvar="TIMESFORMER_PRECISION",
    default=lambda: _served_precision(),
    show_default="what the service serves",
    help="Which graph of the bundle, by default that which the service serves, as "
    "TIMESFORMER_PRECISION has it; `auto` takes the fastest that `engines choose` measured, else "
    "the first of these that the bundle has and the GPU can compute in.",
)
@_batches_option
@_level_option
@click.option("--workspace", type=_COUNT, help="Most scratch memory of a layer, in MiB.")
@click.option(
    "--timing-cache",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder that remembers measurements between builds, in a file for each kind of GPU and "
    "TensorRT; by default that of the plans.",
)
@click.option(
    "--refittable",
    is_flag=True,
    help="Plans whose weights can be replaced: the next version of the same network then takes "
    "seconds. May be slower; measure it.",
)
@click.option(
    "--rebuild",
    is_flag=True,
    help="Build, and measure anew, whether or not the plan is there. Without it a plan that is "
    "there is kept if its level is no lower and, with --refittable, it is so.",
)
@gpu_option
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
    rebuild: bool,
    gpu: int,
    as_json: bool,
) -> None:
    """Build the plan of BUNDLE for this machine's GPU; it may be there already.

    BUNDLE is a bundle's folder, or a name in the store, of which the active version is taken;
    without it, every name's.
    """
    from export.runtime.tensorrt import TensorRt
    from export.tensorrt.builder import BuildJob

    here = TensorRt(gpu, engines)

    for each in find_bundles(bundle, store):
        job = BuildJob.of(
            here.wanted(each, precision, batches),
            timing_cache,
            gpu_index=gpu,
            level=level,
            workspace_bytes=workspace * _MIB if workspace else None,
            refittable=refittable,
            rebuild=rebuild,
        )
        title = f"{each.name} version {each.version}"
        plan, there = _built(job, title, as_json)
        _say(plan, title, there, as_json)


@engines.command()
@click.argument("bundle", required=False)
@store_option
@engines_option
@_batches_option
@click.option(
    "--batch",
    type=_COUNT,
    default=16,
    envvar="TIMESFORMER_MAX_BATCH_CLIPS",
    show_default=True,
    show_envvar=True,
    help="Clips at a time when it is measured: as many as the service will run.",
)
@_level_option
@gpu_option
@json_option
def choose(
    bundle: str | None,
    store: Path | None,
    engines: Path | None,
    batches: tuple[int, ...],
    batch: int,
    level: int,
    gpu: int,
    as_json: bool,
) -> None:
    """Find out which precision of BUNDLE is fastest on this machine's GPU.

    Builds the plan of each precision that the bundle has, compares its answers with the network's,
    and measures those that hold, taking turns. The precision `auto` takes the fastest from then on,
    wherever these plans are; else it goes by the rates that GPUs' makers state.
    """
    if batch > batches[-1]:
        raise click.UsageError(
            f"--batch {batch} is more than plans for --batches up to {batches[-1]} take at once: "
            "let the last of --batches be as large"
        )
    from export.runtime.tensorrt import TensorRt
    from export.tensorrt.builder import BuildJob
    from export.tensorrt.precision_benchmark import measure_fastest

    here = TensorRt(gpu, engines)
    for each in find_bundles(bundle, store):
        title = f"{each.name} version {each.version}"

        def build(precision: str, found: Bundle = each, title: str = title) -> Plan:
            wanted = here.wanted(found, precision, batches)
            return _built(BuildJob.of(wanted, gpu_index=gpu, level=level), title, as_json)[0]

        def report(step: str, title: str = title) -> None:
            if not as_json:
                click.echo(f"{title}: {step}", err=True)

        fastest = measure_fastest(each, here, batches, batch, build, report=report)
        if as_json:
            click.echo(fastest.model_dump_json())
            continue
        rows = [[name, f"{fastest.milliseconds[name]:.4g}", "yes"] for name in fastest.order]
        rows += [[name, "-", reason] for name, reason in fastest.refused.items()]
        columns = ["precision", f"ms a clip, {fastest.batch} at a time", "passes"]
        print_rows(f"{title} on {fastest.gpu}", columns, rows)
        click.echo(f"auto is {fastest.order[0]} here")


@engines.command(name="list")
@click.argument("bundle", required=False)
@store_option
@engines_option
@json_option
def list_plans(bundle: str | None, store: Path | None, engines: Path | None, as_json: bool) -> None:
    """List the plans of BUNDLE, or of every version of the store.

    What each computes in is told by its engine: layers by the type of what they give, and matrix
    products by what they compute in. With --json also both by kind, the same of the network as it
    was read, and the file with all that TensorRT's inspector says.
    """
    from export.runtime.plans import engines_folder, layers_file, plans_in
    from export.tensorrt.inspector import by_type

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
                    "engine_by_type": by_type(plan.facts.engine) if plan.facts.engine else None,
                    "products": plan.facts.products,
                    "layers": str(layers) if layers.is_file() else None,
                    "level": plan.facts.level,
                    "warnings": plan.facts.warnings,
                }
            )
    if as_json:
        click.echo(json.dumps(rows))
    elif rows:
        print_rows("TensorRT plans", [*_COLUMNS, *_COUNTED], [_cells(row) for row in rows])
        for row in rows:
            for warning in row["warnings"]:
                click.secho(f"{row['path']}: {warning}", err=True)
    else:
        click.echo("no plans; `timesformer engines build` makes one")


def _cells(row: dict[str, Any]) -> list[str]:
    from export.tensorrt.inspector import in_words

    counts = (row["engine_by_type"], row["products"])
    return [
        *(str(row[column]) for column in _COLUMNS),
        ",".join(map(str, row["batches"])),
        f"{row['bytes'] / _MIB:.0f}",
        *("not told" if each is None else in_words(each) or "none named" for each in counts),
    ]


def _served_precision() -> str:
    from service.settings import Settings

    return str(Settings.model_fields["precision"].default)


def _built(job: BuildJob, title: str, quiet: bool) -> tuple[Plan, bool]:
    """Returns the plan, and whether the plan was there already."""
    from export.tensorrt.builder import build_plan, find_built
    from service.observability.progress import bar

    if found := find_built(job):
        return found, True
    with bar(not quiet) as progress:
        return build_plan(
            job, lambda share, step: progress.show(f"{title}: {share:.0%}, {step}", share, 1.0)
        ), False


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
