"""`timesformer bench`: how fast the engines of a bundle are on this machine."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from service.commands.options import (
    PATH,
    Sizes,
    device_option,
    find_bundles,
    json_option,
    print_rows,
    store_option,
)

if TYPE_CHECKING:
    from export.measure import Measured, Row
    from export.runtime import Device

_COUNT = click.IntRange(min=1)
_SPEED = [
    *("engine", "batch", "p50 ms", "p90", "p99", "calls", "clips/s", "G mult-adds/s"),
    *("of limit", "speed-up", "(quartiles)", "by cpu time", "off by", "cosine"),
]
_START = ["engine", "load s", "first answer s", "start s", "memory MiB", "peak MiB", "device MiB"]
_MIB = 1024 * 1024


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
@click.option(
    "--against",
    is_flag=True,
    help="Also the original network in PyTorch, eager and compiled, its plain export in ONNX "
    "Runtime, the implementation in Hugging Face transformers, and OpenVINO: those that are "
    "installed, the others are named. Needs torch.",
)
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
@click.option("--gpu", default=0, show_default=True, help="Which GPU.")
@click.option(
    "--threads",
    type=click.IntRange(min=0),
    default=0,
    help="On the CPU; 0: one a usable core. With 1, where no thread waits for another, processor "
    "time is comparable, which hardly sees who else is busy.",
)
@json_option
def bench(
    bundle: str,
    precisions: tuple[str, ...],
    batches: tuple[int, ...],
    rounds: int,
    against: bool,
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
    the ratios, which are taken within rounds, more than the times. The limit is what the same
    engine takes, in the same rounds, for the network's matrix products alone; it needs the package
    onnx. Speed-ups are over the plain export with --against, else over the first engine.
    """
    from export.measure import measure_bundle
    from service.progress import steps

    (found,) = find_bundles(bundle, store)
    with steps(as_json) as report, tempfile.TemporaryDirectory() as folder:
        measured = measure_bundle(
            found,
            Path(folder),
            precisions=precisions,
            batches=batches,
            rounds=rounds,
            against=against,
            device=device,
            gpu=gpu,
            engines=engines,
            threads=threads,
            report=report,
        )
    if as_json:
        click.echo(json.dumps(measured.to_dict()))
        return
    machine = measured.machine
    title = (
        f"{found.name} version {found.version}, {machine['cpu']}, {measured.threads} threads, load "
        f"{machine['load']}; speed-up over {measured.yardstick}"
    )
    print_rows(title, _SPEED, [_speed(row) for row in measured.rows])
    print_rows("start, each in a process of its own", _START, _starts(measured))
    for each in measured.left_out:
        click.echo(f"{each.artefact} was not measured: {each.reason}")


def _speed(row: Row) -> list[str]:
    timing, speed_up = row.timing, row.speed_up
    rate = timing.multiply_adds_per_second
    return [
        row.engine,
        str(row.batch),
        *(f"{value:.1f}" for value in (timing.p50_ms, timing.p90_ms, timing.p99_ms)),
        str(timing.calls),
        f"{timing.clips_per_second:.2f}",
        f"{rate / 1e9:.1f}" if rate else "-",
        f"{row.of_limit.median:.0%}" if row.of_limit else "-",
        f"{speed_up.median:.3f}",
        f"({speed_up.low:.2f}, {speed_up.high:.2f})",
        f"{row.speed_up_by_cpu.median:.3f}",
        f"{row.off_by:.1e}",
        f"{row.cosine:.6f}",
    ]


def _starts(measured: Measured) -> list[list[str]]:
    return [
        [
            name,
            *(f"{s:.2f}" for s in (each.load_seconds, each.first_answer_seconds)),
            f"{each.start_seconds:.2f}",
            *(f"{size / _MIB:.0f}" for size in (each.resident_bytes, each.peak_bytes)),
            "-" if each.device_bytes is None else f"{each.device_bytes / _MIB:.0f}",
        ]
        for name, each in measured.startups.items()
    ]
