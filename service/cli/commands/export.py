"""`timesformer export`: from weights to a verified bundle."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from service.cli.options import EXISTING, FILE, PATH, json_option, read_object

if TYPE_CHECKING:
    from export.bundle.manifest import Parity
    from export.graph.build import Precision

_COUNT = click.IntRange(min=1)


@click.command()
@click.argument("checkpoint")
@click.option("--name", required=True, help="Name of the bundle.")
@click.option(
    "--store",
    type=PATH,
    default="bundles",
    show_default=True,
    envvar="TIMESFORMER_STORE",
    help="Folder of bundles; made if it is not there.",
)
@click.option(
    "--config",
    "config_file",
    type=FILE,
    help="JSON with what the checkpoint does not say of its architecture, such as num_heads.",
)
@click.option("--num-frames", type=_COUNT, help="Frames of a clip; the time embedding is resized.")
@click.option("--image-size", type=_COUNT, help="Pixels; the position embedding is resized.")
@click.option(
    "--labels",
    "labels_file",
    type=FILE,
    help="Label file: one a line, or a JSON list or object.",
)
@click.option(
    "--verify-on",
    "videos",
    multiple=True,
    type=FILE,
    help="Video whose clips the export is compared on, besides the bundled one; repeatable.",
)
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(["float32", "fp16", "int8", "fp8", "auto"]),
    multiple=True,
    help="What the bundle shall hold besides float32, which it always holds; repeatable. int8 is "
    "for CPUs and TensorRT, fp16 and fp8 are for TensorRT; TIMESFORMER_PRECISION serves them. auto "
    "tries all, leaves out what is not the network's answers, and notes which is the fastest.",
)
@click.option(
    "--calibration",
    type=EXISTING,
    help="Videos to measure the ranges of fp16, int8 and fp8 on: a folder, labelled or not, or a "
    "list; by default clips that are rendered.",
)
@click.option(
    "--training",
    "training_file",
    type=FILE,
    help="JSON with metrics of the training, to be kept in the manifest; its temperature becomes "
    "that of the bundle.",
)
@click.option(
    "--calibrate-on",
    type=EXISTING,
    help="Source of labelled videos to fit the temperature on, with the exported float32 graph; "
    "not those of the training.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, min_open=True),
    help="What logits are divided by to become scores; 1 leaves them as they are.",
)
@click.option("--activate", is_flag=True, help="Make it the active version, also if there is one.")
@json_option
def export(
    checkpoint: str,
    name: str,
    store: Path,
    config_file: Path | None,
    num_frames: int | None,
    image_size: int | None,
    labels_file: Path | None,
    videos: tuple[Path, ...],
    precisions: tuple[Precision, ...],
    calibration: Path | None,
    training_file: Path | None,
    calibrate_on: Path | None,
    temperature: float | None,
    activate: bool,
    as_json: bool,
) -> None:
    """Export CHECKPOINT to a verified bundle.

    CHECKPOINT is an official .pyth file, a Hugging Face folder or hub name, an image ViT to start
    from, or a safetensors file of our own. The first version of a name becomes active by itself.
    """
    from export.bundle.bundle import BundleStore
    from export.pipeline import export_bundle
    from model.checkpoints import load_checkpoint
    from model.data.lists import read_videos
    from model.demo import SAMPLE_CLIP
    from model.labels import read_labels
    from service.observability.progress import steps

    if calibrate_on is not None and temperature is not None:
        raise click.UsageError("give either --calibrate-on or --temperature")
    # What is quickly found wrong is found before the long work.
    bundles = BundleStore(store)
    bundles.active(name)
    config, training = read_object(config_file), read_object(training_file)
    labels = read_labels(labels_file) if labels_file else None
    if temperature is None:
        temperature = training.get("temperature", 1.0)
        if not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
            raise click.UsageError(f"{training_file}: temperature must be a number above 0")
    with steps(as_json) as report:
        report(f"reading {checkpoint}")
        loaded = load_checkpoint(
            checkpoint,
            config=config,
            num_frames=num_frames,
            image_size=image_size,
        )
        videos_to_fit = None
        if calibrate_on is not None:
            videos_to_fit = read_videos(calibrate_on, labels=labels or loaded.labels)
        bundle = export_bundle(
            loaded,
            name,
            bundles,
            labels=labels,
            videos=(SAMPLE_CLIP, *videos),
            precisions=precisions,
            calibration=calibration,
            training=training,
            temperature=temperature,
            calibrate_on=videos_to_fit,
            report=report,
        )
    if activate or bundles.active(name) is None:
        bundles.activate(name, bundle.version)
    active = bundles.active(name) == bundle.version
    if as_json:
        summary = {
            "name": name,
            "version": bundle.version,
            "path": str(bundle.path),
            "temperature": bundle.manifest.temperature,
        }
        parity = {
            file: result.model_dump() for file, result in bundle.manifest.verification.items()
        }
        products = {
            file: [product.model_dump() for product in found]
            for file, found in bundle.manifest.products.items()
        }
        choices = {
            device: choice.model_dump() for device, choice in bundle.manifest.fastest.items()
        }
        chosen = {"auto": choices, "rejected": bundle.manifest.rejected}
        found = {"active": active, "verification": parity, "products": products, **chosen}
        click.echo(json.dumps({**summary, **found}))
        return
    for file, result in bundle.manifest.verification.items():
        click.echo(f"{file}: {_agreement(result)}")
        for product in bundle.manifest.products.get(file, ()):
            if product.reason:
                click.echo(f"  {product.name} stays in {product.precision}: {product.reason}")
    for file, reason in bundle.manifest.rejected.items():
        click.echo(f"{file} is left out: {reason}")
    for device, choice in bundle.manifest.fastest.items():
        click.echo(f"auto on a {device.upper()}: {choice.order[0]}, {choice.reason}")
    click.echo(f"temperature of the scores: {bundle.manifest.temperature:g}")
    where = shlex.quote(str(store))
    click.echo(f"published {name} version {bundle.version} in {bundle.path}")
    if not active:
        click.echo(
            f"activate: timesformer bundles activate {name} {bundle.version} --store {where}"
        )
    click.echo(f"serve it: timesformer serve --store {where} --model {name}")


def _agreement(parity: Parity) -> str:
    """In one line how near an artefact's answers are to the network's."""
    off = f"logits within {parity.max_difference:.2g} of the network's on {parity.clips} clips"
    if parity.limit is not None:
        return f"{off} (limit {parity.limit:.2g})"
    return f"{off}, cosine {parity.centred_cosine:.4f} (limit {parity.cosine_limit})"
