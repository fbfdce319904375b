"""Writes a model as our safetensors, as an official `.pyth`, or as a Hugging Face folder.

What is written appears complete or not at all, and `load_checkpoint` reads it back bit for bit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoints.errors import CheckpointError
from model.checkpoints.files import OFFICIAL_FIELDS, OFFICIAL_SAMPLING, placeholder_labels
from model.checkpoints.layouts import HUGGINGFACE, OFFICIAL, PUBLISHED_SCHEMES, Layout
from model.config import ModelConfig
from model.files import replacing
from model.network.timesformer import TimeSformer


def save_safetensors(
    model_or_state: TimeSformer | Mapping[str, Tensor],
    path: str | Path,
    config: ModelConfig,
    labels: Sequence[str] | None = None,
) -> None:
    """Our own file: our names, with configuration and labels in the header.

    Raises:
        CheckpointError: as many labels as classes are needed.
    """
    if isinstance(model_or_state, TimeSformer):
        state: Mapping[str, Tensor] = model_or_state.state_dict()
    else:
        state = model_or_state
    metadata = {"config": json.dumps(config.to_dict())}
    if labels is not None:
        metadata["labels"] = json.dumps(_one_a_class(labels, config), ensure_ascii=False)
    with _beside(Path(path)) as temporary:
        _save_tensors(_plain(state), temporary, metadata)


def save_official(model: TimeSformer, path: str | Path) -> None:
    """A `.pyth` as the original implementation reads it.

    Raises:
        CheckpointError: a scheme that the original does not have.
    """
    contents = {"epoch": 0, "model_state": _named(model, OFFICIAL), "cfg": _cfg(model.config)}
    with _beside(Path(path)) as temporary:
        torch.save(contents, temporary)


def save_huggingface(
    model: TimeSformer, folder: str | Path, labels: Sequence[str] | None = None
) -> None:
    """A folder for `TimesformerForVideoClassification.from_pretrained`.

    A space-only model gives logits per frame there: transformers does not average over the frames.

    Raises:
        CheckpointError: the folder has something in it, a scheme that `transformers` does not
            have, or not as many labels as classes.
    """
    target = Path(folder)
    if target.exists() and any(target.iterdir()):
        raise CheckpointError(f"{target}: is there already and not empty; choose another folder")
    tensors = _named(model, HUGGINGFACE)
    config = _huggingface_config(model.config, labels)
    preprocessing = _huggingface_preprocessing(model.config)
    with _beside(target) as temporary:
        temporary.mkdir(parents=True)
        _save_tensors(tensors, temporary / "model.safetensors", {"format": "pt"})
        _write_json(temporary / "config.json", config)
        _write_json(temporary / "preprocessor_config.json", preprocessing)


def _save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    path.touch()  # for the mode: safetensors lets nobody but the writer read
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yields a path that becomes `path`; two processes may save to one path at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, suffix=f"{os.getpid()}.tmp") as temporary:
        yield temporary


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _named(model: TimeSformer, layout: Layout) -> dict[str, Tensor]:
    scheme = model.config.attention_type
    if scheme not in PUBLISHED_SCHEMES:
        raise CheckpointError(
            f"only {', '.join(PUBLISHED_SCHEMES)} exist in that layout, not {scheme}; "
            "save it as safetensors"
        )
    return {layout.name(name): tensor for name, tensor in _plain(model.state_dict()).items()}


def _one_a_class(labels: Sequence[str], config: ModelConfig) -> list[str]:
    if len(labels) != config.num_classes:
        raise CheckpointError(f"{len(labels)} labels for {config.num_classes} classes")
    return list(labels)


def _cfg(config: ModelConfig) -> str:
    """The two-level YAML that official files have; JSON values are YAML."""
    fields = config.to_dict()
    values = {theirs: fields[ours] for theirs, ours in OFFICIAL_FIELDS.items()}
    datasets = {sampling: dataset for dataset, sampling in OFFICIAL_SAMPLING.items()}
    values["TRAIN.DATASET"] = datasets[config.preprocessing.sampling]
    lines: list[str] = []
    for section in sorted({path.split(".")[0] for path in values}):
        lines.append(f"{section}:")
        lines += [
            f"  {path.split('.')[1]}: {json.dumps(value)}"
            for path, value in sorted(values.items())
            if path.startswith(f"{section}.")
        ]
    return "\n".join(lines) + "\n"


def _huggingface_config(config: ModelConfig, labels: Sequence[str] | None) -> dict[str, Any]:
    names = placeholder_labels(config.num_classes) if labels is None else labels
    id2label = {str(index): label for index, label in enumerate(_one_a_class(names, config))}
    return {
        "architectures": ["TimesformerForVideoClassification"],
        "attention_probs_dropout_prob": 0.0,
        "attention_type": config.attention_type,
        "drop_path_rate": 0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": config.embed_dim,
        "id2label": id2label,
        "image_size": config.image_size,
        "intermediate_size": config.mlp_dim,
        "label2id": {label: int(index) for index, label in id2label.items()},
        "layer_norm_eps": 1e-6,
        "model_type": "timesformer",
        "num_attention_heads": config.num_heads,
        "num_channels": 3,
        "num_frames": config.num_frames,
        "num_hidden_layers": config.depth,
        "patch_size": config.patch_size,
        "qkv_bias": True,
        # Not of the format (see `files.py`); transformers keeps what it does not know.
        "frame_stride": config.preprocessing.frame_stride,
        "sampling": config.preprocessing.sampling,
        "stochastic_depth": config.drop_path_rate,
    }


def _huggingface_preprocessing(config: ModelConfig) -> dict[str, Any]:
    side = config.image_size
    return {
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(config.preprocessing.mean),
        "image_processor_type": "VideoMAEImageProcessor",
        "image_std": list(config.preprocessing.std),
        "resample": 2,
        "size": {"shortest_edge": side},
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
