"""What every artefact is held to: the network's own answers in PyTorch float32."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from export.bundle.bundle import Bundle
from export.bundle.manifest import WEIGHTS
from export.runtime.interface import Outputs
from model.checkpoints import load_checkpoint
from model.network.timesformer import TimeSformer


def load_network(bundle: Bundle) -> TimeSformer:
    """The network of a bundle as it was trained, from the bundle's weights.

    Raises:
        CheckpointError: they are not the weights of a network of ours.
    """
    return load_checkpoint(bundle.file(WEIGHTS)).build()


def run_reference(model: TimeSformer, clips: NDArray[np.uint8]) -> Outputs:
    """The network's own answers in PyTorch float32, one clip at a time to bound memory."""
    with torch.inference_mode():
        answers = [model(torch.from_numpy(clip[None])) for clip in clips]
    logits, embedding = (torch.cat(parts).numpy() for parts in zip(*answers, strict=True))
    return Outputs(logits, embedding)
