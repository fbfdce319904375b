"""From a path or hub name to a `CheckpointFile`: tensors under the file's own names, and whatever
the file itself states of the architecture, the preprocessing and the labels.

Nothing in a file is executed: safetensors hold no code, and pickles are read with `weights_only`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.checkpoints.errors import CheckpointError
from model.checkpoints.layouts import (
    HUGGINGFACE,
    HUGGINGFACE_VIT,
    HUGGINGFACE_VIT_BARE,
    OFFICIAL,
    OFFICIAL_BARE,
    OURS,
    Layout,
)
from model.labels import LabelError, labels_from_json


@dataclasses.dataclass(frozen=True)
class CheckpointFile:
    """What stands in a checkpoint.

    `kind` is "official", "huggingface", "timesformer" (ours), "vit", or "plain": names that a timm
    ViT and our space-only model have in common. `facts` are fields of `ModelConfig.to_dict`, and
    `stated_in` says in words where they stand.
    """

    source: str
    kind: str
    layout: Layout
    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    stated_in: str
    labels: tuple[str, ...] | None = None


def read(source: str | Path) -> CheckpointFile:
    """Reads a file, a folder with a `config.json`, or OWNER/NAME from the hub.

    Tensors are checked to be finite, and floating point ones become float32.

    Raises:
        CheckpointError: nothing there, damaged, code in a pickle, or of no known kind.
    """
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return _read_file(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        folder = _download(str(source))
        return dataclasses.replace(_read_folder(folder), source=str(source))
    raise CheckpointError(f"{source}: no such file or folder, and not a hub name OWNER/NAME")


# --- the hub and folders -------------------------------------------------------------------------


def _download(name: str) -> Path:
    """Fetches configuration and weights, safetensors where the repository has them."""
    from huggingface_hub import snapshot_download  # slow to import, and only hub names need it

    config = ["config.json", "preprocessor_config.json"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*config, "model.safetensors"]))
        if not (folder / "model.safetensors").exists():
            folder = Path(snapshot_download(name, allow_patterns=[*config, "pytorch_model.bin"]))
    except Exception as error:  # which HTTP library's errors come through depends on the version
        raise CheckpointError(
            f"{name}: no such file or folder here, and the hub did not give it: {error}"
        ) from error
    return folder


def _read_folder(folder: Path) -> CheckpointFile:
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise CheckpointError(f"{folder}: has no config.json, so it is no Hugging Face folder")
    config = _json_object(_text(config_path), str(config_path))
    weights = [folder / name for name in ("model.safetensors", "pytorch_model.bin")]
    present = [path for path in weights if path.is_file()]
    if not present:
        raise CheckpointError(f"{folder}: has neither model.safetensors nor pytorch_model.bin")
    file = _read_file(present[0])
    model_type = config.get("model_type")
    if model_type == "timesformer":
        kind, layout = "huggingface", HUGGINGFACE
    elif model_type == "vit" or "architecture" in config:  # timm states its `architecture`
        kind, layout = "vit", file.layout
    else:
        raise CheckpointError(
            f"{folder}: config.json has model_type {model_type!r}; "
            "this loads timesformer, vit, and timm's ViTs"
        )
    _refuse_other_networks(config, model_type, folder)
    return dataclasses.replace(
        file,
        source=str(folder),
        kind=kind,
        layout=layout,
        facts={**_huggingface_facts(config), **_normalisation(config, folder)},
        stated_in="its config.json",
        labels=_huggingface_labels(config, folder) if kind == "huggingface" else None,
    )


def _refuse_other_networks(config: Mapping[str, Any], model_type: Any, folder: Path) -> None:
    """What a configuration can ask for and our network cannot be."""
    if config.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(f"{folder}: hidden_act is {config['hidden_act']!r}; this has gelu")
    # An initialisation trains on from slightly other statistics; finished weights do not.
    epsilon = config.get("layer_norm_eps", 1e-6)
    if model_type == "timesformer" and epsilon != 1e-6:
        raise CheckpointError(f"{folder}: layer_norm_eps is {epsilon!r}; this network has 1e-06")


_HUGGINGFACE_FIELDS = {
    "attention_type": "attention_type",
    "drop_path_rate": "drop_path_rate",
    "hidden_size": "embed_dim",
    "image_size": "image_size",
    "num_attention_heads": "num_heads",
    "num_frames": "num_frames",
    "num_hidden_layers": "depth",
    "patch_size": "patch_size",
    # Written by us: the format has no field for how frames are chosen, and transformers 5 takes
    # no other drop path rate than whole numbers.
    "frame_stride": "frame_stride",
    "sampling": "sampling",
    "stochastic_depth": "drop_path_rate",
}


def _huggingface_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        ours: config[theirs] for theirs, ours in _HUGGINGFACE_FIELDS.items() if theirs in config
    }


def _normalisation(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Mean and std from `preprocessor_config.json`, or from where timm has them."""
    path = folder / "preprocessor_config.json"
    if path.is_file():
        stated = _json_object(_text(path), str(path))
        names = {"image_mean": "mean", "image_std": "std"}
    else:
        timm = config.get("pretrained_cfg")
        stated = timm if isinstance(timm, dict) else {}
        names = {"mean": "mean", "std": "std"}
    return {ours: stated[theirs] for theirs, ours in names.items() if theirs in stated}


def _huggingface_labels(config: Mapping[str, Any], folder: Path) -> tuple[str, ...] | None:
    if "id2label" not in config:
        return None
    labels = _labels(config["id2label"], f"{folder}: id2label")
    # transformers fills in these names where nobody gave any.
    return None if labels == placeholder_labels(len(labels)) else labels


def placeholder_labels(count: int) -> tuple[str, ...]:
    """What `transformers` calls classes that nobody named."""
    return tuple(f"LABEL_{index}" for index in range(count))


# --- single files --------------------------------------------------------------------------------


def _read_file(path: Path) -> CheckpointFile:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    contents = _read_pickle(path)
    for wrapper in ("model_state", "state_dict", "model"):
        if isinstance(contents.get(wrapper), dict):
            return _recognise(str(path), contents[wrapper], contents.get("cfg"))
    return _recognise(str(path), contents)


def _read_safetensors(path: Path) -> CheckpointFile:
    """Ours has `config`, and may have `labels`, as JSON in the header."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error
    recognised = _recognise(str(path), tensors)
    if "config" not in metadata:
        return recognised
    return dataclasses.replace(
        recognised,
        kind="timesformer",
        layout=OURS,
        facts=_json_object(metadata["config"], f"{path}: metadata"),
        stated_in="its metadata",
        labels=_header_labels(metadata, path),
    )


def _header_labels(metadata: Mapping[str, str], path: Path) -> tuple[str, ...] | None:
    if "labels" not in metadata:
        return None
    # `_json_object` refuses what is no JSON; a list is wrapped to pass through it.
    wrapped = _json_object(f'{{"labels": {metadata["labels"]}}}', f"{path}: metadata")
    return _labels(wrapped["labels"], f"{path}: metadata")


def _read_pickle(path: Path) -> dict[Any, Any]:
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever a broken file leads it to
        # torch's own message advises to switch the protection off; it is not passed on.
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise CheckpointError(
                f"{path}: refused, because loading it would run code ({code[1]}). Let its author "
                "save the tensors alone, best as safetensors"
            ) from None
        raise CheckpointError(f"{path}: not a checkpoint, or a damaged one") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path}: holds a {type(contents).__name__}, not named tensors")
    return contents


def _recognise(source: str, values: Mapping[Any, Any], cfg: Any = None) -> CheckpointFile:
    """Tells official files, Hugging Face's, ours and ViTs apart by the names of their tensors."""
    tensors = _checked(values, source)

    def any_begins(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in tensors)

    if any_begins("model."):
        kind, layout = "official", OFFICIAL
    elif cfg is not None or any(".temporal_attn." in name for name in tensors):
        kind, layout = "official", OFFICIAL_BARE
    elif any_begins("timesformer."):
        kind, layout = "huggingface", HUGGINGFACE
    elif any_begins("vit."):
        kind, layout, tensors = "vit", HUGGINGFACE_VIT, _join_qkv(tensors)
    elif any_begins("encoder.layer."):
        kind, layout, tensors = "vit", HUGGINGFACE_VIT_BARE, _join_qkv(tensors)
    elif "time_embed" in tensors or any(".before." in name for name in tensors):
        kind, layout = "timesformer", OURS
    else:
        kind, layout = "plain", OURS
    facts = _official_facts(cfg) if isinstance(cfg, str) else {}
    return CheckpointFile(source, kind, layout, tensors, facts, stated_in="its cfg")


def _checked(values: Mapping[Any, Any], source: str) -> dict[str, Tensor]:
    """Plain, finite tensors by name; floating point as float32."""
    tensors: dict[str, Tensor] = {}
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{source}: {name!r} is a {type(value).__name__}; named tensors are expected"
            )
        if value.layout is not torch.strided or value.is_quantized:
            raise CheckpointError(f"{source}: {name} is sparse or quantised; save it dense")
        floating = value.detach().float() if value.is_floating_point() else value
        tensors[name] = floating.contiguous()
    if not tensors:
        raise CheckpointError(f"{source}: holds no tensors")
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{source}: {shortened(broken)}: NaN or infinite values; training diverged or the "
            "file is damaged"
        )
    return tensors


def _join_qkv(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face ViTs keep query, key and value apart; incomplete sets stay as they are."""
    joined = dict(tensors)
    for name in tensors:
        names = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        parts = [tensors[part] for part in names if part in tensors]
        if ".query." in name and len({part.shape for part in parts}) == 1 and len(parts) == 3:
            joined[name.replace(".query.", ".qkv.")] = torch.cat(parts)
            for part in names:
                del joined[part]
    return joined


# --- the official cfg ----------------------------------------------------------------------------

# What the official training writes beside the weights. NUM_HEADS is our addition: the original
# has the number in its code, and ignores the key.
OFFICIAL_FIELDS = {
    "DATA.MEAN": "mean",
    "DATA.NUM_FRAMES": "num_frames",
    "DATA.SAMPLING_RATE": "frame_stride",
    "DATA.STD": "std",
    "DATA.TRAIN_CROP_SIZE": "image_size",
    "MODEL.NUM_CLASSES": "num_classes",
    "TIMESFORMER.ATTENTION_TYPE": "attention_type",
    "TIMESFORMER.NUM_HEADS": "num_heads",
}
# The original samples by the data set it was trained on.
OFFICIAL_SAMPLING = {"kinetics": "dense", "ssv2": "uniform"}


def _official_facts(cfg: str) -> dict[str, Any]:
    stated = _yaml_sections(cfg)
    facts = {ours: stated[theirs] for theirs, ours in OFFICIAL_FIELDS.items() if theirs in stated}
    dataset = str(stated.get("TRAIN.DATASET")).lower()
    if dataset in OFFICIAL_SAMPLING:
        facts["sampling"] = OFFICIAL_SAMPLING[dataset]
    return facts


def _yaml_sections(text: str) -> dict[str, Any]:
    """`SECTION.KEY` -> value, of the two-level YAML that a training configuration is dumped as.

    This reads that dump (scalars, flow lists, block lists of scalars), not YAML at large, and so
    needs no YAML library; what it does not understand, it leaves out.
    """
    values: dict[str, Any] = {}
    section = path = ""
    for line in text.splitlines():
        indent, stripped = len(line) - len(line.lstrip()), line.strip()
        if stripped.startswith("- "):
            values.setdefault(path, []).append(_yaml_scalar(stripped[2:]))
            continue
        key, colon, value = stripped.partition(":")
        if not colon or indent > 2:
            continue
        section = key if indent == 0 else section
        path = f"{section}.{key}"
        if value.strip():
            values[path] = _yaml_scalar(value)
    return values


def _yaml_scalar(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text.strip().strip("'\"")


# --- small parts ---------------------------------------------------------------------------------


def shortened(items: list[str], limit: int = 10) -> str:
    """The items with commas; beyond the limit, how many more there are."""
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return ", ".join(items[:limit] + more)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{where}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: not a JSON object")
    return value


def _labels(value: Any, where: str) -> tuple[str, ...]:
    try:
        return labels_from_json(value)
    except LabelError as error:
        raise CheckpointError(f"{where}: {error}") from error
