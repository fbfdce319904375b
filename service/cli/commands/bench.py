"""`timesformer bench`: how fast the engines of a bundle are on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from service.cli.options import (
    PATH,
    Sizes,
    device_option,
    find_bundles,
    gpu_option,
    json_option,
    print_rows,
    store_option,
    threads_option,
)

if TYPE_CHECKING:
    from export.benchmark.suite import Row
    from export.runtime import Device

_COUNT = click.IntRange(min=1)
_COLUMNS = [
    *("engine", "batch", "p50 ms", "p90", "p99", "calls", "clips/s", "G mult-adds/s"),
    *("speed-up", "(quartiles)", "by cpu time", "off by", "cosine"),
]


@click.command()
@click.argument("bundle")
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    default=("float32",),
    show_default=True,
    help="Which of the bundle's artefacts; repeatable, or `all`.",
)
@click.option(
    "--batches", type=Sizes(), default="1,2,4", show_default=True, help="Batch sizes, rising."
)
@click.option("--rounds", type=_COUNT, default=7, show_default=True, help="Turns of each engine.")
@store_option
@click.option(
    "--engines",
    type=PATH,
    multiple=True,
    envvar="TIMESFORMER_ENGINES",
    help="Folder of plans; repeatable, to compare refittable plans with others, for example. By "
    "default the bundle's own `engines`.",
)
@device_option
@gpu_option
@threads_option
@json_option
def bench(
    bundle: str,
    precisions: tuple[str, ...],
    batches: tuple[int, ...],
    rounds: int,
    store: Path | None,
    engines: tuple[Path, ...],
    device: Device,
    gpu: int,
    threads: int,
    as_json: bool,
) -> None:
    """Measure the engines of BUNDLE beside each other on this machine.

    BUNDLE is a bundle's folder, or a name in the store, of which the active version is taken. All
    engines take turns, round by round, so that whatever else runs here meets them alike: believe
    the ratios, which are taken within rounds, more than the times. Speed-ups are over the first
    engine. `off by` is the largest difference of a logit from the float32 graph's on the CPU.
    """
    from export.benchmark.suite import measure_bundle
    from service.observability.progress import steps

    (found,) = find_bundles(bundle, store)
    with steps(as_json) as report:
        measured = measure_bundle(
            found,
            precisions=precisions,
            batches=batches,
            rounds=rounds,
            device=device,
            gpu=gpu,
            engines=engines,
            threads=threads,
            report=report,
        )
    if as_json:
        facts = {
            "name": found.name,
            "version": found.version,
            "rounds": rounds,
            "engines": [
                {
                    **row._asdict(),
                    "timing": row.timing._asdict(),
                    "speed_up": row.speed_up._asdict(),
                    "speed_up_by_cpu": row.speed_up_by_cpu._asdict(),
                }
                for row in measured.rows
            ],
            "left_out": [each._asdict() for each in measured.left_out],
        }
        click.echo(json.dumps(facts))
        return
    title = f"{found.name} version {found.version}; speed-up over {measured.rows[0].engine}"
    print_rows(title, _COLUMNS, [_cells(row) for row in measured.rows])
    for each in measured.left_out:
        click.echo(f"{each.artefact} was not measured: {each.reason}")


def _cells(row: Row) -> list[str]:
    timing, speed_up = row.timing, row.speed_up
    rate = timing.multiply_adds_per_second
    return [
        row.engine,
        str(row.batch),
        *(f"{value:.1f}" for value in (timing.p50_ms, timing.p90_ms, timing.p99_ms)),
        str(timing.calls),
        f"{timing.clips_per_second:.2f}",
        f"{rate / 1e9:.1f}" if rate else "-",
        f"{speed_up.median:.3f}",
        f"({speed_up.low:.2f}, {speed_up.high:.2f})",
        f"{row.speed_up_by_cpu.median:.3f}",
        f"{row.off_by:.1e}",
        f"{row.cosine:.6f}",
    ]
