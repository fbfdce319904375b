"""`timesformer verify`: the parity gate once more, on the machine at hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.cli.options import (
    EXIT_PARTLY_FAILED,
    device_option,
    engines_option,
    find_bundles,
    gpu_option,
    json_option,
    print_rows,
    store_option,
    threads_option,
)

if TYPE_CHECKING:
    from export.bundle.bundle import Bundle
    from export.bundle.manifest import Parity
    from export.runtime import Device
    from export.verification.gate import Checked, Verdict

_COLUMNS = [
    *("artefact", "ran on", "max diff", "mean diff", "cosine", "error", "top-1", "top-5"),
    *("low margin", "KL", "limit", "passed"),
]


@click.command()
@click.argument("bundle")
@click.option(
    "--clips",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of videos to compare on, besides the bundled one; the more, the better.",
)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    help="Only artefacts of this precision; repeatable. By default all.",
)
@store_option
@engines_option
@device_option
@gpu_option
@threads_option
@json_option
def verify(
    bundle: str,
    folder: Path | None,
    precisions: tuple[str, ...],
    store: Path | None,
    engines: Path | None,
    device: Device,
    gpu: int,
    threads: int,
    as_json: bool,
) -> None:
    """Compare every artefact of BUNDLE with the float32 network, here.

    BUNDLE is a bundle's folder, or a name in the store, of which the active version is taken. Each
    of its graphs, and each TensorRT plan that fits this machine, runs on the same clips of real
    videos and must pass the limits of the export. The network runs in PyTorch where that is
    installed; elsewhere the float32 graph stands for it. Files are checked against their hashes
    first, which is all that `bundles verify` does. Exit code 3 if an artefact does not pass.
    """
    from export.calibration.clips import verification_clips, videos_in
    from export.verification.gate import check_bundle
    from model.demo import SAMPLE_CLIP
    from service.observability.progress import steps

    (found,) = find_bundles(bundle, store)
    with steps(as_json) as report:
        report("checking hashes")
        found.verify()
        videos = (SAMPLE_CLIP, *(videos_in(folder) if folder else ()))
        report(f"decoding {len(videos)} videos")
        verdict = check_bundle(
            found,
            verification_clips(found.config, videos),
            device=device,
            precisions=precisions,
            gpu=gpu,
            engines=engines,
            threads=threads,
            report=report,
        )
    if as_json:
        click.echo(json.dumps(_facts(found, verdict)))
    else:
        _print(found, verdict)
    if not verdict.passed:
        sys.exit(EXIT_PARTLY_FAILED)


def _facts(bundle: Bundle, verdict: Verdict) -> dict[str, Any]:
    return {
        "name": bundle.name,
        "version": bundle.version,
        "path": str(bundle.path),
        "reference": verdict.reference,
        "clips": verdict.clips,
        "passed": verdict.passed,
        "artefacts": [
            {
                **each._asdict(),
                "parity": each.parity.model_dump() if each.parity else None,
                "passed": each.passed,
            }
            for each in verdict.checked
        ],
        "left_out": [each._asdict() for each in verdict.left_out],
    }


def _print(bundle: Bundle, verdict: Verdict) -> None:
    title = (
        f"{bundle.name} version {bundle.version} on {verdict.clips} clips, "
        f"against {verdict.reference}"
    )
    print_rows(title, _COLUMNS, [_row(each) for each in verdict.checked])
    for each in verdict.checked:
        if each.problem:
            click.secho(f"{each.artefact}: {each.problem}", fg="red", err=True)
    for left_out in verdict.left_out:
        click.echo(f"{left_out.artefact} was not run: {left_out.reason}")


def _row(checked: Checked) -> list[str]:
    parity = checked.parity
    if parity is None:
        return [checked.artefact, checked.provider, *["-"] * (len(_COLUMNS) - 3), "no"]
    low_margin = "none"
    if parity.low_margin_agreement is not None:
        low_margin = f"{parity.low_margin_agreement:.0%} of {parity.low_margin_clips}"
    return [
        checked.artefact,
        f"{checked.engine}, {checked.provider}",
        f"{parity.max_difference:.2g}",
        f"{parity.mean_difference:.2g}",
        f"{parity.centred_cosine:.6f}",
        f"{parity.relative_error:.2g}",
        f"{parity.top1_agreement:.0%}",
        f"{parity.top5_agreement:.0%}",
        low_margin,
        f"{parity.softmax_divergence:.2g}",
        _limits(parity),
        "yes" if parity.passed else "no",
    ]


def _limits(parity: Parity) -> str:
    if parity.limit is not None:
        return f"diff {parity.limit:.2g}"
    return f"cosine {parity.cosine_limit}, error {parity.error_limit}, KL {parity.divergence_limit}"
