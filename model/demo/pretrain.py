"""First weights for networks that are to see motion: they learn how far every patch moves.

    python -m model.demo.pretrain --out build/start.safetensors      # minutes of one CPU core
    python -m model.demo.pretrain --out build/joint.safetensors --scheme joint_space_time

Twelve labels alone teach motion slowly. So before them a linear on the patches after the first
block predicts how far each patch moves to the next frame, which the renderer knows; only the
embedding and the first block run. The linear is no part of the saved network, whose head is still
random. Rendered clips are kept in `--cache` for the next run.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name the field uses

from model.checkpoints import save_safetensors
from model.config import ATTENTION_TYPES, VARIANTS, ModelConfig
from model.demo import clips
from model.demo.clips import Rendered
from model.demo.render import LABELS
from model.demo.start import start_as_motion_energy
from model.network.timesformer import TimeSformer

FLOW_SCALE = 3.0  # pixels: the flow is learned in units of this
LOG_EVERY = 100  # steps


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """All that decides the first weights. AdamW; linear warm-up, then half a cosine to zero."""

    seed: int = 0
    steps: int = 600
    clips: int = 2400
    batch: int = 32
    learning_rate: float = 3e-3
    warm_up: int = 30  # steps


def draw_batch(rendered: Rendered, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A random batch: frames uint8, and flow in units of `FLOW_SCALE`."""
    chosen = rng.integers(len(rendered.frames), size=size)
    examples = [
        clips.augment((rendered.frames[i], rendered.flow[i].astype(np.float32)), rng)
        for i in chosen
    ]
    frames, flow = (np.stack(part) for part in zip(*examples, strict=True))
    return torch.from_numpy(frames), torch.from_numpy(flow).float() / FLOW_SCALE


def learn_flow(
    network: TimeSformer, settings: Pretraining, rendered: Rendered, rng: np.random.Generator
) -> list[float]:
    """Trains the embedding and the first block, in place; returns the loss of every step."""
    first, linear = network.blocks[0], nn.Linear(network.config.embed_dim, 2)
    weights = [
        weight
        for name, weight in network.named_parameters()
        if name.startswith("blocks.0.") or not name.startswith(("blocks.", "norm.", "head."))
    ]
    optimiser = torch.optim.AdamW(
        [*weights, *linear.parameters()],
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=0.0,
    )

    def share(step: int) -> float:
        falling = 0.5 + 0.5 * math.cos(math.pi * step / settings.steps)
        return min((step + 1) / settings.warm_up, 1) * falling

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, share)
    losses = []
    for step in range(1, settings.steps + 1):
        frames, target = draw_batch(rendered, settings.batch, rng)
        _, patches = first(*network._embed(frames))
        # For space-only attention every frame is a clip of its own.
        patches = patches.reshape(len(frames), -1, *patches.shape[2:])
        # Nothing follows the last frame.
        loss = F.smooth_l1_loss(linear(patches[:, :-1]), target)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call] # of torch
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if step % LOG_EVERY == 0:
            recent = float(np.mean(losses[-LOG_EVERY:]))
            print(f"step {step} of {settings.steps}: {recent:.4f}", flush=True)
    return losses


def first_weights(settings: Pretraining, config: ModelConfig, rendered: Rendered) -> TimeSformer:
    """The network of `config`, able to see motion."""
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng([settings.seed, 1 << 30])
    network = TimeSformer(config)
    start_as_motion_energy(network, torch.from_numpy(rendered.frames[:48].copy()))
    learn_flow(network, settings, rendered, rng)
    return network


def main() -> None:
    """Reads the command line, renders, trains and writes."""
    parser = argparse.ArgumentParser(description="Make first weights that see motion.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scheme", choices=ATTENTION_TYPES, default="divided_space_time")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "demo-clips")
    parser.add_argument("--workers", type=int, default=2, help="processes that render")
    for name in ("seed", "steps", "clips"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Pretraining, name))
    args = parser.parse_args()
    torch.set_num_threads(1)  # as small as it is, more are no faster
    settings = Pretraining(seed=args.seed, steps=args.steps, clips=args.clips)
    config = VARIANTS["demo"].replace(attention_type=args.scheme)
    rendered = clips.training_set(args.seed, args.clips, config, args.cache, args.workers)
    network = first_weights(settings, config, rendered)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_safetensors(network, args.out, config, LABELS)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
