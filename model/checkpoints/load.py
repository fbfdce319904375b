"""From any checkpoint to a `Checkpoint`: which architecture it is, whether every tensor fits, what
is resized, and how an image ViT becomes the beginning of a video model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name the field uses

from model.checkpoints.errors import CheckpointError
from model.checkpoints.files import CheckpointFile, read, shortened
from model.checkpoints.layouts import Layout
from model.config import CONFIG_FIELDS, VARIANTS, ConfigError, ModelConfig
from model.network.schemes import SCHEMES
from model.network.timesformer import TimeSformer


@dataclass(frozen=True)
class Checkpoint:
    """Weights under our names, float32, and the model they are for.

    `kind` is "official", "huggingface", "timesformer" (ours), or "vit": an image model as the
    beginning of a video model, whose head is therefore random.
    """

    config: ModelConfig
    state: dict[str, Tensor]
    labels: tuple[str, ...] | None
    kind: str
    source: str

    def build(self) -> TimeSformer:
        """The network with a copy of these weights, in eval mode."""
        model = TimeSformer(self.config)
        model.load_state_dict(self.state, strict=True)
        return model.eval()

    def with_new_head(self, num_classes: int) -> Checkpoint:
        """The same weights with a fresh head for other classes, to train on from there.

        The head starts as `TimeSformer` starts it, from a fixed seed; the labels are dropped.
        """
        config = self.config.replace(num_classes=num_classes)
        head = {name: tensor for name, tensor in _fresh(config).items() if name.startswith("head.")}
        return replace(self, config=config, state={**self.state, **head}, labels=None)


def load_checkpoint(
    source: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    num_frames: int | None = None,
    image_size: int | None = None,
    attention_type: str | None = None,
    num_classes: int | None = None,
) -> Checkpoint:
    """Loads weights, all of them or none.

    The architecture is read from the tensors' names and shapes, from what the file states (an
    official `cfg`, `config.json`, our metadata) and from `config`; where they contradict each
    other nothing is loaded. The head count is in no tensor: where nobody states it, only the widths
    of the named variants have one that is safe to assume.

    An image ViT initialises any of the five schemes: every further attention and its norm are
    copies of the ViT's, the linears after them and the time embedding are zero, and the head is
    fresh, from a fixed seed. Its `config` says what is wanted, so that sizes may differ from the
    ViT's. A plain dict of tensors (no metadata, no `config.json`) with a timm ViT's names is a ViT,
    unless space-only attention is asked for and its head has the classes asked for: that
    is a space-only TimeSformer already, and keeps its head.

    Args:
        source: a file, a folder, or OWNER/NAME on the Hugging Face hub (`HF_ENDPOINT` respected).
        config: the parsed `--config FILE`, fields of `ModelConfig.to_dict`; others are ignored.
        num_frames, image_size: the size wanted; embeddings are resized to it by nearest neighbour,
            over the patch grid in 2-D and over time in 1-D, as the original does.
        attention_type, num_classes: as in `config`.

    Raises:
        CheckpointError: nothing there, damaged, code in a pickle, values that are not finite,
            tensors that are missing, unexpected or of a wrong shape, or contradictions.
    """
    file = read(source)
    arguments = _present(attention_type=attention_type, num_classes=num_classes)
    size = _present(num_frames=num_frames, image_size=image_size)
    given = {key: value for key, value in (config or {}).items() if key in CONFIG_FIELDS}
    try:
        if file.kind == "plain":
            file = _settle_plain(file, {**given, **arguments})
        if file.kind == "vit":
            return _initialise_from_vit(file, {**given, **arguments, **size})
        native = _native_config(file, given, arguments, size)
        state = _fit(file, native)
        wanted = native.replace(**size)
        _check_labels(file, native)
    except ConfigError as error:
        raise CheckpointError(f"{file.source}: {error}") from error
    return Checkpoint(wanted, _resize(state, wanted), file.labels, file.kind, file.source)


def _present(**fields: Any) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}


def _check_labels(file: CheckpointFile, config: ModelConfig) -> None:
    if file.labels is not None and len(file.labels) != config.num_classes:
        raise CheckpointError(
            f"{file.source}: {len(file.labels)} labels for {config.num_classes} classes"
        )


# --- which architecture --------------------------------------------------------------------------

# Published weights of these widths have 64 dimensions a head.
_HEADS_OF_WIDTH = {
    variant.embed_dim: variant.num_heads for variant in VARIANTS.values() if variant.head_dim == 64
}
# What tensors and statements must agree on. Of the rest (sampling, normalisation, drop path),
# which no tensor depends on, `config` has the last word.
_ARCHITECTURE = {
    "attention_type",
    "depth",
    "embed_dim",
    "image_size",
    "mlp_ratio",
    "num_classes",
    "num_frames",
    "num_heads",
    "patch_size",
}


def _native_config(
    file: CheckpointFile,
    given: Mapping[str, Any],
    arguments: Mapping[str, Any],
    size: Mapping[str, Any],
) -> ModelConfig:
    """The architecture that the tensors have as they stand, before any resizing."""
    facts = _agree(
        file.source,
        [
            ("its tensors", _facts_of_tensors(file.tensors, file.layout)),
            (file.stated_in, file.facts),
            ("--config", given),
            ("the arguments", arguments),
        ],
    )
    if "num_frames" not in facts and "num_frames" in size:
        facts["num_frames"] = size["num_frames"]
    if facts["attention_type"] == "space_only" and "num_frames" not in facts:
        raise CheckpointError(
            f"{file.source}: space-only weights do not say how many frames a clip has; "
            "pass --config with num_frames"
        )
    return ModelConfig.from_dict(_with_heads(file.source, facts))


def _agree(source: str, statements: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    agreed: dict[str, Any] = {}
    stated_in: dict[str, str] = {}
    for where, facts in statements:
        for field, value in facts.items():
            if field in _ARCHITECTURE and agreed.get(field, value) != value:
                resize = " (to resize, pass it as an argument)" if field in _SIZE else ""
                raise CheckpointError(
                    f"{source}: {field} is {agreed[field]!r} in {stated_in[field]} "
                    f"but {value!r} in {where}{resize}"
                )
            agreed[field] = value
            stated_in.setdefault(field, where)
    return agreed


_SIZE = ("num_frames", "image_size")


def _with_heads(source: str, facts: dict[str, Any]) -> dict[str, Any]:
    if "num_heads" in facts:
        return facts
    width = facts.get("embed_dim")
    if width not in _HEADS_OF_WIDTH:
        raise CheckpointError(
            f"{source}: the number of attention heads stands in no tensor, and {width} is not the "
            f"width of a published model {tuple(_HEADS_OF_WIDTH)}; pass --config with num_heads"
        )
    return {**facts, "num_heads": _HEADS_OF_WIDTH[width]}


def _facts_of_tensors(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Any]:
    """What names and shapes say. A tensor that is absent or misshapen says nothing here; that it
    does not fit is found by `_fit`."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def shape(ours: str, dimensions: int) -> tuple[int, ...] | None:
        found = shapes.get(layout.name(ours), ())
        return found if len(found) == dimensions and 0 not in found else None

    facts: dict[str, Any] = {"attention_type": _attention_type(tensors, layout)}
    depth = _depth(tensors, layout)
    if depth:
        facts["depth"] = depth
    if patch := shape("patch_embed.proj.weight", 4):
        facts["embed_dim"], facts["patch_size"] = patch[0], patch[2]
    if time := shape("time_embed", 3):
        facts["num_frames"] = time[1]
    if head := shape("head.weight", 2):
        facts["num_classes"] = head[0]
    if hidden := shape("blocks.0.mlp.fc1.weight", 2):
        facts["mlp_ratio"] = hidden[0] / hidden[1]
    positions = shape("pos_embed", 3)
    if positions and patch and math.isqrt(positions[1] - 1) ** 2 == positions[1] - 1 > 0:
        facts["image_size"] = math.isqrt(positions[1] - 1) * patch[2]
    return facts


def _depth(tensors: Mapping[str, Tensor], layout: Layout) -> int:
    """One more than the highest block number, so that a missing block is found missing.

    No model has more blocks than tensors; a higher number is left to be found unexpected.
    """
    before = layout.block.split("{}")[0]
    names = (name.removeprefix(before) for name in tensors if name.startswith(before))
    numbers = (int(name.split(".")[0]) for name in names if name.split(".")[0].isdecimal())
    return max((number + 1 for number in numbers if number < len(tensors)), default=0)


def _attention_type(tensors: Mapping[str, Tensor], layout: Layout) -> str:
    """The scheme whose attentions, beside the one that all have, are there."""
    before = {
        name
        for scheme in SCHEMES.values()
        for name in scheme.before
        if layout.name(f"blocks.0.before.{name}.attn.qkv.weight") in tensors
    }
    if not before:
        timeless = layout.name("time_embed") not in tensors
        return "space_only" if timeless else "joint_space_time"
    schemes = [key for key, scheme in SCHEMES.items() if before <= scheme.before.keys()]
    return min(schemes, key=lambda key: len(SCHEMES[key].before))


# --- does it fit ---------------------------------------------------------------------------------


def _fit(
    file: CheckpointFile, config: ModelConfig, ignored: Sequence[str] = ()
) -> dict[str, Tensor]:
    """All of the tensors under our names, or an error that lists what does not fit.

    Args:
        ignored: our names, or beginnings of the file's, that need not be there nor matter.
    """
    with torch.device("meta"):
        expected = TimeSformer(config).state_dict()
    wanted = {
        file.layout.name(ours): (ours, tuple(tensor.shape))
        for ours, tensor in expected.items()
        if not ours.startswith(tuple(ignored))
    }
    found = {
        name: tensor
        for name, tensor in file.tensors.items()
        if name in wanted or not name.startswith(tuple(ignored))
    }
    wrong = [
        f"{name} is {_describe(found[name])}, not {shape}"
        for name, (_, shape) in wanted.items()
        if name in found and _describe(found[name]) != str(shape)
    ]
    problems = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "of wrong shape": wrong,
    }
    listed = [
        f"{len(names)} {what}: {shortened(names)}" for what, names in problems.items() if names
    ]
    if listed:
        raise CheckpointError(
            f"{file.source} does not fit a {config.attention_type} model. "
            f"Tensors {'; '.join(listed)}"
        )
    return {ours: file.tensors[name] for name, (ours, _) in wanted.items()}


def _describe(tensor: Tensor) -> str:
    shape = str(tuple(tensor.shape))
    return shape if tensor.is_floating_point() else f"{tensor.dtype} {shape}"


# --- resizing and initialisation -----------------------------------------------------------------


def _resize(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Position and time embedding for the config's size, by nearest neighbour."""
    resized = {**state, "pos_embed": _resize_grid(state["pos_embed"], config.grid)}
    if "time_embed" in state:
        time = state["time_embed"].transpose(1, 2)
        resized["time_embed"] = (
            F.interpolate(time, size=config.num_frames, mode="nearest").transpose(1, 2).contiguous()
        )
    return resized


def _resize_grid(pos_embed: Tensor, grid: int) -> Tensor:
    """(1, 1 + old^2, dim) -> (1, 1 + grid^2, dim); the class token's row stays."""
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    old = math.isqrt(patches.shape[1])
    image = patches.transpose(1, 2).reshape(1, -1, old, old)
    resized = F.interpolate(image, size=(grid, grid), mode="nearest")
    return torch.cat([cls, resized.flatten(2).transpose(1, 2)], dim=1)


def _settle_plain(file: CheckpointFile, wanted: Mapping[str, Any]) -> CheckpointFile:
    """A ViT, unless a space-only model with the head that is there is asked for."""
    head = file.tensors.get("head.weight")
    keeps_head = head is not None and wanted.get("num_classes", len(head)) == len(head)
    space_only = wanted.get("attention_type") == "space_only"
    return replace(file, kind="timesformer" if space_only and keeps_head else "vit")


# A ViT's own classifier and what stands between it and the class token.
_VIT_ENDS = ("head.", "pre_logits.", "classifier.", "pooler.", "vit.pooler.")


def _initialise_from_vit(file: CheckpointFile, wanted: Mapping[str, Any]) -> Checkpoint:
    image_facts = {
        **_facts_of_tensors(file.tensors, file.layout),
        "attention_type": "space_only",
        "num_classes": 1,
    }
    size = {key: wanted[key] for key in _SIZE if key in wanted}
    scheme = wanted.get("attention_type", ModelConfig().attention_type)
    rest = {
        key: value
        for key, value in wanted.items()
        if key not in (*_SIZE, "attention_type", "num_classes")
    }
    facts = _agree(
        file.source,
        [("its tensors", image_facts), (file.stated_in, file.facts), ("--config", rest)],
    )
    image_config = ModelConfig.from_dict(_with_heads(file.source, facts))
    vit = _resize(_fit(file, image_config, _VIT_ENDS), image_config.replace(**size))
    classes = wanted.get("num_classes", ModelConfig().num_classes)
    config = image_config.replace(attention_type=scheme, num_classes=classes, **size)
    state = {name: _from_vit(name, vit, fresh) for name, fresh in _fresh(config).items()}
    return Checkpoint(config, state, None, "vit", file.source)


def _from_vit(name: str, vit: Mapping[str, Tensor], fresh: Tensor) -> Tensor:
    """One tensor of the video model; `fresh` is zero for time embedding and trailing linears."""
    if name in vit:
        return vit[name]
    block, before, inner = name.partition(".before.")
    if not before:
        return fresh
    part = inner.split(".", 1)[1]
    source = part.replace("norm.", "norm1.", 1) if part.startswith("norm.") else part
    return vit[f"{block}.{source}"].clone() if f"{block}.{source}" in vit else fresh


def _fresh(config: ModelConfig) -> dict[str, Tensor]:
    """A new model's weights, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TimeSformer(config).state_dict()
