"""The paper's five attention schemes at equal budget, on videos that only time can tell apart.

    make schemes
    python -m tests.benchmarks.schemes [--epochs 12] [--schemes divided_space_time space_only]

Renders the demo set, then for each scheme in turn: first weights by `model.demo.pretrain`, then
`timesformer train` with the demo recipe, the same videos, views, order, seed and number of steps.
The last weights are evaluated on the held-out videos by three crops, and the table is printed as
Markdown. Interrupted, the same command goes on; what is there is not made again.

Eight of the twelve classes are a motion and its opposite. Which of the two it is only the order of
the frames says, and space-only attention does not see the order: it averages over the frames.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from model.checkpoints import load_checkpoint
from model.config import ATTENTION_TYPES
from model.data.lists import read_class_names, read_videos
from model.demo.render import LABELS
from model.evaluation.metrics import Predictions, measure, predict
from model.scores import mean_scores
from model.training.trainer import classifier

OPPOSITES = {
    "moving left": "moving right",
    "moving up": "moving down",
    "approaching": "receding",
    "turning clockwise": "turning counter-clockwise",
}
RECIPE = Path("model/demo/recipe.json")


class Result(NamedTuple):
    """What a scheme has learned; shares from 0 to 1."""

    scheme: str
    parameters: int
    top1: float
    directed: float  # top-1 on the classes that have an opposite
    told_apart: float  # of their videos: the class scores higher than its opposite
    per_class: dict[str, float]


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    out: Path = options.out
    videos = out / "set"
    count = ["--videos", str(options.videos), "--held-out", str(options.held_out)]
    timesformer("data", "demo", str(videos), *count, "--workers", str(options.workers))
    results = []
    for scheme in options.schemes:
        train(scheme, options)
        results.append(evaluate(scheme, out, options.workers))
        print(results[-1], flush=True)
    print(table(results))
    print()
    print(classes(results))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/schemes"))
    parser.add_argument("--schemes", nargs="+", choices=ATTENTION_TYPES, default=ATTENTION_TYPES)
    parser.add_argument("--videos", type=int, default=960, help="to train on")
    parser.add_argument("--held-out", type=int, default=480)
    parser.add_argument("--epochs", type=float, default=12)
    parser.add_argument("--flow-clips", type=int, default=800, help="for the first weights")
    parser.add_argument("--flow-steps", type=int, default=300, help="for the first weights")
    parser.add_argument("--workers", type=int, default=2, help="processes that render and decode")
    return parser.parse_args()


def train(scheme: str, options: argparse.Namespace) -> None:
    """First weights, then the demo recipe."""
    out, run = options.out, options.out / scheme
    start, videos = run / "start.safetensors", out / "set"
    if not start.exists():
        subprocess.run(
            [
                *(sys.executable, "-m", "model.demo.pretrain", "--scheme", scheme),
                *("--clips", str(options.flow_clips), "--steps", str(options.flow_steps)),
                *("--cache", str(out / "flow"), "--workers", str(options.workers)),
                *("--out", str(start)),
            ],
            check=True,
        )
    timesformer(
        *("train", str(videos / "train.csv"), "--labels", str(videos / "labels.txt")),
        *("--out", str(run / "run"), "--from", str(start), "--recipe", str(RECIPE)),
        *("--epochs", str(options.epochs), "--cache", str(out / "cache"), "--device", "cpu"),
        *("--workers", str(options.workers)),
    )


def timesformer(*words: str) -> None:
    subprocess.run([Path(sys.executable).with_name("timesformer"), *words], check=True)


def evaluate(scheme: str, out: Path, workers: int) -> Result:
    run = out / scheme / "run"
    loaded = load_checkpoint(run / "weights.safetensors")
    network = loaded.build().eval()
    labels = read_class_names(out / "set" / "labels.txt")
    videos = read_videos(out / "set" / "validation.csv", labels=labels)
    found = predict(videos, loaded.config.preprocessing, classifier(network), processes=workers)
    metrics = measure(found)
    directed, told_apart = of_opposites(found)
    return Result(
        scheme,
        sum(weight.numel() for weight in network.parameters()),
        metrics.top1,
        directed,
        told_apart,
        {label: each["accuracy"] for label, each in metrics.per_class.items()},
    )


def of_opposites(found: Predictions) -> tuple[float, float]:
    """On the videos whose class has an opposite: top-1, and how often it is told from that."""
    opposite = np.full(len(LABELS), -1)
    for one, other in OPPOSITES.items():
        pair = LABELS.index(one), LABELS.index(other)
        opposite[list(pair)] = pair[::-1]
    scores, targets = mean_scores(found.logits), found.targets
    chosen = opposite[targets] >= 0
    scores, targets = scores[chosen], targets[chosen]
    rows = np.arange(len(targets))
    told_apart = scores[rows, targets] > scores[rows, opposite[targets]]
    return float((scores.argmax(1) == targets).mean()), float(told_apart.mean())


def table(results: Sequence[Result]) -> str:
    lines = [
        "| scheme | parameters | top-1 | eight directions | told from its opposite |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name(each)} | {each.parameters:,} | {each.top1:.1%} | {each.directed:.1%} "
        f"| {each.told_apart:.1%} |"
        for each in results
    ]
    return "\n".join(lines)


def classes(results: Sequence[Result]) -> str:
    lines = [
        f"| class | {' | '.join(map(name, results))} |",
        f"| --- |{' --- |' * len(results)}",
    ]
    lines += [
        f"| {label} | " + " | ".join(f"{each.per_class[label]:.0%}" for each in results) + " |"
        for label in LABELS
    ]
    return "\n".join(lines)


def name(result: Result) -> str:
    return result.scheme.replace("_", " ")


if __name__ == "__main__":
    main()
