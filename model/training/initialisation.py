"""The first weights of a run: fresh, or a checkpoint's with a head for the data's classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from model.checkpoints import Checkpoint
from model.config import ModelConfig
from model.network.timesformer import TimeSformer
from model.training.errors import RecipeError


def fresh_model(config: ModelConfig, seed: int) -> TimeSformer:
    """Random weights that the seed alone decides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TimeSformer(config)


def shared_classes(checkpoint: Checkpoint, names: Sequence[str]) -> tuple[str, ...] | None:
    """The classes of a checkpoint where `names` are among them, else None.

    In its order its head can be trained on, also on a set that lacks some of its classes.
    """
    if checkpoint.labels is None or not set(names) <= set(checkpoint.labels):
        return None
    return checkpoint.labels


def fine_tuned_model(checkpoint: Checkpoint, labels: Sequence[str]) -> tuple[TimeSformer, bool]:
    """The checkpoint's network, and whether its head was kept.

    It is kept where the classes are the same, or their number is and the checkpoint does not name
    them. An image model has no head for a video's classes.
    """
    if checkpoint.labels is not None:
        keep = checkpoint.labels == tuple(labels)
    else:
        keep = checkpoint.config.num_classes == len(labels) and checkpoint.kind != "vit"
    return (checkpoint if keep else checkpoint.with_new_head(len(labels))).build(), keep


def grown(checkpoint: Checkpoint, labels: Sequence[str]) -> Checkpoint:
    """The checkpoint with a head for `labels`: its own classes, in their order, and new ones after.

    The old rows stay bit for bit. Each new row is the mean of the old ones: its logit is the mean
    of theirs, so that it never outranks the best of them and no answer changes before training,
    whatever offset the old logits share. Small random rows would give logits near zero instead,
    which may be above all that a trained head gives. Targets tell equal rows apart from the
    first step on.

    Raises:
        RecipeError: `labels` do not begin with the checkpoint's.
    """
    known = checkpoint.labels
    if known is None or tuple(labels[: len(known)]) != known:
        raise RecipeError("a head grows at its end: the classes must begin with those it has")
    added = len(labels) - len(known)
    rows = {name: checkpoint.state[name] for name in ("head.weight", "head.bias")}
    head = {
        name: torch.cat([row, row.mean(0, keepdim=True).expand(added, *row.shape[1:])])
        for name, row in rows.items()
    }
    return dataclasses.replace(
        checkpoint,
        config=checkpoint.config.replace(num_classes=len(labels)),
        state={**checkpoint.state, **head},
        labels=tuple(labels),
    )


def choose_device(wanted: str) -> str:
    """`auto` to `cuda` where there is a usable GPU, else `cpu`.

    Raises:
        RecipeError: `cuda` is wanted and there is none.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise RecipeError("there is no GPU that torch can use; train with --device cpu")
    return "cuda" if available and wanted != "cpu" else "cpu"
