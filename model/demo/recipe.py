"""Trains the bundled demo model on clips that it renders itself, and measures it on real mp4 files.

    python -m model.demo.recipe --out build/demo                 # half an hour of one CPU core
    python -m model.demo.recipe --out build/try --steps 200 --clips 1200 --held-out 60

Writes `weights.safetensors`, with configuration and labels, and `training.json`. Rendered
clips are kept in `--cache` for the next run. The same seed, steps, clips and software give the
same weights on the same machine.

Twelve labels alone teach motion slowly. So a linear on the patches after the first block also
predicts how far each patch moves to the next frame, which the renderer knows: at first that alone,
which runs one block only, then together with the classes. It is no part of the saved network.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import platform
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name the field uses

from model.checkpoints import save_safetensors
from model.config import VARIANTS, ModelConfig
from model.demo import clips
from model.demo.clips import Rendered
from model.demo.render import LABELS, Frames
from model.demo.start import start_as_motion_energy
from model.timesformer import TimeSformer

FLOW_SCALE = 3.0  # pixels: the flow is learned in units of this
LOG_EVERY = 100  # steps


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that decides what is learned."""

    seed: int = 0
    flow_steps: int = 400
    steps: int = 3000
    clips: int = 6000
    held_out: int = 480
    batch: int = 32
    flow_learning_rate: float = 3e-3
    learning_rate: float = 2e-3
    warm_up: int = 100  # steps
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    flow_weight: float = 5.0
    average_over: float = 0.05  # share of all steps that the averaged weights look back on


# ---- training ---------------------------------------------------------------------------------


def draw_batch(
    rendered: Rendered, size: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """A random batch: frames uint8, flow in units of `FLOW_SCALE`, labels."""
    chosen = rng.integers(len(rendered.frames), size=size)
    examples = [
        clips.augment(
            (rendered.frames[i], rendered.flow[i].astype(np.float32), i % len(LABELS)), rng
        )
        for i in chosen
    ]
    frames, flow, labels = zip(*examples, strict=True)
    return (
        torch.from_numpy(np.stack(frames)),
        torch.from_numpy(np.stack(flow)).float() / FLOW_SCALE,
        torch.tensor(labels),
    )


class Flow(nn.Module):
    """Predicts from patches how far each moves to the next frame, in units of `FLOW_SCALE`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 2)

    def loss(self, patches: Tensor, flow: Tensor) -> Tensor:
        """Mean error for patches (batch, time, grid, grid, dim); nothing follows the last frame."""
        return F.smooth_l1_loss(self.linear(patches[:, :-1]), flow)


def _optimiser(
    weights: Iterable[nn.Parameter], rate: float, decay: float, steps: int, warm_up: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW without decay of biases and norms; linear warm-up, then half a cosine to zero."""
    every = list(weights)
    groups = [
        {"params": [weight for weight in every if weight.ndim > 1], "weight_decay": decay},
        {"params": [weight for weight in every if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))

    def share(step: int) -> float:
        return min((step + 1) / warm_up, 1) * (0.5 + 0.5 * math.cos(math.pi * step / steps))

    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, share)


def learn_flow(
    network: TimeSformer, flow: Flow, recipe: Recipe, rendered: Rendered, rng: np.random.Generator
) -> None:
    """Trains the embedding and the first block, alone, to say how far every patch moves."""
    first = network.blocks[0]
    others = {id(weight) for block in network.blocks[1:] for weight in block.parameters()}
    others |= {id(weight) for part in (network.norm, network.head) for weight in part.parameters()}
    used = [weight for weight in network.parameters() if id(weight) not in others]
    optimiser, schedule = _optimiser(
        [*used, *flow.parameters()], recipe.flow_learning_rate, 0.0, recipe.flow_steps, 30
    )
    for step in range(1, recipe.flow_steps + 1):
        frames, target, _ = draw_batch(rendered, recipe.batch, rng)
        _, patches = first(*network._embed(frames))
        loss = flow.loss(patches, target)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        if step % LOG_EVERY == 0:
            print(f"flow step {step} of {recipe.flow_steps}: {loss.item():.4f}", flush=True)


def learn_classes(
    network: TimeSformer,
    flow: Flow,
    recipe: Recipe,
    rendered: Rendered,
    rng: np.random.Generator,
    out: Path,
) -> TimeSformer:
    """Trains all; returns a copy with averaged weights, which is also saved in `out` as it goes."""
    average = copy.deepcopy(network)
    keep = 1 - 1 / max(recipe.average_over * recipe.steps, 1)
    seen: list[Tensor] = []
    network.blocks[0].register_forward_hook(lambda _block, _input, output: seen.append(output[1]))
    weights = [*network.parameters(), *flow.parameters()]
    optimiser, schedule = _optimiser(
        weights, recipe.learning_rate, recipe.weight_decay, recipe.steps, recipe.warm_up
    )
    losses: list[tuple[float, float]] = []
    for step in range(1, recipe.steps + 1):
        frames, target, labels = draw_batch(rendered, recipe.batch, rng)
        logits, _ = network(frames)
        classes = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
        flows = flow.loss(seen.pop(), target)
        optimiser.zero_grad()
        (classes + recipe.flow_weight * flows).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), network.parameters(), strict=True):
                slow.lerp_(fast, 1 - min(keep, step / (step + 9)))
        losses.append((classes.item(), flows.item()))
        if step % LOG_EVERY == 0 or step == recipe.steps:
            of_classes, of_flow = np.mean(losses, axis=0)
            losses.clear()
            print(
                f"step {step} of {recipe.steps}: {of_classes:.4f}, flow {of_flow:.4f}", flush=True
            )
            save_safetensors(average, out / "weights.safetensors", network.config, LABELS)
    return average


def train(recipe: Recipe, config: ModelConfig, rendered: Rendered, out: Path) -> TimeSformer:
    """The network of `config`, trained by the recipe."""
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng([recipe.seed, 1 << 30])
    network, flow = TimeSformer(config), Flow(config.embed_dim)
    start_as_motion_energy(network, torch.from_numpy(rendered.frames[:48].copy()))
    learn_flow(network, flow, recipe, rendered, rng)
    return learn_classes(network, flow, recipe, rendered, rng, out)


# ---- evaluation -------------------------------------------------------------------------------


@torch.no_grad()
def classify(network: nn.Module, frames: Frames) -> npt.NDArray[np.int64]:
    """The most likely label's index of each clip."""
    network.eval()
    parts = [network(part)[0].argmax(-1) for part in torch.split(torch.from_numpy(frames), 32)]
    return torch.cat(parts).numpy()


def evaluate(network: nn.Module, held_out: Frames) -> dict[str, Any]:
    """Top-1 accuracy over held-out clips, and within every class that occurs."""
    labels = np.arange(len(held_out)) % len(LABELS)
    right = classify(network, held_out) == labels
    seen = LABELS[: len(held_out)]
    per_class = {name: right[labels == i].mean() for i, name in enumerate(seen)}
    return {
        "clips": len(held_out),
        "top1": round(float(right.mean()), 4),
        "per_class": {name: round(float(share), 4) for name, share in per_class.items()},
    }


# ---- the command ------------------------------------------------------------------------------


def run(recipe: Recipe, config: ModelConfig, out: Path, cache: Path, workers: int) -> float:
    """Renders, trains, evaluates and writes; returns the held-out accuracy."""
    out.mkdir(parents=True, exist_ok=True)
    rendered = clips.training_set(recipe.seed, recipe.clips, config, cache, workers)
    held_out = clips.held_out_set(recipe.seed, recipe.held_out, config, cache, workers)
    wall, cpu = time.perf_counter(), time.process_time()
    network = train(recipe, config, rendered, out)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    accuracy = evaluate(network, held_out)
    report = {
        "recipe": dataclasses.asdict(recipe),
        "config": config.to_dict(),
        "labels": LABELS,
        "held_out": accuracy,
        "training_seconds": {"wall": round(wall), "cpu": round(cpu)},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "av": av.__version__,
        },
    }
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    return float(accuracy["top1"])


def main() -> None:
    """Reads the command line and runs the recipe."""
    parser = argparse.ArgumentParser(description="Train the bundled demo model.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "demo-clips")
    parser.add_argument("--workers", type=int, default=1, help="processes that render")
    parser.add_argument("--threads", type=int, default=1, help="of the training itself")
    for name in ("seed", "steps", "clips", "held_out"):
        default = getattr(Recipe, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = Recipe(seed=args.seed, steps=args.steps, clips=args.clips, held_out=args.held_out)
    accuracy = run(recipe, VARIANTS["demo"], args.out, args.cache, args.workers)
    print(f"held-out top-1 accuracy {accuracy:.1%}, written to {args.out}")


if __name__ == "__main__":
    main()
