from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoints import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    save_huggingface,
    save_official,
    save_safetensors,
)
from model.checkpoints.layouts import PUBLISHED_SCHEMES
from model.config import ATTENTION_TYPES
from model.network.timesformer import TimeSformer
from tests.model.conftest import random_frames, random_model, tiny_config

LABELS = ("archery", "yoga", "café", "juggling balls", "bowling")
HEADS = {"num_heads": 2}


def _state(model: TimeSformer) -> dict[str, Tensor]:
    return dict(model.state_dict())


def _assert_same(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    different = [
        name
        for name, tensor in state.items()
        if tensor.dtype != expected[name].dtype or not torch.equal(tensor, expected[name])
    ]
    assert different == []


# --- the original implementations ----------------------------------------------------------------


@pytest.mark.parametrize("scheme", PUBLISHED_SCHEMES)
@pytest.mark.parametrize(
    ("case", "size"),
    [("native", {}), ("more_frames", {"num_frames": 8}), ("larger_image", {"image_size": 96})],
)
def test_official_checkpoints_give_the_original_logits(
    shared_fixtures: Path, scheme: str, case: str, size: dict[str, int]
) -> None:
    folder = shared_fixtures / f"official_{scheme}"
    config = json.loads((folder / "config.json").read_text())
    checkpoint = load_checkpoint(folder / "checkpoint.pyth", config=config, **size)
    assert (checkpoint.kind, checkpoint.config.attention_type) == ("official", scheme)
    _assert_output(checkpoint, folder, case, "logits")


def test_a_huggingface_folder_gives_the_original_logits_and_its_labels(
    shared_fixtures: Path,
) -> None:
    folder = shared_fixtures / "huggingface_divided"
    checkpoint = load_checkpoint(folder)
    assert checkpoint.kind == "huggingface"
    assert checkpoint.labels == ("abseiling", "archery", "bowling", "juggling balls", "yoga")
    assert checkpoint.config.preprocessing.mean == (0.45, 0.45, 0.45)
    _assert_output(checkpoint, folder, "native", "logits")


def test_a_vit_begins_a_video_model_as_in_the_original(shared_fixtures: Path) -> None:
    folder = shared_fixtures / "vit_init"
    config = json.loads((folder / "config.json").read_text())
    checkpoint = load_checkpoint(folder / "vit.pth", config=config)
    assert (checkpoint.kind, checkpoint.config.num_classes) == ("vit", 7)
    _assert_output(checkpoint, folder, "native", "features")


def _assert_output(checkpoint: Checkpoint, folder: Path, case: str, output: str) -> None:
    arrays = np.load(folder / "io.npz")
    with torch.no_grad():
        logits, embedding = checkpoint.build()(torch.from_numpy(arrays[f"{case}_frames"]))
    found = logits if output == "logits" else embedding
    np.testing.assert_allclose(found.numpy(), arrays[f"{case}_{output}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheme", PUBLISHED_SCHEMES)
def test_an_official_file_is_written_back_tensor_for_tensor(
    shared_fixtures: Path, scheme: str, tmp_path: Path
) -> None:
    folder = shared_fixtures / f"official_{scheme}"
    config = json.loads((folder / "config.json").read_text())
    save_official(
        load_checkpoint(folder / "checkpoint.pyth", config=config).build(), tmp_path / "x"
    )
    original, written = (
        torch.load(path, weights_only=True)["model_state"]
        for path in (folder / "checkpoint.pyth", tmp_path / "x")
    )
    _assert_same(written, original)


def test_a_huggingface_folder_is_written_back_tensor_for_tensor(
    shared_fixtures: Path, tmp_path: Path
) -> None:
    folder = shared_fixtures / "huggingface_divided"
    checkpoint = load_checkpoint(folder)
    save_huggingface(checkpoint.build(), tmp_path, checkpoint.labels)
    _assert_same(load_file(tmp_path / "model.safetensors"), load_file(folder / "model.safetensors"))
    original, written = (
        json.loads((path / "config.json").read_text()) for path in (folder, tmp_path)
    )
    # Of the original these are its software's version and defaults.
    ours = {"frame_stride", "sampling", "stochastic_depth"}
    theirs = {"dtype", "initializer_range", "transformers_version"}
    assert {**written, **{key: original[key] for key in theirs}} == {
        **original,
        **{key: written[key] for key in ours},
    }


# --- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ATTENTION_TYPES)
def test_our_file_describes_itself(tmp_path: Path, scheme: str) -> None:
    config = tiny_config(scheme, sampling="uniform", drop_path_rate=0.2, mlp_ratio=2.5)
    model = random_model(config)
    save_safetensors(model, tmp_path / "m.safetensors", config, LABELS)
    checkpoint = load_checkpoint(tmp_path / "m.safetensors")
    assert (checkpoint.config, checkpoint.labels) == (config, LABELS)
    assert checkpoint.kind == "timesformer"
    _assert_same(checkpoint.state, _state(model))
    assert not checkpoint.build().training


def test_whoever_may_read_a_new_file_may_read_the_weights(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    save_safetensors(random_model(tiny_config()), tmp_path / "m.safetensors", tiny_config())
    assert (tmp_path / "m.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode


@pytest.mark.parametrize("scheme", PUBLISHED_SCHEMES)
def test_official_and_huggingface_round_trips_are_exact(tmp_path: Path, scheme: str) -> None:
    config = tiny_config(scheme, sampling="uniform", frame_stride=4, mean=[0.1, 0.2, 0.3])
    model = random_model(config)
    save_official(model, tmp_path / "m.pyth")
    official = load_checkpoint(tmp_path / "m.pyth", config={"drop_path_rate": 0.0})
    save_huggingface(model, tmp_path / "folder", LABELS)
    huggingface = load_checkpoint(tmp_path / "folder")
    for checkpoint in (official, huggingface):
        assert checkpoint.config == config
        _assert_same(checkpoint.state, _state(model))
    assert (official.kind, huggingface.kind) == ("official", "huggingface")
    assert huggingface.labels == LABELS


@pytest.mark.parametrize("scheme", ATTENTION_TYPES)
def test_a_plain_state_dict_is_recognised_by_its_tensors(tmp_path: Path, scheme: str) -> None:
    model = random_model(tiny_config(scheme))
    save_file(_state(model), tmp_path / "m.safetensors")
    given: dict[str, Any] = dict(HEADS)
    if scheme == "space_only":
        given |= {"attention_type": scheme, "num_frames": 4}
    checkpoint = load_checkpoint(tmp_path / "m.safetensors", config=given)
    assert checkpoint.kind == "timesformer"
    assert checkpoint.config.replace(drop_path_rate=0.0) == model.config
    _assert_same(checkpoint.state, _state(model))


def test_classes_without_names_have_no_labels(tmp_path: Path) -> None:
    save_huggingface(random_model(tiny_config()), tmp_path / "folder")
    assert load_checkpoint(tmp_path / "folder").labels is None


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    state = {name: value.half() for name, value in _state(random_model(tiny_config())).items()}
    torch.save(state, tmp_path / "m.pth")
    loaded = load_checkpoint(tmp_path / "m.pth", config=HEADS).state
    _assert_same(loaded, {name: value.float() for name, value in state.items()})


def test_the_built_network_does_not_share_its_weights(tmp_path: Path) -> None:
    config = tiny_config()
    save_safetensors(random_model(config), tmp_path / "m.safetensors", config)
    checkpoint = load_checkpoint(tmp_path / "m.safetensors")
    torch.nn.init.zeros_(checkpoint.build().head.weight)
    assert checkpoint.state["head.weight"].all()


def test_a_new_head_is_asked_for_in_so_many_words(tmp_path: Path) -> None:
    config = tiny_config()
    model = random_model(config)
    save_safetensors(model, tmp_path / "m.safetensors", config, LABELS)
    checkpoint = load_checkpoint(tmp_path / "m.safetensors").with_new_head(9)
    assert checkpoint.config.num_classes == 9
    assert checkpoint.labels is None
    assert checkpoint.build().head.weight.shape == (9, 24)
    kept = {name: value for name, value in _state(model).items() if not name.startswith("head.")}
    _assert_same({name: checkpoint.state[name] for name in kept}, kept)
    again = load_checkpoint(tmp_path / "m.safetensors").with_new_head(9)
    _assert_same(again.state, checkpoint.state)


@pytest.mark.parametrize("scheme", ["sparse_local_global", "axial"])
def test_schemes_that_a_layout_cannot_hold_are_refused(tmp_path: Path, scheme: str) -> None:
    model = random_model(tiny_config(scheme))
    with pytest.raises(CheckpointError, match=f"not {scheme}; save it as safetensors"):
        save_official(model, tmp_path / "x.pyth")
    with pytest.raises(CheckpointError, match=f"not {scheme}; save it as safetensors"):
        save_huggingface(model, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(tiny_config())
    save_official(model, tmp_path / "m.pyth")
    old = (tmp_path / "m.pyth").read_bytes()

    def full(_: object, path: Path) -> None:
        path.write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="disk full"):
        save_official(model, tmp_path / "m.pyth")
    assert (tmp_path / "m.pyth").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["m.pyth"]


def test_a_folder_with_something_in_it_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        save_huggingface(random_model(tiny_config()), tmp_path)


def test_labels_and_classes_are_as_many(tmp_path: Path) -> None:
    config = tiny_config()
    model = random_model(config)
    with pytest.raises(CheckpointError, match="2 labels for 5 classes"):
        save_safetensors(model, tmp_path / "m.safetensors", config, ["a", "b"])
    with pytest.raises(CheckpointError, match="2 labels for 5 classes"):
        save_huggingface(model, tmp_path / "folder", ["a", "b"])
    metadata = {"config": json.dumps(config.to_dict()), "labels": '["a", "b"]'}
    save_file(_state(model), tmp_path / "m.safetensors", metadata)
    with pytest.raises(CheckpointError, match="2 labels for 5 classes"):
        load_checkpoint(tmp_path / "m.safetensors")


# --- resizing ------------------------------------------------------------------------------------


def test_embeddings_are_resized_by_nearest_neighbour(tmp_path: Path) -> None:
    config = tiny_config()
    model = random_model(config)
    save_safetensors(model, tmp_path / "m.safetensors", config)
    resized = load_checkpoint(tmp_path / "m.safetensors", num_frames=6, image_size=48)
    assert (resized.config.num_frames, resized.config.grid) == (6, 6)
    time, positions = resized.state["time_embed"], resized.state["pos_embed"]
    assert torch.equal(time, model.time_embed[:, [0, 0, 1, 2, 2, 3]])
    assert torch.equal(positions[:, 0], model.pos_embed[:, 0])
    near = [0, 0, 1, 2, 2, 3]
    grid = model.pos_embed[0, 1:].reshape(4, 4, -1)[near][:, near]
    assert torch.equal(positions[0, 1:].reshape(6, 6, -1), grid)
    resized.build()(random_frames(resized.config))


def test_a_size_that_fits_no_model_is_refused(tmp_path: Path) -> None:
    config = tiny_config()
    save_safetensors(random_model(config), tmp_path / "m.safetensors", config)
    with pytest.raises(CheckpointError, match="image_size 33 is not a multiple"):
        load_checkpoint(tmp_path / "m.safetensors", image_size=33)


# --- image ViTs ----------------------------------------------------------------------------------


def _timm_vit() -> dict[str, Tensor]:
    """A timm ViT has the tensors of our space-only model, and a head of its own."""
    return _state(random_model(tiny_config("space_only", num_classes=10)))


def _huggingface_vit(timm: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    names = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "blocks.": "encoder.layer.",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    state: dict[str, Tensor] = {"pooler.dense.weight": torch.zeros(24, 24)}
    for name, value in timm.items():
        stem, _, leaf = name.rpartition(".")
        if stem == "norm":
            state[f"layernorm.{leaf}"] = value
        elif stem.endswith("attn.qkv"):
            base = stem.replace("blocks.", "encoder.layer.").replace("attn.qkv", "attention")
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                state[f"{base}.attention.{part}.{leaf}"] = rows.clone()
        elif stem != "head":
            for ours, theirs in names.items():
                name = name.replace(ours, theirs)
            state[name] = value
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("scheme", ATTENTION_TYPES)
def test_a_vit_initialises_every_scheme(tmp_path: Path, scheme: str) -> None:
    vit = _timm_vit()
    torch.save({"model": vit}, tmp_path / "vit.pth")
    checkpoint = load_checkpoint(
        tmp_path / "vit.pth", config=HEADS, attention_type=scheme, num_frames=4, num_classes=3
    )
    assert (checkpoint.kind, checkpoint.config.attention_type) == ("vit", scheme)
    state = checkpoint.state
    for name, value in checkpoint.state.items():
        inner = name.partition(".before.")[2].partition(".")[2]
        block = name.partition(".before.")[0]
        if name.startswith("head."):
            assert len(value) == 3
        elif name == "time_embed" or inner.startswith("fc."):
            assert not value.any()
        elif inner:
            source = inner if inner.startswith("attn.") else f"norm1.{inner.split('.')[1]}"
            assert torch.equal(value, vit[f"{block}.{source}"])
        else:
            assert torch.equal(value, vit[name])
    checkpoint.build()(random_frames(checkpoint.config))
    again = load_checkpoint(
        tmp_path / "vit.pth", config=HEADS, attention_type=scheme, num_frames=4, num_classes=3
    )
    _assert_same(again.state, state)


def test_a_vit_leaves_the_random_numbers_of_the_process_alone(tmp_path: Path) -> None:
    torch.save(_timm_vit(), tmp_path / "vit.pth")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    load_checkpoint(tmp_path / "vit.pth", config=HEADS)
    assert torch.equal(torch.rand(1), expected)


def test_a_vit_is_resized_to_what_the_config_wants(tmp_path: Path) -> None:
    torch.save(_timm_vit(), tmp_path / "vit.pth")
    wanted = {**HEADS, "image_size": 64, "num_frames": 2}
    config = load_checkpoint(tmp_path / "vit.pth", config=wanted).config
    assert (config.image_size, config.num_frames) == (64, 2)


@pytest.mark.parametrize("prefix", ["vit.", ""])
def test_a_huggingface_vit_is_the_same_beginning(tmp_path: Path, prefix: str) -> None:
    timm = _timm_vit()
    torch.save(timm, tmp_path / "vit.pth")
    expected = load_checkpoint(tmp_path / "vit.pth", config=HEADS, num_frames=4)
    config = {"model_type": "vit", "num_attention_heads": 2, "layer_norm_eps": 1e-12}
    folder = _folder(tmp_path / "hf", config, _huggingface_vit(timm, prefix))
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    found = load_checkpoint(folder, num_frames=4)
    _assert_same(found.state, expected.state)
    assert (found.kind, found.labels) == ("vit", None)
    assert found.config.preprocessing.mean == (0.5, 0.5, 0.5)


def test_a_timm_folder_is_a_vit(tmp_path: Path) -> None:
    config = {"architecture": "vit_tiny", "pretrained_cfg": {"std": [0.5, 0.5, 0.5]}}
    folder = _folder(tmp_path / "timm", config, _timm_vit())
    found = load_checkpoint(folder, config=HEADS, attention_type="space_only")
    assert found.kind == "vit"
    assert found.config.preprocessing.std == (0.5, 0.5, 0.5)
    assert found.config.num_classes == 400


def test_space_only_keeps_a_head_that_has_its_classes(tmp_path: Path) -> None:
    vit = _timm_vit()
    torch.save(vit, tmp_path / "vit.pth")
    given = {**HEADS, "attention_type": "space_only", "num_frames": 4}
    kept = load_checkpoint(tmp_path / "vit.pth", config=given, num_classes=10)
    assert kept.kind == "timesformer"
    _assert_same(kept.state, vit)
    fresh = load_checkpoint(tmp_path / "vit.pth", config=given, num_classes=11)
    assert fresh.kind == "vit"


def test_a_vit_that_is_not_ours_to_hold_is_refused(tmp_path: Path) -> None:
    vit = _timm_vit()
    vit["dist_token"] = torch.zeros(1, 1, 24)
    del vit["blocks.1.norm2.bias"]
    torch.save(vit, tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match=r"1 missing: blocks.1.norm2.bias; .*: dist_token"):
        load_checkpoint(tmp_path / "vit.pth", config=HEADS)


def _folder(path: Path, config: Mapping[str, Any], state: dict[str, Tensor]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(state, path / "model.safetensors", {"format": "pt"})
    return path


# --- the official cfg ----------------------------------------------------------------------------

# As the original dumps it: block lists, nothing quoted, keys sorted.
CFG = """DATA:
  MEAN:
  - 0.5
  - 0.45
  - 0.4
  NUM_FRAMES: 4
  PATH_TO_DATA_DIR: ''
  SAMPLING_RATE: 32
  STD: [0.2, 0.2, 0.2]
  TRAIN_CROP_SIZE: 32
MODEL:
  ARCH: vit
  NUM_CLASSES: 5
TIMESFORMER:
  ATTENTION_TYPE: divided_space_time
TRAIN:
  DATASET: Ssv2
"""


def _official(path: Path, model: TimeSformer, cfg: str | None) -> Path:
    save_official(model, path)
    contents = torch.load(path, weights_only=True)
    torch.save({**contents, "cfg": cfg, "optimizer_state": {"state": {}}}, path)
    return path


def test_the_cfg_of_an_official_file_is_read(tmp_path: Path) -> None:
    path = _official(tmp_path / "m.pyth", random_model(tiny_config()), CFG)
    config = load_checkpoint(path, config=HEADS).config
    preprocessing = config.preprocessing
    assert (preprocessing.mean, preprocessing.std) == ((0.5, 0.45, 0.4), (0.2, 0.2, 0.2))
    assert (preprocessing.sampling, preprocessing.frame_stride) == ("uniform", 32)


def test_a_cfg_that_contradicts_its_tensors_is_refused(tmp_path: Path) -> None:
    cfg = CFG.replace("NUM_CLASSES: 5", "NUM_CLASSES: 6")
    path = _official(tmp_path / "m.pyth", random_model(tiny_config()), cfg)
    with pytest.raises(CheckpointError, match="num_classes is 5 in its tensors but 6 in its cfg"):
        load_checkpoint(path, config=HEADS)


@pytest.mark.parametrize("width", [24, 128])  # 128: the demo's, which nobody has published
def test_heads_are_not_guessed(tmp_path: Path, width: int) -> None:
    path = _official(tmp_path / "m.pyth", random_model(tiny_config(embed_dim=width)), None)
    with pytest.raises(CheckpointError, match="pass --config with num_heads"):
        load_checkpoint(path)


def test_heads_of_published_widths_are_known(tmp_path: Path) -> None:
    published = tiny_config(embed_dim=192, num_heads=3, depth=1)
    path = _official(tmp_path / "n.pyth", random_model(published), None)
    assert load_checkpoint(path).config.num_heads == 3


def test_frames_of_a_space_only_model_are_not_guessed(tmp_path: Path) -> None:
    path = _official(tmp_path / "m.pyth", random_model(tiny_config("space_only")), "MODEL:\n")
    with pytest.raises(CheckpointError, match="pass --config with num_frames"):
        load_checkpoint(path, config=HEADS)
    assert load_checkpoint(path, config=HEADS, num_frames=7).config.num_frames == 7


def test_official_names_without_the_prefix_are_known(tmp_path: Path) -> None:
    model = random_model(tiny_config())
    save_official(model, tmp_path / "m.pyth")
    named = torch.load(tmp_path / "m.pyth", weights_only=True)["model_state"]
    bare = {name.removeprefix("model."): value for name, value in named.items()}
    torch.save({"state_dict": bare}, tmp_path / "bare.pth")
    checkpoint = load_checkpoint(tmp_path / "bare.pth", config=HEADS)
    assert checkpoint.kind == "official"
    _assert_same(checkpoint.state, _state(model))


# --- what does not fit ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "stands"),
    [
        ("attention_type", "joint_space_time", "'divided_space_time'"),
        ("depth", 3, 2),
        ("embed_dim", 48, 24),
        ("patch_size", 16, 8),
        ("num_classes", 6, 5),
        ("num_frames", 8, 4),
        ("image_size", 64, 32),
        ("mlp_ratio", 3.0, 4.0),
        ("num_heads", 3, 2),
    ],
)
def test_a_config_that_contradicts_the_checkpoint_names_both_values(
    tmp_path: Path, field: str, value: Any, stands: Any
) -> None:
    save_official(random_model(tiny_config()), tmp_path / "m.pyth")
    with pytest.raises(CheckpointError, match=f"{field} is {stands} .* but {value!r} in --config"):
        load_checkpoint(tmp_path / "m.pyth", config={field: value})


def test_arguments_are_held_against_the_checkpoint_too(tmp_path: Path) -> None:
    save_official(random_model(tiny_config()), tmp_path / "m.pyth")
    with pytest.raises(CheckpointError, match="5 in its tensors but 6 in the arguments"):
        load_checkpoint(tmp_path / "m.pyth", num_classes=6)
    with pytest.raises(CheckpointError, match="but 'axial' in the arguments"):
        load_checkpoint(tmp_path / "m.pyth", attention_type="axial")


def test_what_does_not_fit_is_listed_by_the_names_of_the_file(tmp_path: Path) -> None:
    save_official(random_model(tiny_config()), tmp_path / "m.pyth")
    contents = torch.load(tmp_path / "m.pyth", weights_only=True)
    tensors = contents["model_state"]
    del tensors["model.blocks.1.temporal_fc.bias"]
    tensors["model.surprise"] = torch.zeros(1)
    tensors["model.norm.weight"] = torch.zeros(25)
    tensors["model.head.bias"] = torch.zeros(5, dtype=torch.int64)
    torch.save(contents, tmp_path / "m.pyth")
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path / "m.pyth")
    message = str(error.value)
    assert "1 missing: model.blocks.1.temporal_fc.bias;" in message
    assert "1 unexpected: model.surprise;" in message
    assert "model.norm.weight is (25,), not (24,)" in message
    assert "model.head.bias is torch.int64 (5,), not (5,)" in message


def test_long_lists_are_cut_and_counted(tmp_path: Path) -> None:
    state = _state(random_model(tiny_config(depth=3)))
    lost = [name for name in state if name.startswith("blocks.1.")]
    torch.save({name: state[name] for name in state.keys() - set(lost)}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=f"{len(lost)} missing: .* and {len(lost) - 10} more"):
        load_checkpoint(tmp_path / "m.pth", config=HEADS)


def test_a_block_number_beyond_all_measure_builds_no_such_model(tmp_path: Path) -> None:
    state = _state(random_model(tiny_config()))
    state["blocks.1000000000.norm1.weight"] = torch.zeros(24)
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"1 unexpected: blocks\.1000000000"):
        load_checkpoint(tmp_path / "m.pth", config=HEADS)


@pytest.mark.parametrize("name", ["pos_embed", "patch_embed.proj.weight", "head.weight"])
def test_a_lost_tensor_that_says_the_architecture_is_missed_all_the_same(
    tmp_path: Path, name: str
) -> None:
    config = tiny_config()
    state = _state(random_model(config))
    del state[name]
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=f"1 missing: {name}$"):
        load_checkpoint(tmp_path / "m.pth", config=config.to_dict())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    config = tiny_config()
    state = _state(random_model(config))
    state["blocks.0.norm1.weight"][3] = value
    save_safetensors(state, tmp_path / "m.safetensors", config)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.norm1\.weight: NaN or infinite"):
        load_checkpoint(tmp_path / "m.safetensors")


# --- files that are something else ---------------------------------------------------------------


class Malicious:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.witness,)


@pytest.mark.parametrize("name", ["m.pyth", "m.pth", "m.bin"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, name: str) -> None:
    contents = {"model_state": Malicious(tmp_path / "ran")}
    torch.save(contents, tmp_path / name)
    with pytest.raises(CheckpointError, match="would run code") as error:
        load_checkpoint(tmp_path / name)
    assert "weights_only" not in str(error.value)
    (tmp_path / name).write_bytes(pickle.dumps(contents))
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    pickle.loads((tmp_path / name).read_bytes())
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["m.pyth", "m.safetensors"])
@pytest.mark.parametrize("contents", [b"", b"no checkpoint", b"PK\x03\x04 cut off", b"\x80\x02."])
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, contents: bytes) -> None:
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(CheckpointError, match=r"not a (readable|checkpoint)"):
        load_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([1, 2], "holds a list"),
        ({}, "holds no tensors"),
        ({"epoch": 3}, "'epoch' is a int"),
        ({"x": torch.eye(2).to_sparse()}, "x is sparse"),
    ],
)
def test_a_file_of_something_else_is_refused(
    tmp_path: Path, contents: object, message: str
) -> None:
    torch.save(contents, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "m.pth")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load_checkpoint(tmp_path / "absent.pyth")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "timesformer"}')
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "model_type 'bert'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05"),
        ({"hidden_size": 48}, r"embed_dim is 24 in its tensors but 48 in its config\.json"),
        ({"num_attention_heads": 5}, "24 is not a multiple of num_heads 5"),
        ({"id2label": {"0": "a"}}, "1 labels for 5 classes"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label: .* none for 1"),
    ],
)
def test_a_folder_of_another_network_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    save_huggingface(random_model(tiny_config()), tmp_path / "folder")
    path = tmp_path / "folder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "folder")


@pytest.mark.parametrize(
    "metadata",
    [{"config": "{"}, {"config": "[]"}, {"config": "{}", "labels": "["}],
)
def test_a_broken_header_is_refused(tmp_path: Path, metadata: dict[str, str]) -> None:
    save_file(_state(random_model(tiny_config())), tmp_path / "m.safetensors", metadata)
    with pytest.raises(CheckpointError, match="metadata: not"):
        load_checkpoint(tmp_path / "m.safetensors", config=HEADS)


# --- the hub -------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as fetching a repository takes; serves the folders in `root`."""

    root: Path
    fetched: list[str]

    def do_GET(self) -> None:
        words = self.path.removeprefix("/api/models").split("/")
        folder, action = self.root.joinpath(*words[1:3]), words[3]
        if not folder.is_dir():
            self.send_error(404)
        elif action == "resolve":
            if self.command == "GET":
                self.fetched.append("/".join([*words[1:3], words[-1]]))
            self._answer((folder / words[-1]).read_bytes(), "application/octet-stream")
        elif action == "tree":
            self._answer(json.dumps(self._tree(folder)).encode(), "application/json")
        else:
            siblings = [{"rfilename": file["path"]} for file in self._tree(folder)]
            info = {"id": "/".join(words[1:3]), "sha": COMMIT, "siblings": siblings}
            self._answer(json.dumps(info).encode(), "application/json")

    @staticmethod
    def _tree(folder: Path) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": path.name}
            for path in sorted(folder.iterdir())
        ]

    do_HEAD = do_GET  # noqa: N815 - the name that http.server looks for

    def _answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[type[Hub], str]]:
    handler = type("Handler", (Hub,), {"root": tmp_path / "hub", "fetched": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


LOAD_FROM_HUB = """
import sys
from pathlib import Path
from model.checkpoints import CheckpointError, load_checkpoint, save_safetensors
for name in sys.argv[2:]:
    try:
        checkpoint = load_checkpoint(name)
    except CheckpointError as error:
        print(f"CheckpointError: {error}")
        continue
    assert checkpoint.source == name, checkpoint.source
    path = Path(sys.argv[1], name.replace("/", "-") + ".safetensors")
    save_safetensors(checkpoint.state, path, checkpoint.config, checkpoint.labels)
"""


def _load_from_hub(folder: Path, endpoint: str, *names: str) -> str:
    """Returns what a process of its own prints: the hub's library reads its environment when
    imported."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-c", LOAD_FROM_HUB, str(folder), *names]
    run = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_hub_names_bring_weights_config_labels_and_preprocessing_or_are_refused(
    tmp_path: Path, hub: tuple[type[Hub], str]
) -> None:
    """Weights as safetensors, as a pickle, and of a name that the hub does not know."""
    handler, endpoint = hub
    config = tiny_config(mean=[0.1, 0.2, 0.3])
    model = random_model(config)
    files = {"tiny": "model.safetensors", "pickled": "pytorch_model.bin"}
    for name in files:
        folder = handler.root / "someone" / name
        save_huggingface(model, folder, LABELS)
        (folder / "modeling.py").write_text("raise SystemExit('code was run')")
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (handler.root / "someone" / "pickled" / "model.safetensors").unlink()

    printed = _load_from_hub(tmp_path, endpoint, *(f"someone/{name}" for name in (*files, "else")))

    assert printed.startswith("CheckpointError: someone/else: no such file or folder here, and the")
    wanted = set()
    for name, weights in files.items():
        checkpoint = load_checkpoint(tmp_path / f"someone-{name}.safetensors")
        assert (checkpoint.config, checkpoint.labels) == (config, LABELS)
        _assert_same(checkpoint.state, _state(model))
        for file in ("config.json", "preprocessor_config.json", weights):
            wanted.add(f"someone/{name}/{file}")
    assert set(handler.fetched) == wanted
