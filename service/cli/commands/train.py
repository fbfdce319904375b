"""`timesformer train`: from labelled videos to weights."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from model.config import VARIANTS
from service.cli.commands.evaluate import print_metrics
from service.cli.options import (
    FILE,
    PATH,
    SOURCE,
    Command,
    class_names,
    device_option,
    json_option,
    read_list,
    read_object,
    source_options,
    workers_option,
)

if TYPE_CHECKING:
    from model.evaluation.metrics import Metrics
    from model.training.config import Step


def recipe_options(command: Command) -> Command:
    """The fields of a recipe that are changed most; `--recipe` changes any."""
    for option in (
        click.option("--epochs", type=float, help="Times that every video is seen."),
        click.option("--batch-size", type=int, help="Clips that go through the network together."),
        click.option("--accumulate", type=int, help="Batches that make one step."),
        click.option("--learning-rate", type=float, help="At its highest."),
        click.option("--flip", type=float, help="Probability of mirroring; 0 where sides matter."),
        click.option(
            "--cached-views",
            "cached",
            type=int,
            help="Views that a video has in all, instead of new ones in every epoch; see --cache.",
        ),
        click.option("--train", help="`all`, `head`, `lora`, or how many of the last blocks."),
        click.option("--lora-rank", type=int, help="Of the adapters of --train lora."),
        click.option("--seed", type=int, help="Decides everything random."),
        click.option(
            "--recipe",
            "recipe_file",
            type=FILE,
            help="JSON with any fields of the recipe; the command's other options win.",
        ),
    ):
        command = option(command)
    return command


def preset_option(default: str) -> Callable[[Command], Command]:
    return click.option(
        "--preset",
        type=click.Choice(["paper", "modern", "refresh"]),
        default=default,
        show_default=True,
        help="The recipe to begin from.",
    )


@click.command()
@click.argument("source", type=SOURCE)
@click.option("--out", type=PATH, required=True, help="Folder of the run; continued if it is one.")
@click.option(
    "--validation",
    type=SOURCE,
    help="Source that is evaluated on, after every epoch and at the end.",
)
@click.option(
    "--hold-out",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of the groups of SOURCE to evaluate on instead of training on them.",
)
@click.option("--from", "checkpoint", help="Weights to begin with; as `timesformer export` reads.")
@click.option(
    "--variant", type=click.Choice(list(VARIANTS)), help="Architecture to begin from scratch."
)
@click.option(
    "--config",
    "config_file",
    type=FILE,
    help="JSON that changes what a checkpoint or variant is, such as num_frames.",
)
@click.option(
    "--checkpoint-every",
    type=click.IntRange(min=1),
    default=500,
    show_default=True,
    help="Steps between saved states.",
)
@click.option(
    "--recompute/--no-recompute",
    default=None,
    help="Compute a block twice instead of keeping its activations; by default for large clips.",
)
@click.option("--compile", "compiled", is_flag=True, help="Compile the network for the device.")
@click.option(
    "--cache",
    type=PATH,
    help="Folder that decoded clips are kept in, with --cached-views; for sets that fit a disk.",
)
@click.option("--tensorboard", is_flag=True, help="Also write curves into OUT/tensorboard.")
@click.option(
    "--shard",
    is_flag=True,
    help="Under torchrun: keep a part of the weights in each process, for models that do not fit.",
)
@click.option(
    "--lost-after",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    help="Under torchrun: seconds without an answer until another process counts as lost.",
)
@preset_option("modern")
@recipe_options
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of matrix products; weights stay float32.",
)
@click.option("--patience", type=int, help="Evaluations without a gain that end the run.")
@source_options
@device_option
@workers_option
@json_option
def train(
    source: str,
    out: Path,
    validation: str | None,
    hold_out: float | None,
    checkpoint: str | None,
    variant: str | None,
    config_file: Path | None,
    checkpoint_every: int,
    recompute: bool | None,
    compiled: bool,
    cache: Path | None,
    tensorboard: bool,
    shard: bool,
    lost_after: float,
    labels_file: Path | None,
    root: str | None,
    columns: str,
    device: str,
    workers: int,
    as_json: bool,
    preset: str,
    recipe_file: Path | None,
    **changes: Any,
) -> None:
    """Train on the videos of SOURCE and write weights that `timesformer export` takes.

    The same command continues a run that was stopped or killed; the weights end the same. Ctrl-C
    or SIGTERM stops it after the step, which is saved.

    Under torchrun, processes on one machine or several train together, and learn what one would:
    torchrun --standalone --nproc-per-node 8 --no-python timesformer train ...
    """
    from model.checkpoints import load_checkpoint
    from model.training.config import Job, Machine
    from model.training.distributed.process_group import joined
    from model.training.initialisation import (
        choose_device,
        fine_tuned_model,
        fresh_model,
        shared_classes,
    )
    from model.training.loop import train as run
    from model.training.recipe import PRESETS
    from model.training.trainer import WEIGHTS

    if (checkpoint is None) == (variant is None):
        raise click.UsageError("give either --from CHECKPOINT or --variant NAME")
    if validation is not None and hold_out is not None:
        raise click.UsageError("give either --validation or --hold-out")
    recipe = PRESETS[preset].replace({**read_object(recipe_file), **given(changes)})
    config, begins = read_object(config_file), ""
    videos = read_list(source, class_names(labels_file), root, columns)
    if checkpoint is not None:
        # Sizes that differ from the checkpoint's are wanted, not claimed of it.
        size = {key: config.pop(key, None) for key in ("num_frames", "image_size")}
        loaded = load_checkpoint(checkpoint, config=config, **size)
        known = shared_classes(loaded, videos.labels) if labels_file is None else None
        if known is not None:
            videos = read_list(source, known, root, columns)
        model, kept = fine_tuned_model(loaded, videos.labels)
        head = "its head is kept" if kept else "its head is new"
        begins = f"{checkpoint}: {len(videos.labels)} classes; {head}"
    else:
        classes = {"num_classes": len(videos.labels)}
        model = fresh_model(VARIANTS[variant or ""].replace(**{**config, **classes}), recipe.seed)
    held_out = None
    if validation is not None:
        held_out = read_list(validation, videos.labels, root, columns)
    elif hold_out is not None:
        videos, held_out = videos.split(hold_out)
    job = Job(recipe, videos, held_out, out)
    chosen = choose_device(device)
    with joined(chosen, lost_after) as world, training_progress(world.rank == 0) as told:
        if begins and world.rank == 0:
            click.echo(begins, err=True)
        machine = Machine(
            world.own(chosen),
            workers,
            checkpoint_every,
            recompute,
            "inductor" if compiled else None,
            cache,
            tensorboard,
            shard,
        )
        report = run(model, job, machine, world=world, **told)
    if world.rank > 0:
        return
    if as_json:
        click.echo(json.dumps(report))
        return
    if report["metrics"] is not None:
        print_metrics(f"{out / WEIGHTS}, 1 view x 3 crops", report["metrics"])
    if report["replaced_clips"]:
        click.echo(
            f"{report['replaced_clips']} clips of {report['replaced_videos']} videos could not be "
            f"decoded and were replaced; {out / 'log.jsonl'} says which"
        )
    where = shlex.quote(str(out))
    click.echo(
        f"export it: timesformer export {where}/weights.safetensors --name NAME "
        f"--training {where}/training.json"
    )


def given(changes: dict[str, Any]) -> dict[str, Any]:
    """The fields that an option was given for.

    Raises:
        click.UsageError: `--train` is none of its forms, or another option needs another one.
    """
    fields = {key: value for key, value in changes.items() if value is not None}
    train = fields.get("train")
    if "lora_rank" in fields and train != "lora":
        raise click.UsageError("--lora-rank goes with --train lora")
    if train is not None and train not in ("all", "head", "lora"):
        if not train.isdecimal():
            raise click.UsageError("--train takes `all`, `head`, `lora` or a number of blocks")
        fields["train"] = int(train)
    return fields


@contextmanager
def training_progress(shown: bool = True) -> Iterator[dict[str, Callable[..., None]]]:
    """Yields the listeners of a run, as keywords, which show how far the run is."""
    from service.observability.progress import bar

    def on_cached(count: int, videos: int) -> None:
        progress.show(f"video {count} of {videos}, decoded for the cache", count, videos)

    def on_step(step: Step) -> None:
        state = f"epoch {step.epoch:.2f}, loss {step.loss:.4f}, {step.clips_per_s:.1f} clips/s"
        progress.show(f"step {step.step} of {step.steps}, {state}", step.step, step.steps)

    def on_evaluation(step: int, metrics: Metrics) -> None:
        progress.print(
            f"after step {step}: top-1 {metrics.top1:.4f}, log loss {metrics.log_loss:.4f}"
        )

    with bar(shown) as progress:
        yield {"on_step": on_step, "on_evaluation": on_evaluation, "on_cached": on_cached}
